/* What goes row by row: the norm, of a blend or of one read, and the short convolution. Rows are whole vectors. */

/* RMSNorm of a, or of the blend of a and b by the gate's logit; rows [V]. */
INLINE vec blended(const real *a, const real *b, const real *logit, long j, vec *gate) {
    vec first = load(a + j);
    if (!b) return first;
    vec second = load(b + j);
    *gate = 1 / (1 + exponential(-load(logit + j)));
    return second + *gate * (first - second);
}
int norm(long first, long last, long V, const real *a, const real *b, const real *logit, const real *weight, real eps, real *y) {
    int NV = (int)VECS(V);
    vec m[NV], gate;
    for (long n = first; n < last; n++) {
        long at = n * V;
        vec square = (vec){};
        for (int i = 0; i < NV; i++) { m[i] = blended(a, b, logit, at + i * W, &gate); square += m[i] * m[i]; }
        real factor = 1 / (real)sqrt(total(square) / V + eps);
        for (int i = 0; i < NV; i++) store(m[i] * factor * load(weight + i * W), y + at + i * W);
    }
    return 0;
}
/* Parts first ... last - 1 of the rows; dweight [parts, V] holds a sum for each. */
int norm_backward(long first, long last, long parts, long rows, long V, const real *a, const real *b, const real *logit,
        const real *weight, real eps, const real *grad, real *da, real *db, real *dlogit, real *dweight) {
    int NV = (int)VECS(V);
    vec m[NV], g[NV], sum[NV], gate[NV];
    for (long part = first; part < last; part++) {
        for (int i = 0; i < NV; i++) sum[i] = (vec){};
        for (long n = rows * part / parts; n < rows * (part + 1) / parts; n++) {
            long at = n * V;
            vec square = (vec){}, product = (vec){};
            for (int i = 0; i < NV; i++) {
                m[i] = blended(a, b, logit, at + i * W, gate + i);
                g[i] = load(grad + at + i * W);
                square += m[i] * m[i];
                product += g[i] * load(weight + i * W) * m[i];
            }
            real factor = 1 / (real)sqrt(total(square) / V + eps), along = total(product) * factor * factor / V;
            for (int i = 0; i < NV; i++) {
                long j = at + i * W;
                vec d = (g[i] * load(weight + i * W) - m[i] * along) * factor;
                sum[i] += g[i] * m[i] * factor;
                if (!b) { store(d, da + j); continue; }
                store(d * gate[i], da + j);
                store(d - d * gate[i], db + j);
                store(d * (load(a + j) - load(b + j)) * gate[i] * (1 - gate[i]), dlogit + j);
            }
        }
        memcpy(dweight + part * V, sum, sizeof(real) * V);
    }
    return 0;
}

/* Depthwise convolution with C taps [C][D]: y_t = sum_j w_j x_{t - C + 1 + j} in each document, whose past [C - 1][D] comes
   before its rows of x. Channels in vectors first ... last - 1 of D. */
INLINE const real *row(long t, long D, long C, const real *x, const real *past) {
    return t < 0 ? past + (C - 1 + t) * D : x + t * D;
}
#define DOCUMENT long T = starts[n + 1] - starts[n], at = starts[n] * D, before = n * (C - 1) * D;
int convolution(long first, long last, long documents, const int64_t *starts, long D, long C, const real *x, const real *past,
        const real *w, real *y) {
    for (long n = 0; n < documents; n++) { DOCUMENT
        for (long t = 0; t < T; t++) for (long i = first * W; i < last * W; i += W) {
            vec sum = (vec){};
            for (long j = 0; j < C; j++) sum += load(w + j * D + i) * load(row(t - C + 1 + j, D, C, x + at, past + before) + i);
            store(sum, y + at + t * D + i);
        }
    }
    return 0;
}
/* All gradients begin at 0. */
int convolution_backward(long first, long last, long documents, const int64_t *starts, long D, long C, const real *x,
        const real *past, const real *w, const real *grad, real *grad_x, real *grad_past, real *grad_w) {
    for (long n = 0; n < documents; n++) { DOCUMENT
        for (long t = 0; t < T; t++) for (long j = 0; j < C; j++) {
            const real *from = row(t - C + 1 + j, D, C, x + at, past + before), *g = grad + at + t * D;
            real *to = (real *)row(t - C + 1 + j, D, C, grad_x + at, grad_past + before);
            for (long i = first * W; i < last * W; i += W) {
                vec one = load(g + i);
                store(load(to + i) + one * load(w + j * D + i), to + i);
                store(load(grad_w + j * D + i) + one * load(from + i), grad_w + j * D + i);
            }
        }
    }
    return 0;
}
