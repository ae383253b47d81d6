/* Window attention of T queries to R keys; the last query is the token of the last key. Queries are taken in blocks, with the
   keys that they see, whose transposes [K][P] then stay in a cache: a query meets the keys of a whole vector at once. P is the
   number of keys rounded up and a vector more; what lies beyond a window is computed and dropped. */
#define BLOCK 128

INLINE long window_start(long place, long S, int anchored) {
    return anchored ? place / S * S : place >= S ? place - S + 1 : 0;
}
INLINE void transpose(long rows, long D, long stride, long P, const real *x, real *y) {
    for (long i = 0; i < D; i++) {
        for (long t = 0; t < rows; t++) y[i * P + t] = x[t * stride + i];
        for (long t = rows; t < P; t++) y[i * P + t] = 0;
    }
}
/* products of x with n columns that begin at a place, in vectors */
INLINE void products(long D, long P, long n, const real *x, const real *columns, vec *y) {
    for (long b = 0; b < VECS(n); b++) {
        vec even = (vec){}, odd = (vec){};
        long i = 0;
        for (; i + 1 < D; i += 2) {
            even += x[i] * load(columns + i * P + b * W);
            odd += x[i + 1] * load(columns + (i + 1) * P + b * W);
        }
        if (i < D) even += x[i] * load(columns + i * P + b * W);
        y[b] = even + odd;
    }
}
/* A block: T queries to its R keys, the first of which is on the grid of an anchored window. */
INLINE void window_block(int NV, long T, long R, long H, long K, long V, long S, int anchored, const real *q, const real *k,
        const real *v, real scale, real *o, real *lse, vec *scratch) {
    long P = VECS(R) * W + W;
    vec *weights = scratch, *vs = weights + VECS(R), y[NV];
    real *numbers = (real *)weights, *kt = (real *)(vs + R * NV);
    transpose(R, K, H * K, P, k, kt);
    gather(NV, R, V, H * V, v, vs);
    for (long t = 0; t < T; t++) {
        long place = R - T + t, a = window_start(place, S, anchored), n = place - a + 1;
        products(K, P, n, q + t * H * K, kt + a, weights);
        for (long b = 0; b < VECS(n); b++) weights[b] *= scale;
        for (long s = n; s < VECS(n) * W; s++) numbers[s] = -INFINITY;
        vec top = weights[0], sum = (vec){};
        for (long b = 1; b < VECS(n); b++) top = larger(top, weights[b]);
        real highest = top[0];
        for (int i = 1; i < W; i++) highest = top[i] > highest ? top[i] : highest;
        for (long b = 0; b < VECS(n); b++) weights[b] = exponential(weights[b] - highest);
        for (long s = n; s < VECS(n) * W; s++) numbers[s] = 0;
        for (long b = 0; b < VECS(n); b++) sum += weights[b];
        real whole = total(sum);
        for (int b = 0; b < NV; b++) y[b] = (vec){};
        for (long s = 0; s < n; s++) for (int b = 0; b < NV; b++) y[b] += numbers[s] * vs[(a + s) * NV + b];
        for (int b = 0; b < NV; b++) y[b] /= whole;
        scatter(NV, 1, V, H * V, y, o + t * H * V);
        if (lse) lse[t * H] = highest + (real)log(whole);
    }
}
/* Gradients of keys and values are added to. */
INLINE void window_block_backward(int NK, int NV, long T, long R, long H, long K, long V, long S, int anchored, const real *q,
        const real *k, const real *v, real scale, const real *o, const real *lse, const real *grad, real *grad_q, real *grad_k,
        real *grad_v, vec *scratch) {
    long P = VECS(R) * W + W;
    vec *weights = scratch, *slopes = weights + VECS(R), *ks = slopes + VECS(R), *dk = ks + R * NK, *dv = dk + R * NK,
        qt[NK], gt[NV], ot[NV], y[NK];
    real *weight = (real *)weights, *slope = (real *)slopes, *kt = (real *)(dv + R * NV), *vt = kt + K * P;
    transpose(R, K, H * K, P, k, kt);
    transpose(R, V, H * V, P, v, vt);
    gather(NK, R, K, H * K, k, ks);
    gather(NK, R, K, H * K, grad_k, dk);
    gather(NV, R, V, H * V, grad_v, dv);
    for (long t = 0; t < T; t++) {
        long place = R - T + t, a = window_start(place, S, anchored), n = place - a + 1;
        gather(NK, 1, K, H * K, q + t * H * K, qt);
        gather(NV, 1, V, H * V, grad + t * H * V, gt);
        gather(NV, 1, V, H * V, o + t * H * V, ot);
        vec product = (vec){};
        for (int b = 0; b < NV; b++) product += gt[b] * ot[b];
        real mean = total(product);
        products(K, P, n, (real *)qt, kt + a, weights);
        products(V, P, n, (real *)gt, vt + a, slopes);
        for (long b = 0; b < VECS(n); b++) {
            weights[b] = exponential(scale * weights[b] - lse[t * H]);
            slopes[b] = scale * weights[b] * (slopes[b] - mean);
        }
        for (int b = 0; b < NK; b++) y[b] = (vec){};
        for (long s = 0; s < n; s++) {
            for (int b = 0; b < NK; b++) y[b] += slope[s] * ks[(a + s) * NK + b];
            for (int b = 0; b < NK; b++) dk[(a + s) * NK + b] += slope[s] * qt[b];
            for (int b = 0; b < NV; b++) dv[(a + s) * NV + b] += weight[s] * gt[b];
        }
        scatter(NK, 1, K, H * K, y, grad_q + t * H * K);
    }
    scatter(NK, R, K, H * K, dk, grad_k);
    scatter(NV, R, V, H * V, dv, grad_v);
}

/* The keys of a lane, and its blocks: n tokens from t on see r keys from a on. */
#define KEYS long first_key = key_starts[n / H], R = key_starts[n / H + 1] - first_key, \
    from = (first_key * H + h) * K, held = (first_key * H + h) * V;
#define FOR_BLOCKS(call) for (long t = 0; t < T; t += BLOCK) { \
    long some = T - t < BLOCK ? T - t : BLOCK, place = R - T + t, a = window_start(place, S, anchored), r = place + some - a, \
        x = t * H, y = a * H; \
    call; }

/* The most keys that a block sees. */
static long most_keys(long documents, const int64_t *key_starts, long S) {
    long longest = 0;
    for (long n = 0; n < documents; n++) {
        long R = key_starts[n + 1] - key_starts[n];
        longest = R > longest ? R : longest;
    }
    return longest < S - 1 + BLOCK ? longest : S - 1 + BLOCK;
}
int window(long first, long last, long documents, const int64_t *starts, const int64_t *key_starts, long H, long K, long V,
        long S, int anchored, const real *q, const real *k, const real *v, real scale, real *o, real *lse) {
    long most = most_keys(documents, key_starts, S);
    vec *scratch = aligned_alloc(BYTES, BYTES * (VECS(most) + most * VECS(V) + K * (VECS(most) + 1)));
    if (!scratch) return NO_MEMORY;
    BY_SIZE(for (long n = first; n < last; n++) { LANE KEYS FOR_BLOCKS(
        window_block(NV, some, r, H, K, V, S, anchored, q + key + x * K, k + from + y * K, v + held + y * V, scale,
            o + val + x * V, AT(lse, one + x), scratch)) })
    free(scratch);
    return 0;
}
/* grad_k and grad_v begin at 0. */
int window_backward(long first, long last, long documents, const int64_t *starts, const int64_t *key_starts, long H, long K,
        long V, long S, int anchored, const real *q, const real *k, const real *v, real scale, const real *o, const real *lse,
        const real *grad, real *grad_q, real *grad_k, real *grad_v) {
    long most = most_keys(documents, key_starts, S);
    vec *scratch = aligned_alloc(BYTES, BYTES * (2 * VECS(most) + 2 * most * VECS(K) + most * VECS(V) + (K + V) * (VECS(most) + 1)));
    if (!scratch) return NO_MEMORY;
    BY_SIZE(for (long n = first; n < last; n++) { LANE KEYS FOR_BLOCKS(
        window_block_backward(NK, NV, some, r, H, K, V, S, anchored, q + key + x * K, k + from + y * K, v + held + y * V, scale,
            o + val + x * V, lse + one + x, grad + val + x * V, grad_q + key + x * K, grad_k + from + y * K,
            grad_v + held + y * V, scratch)) })
    free(scratch);
    return 0;
}
