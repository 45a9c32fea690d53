// Nearest codes: the last step of each search, one thread a result.

// For z (N, D), the nearest of the values (V, D) of its column and which it is; of values at one
// distance the first. An element that is not finite gets the first.
template <typename T>
__global__ void nearest_value(
    const T* z, const T* values, i64* found, T* codes, i64 columns, i64 count, i64 items) {
    for (i64 item = first_item(); item < items; item += item_step()) {
        i64 column = item;
        divide(column, columns);
        const auto x = widen(z[item]);
        auto least = magnitude(x - widen(values[column]));
        i64 best = 0;
        for (i64 value = 1; value < count; ++value) {
            const auto distance = magnitude(x - widen(values[value * columns + column]));
            if (distance < least) {
                least = distance;
                best = value;
            }
        }
        found[item] = best;
        narrow(widen(values[best * columns + column]) + (x - x), codes + item);
    }
}

// For products (C, N) of codes and rows: of each run of codes, the least bias - product of each row
// and its code, (ceil(C / run), N). Scores that are NaN are never least.
template <typename A>
__global__ void least_of_runs(
    const A* products, const A* bias, A* least, i64* found, i64 codes, i64 rows, i64 run,
    i64 offset, i64 items) {
    for (i64 item = first_item(); item < items; item += item_step()) {
        i64 row = item;
        const i64 first = divide(row, rows) * run;
        const i64 last = first + run < codes ? first + run : codes;
        A score = (A)__uint_as_float(0x7f800000u);
        i64 best = first;
        for (i64 code = first; code < last; ++code) {
            const A own = bias[code] - products[code * rows + row];
            if (own < score) {
                score = own;
                best = code;
            }
        }
        least[item] = score;
        found[item] = best + offset;
    }
}
