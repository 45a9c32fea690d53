// What stands before every kernel: types, conversions, and the loop over items.
// It needs no header of CUDA. T is float, double, Half or BFloat16; sums of it are of the type A, which
// is float or double.

typedef long long i64;

struct Half {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

template <typename T>
struct Accumulator {
    typedef float type;
};

template <>
struct Accumulator<double> {
    typedef double type;
};

__device__ inline float widen(float x) { return x; }

__device__ inline double widen(double x) { return x; }

__device__ inline float widen(BFloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

// The exponent is moved by a product, which also makes numbers below 2^-14 right.
__device__ inline float widen(Half x) {
    const unsigned rest = (x.bits & 0x7fffu) << 13;
    const unsigned sign = (x.bits & 0x8000u) << 16;
    const float moved = __uint_as_float(rest) * __uint_as_float(0x77800000u);
    const unsigned special = rest >= 0x0f800000u ? 0x7f800000u | rest : __float_as_uint(moved);
    return __uint_as_float(special | sign);
}

__device__ inline void narrow(float x, float* y) { *y = x; }

__device__ inline void narrow(double x, double* y) { *y = x; }

// To nearest, ties to even, as torch rounds.
__device__ inline void narrow(float x, BFloat16* y) {
    const unsigned bits = __float_as_uint(x);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    y->bits = nan ? 0x7fc0 : (unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Numbers below 2^-14 are rounded by a sum with 0.5, whose last bit is worth 2^-24.
__device__ inline void narrow(float x, Half* y) {
    const unsigned sign = __float_as_uint(x) >> 16 & 0x8000u;
    const unsigned size = __float_as_uint(x) & 0x7fffffffu;
    unsigned half;
    if (size > 0x7f800000u) {
        half = 0x7e00u;
    } else if (size >= 0x477ff000u) {
        half = 0x7c00u;
    } else if (size < 0x38800000u) {
        half = __float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u;
    } else {
        half = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
    }
    y->bits = (unsigned short)(half | sign);
}

__device__ inline float exponential(float x) { return expf(x); }

__device__ inline double exponential(double x) { return exp(x); }

__device__ inline float magnitude(float x) { return fabsf(x); }

__device__ inline double magnitude(double x) { return fabs(x); }

__device__ inline i64 first_item() { return (i64)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ inline i64 item_step() { return (i64)gridDim.x * blockDim.x; }

// Return a / b of numbers that are not negative and put the rest into a; 32 bits are much faster.
__device__ inline i64 divide(i64& a, i64 b) {
    const i64 whole = a;
    if ((whole | b) >> 32) {
        a = whole % b;
        return whole / b;
    }
    a = (unsigned)whole % (unsigned)b;
    return (unsigned)whole / (unsigned)b;
}
