// What CUDA C++ needs to be compiled as C++ and run on a CPU, one thread after the other.

#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#define __global__
#define __device__

using std::isinf;

struct Coordinate {
    unsigned x;
};

static Coordinate blockIdx, threadIdx, blockDim, gridDim;

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

struct Half;
struct BFloat16;

template <typename T>
std::string type_name() {
    if constexpr (std::is_pointer_v<T>) {
        typedef std::remove_pointer_t<T> Element;
        const char* access = std::is_const_v<Element> ? "const " : "";
        return access + type_name<std::remove_const_t<Element>>() + "*";
    }
    if (std::is_same_v<T, float>) return "float";
    if (std::is_same_v<T, double>) return "double";
    if (std::is_same_v<T, Half>) return "Half";
    if (std::is_same_v<T, BFloat16>) return "BFloat16";
    if (std::is_same_v<T, int>) return "int";
    if (std::is_same_v<T, long long>) return "long long";
    if (std::is_same_v<T, signed char>) return "signed char";
    if (std::is_same_v<T, unsigned char>) return "unsigned char";
    return "?";
}

// The types of a kernel's arguments, each followed by a comma.
template <typename... Arguments>
std::string signature(void (*)(Arguments...)) {
    return ((type_name<Arguments>() + ",") + ...);
}

template <typename... Arguments, std::size_t... places>
void call(void (*kernel)(Arguments...), void** values, std::index_sequence<places...>) {
    kernel(*static_cast<std::remove_const_t<Arguments>*>(values[places])...);
}

// Run the threads of the blocks first..last - 1 of a grid, backwards if wanted.
template <typename... Arguments>
void run(
    void (*kernel)(Arguments...), unsigned first, unsigned last, unsigned blocks, unsigned threads,
    bool backwards, void** values) {
    gridDim.x = blocks;
    blockDim.x = threads;
    const unsigned long long count = (unsigned long long)(last - first) * threads;
    for (unsigned long long step = 0; step < count; ++step) {
        const unsigned long long place = backwards ? count - 1 - step : step;
        blockIdx.x = first + (unsigned)(place / threads);
        threadIdx.x = (unsigned)(place % threads);
        call(kernel, values, std::index_sequence_for<Arguments...>());
    }
}
