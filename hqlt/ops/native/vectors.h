/* Rows of numbers in vectors of 32 bytes, which compilers map to what the processor has. */
#ifdef DOUBLE
typedef double real;
typedef int64_t bit;
#else
typedef float real;
typedef int32_t bit;
#endif
#define BYTES 32
typedef real vec __attribute__((vector_size(BYTES), may_alias));
typedef bit bits __attribute__((vector_size(BYTES)));
#define INLINE static inline __attribute__((always_inline))
#define W ((int)(BYTES / sizeof(real)))
#define VECS(n) (((n) + W - 1) / W)

/* The larger of two, a where one is no number. */
INLINE vec larger(vec a, vec b) {
    bits b_is = b > a;
    return (vec)((b_is & (bits)b) | (~b_is & (bits)a));
}
#ifdef DOUBLE
INLINE vec exponential(vec x) {
    for (int i = 0; i < W; i++) x[i] = exp(x[i]);
    return x;
}
INLINE real power(real x) { return exp(x); }
#else
/* e^x to two units in the last place, without branches; 0 below the normal numbers, infinite above 2^127.5. */
INLINE vec exponential(vec x) {
    vec low = (vec){} - 88.0f, high = (vec){} + 89.0f;
    x = larger(x, low);
    x = -larger(-x, -high);
    vec n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f; /* rounds to an integer, -127 to 128 */
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((__builtin_convertvector(n, bits) + 127) << 23);
}
INLINE real power(real x) { return expf(x); }
#endif
INLINE vec load(const real *x) {
    vec y;
    memcpy(&y, x, BYTES);
    return y;
}
INLINE void store(vec x, real *y) { memcpy(y, &x, BYTES); }
INLINE real total(vec x) {
    real sum = 0;
    for (int i = 0; i < W; i++) sum += x[i];
    return sum;
}
/* Rows of D numbers at a stride to rows of N vectors, padded with zeros, and back. */
INLINE void gather(int N, long rows, long D, long stride, const real *x, vec *y) {
    for (long t = 0; t < rows; t++) {
        if (D % W) y[t * N + N - 1] = (vec){};
        memcpy(y + t * N, x + t * stride, sizeof(real) * D);
    }
}
INLINE void scatter(int N, long rows, long D, long stride, const vec *y, real *x) {
    for (long t = 0; t < rows; t++) memcpy(x + t * stride, y + t * N, sizeof(real) * D);
}
/* Rows of R numbers, times the vectors of a matrix of R rows: y = sum_i x_i M_i. */
INLINE void combine(int R, int N, const vec *x, const vec *M, vec *y) {
    const real *numbers = (const real *)x;
    vec even[N], odd[N];
    for (int b = 0; b < N; b++) even[b] = odd[b] = (vec){};
    for (int i = 0; i < R; i += 2) for (int b = 0; b < N; b++) {
        even[b] += numbers[i] * M[i * N + b];
        odd[b] += numbers[i + 1] * M[(i + 1) * N + b];
    }
    for (int b = 0; b < N; b++) y[b] = even[b] + odd[b];
}
/* M_i += x_i u */
INLINE void add_outer(int R, int N, const vec *x, const vec *u, vec *M) {
    const real *numbers = (const real *)x;
    for (int i = 0; i < R; i++) for (int b = 0; b < N; b++) M[i * N + b] += numbers[i] * u[b];
}
