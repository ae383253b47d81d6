/* The delta rule, plain and gated, with its feature map. */
/* scale silu(x) / |silu(x)|, row by row */
INLINE void unit_silu(int N, long rows, real scale, vec *x) {
    for (long t = 0; t < rows; t++, x += N) {
        vec square = (vec){};
        for (int b = 0; b < N; b++) { x[b] = x[b] / (1 + exponential(-x[b])); square += x[b] * x[b]; }
        real factor = scale / (real)sqrt(total(square) + (real)1e-6);
        for (int b = 0; b < N; b++) x[b] *= factor;
    }
}
/* The gradient of x from that of its feature, in place of the latter. */
INLINE void unit_silu_backward(int N, long rows, real scale, const vec *x, vec *grad) {
    vec s[N], slope[N];
    for (long t = 0; t < rows; t++, x += N, grad += N) {
        vec square = (vec){}, product = (vec){};
        for (int b = 0; b < N; b++) {
            vec gate = 1 / (1 + exponential(-x[b]));
            s[b] = x[b] * gate;
            slope[b] = gate * (1 + x[b] * (1 - gate));
            square += s[b] * s[b];
            product += s[b] * grad[b];
        }
        real inverse = 1 / (real)sqrt(total(square) + (real)1e-6), along = total(product) * inverse * inverse;
        for (int b = 0; b < N; b++) grad[b] = (scale * inverse) * (grad[b] - s[b] * along) * slope[b];
    }
}
INLINE void mapped(int N, long rows, real scale, int features, vec *x) {
    if (features) unit_silu(N, rows, scale, x);
    else for (long i = 0; i < rows * N; i++) x[i] *= scale;
}

/* The delta rule. q, k [T][H K], v, o, e [T][H V], beta, decay [T][H]; state [K][V], the first and then the last. decay is
   the logarithm of what the state is multiplied by before a write, or NULL. e = v - M^T k, and states [T / SEGMENT][K V]
   before each segment, are for the backward pass or NULL. */
INLINE void delta_lane(int NK, int NV, long T, long H, long K, long V, const real *q, const real *k, const real *v,
        const real *beta, const real *decay, real scale, int features, real *state, real *o, real *e, real *states) {
    int rows = NK * W;
    vec M[rows * NV], ks[SEGMENT * NK], qs[SEGMENT * NK], vs[SEGMENT * NV], u[NV];
    for (int i = 0; i < rows * NV; i++) M[i] = (vec){};
    gather(NV, K, V, V, state, M);
    for (long start = 0; start < T; start += SEGMENT) {
        long n = T - start < SEGMENT ? T - start : SEGMENT;
        if (states) scatter(NV, K, V, V, M, states + start / SEGMENT * H * K * V);
        gather(NK, n, K, H * K, k + start * H * K, ks);
        gather(NK, n, K, H * K, q + start * H * K, qs);
        gather(NV, n, V, H * V, v + start * H * V, vs);
        mapped(NK, n, 1, features, ks);
        mapped(NK, n, scale, features, qs);
        for (long t = 0; t < n; t++) {
            if (decay) { real kept = power(decay[(start + t) * H]); for (int i = 0; i < rows * NV; i++) M[i] *= kept; }
            combine(rows, NV, ks + t * NK, M, u);
            real strength = beta[(start + t) * H];
            for (int b = 0; b < NV; b++) vs[t * NV + b] -= u[b];
            for (int b = 0; b < NV; b++) u[b] = strength * vs[t * NV + b];
            add_outer(rows, NV, ks + t * NK, u, M);
            if (e) scatter(NV, 1, V, H * V, vs + t * NV, e + (start + t) * H * V);
            combine(rows, NV, qs + t * NK, M, vs + t * NV);
        }
        scatter(NV, n, V, H * V, vs, o + start * H * V);
    }
    scatter(NV, K, V, V, M, state);
}

/* Gradients of a lane; grad_state [K][V] is that of the last state and becomes that of the first. Matrices are held in rows
   of the value and, transposed, of the key, so that no sum runs across a vector. scratch: SEGMENT + 1
   matrices, the state before each token, decayed, and the last one's after it. */
INLINE void delta_lane_backward(int NK, int NV, long T, long H, long K, long V, const real *q, const real *k,
        const real *beta, const real *decay, real scale, int features, const real *e, const real *states, const real *grad,
        real *grad_state, real *grad_q, real *grad_k, real *grad_v, real *grad_beta, real *grad_decay, vec *scratch) {
    int rows = NK * W, columns = NV * W;
    vec D[rows * NV], Dt[columns * NK], ks[SEGMENT * NK], qs[SEGMENT * NK], raw[SEGMENT * NK], dq[SEGMENT * NK],
        dk[SEGMENT * NK], es[SEGMENT * NV], gs[SEGMENT * NV], dv[SEGMENT * NV], u[NV], part[NK];
    for (int i = 0; i < rows * NV; i++) D[i] = (vec){};
    for (int i = 0; i < columns * NK; i++) Dt[i] = (vec){};
    gather(NV, K, V, V, grad_state, D);
    for (long i = 0; i < K; i++) for (long j = 0; j < V; j++) ((real *)Dt)[j * rows + i] = grad_state[i * V + j];
    for (long start = (T - 1) / SEGMENT * SEGMENT; start >= 0; start -= SEGMENT) {
        long n = T - start < SEGMENT ? T - start : SEGMENT;
        gather(NK, n, K, H * K, k + start * H * K, ks);
        gather(NK, n, K, H * K, q + start * H * K, qs);
        gather(NV, n, V, H * V, e + start * H * V, es);
        gather(NV, n, V, H * V, grad + start * H * V, gs);
        mapped(NK, n, 1, features, ks);
        mapped(NK, n, scale, features, qs);
        const real *first = states + start / SEGMENT * H * K * V;
        for (int i = 0; i < columns * NK; i++) scratch[i] = (vec){};
        for (long i = 0; i < K; i++) for (long j = 0; j < V; j++) ((real *)scratch)[j * rows + i] = first[i * V + j];
        for (long t = 0; t < n; t++) {
            vec *before = scratch + t * columns * NK, *after = before + columns * NK;
            real strength = beta[(start + t) * H];
            const real *numbers = (const real *)(es + t * NV);
            if (decay) { real kept = power(decay[(start + t) * H]); for (int i = 0; i < columns * NK; i++) before[i] *= kept; }
            for (int j = 0; j < columns; j++) for (int b = 0; b < NK; b++)
                after[j * NK + b] = before[j * NK + b] + strength * numbers[j] * ks[t * NK + b];
        }
        for (long t = n - 1; t >= 0; t--) {
            const vec *before = scratch + t * columns * NK;
            const vec *kt = ks + t * NK, *qt = qs + t * NK, *gt = gs + t * NV, *et = es + t * NV;
            real strength = beta[(start + t) * H];
            vec along = (vec){}, product = (vec){};
            for (int b = 0; b < NV; b++) product += gt[b] * et[b];
            real written = strength * total(product);
            combine(columns, NK, gt, before, dq + t * NK);
            for (int b = 0; b < NK; b++) dq[t * NK + b] += written * kt[b];
            add_outer(rows, NV, qt, gt, D);
            add_outer(columns, NK, gt, qt, Dt);
            combine(rows, NV, kt, D, u);
            for (int b = 0; b < NV; b++) { along += u[b] * et[b]; dv[t * NV + b] = strength * u[b]; }
            grad_beta[(start + t) * H] = total(along);
            for (int b = 0; b < NV; b++) u[b] = strength * et[b];
            combine(columns, NK, u, Dt, dk + t * NK);
            for (int b = 0; b < NV; b++) u[b] = -dv[t * NV + b];
            combine(columns, NK, u, before, part);
            for (int b = 0; b < NK; b++) dk[t * NK + b] += part[b];
            add_outer(rows, NV, kt, u, D);
            add_outer(columns, NK, u, kt, Dt);
            if (!decay) continue;
            real kept = power(decay[(start + t) * H]);
            vec sum = (vec){};
            for (int i = 0; i < columns * NK; i++) { sum += Dt[i] * before[i]; Dt[i] *= kept; }
            for (int i = 0; i < rows * NV; i++) D[i] *= kept;
            grad_decay[(start + t) * H] = total(sum);
        }
        if (features) {
            gather(NK, n, K, H * K, k + start * H * K, raw);
            unit_silu_backward(NK, n, 1, raw, dk);
            gather(NK, n, K, H * K, q + start * H * K, raw);
            unit_silu_backward(NK, n, scale, raw, dq);
        } else for (long i = 0; i < n * NK; i++) dq[i] *= scale;
        scatter(NK, n, K, H * K, dk, grad_k + start * H * K);
        scatter(NK, n, K, H * K, dq, grad_q + start * H * K);
        scatter(NV, n, V, H * V, dv, grad_v + start * H * V);
    }
    scatter(NV, K, V, V, D, grad_state);
}

/* Lanes first ... last - 1; state [documents, H, K, V] is the first and becomes the last. states has a place for each whole
   segment of all tokens and one more for each document. */
#define STATES_AT (((start / SEGMENT + n / H) * H + h) * K * V)
int delta(long first, long last, const int64_t *starts, long H, long K, long V, const real *q, const real *k,
        const real *v, const real *beta, const real *decay, real scale, int features, real *state, real *o, real *e,
        real *states) {
    BY_SIZE(for (long n = first; n < last; n++) { LANE
        delta_lane(NK, NV, T, H, K, V, q + key, k + key, v + val, beta + one, AT(decay, one), scale, features,
            state + n * K * V, o + val, AT(e, val), AT(states, STATES_AT)); })
    return 0;
}
int delta_backward(long first, long last, const int64_t *starts, long H, long K, long V, const real *q, const real *k,
        const real *beta, const real *decay, real scale, int features, const real *e, const real *states, const real *grad,
        real *grad_state, real *grad_q, real *grad_k, real *grad_v, real *grad_beta, real *grad_decay) {
    vec *scratch = aligned_alloc(BYTES, BYTES * (SEGMENT + 1) * VECS(V) * W * VECS(K));
    if (!scratch) return NO_MEMORY;
    BY_SIZE(for (long n = first; n < last; n++) { LANE
        delta_lane_backward(NK, NV, T, H, K, V, q + key, k + key, beta + one, AT(decay, one), scale, features, e + val,
            states + STATES_AT, grad + val, grad_state + n * K * V, grad_q + key, grad_k + key, grad_v + val, grad_beta + one,
            AT(grad_decay, one), scratch); })
    free(scratch);
    return 0;
}
