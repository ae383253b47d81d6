#define FN(name) NAME(name, SUFFIX)
#define VEC FN(vec)
#define EXP FN(exponential)
#define W ((int)(BYTES / sizeof(REAL)))
#define VECS(n) (((n) + W - 1) / W)

INLINE REAL FN(total)(VEC x) {
    REAL sum = 0;
    for (int i = 0; i < W; i++) sum += x[i];
    return sum;
}
/* Rows of D numbers at a stride to rows of N vectors, padded with zeros, and back. */
INLINE void FN(gather)(int N, long rows, long D, long stride, const REAL *x, VEC *y) {
    for (long t = 0; t < rows; t++) {
        if (D % W) y[t * N + N - 1] = (VEC){};
        memcpy(y + t * N, x + t * stride, sizeof(REAL) * D);
    }
}
INLINE void FN(scatter)(int N, long rows, long D, long stride, const VEC *y, REAL *x) {
    for (long t = 0; t < rows; t++) memcpy(x + t * stride, y + t * N, sizeof(REAL) * D);
}
/* Rows of R numbers, times the vectors of a matrix of R rows: y = sum_i x_i M_i. */
INLINE void FN(combine)(int R, int N, const VEC *x, const VEC *M, VEC *y) {
    const REAL *numbers = (const REAL *)x;
    VEC even[N], odd[N];
    for (int b = 0; b < N; b++) even[b] = odd[b] = (VEC){};
    for (int i = 0; i < R; i += 2) for (int b = 0; b < N; b++) {
        even[b] += numbers[i] * M[i * N + b];
        odd[b] += numbers[i + 1] * M[(i + 1) * N + b];
    }
    for (int b = 0; b < N; b++) y[b] = even[b] + odd[b];
}
/* M_i += x_i u */
INLINE void FN(add_outer)(int R, int N, const VEC *x, const VEC *u, VEC *M) {
    const REAL *numbers = (const REAL *)x;
    for (int i = 0; i < R; i++) for (int b = 0; b < N; b++) M[i * N + b] += numbers[i] * u[b];
}
/* scale silu(x) / |silu(x)|, row by row */
INLINE void FN(unit_silu)(int N, long rows, REAL scale, VEC *x) {
    for (long t = 0; t < rows; t++, x += N) {
        VEC square = (VEC){};
        for (int b = 0; b < N; b++) { x[b] = x[b] / (1 + EXP(-x[b])); square += x[b] * x[b]; }
        REAL factor = scale / (REAL)sqrt(FN(total)(square) + (REAL)1e-6);
        for (int b = 0; b < N; b++) x[b] *= factor;
    }
}
/* The gradient of x from that of its feature, in place of the latter. */
INLINE void FN(unit_silu_backward)(int N, long rows, REAL scale, const VEC *x, VEC *grad) {
    VEC s[N], slope[N];
    for (long t = 0; t < rows; t++, x += N, grad += N) {
        VEC square = (VEC){}, product = (VEC){};
        for (int b = 0; b < N; b++) {
            VEC gate = 1 / (1 + EXP(-x[b]));
            s[b] = x[b] * gate;
            slope[b] = gate * (1 + x[b] * (1 - gate));
            square += s[b] * s[b];
            product += s[b] * grad[b];
        }
        REAL inverse = 1 / (REAL)sqrt(FN(total)(square) + (REAL)1e-6), along = FN(total)(product) * inverse * inverse;
        for (int b = 0; b < N; b++) grad[b] = (scale * inverse) * (grad[b] - s[b] * along) * slope[b];
    }
}
INLINE void FN(mapped)(int N, long rows, REAL scale, int features, VEC *x) {
    if (features) FN(unit_silu)(N, rows, scale, x);
    else for (long i = 0; i < rows * N; i++) x[i] *= scale;
}

/* The delta rule. q, k [T][H K], v, o, e [T][H V], beta, decay [T][H]; state [K][V], the first and then the last. decay is
   the logarithm of what the state is multiplied by before a write, or NULL. e = v - M^T k, and states [T / SEGMENT][K V]
   before each segment, are for the backward pass or NULL. */
INLINE void FN(delta_lane)(int NK, int NV, long T, long H, long K, long V, const REAL *q, const REAL *k, const REAL *v,
        const REAL *beta, const REAL *decay, REAL scale, int features, REAL *state, REAL *o, REAL *e, REAL *states) {
    int rows = NK * W;
    VEC M[rows * NV], ks[SEGMENT * NK], qs[SEGMENT * NK], vs[SEGMENT * NV], u[NV];
    for (int i = 0; i < rows * NV; i++) M[i] = (VEC){};
    FN(gather)(NV, K, V, V, state, M);
    for (long start = 0; start < T; start += SEGMENT) {
        long n = T - start < SEGMENT ? T - start : SEGMENT;
        if (states) FN(scatter)(NV, K, V, V, M, states + start / SEGMENT * H * K * V);
        FN(gather)(NK, n, K, H * K, k + start * H * K, ks);
        FN(gather)(NK, n, K, H * K, q + start * H * K, qs);
        FN(gather)(NV, n, V, H * V, v + start * H * V, vs);
        FN(mapped)(NK, n, 1, features, ks);
        FN(mapped)(NK, n, scale, features, qs);
        for (long t = 0; t < n; t++) {
            if (decay) { REAL kept = FN(power)(decay[(start + t) * H]); for (int i = 0; i < rows * NV; i++) M[i] *= kept; }
            FN(combine)(rows, NV, ks + t * NK, M, u);
            REAL strength = beta[(start + t) * H];
            for (int b = 0; b < NV; b++) vs[t * NV + b] -= u[b];
            for (int b = 0; b < NV; b++) u[b] = strength * vs[t * NV + b];
            FN(add_outer)(rows, NV, ks + t * NK, u, M);
            if (e) FN(scatter)(NV, 1, V, H * V, vs + t * NV, e + (start + t) * H * V);
            FN(combine)(rows, NV, qs + t * NK, M, vs + t * NV);
        }
        FN(scatter)(NV, n, V, H * V, vs, o + start * H * V);
    }
    FN(scatter)(NV, K, V, V, M, state);
}

/* Gradients of a lane; grad_state [K][V] is that of the last state and becomes that of the first. Matrices are held in rows
   of the value and, transposed, of the key, so that no sum runs across a vector. scratch: SEGMENT + 1
   matrices, the state before each token, decayed, and the last one's after it. */
INLINE void FN(delta_lane_backward)(int NK, int NV, long T, long H, long K, long V, const REAL *q, const REAL *k,
        const REAL *beta, const REAL *decay, REAL scale, int features, const REAL *e, const REAL *states, const REAL *grad,
        REAL *grad_state, REAL *grad_q, REAL *grad_k, REAL *grad_v, REAL *grad_beta, REAL *grad_decay, VEC *scratch) {
    int rows = NK * W, columns = NV * W;
    VEC D[rows * NV], Dt[columns * NK], ks[SEGMENT * NK], qs[SEGMENT * NK], raw[SEGMENT * NK], dq[SEGMENT * NK],
        dk[SEGMENT * NK], es[SEGMENT * NV], gs[SEGMENT * NV], dv[SEGMENT * NV], u[NV], part[NK];
    for (int i = 0; i < rows * NV; i++) D[i] = (VEC){};
    for (int i = 0; i < columns * NK; i++) Dt[i] = (VEC){};
    FN(gather)(NV, K, V, V, grad_state, D);
    for (long i = 0; i < K; i++) for (long j = 0; j < V; j++) ((REAL *)Dt)[j * rows + i] = grad_state[i * V + j];
    for (long start = (T - 1) / SEGMENT * SEGMENT; start >= 0; start -= SEGMENT) {
        long n = T - start < SEGMENT ? T - start : SEGMENT;
        FN(gather)(NK, n, K, H * K, k + start * H * K, ks);
        FN(gather)(NK, n, K, H * K, q + start * H * K, qs);
        FN(gather)(NV, n, V, H * V, e + start * H * V, es);
        FN(gather)(NV, n, V, H * V, grad + start * H * V, gs);
        FN(mapped)(NK, n, 1, features, ks);
        FN(mapped)(NK, n, scale, features, qs);
        const REAL *first = states + start / SEGMENT * H * K * V;
        for (int i = 0; i < columns * NK; i++) scratch[i] = (VEC){};
        for (long i = 0; i < K; i++) for (long j = 0; j < V; j++) ((REAL *)scratch)[j * rows + i] = first[i * V + j];
        for (long t = 0; t < n; t++) {
            VEC *before = scratch + t * columns * NK, *after = before + columns * NK;
            REAL strength = beta[(start + t) * H];
            const REAL *numbers = (const REAL *)(es + t * NV);
            if (decay) { REAL kept = FN(power)(decay[(start + t) * H]); for (int i = 0; i < columns * NK; i++) before[i] *= kept; }
            for (int j = 0; j < columns; j++) for (int b = 0; b < NK; b++)
                after[j * NK + b] = before[j * NK + b] + strength * numbers[j] * ks[t * NK + b];
        }
        for (long t = n - 1; t >= 0; t--) {
            const VEC *before = scratch + t * columns * NK;
            const VEC *kt = ks + t * NK, *qt = qs + t * NK, *gt = gs + t * NV, *et = es + t * NV;
            REAL strength = beta[(start + t) * H];
            VEC along = (VEC){}, product = (VEC){};
            for (int b = 0; b < NV; b++) product += gt[b] * et[b];
            REAL written = strength * FN(total)(product);
            FN(combine)(columns, NK, gt, before, dq + t * NK);
            for (int b = 0; b < NK; b++) dq[t * NK + b] += written * kt[b];
            FN(add_outer)(rows, NV, qt, gt, D);
            FN(add_outer)(columns, NK, gt, qt, Dt);
            FN(combine)(rows, NV, kt, D, u);
            for (int b = 0; b < NV; b++) { along += u[b] * et[b]; dv[t * NV + b] = strength * u[b]; }
            grad_beta[(start + t) * H] = FN(total)(along);
            for (int b = 0; b < NV; b++) u[b] = strength * et[b];
            FN(combine)(columns, NK, u, Dt, dk + t * NK);
            for (int b = 0; b < NV; b++) u[b] = -dv[t * NV + b];
            FN(combine)(columns, NK, u, before, part);
            for (int b = 0; b < NK; b++) dk[t * NK + b] += part[b];
            FN(add_outer)(rows, NV, kt, u, D);
            FN(add_outer)(columns, NK, u, kt, Dt);
            if (!decay) continue;
            REAL kept = FN(power)(decay[(start + t) * H]);
            VEC sum = (VEC){};
            for (int i = 0; i < columns * NK; i++) { sum += Dt[i] * before[i]; Dt[i] *= kept; }
            for (int i = 0; i < rows * NV; i++) D[i] *= kept;
            grad_decay[(start + t) * H] = FN(total)(sum);
        }
        if (features) {
            FN(gather)(NK, n, K, H * K, k + start * H * K, raw);
            FN(unit_silu_backward)(NK, n, 1, raw, dk);
            FN(gather)(NK, n, K, H * K, q + start * H * K, raw);
            FN(unit_silu_backward)(NK, n, scale, raw, dq);
        } else for (long i = 0; i < n * NK; i++) dq[i] *= scale;
        FN(scatter)(NK, n, K, H * K, dk, grad_k + start * H * K);
        FN(scatter)(NK, n, K, H * K, dq, grad_q + start * H * K);
        FN(scatter)(NV, n, V, H * V, dv, grad_v + start * H * V);
    }
    FN(scatter)(NV, K, V, V, D, grad_state);
}

/* Window attention of T queries to R keys; the last query is the token of the last key. A lane's keys lie transposed in scratch,
   [K][P] with P = R rounded up and W more, so that a query meets W of them at once; so do the values in the backward pass. */
INLINE long FN(window_start)(long place, long S, int anchored) {
    return anchored ? place / S * S : place >= S ? place - S + 1 : 0;
}
INLINE void FN(transpose)(long rows, long D, long stride, long P, const REAL *x, REAL *y) {
    for (long i = 0; i < D; i++) {
        for (long t = 0; t < rows; t++) y[i * P + t] = x[t * stride + i];
        for (long t = rows; t < P; t++) y[i * P + t] = 0;
    }
}
INLINE VEC FN(load)(const REAL *x) {
    VEC y;
    memcpy(&y, x, BYTES);
    return y;
}
/* products of x with n columns that begin at a place, in vectors */
INLINE void FN(products)(long D, long P, long n, const REAL *x, const REAL *columns, VEC *y) {
    for (long b = 0; b < VECS(n); b++) {
        VEC even = (VEC){}, odd = (VEC){};
        long i = 0;
        for (; i + 1 < D; i += 2) {
            even += x[i] * FN(load)(columns + i * P + b * W);
            odd += x[i + 1] * FN(load)(columns + (i + 1) * P + b * W);
        }
        if (i < D) even += x[i] * FN(load)(columns + i * P + b * W);
        y[b] = even + odd;
    }
}
INLINE void FN(window_lane)(int NV, long T, long R, long H, long K, long V, long S, int anchored, const REAL *q, const REAL *k, const REAL *v,
        REAL scale, REAL *o, REAL *lse, REAL *scratch) {
    long P = VECS(R) * W + W;
    VEC *weights = (VEC *)scratch, *vs = weights + VECS(S < R ? S : R), y[NV];
    REAL *numbers = (REAL *)weights, *kt = (REAL *)(vs + R * NV);
    FN(transpose)(R, K, H * K, P, k, kt);
    FN(gather)(NV, R, V, H * V, v, vs);
    for (long t = 0; t < T; t++) {
        long place = R - T + t, a = FN(window_start)(place, S, anchored), n = place - a + 1;
        FN(products)(K, P, n, q + t * H * K, kt + a, weights);
        for (long s = n; s < VECS(n) * W; s++) numbers[s] = -INFINITY;
        VEC top = weights[0], sum = (VEC){};
        for (long b = 1; b < VECS(n); b++) top = LARGER_OF(SUFFIX, top, weights[b]);
        REAL highest = top[0];
        for (int i = 1; i < W; i++) highest = top[i] > highest ? top[i] : highest;
        for (long b = 0; b < VECS(n); b++) weights[b] = EXP(scale * (weights[b] - highest));
        for (long s = n; s < VECS(n) * W; s++) numbers[s] = 0;
        for (long b = 0; b < VECS(n); b++) sum += weights[b];
        REAL whole = FN(total)(sum);
        for (int b = 0; b < NV; b++) y[b] = (VEC){};
        for (long s = 0; s < n; s++) for (int b = 0; b < NV; b++) y[b] += numbers[s] * vs[(a + s) * NV + b];
        for (int b = 0; b < NV; b++) y[b] /= whole;
        FN(scatter)(NV, 1, V, H * V, y, o + t * H * V);
        if (lse) lse[t * H] = scale * highest + (REAL)log(whole);
    }
}
INLINE void FN(window_lane_backward)(int NK, int NV, long T, long R, long H, long K, long V, long S, int anchored, const REAL *q, const REAL *k,
        const REAL *v, REAL scale, const REAL *o, const REAL *lse, const REAL *grad, REAL *grad_q, REAL *grad_k, REAL *grad_v,
        REAL *scratch) {
    long P = VECS(R) * W + W, most = VECS(S < R ? S : R);
    VEC *weights = (VEC *)scratch, *slopes = weights + most, *ks = slopes + most, *dk = ks + R * NK, *dv = dk + R * NK,
        qt[NK], gt[NV], ot[NV], y[NK];
    REAL *weight = (REAL *)weights, *slope = (REAL *)slopes, *kt = (REAL *)(dv + R * NV), *vt = kt + K * P;
    FN(transpose)(R, K, H * K, P, k, kt);
    FN(transpose)(R, V, H * V, P, v, vt);
    FN(gather)(NK, R, K, H * K, k, ks);
    for (long i = 0; i < R * NK; i++) dk[i] = (VEC){};
    for (long i = 0; i < R * NV; i++) dv[i] = (VEC){};
    for (long t = 0; t < T; t++) {
        long place = R - T + t, a = FN(window_start)(place, S, anchored), n = place - a + 1;
        FN(gather)(NK, 1, K, H * K, q + t * H * K, qt);
        FN(gather)(NV, 1, V, H * V, grad + t * H * V, gt);
        FN(gather)(NV, 1, V, H * V, o + t * H * V, ot);
        VEC product = (VEC){};
        for (int b = 0; b < NV; b++) product += gt[b] * ot[b];
        REAL mean = FN(total)(product);
        FN(products)(K, P, n, (REAL *)qt, kt + a, weights);
        FN(products)(V, P, n, (REAL *)gt, vt + a, slopes);
        for (long b = 0; b < VECS(n); b++) {
            weights[b] = EXP(scale * weights[b] - lse[t * H]);
            slopes[b] = scale * weights[b] * (slopes[b] - mean);
        }
        for (int b = 0; b < NK; b++) y[b] = (VEC){};
        for (long s = 0; s < n; s++) {
            for (int b = 0; b < NK; b++) y[b] += slope[s] * ks[(a + s) * NK + b];
            for (int b = 0; b < NK; b++) dk[(a + s) * NK + b] += slope[s] * qt[b];
            for (int b = 0; b < NV; b++) dv[(a + s) * NV + b] += weight[s] * gt[b];
        }
        FN(scatter)(NK, 1, K, H * K, y, grad_q + t * H * K);
    }
    FN(scatter)(NK, R, K, H * K, dk, grad_k);
    FN(scatter)(NV, R, V, H * V, dv, grad_v);
}

/* RMSNorm of a, or of the blend of a and b by the gate's logit; rows [V], V a multiple of W. */
INLINE VEC FN(blended)(const REAL *a, const REAL *b, const REAL *logit, long j, VEC *gate) {
    VEC first = FN(load)(a + j);
    if (!b) return first;
    VEC second = FN(load)(b + j);
    *gate = 1 / (1 + EXP(-FN(load)(logit + j)));
    return second + *gate * (first - second);
}
INLINE void FN(norm_rows)(int NV, long first, long last, const REAL *a, const REAL *b, const REAL *logit, const REAL *weight, REAL eps, REAL *y) {
    VEC m[NV], gate;
    for (long n = first; n < last; n++) {
        long at = n * NV * W;
        VEC square = (VEC){};
        for (int i = 0; i < NV; i++) { m[i] = FN(blended)(a, b, logit, at + i * W, &gate); square += m[i] * m[i]; }
        REAL factor = 1 / (REAL)sqrt(FN(total)(square) / (NV * W) + eps);
        for (int i = 0; i < NV; i++) { VEC z = m[i] * factor * FN(load)(weight + i * W); memcpy(y + at + i * W, &z, BYTES); }
    }
}
INLINE void FN(norm_rows_backward)(int NV, long first, long last, const REAL *a, const REAL *b, const REAL *logit, const REAL *weight, REAL eps,
        const REAL *grad, REAL *da, REAL *db, REAL *dlogit, REAL *dweight) {
    VEC m[NV], g[NV], sum[NV], gate[NV];
    for (int i = 0; i < NV; i++) sum[i] = (VEC){};
    for (long n = first; n < last; n++) {
        long at = n * NV * W;
        VEC square = (VEC){}, product = (VEC){};
        for (int i = 0; i < NV; i++) {
            m[i] = FN(blended)(a, b, logit, at + i * W, gate + i);
            g[i] = FN(load)(grad + at + i * W);
            square += m[i] * m[i];
            product += g[i] * FN(load)(weight + i * W) * m[i];
        }
        REAL factor = 1 / (REAL)sqrt(FN(total)(square) / (NV * W) + eps);
        REAL along = FN(total)(product) * factor * factor / (NV * W);
        for (int i = 0; i < NV; i++) {
            VEC d = (g[i] * FN(load)(weight + i * W) - m[i] * along) * factor, x;
            sum[i] += g[i] * m[i] * factor;
            if (!b) { memcpy(da + at + i * W, &d, BYTES); continue; }
            x = d * gate[i];
            memcpy(da + at + i * W, &x, BYTES);
            x = d - x;
            memcpy(db + at + i * W, &x, BYTES);
            x = d * (FN(load)(a + at + i * W) - FN(load)(b + at + i * W)) * gate[i] * (1 - gate[i]);
            memcpy(dlogit + at + i * W, &x, BYTES);
        }
    }
    memcpy(dweight, sum, NV * BYTES);
}

/* Depthwise convolution of a document's T rows of D channels with C taps [C][D]: y_t = sum_j w_j x_{t - C + 1 + j}, where
   past [C - 1][D] comes before x. D is a multiple of W. */
INLINE const REAL *FN(row)(long t, long D, long C, const REAL *x, const REAL *past) {
    return t < 0 ? past + (C - 1 + t) * D : x + t * D;
}
static void FN(convolution_rows)(long T, long D, long C, const REAL *x, const REAL *past, const REAL *w, REAL *y) {
    for (long t = 0; t < T; t++) for (long i = 0; i < D; i += W) {
        VEC sum = (VEC){};
        for (long j = 0; j < C; j++) sum += FN(load)(w + j * D + i) * FN(load)(FN(row)(t - C + 1 + j, D, C, x, past) + i);
        memcpy(y + t * D + i, &sum, BYTES);
    }
}
/* grad_x and grad_past begin at 0, grad_w is added to. */
static void FN(convolution_rows_backward)(long T, long D, long C, const REAL *x, const REAL *past, const REAL *w,
        const REAL *grad, REAL *grad_x, REAL *grad_past, REAL *grad_w) {
    for (long t = 0; t < T; t++) for (long j = 0; j < C; j++) {
        const REAL *from = FN(row)(t - C + 1 + j, D, C, x, past), *weight = w + j * D, *g = grad + t * D;
        REAL *to = (REAL *)FN(row)(t - C + 1 + j, D, C, grad_x, grad_past), *sums = grad_w + j * D;
        for (long i = 0; i < D; i += W) {
            VEC one = FN(load)(g + i), x_part = FN(load)(to + i) + one * FN(load)(weight + i),
                w_part = FN(load)(sums + i) + one * FN(load)(from + i);
            memcpy(to + i, &x_part, BYTES);
            memcpy(sums + i, &w_part, BYTES);
        }
    }
}

/* Constant sizes keep small fast weights in registers. */
#define BY_SIZE(call) { int NK = (int)VECS(K), NV = (int)VECS(V); \
    if (SPECIALISED && NK == 1 && NV == 1) { enum { NK = 1, NV = 1 }; call; } \
    else if (SPECIALISED && NK == 2 && NV == 2) { enum { NK = 2, NV = 2 }; call; } \
    else { call; } }
/* A lane is head n % H of document n / H, whose tokens are rows starts[n / H] ... of [tokens, H, K]. */
#define LANE long h = n % H, start = starts[n / H], T = starts[n / H + 1] - start, \
    key = (start * H + h) * K, val = (start * H + h) * V, one = start * H + h;
#define STATES_AT (((start / SEGMENT + n / H) * H + h) * K * V)
#define KEYS long first_key = key_starts[n / H], R = key_starts[n / H + 1] - first_key, \
    from = (first_key * H + h) * K, held = (first_key * H + h) * V;
#define AT(x, place) (x ? x + (place) : 0)

/* Lanes first ... last - 1; state [documents, H, K, V] is the first and becomes the last. states has a place for each whole
   segment of all tokens and one more for each document. */
void FN(delta)(long first, long last, const int64_t *starts, long H, long K, long V, const REAL *q, const REAL *k,
        const REAL *v, const REAL *beta, const REAL *decay, REAL scale, int features, REAL *state, REAL *o, REAL *e,
        REAL *states) {
    BY_SIZE(for (long n = first; n < last; n++) { LANE
        FN(delta_lane)(NK, NV, T, H, K, V, q + key, k + key, v + val, beta + one, AT(decay, one), scale, features,
            state + n * K * V, o + val, AT(e, val), AT(states, STATES_AT)); })
}
void FN(delta_backward)(long first, long last, const int64_t *starts, long H, long K, long V, const REAL *q, const REAL *k,
        const REAL *beta, const REAL *decay, REAL scale, int features, const REAL *e, const REAL *states, const REAL *grad,
        REAL *grad_state, REAL *grad_q, REAL *grad_k, REAL *grad_v, REAL *grad_beta, REAL *grad_decay) {
    VEC *scratch = aligned_alloc(BYTES, BYTES * (SEGMENT + 1) * VECS(V) * W * VECS(K));
    BY_SIZE(for (long n = first; n < last; n++) { LANE
        FN(delta_lane_backward)(NK, NV, T, H, K, V, q + key, k + key, beta + one, AT(decay, one), scale, features, e + val,
            states + STATES_AT, grad + val, grad_state + n * K * V, grad_q + key, grad_k + key, grad_v + val, grad_beta + one,
            AT(grad_decay, one), scratch); })
    free(scratch);
}
void FN(window)(long first, long last, const int64_t *starts, const int64_t *key_starts, long H, long K, long V, long S,
        int anchored, const REAL *q, const REAL *k, const REAL *v, REAL scale, REAL *o, REAL *lse) {
    BY_SIZE(for (long n = first; n < last; n++) { LANE KEYS
        REAL *scratch = aligned_alloc(BYTES, BYTES * (VECS(R) + R * NV + K * (VECS(R) + 1)));
        FN(window_lane)(NV, T, R, H, K, V, S, anchored, q + key, k + from, v + held, scale, o + val, AT(lse, one), scratch);
        free(scratch); })
}
void FN(window_backward)(long first, long last, const int64_t *starts, const int64_t *key_starts, long H, long K, long V, long S,
        int anchored, const REAL *q, const REAL *k, const REAL *v, REAL scale, const REAL *o, const REAL *lse,
        const REAL *grad, REAL *grad_q, REAL *grad_k, REAL *grad_v) {
    BY_SIZE(for (long n = first; n < last; n++) { LANE KEYS
        REAL *scratch = aligned_alloc(BYTES, BYTES * (2 * VECS(R) + 2 * R * NK + R * NV + (K + V) * (VECS(R) + 1)));
        FN(window_lane_backward)(NK, NV, T, R, H, K, V, S, anchored, q + key, k + from, v + held, scale, o + val, lse + one,
            grad + val, grad_q + key, grad_k + from, grad_v + held, scratch);
        free(scratch); })
}
void FN(norm)(long first, long last, long V, const REAL *a, const REAL *b, const REAL *logit, const REAL *weight, REAL eps, REAL *y) {
    long K = V;
    BY_SIZE(FN(norm_rows)(NV, first, last, a, b, logit, weight, eps, y))
}
void FN(norm_backward)(long first, long last, long V, const REAL *a, const REAL *b, const REAL *logit, const REAL *weight, REAL eps,
        const REAL *grad, REAL *da, REAL *db, REAL *dlogit, REAL *dweight) {
    long K = V;
    BY_SIZE(FN(norm_rows_backward)(NV, first, last, a, b, logit, weight, eps, grad, da, db, dlogit, dweight))
}
/* Documents first ... last - 1, tensors [tokens, D] and past [documents, C - 1, D]. */
void FN(convolution)(long first, long last, const int64_t *starts, long D, long C, const REAL *x, const REAL *past,
        const REAL *w, REAL *y) {
    for (long n = first; n < last; n++)
        FN(convolution_rows)(starts[n + 1] - starts[n], D, C, x + starts[n] * D, past + n * (C - 1) * D, w, y + starts[n] * D);
}
void FN(convolution_backward)(long first, long last, const int64_t *starts, long D, long C, const REAL *x, const REAL *past,
        const REAL *w, const REAL *grad, REAL *grad_x, REAL *grad_past, REAL *grad_w) {
    for (long n = first; n < last; n++)
        FN(convolution_rows_backward)(starts[n + 1] - starts[n], D, C, x + starts[n] * D, past + n * (C - 1) * D, w,
            grad + starts[n] * D, grad_x + starts[n] * D, grad_past + n * (C - 1) * D, grad_w);
}
#undef FN
#undef VEC
#undef EXP
#undef W
#undef VECS
#undef BY_SIZE
#undef LANE
#undef KEYS
#undef AT
#undef STATES_AT
