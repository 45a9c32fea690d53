// Products of a weighted graph with a table, and dot products along its edges.

// The sum over the edges of each row of weight (E,) times dense (M, d) at their columns, (N, d): one
// thread a feature of a row, edge by edge.
template <typename T, typename I, typename J>
__global__ void weighted_spmm(
    const I* crow, const J* col, const T* weight, const T* dense, T* out, i64 features, i64 items) {
    for (i64 item = first_item(); item < items; item += item_step()) {
        i64 feature = item;
        const i64 row = divide(feature, features);
        typename Accumulator<T>::type sum = 0;
        const i64 last = crow[row + 1];
        for (i64 edge = crow[row]; edge < last; ++edge) {
            sum += widen(weight[edge]) * widen(dense[(i64)col[edge] * features + feature]);
        }
        narrow(sum, out + item);
    }
}

// The dot product of a row of u (N, d) and one of v (M, d) for each edge (E,): one thread an edge.
template <typename T, typename I, typename J>
__global__ void edge_dot(
    const T* u, const T* v, const I* row, const J* col, T* out, i64 features, i64 items) {
    for (i64 item = first_item(); item < items; item += item_step()) {
        const T* x = u + (i64)row[item] * features;
        const T* y = v + (i64)col[item] * features;
        typename Accumulator<T>::type sum = 0;
        for (i64 feature = 0; feature < features; ++feature) {
            sum += widen(x[feature]) * widen(y[feature]);
        }
        narrow(sum, out + item);
    }
}
