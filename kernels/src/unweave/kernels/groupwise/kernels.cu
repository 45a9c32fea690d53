// Weights from their codes, one thread an element.

// code * scale + zero for codes (R, width); scales, and zeros if not null, are (R, groups).
template <typename A>
__global__ void dequantize_8(
    const signed char* codes, const A* scales, const A* zeros, A* out, i64 width, i64 group_size,
    i64 groups, i64 items) {
    for (i64 item = first_item(); item < items; item += item_step()) {
        i64 column = item;
        i64 group = divide(column, width) * groups;
        group += divide(column, group_size);
        const A value = codes[item] * scales[group];
        out[item] = zeros ? value + zeros[group] : value;
    }
}

// The same for codes of four bits, plus 8, two a byte of (R, ceil(width / 2)), the low half first.
template <typename A>
__global__ void dequantize_4(
    const unsigned char* codes, const A* scales, const A* zeros, A* out, i64 width, i64 group_size,
    i64 groups, i64 items) {
    for (i64 item = first_item(); item < items; item += item_step()) {
        i64 column = item;
        const i64 row = divide(column, width);
        const unsigned char pair = codes[row * ((width + 1) / 2) + column / 2];
        const signed char code = (signed char)((column % 2 ? pair >> 4 : pair & 15) - 8);
        const i64 group = row * groups + divide(column, group_size);
        const A value = code * scales[group];
        out[item] = zeros ? value + zeros[group] : value;
    }
}
