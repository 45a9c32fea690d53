// Attention maps from the log-sum-exp, one thread a result.

// The sum over `heads` neighbouring heads of exp(scale q . k_s + added - lse) for the keys s of
// `columns` (batch, count), into maps (batch, outer, queries, count). Queries, keys, lse and what is
// added have any strides, in elements, but features lie side by side; `added` may be null. A query
// whose lse is -inf looks nowhere.
template <typename T>
__global__ void column_maps(
    const T* q, const T* k, const typename Accumulator<T>::type* lse,
    const typename Accumulator<T>::type* added, const i64* columns,
    typename Accumulator<T>::type* maps, double scale, i64 outer, i64 heads, i64 queries, i64 count,
    i64 features, i64 q_batch, i64 q_head, i64 q_token, i64 k_batch, i64 k_head, i64 k_token,
    i64 lse_batch, i64 lse_head, i64 lse_token, i64 added_batch, i64 added_head, i64 added_token,
    i64 added_column, i64 items) {
    typedef typename Accumulator<T>::type A;
    for (i64 item = first_item(); item < items; item += item_step()) {
        i64 column = item;
        i64 token = divide(column, count);
        i64 group = divide(token, queries);
        const i64 batch = divide(group, outer);
        const T* key = k + batch * k_batch + columns[batch * count + column] * k_token;
        const T* query = q + batch * q_batch + token * q_token;
        const A* normalizer = lse + batch * lse_batch + token * lse_token;
        const A* shift = added;
        if (added) {
            shift += batch * added_batch + token * added_token + column * added_column;
        }
        A sum = 0;
        for (i64 head = group * heads; head < (group + 1) * heads; ++head) {
            const T* x = query + head * q_head;
            const T* y = key + head * k_head;
            A product = 0;
            for (i64 feature = 0; feature < features; ++feature) {
                product += widen(x[feature]) * widen(y[feature]);
            }
            product *= (A)scale;
            if (added) {
                product += shift[head * added_head];
            }
            const A own = normalizer[head * lse_head];
            if (!(isinf(own) && own < 0)) {
                sum += exponential(product - own);
            }
        }
        maps[item] = sum;
    }
}
