/* Both memories of an HQLT layer on a CPU, token by token.

   A lane is one head of one document; its tokens are rows, H K numbers apart, of a [tokens, H, K] tensor. Rows are held in
   vectors of 32 bytes, padded with zeros, a fast weight in the first-level cache or, if small, in registers. lanes.h is
   compiled for float and double. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define BYTES 32
#define SEGMENT 16 /* tokens between stored fast weights; the backward pass repeats the writes in between */
#define PASTE(a, b) a##_##b
#define NAME(a, b) PASTE(a, b)

typedef float vec_f32 __attribute__((vector_size(BYTES)));
typedef double vec_f64 __attribute__((vector_size(BYTES)));
typedef int32_t bits_f32 __attribute__((vector_size(BYTES)));
typedef int64_t bits_f64 __attribute__((vector_size(BYTES)));

/* The larger of two, a where one is no number. */
#define LARGER(suffix, a, b) ({ vec_##suffix x_ = (a), y_ = (b); bits_##suffix y_is = y_ > x_; \
    (vec_##suffix)((y_is & (bits_##suffix)y_) | (~y_is & (bits_##suffix)x_)); })
#define LARGER_OF(suffix, a, b) LARGER(suffix, a, b)

/* e^x to two units in the last place, without branches. */
INLINE vec_f32 exponential_f32(vec_f32 x) {
    vec_f32 low = (vec_f32){} - 87.0f, high = (vec_f32){} + 88.0f;
    x = LARGER(f32, x, low);
    x = -LARGER(f32, -x, -high);
    vec_f32 n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f; /* rounds to an integer */
    vec_f32 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec_f32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec_f32)((__builtin_convertvector(n, bits_f32) + 127) << 23);
}
INLINE vec_f64 exponential_f64(vec_f64 x) {
    for (int i = 0; i < BYTES / 8; i++) x[i] = exp(x[i]);
    return x;
}

INLINE float power_f32(float x) { return expf(x); }
INLINE double power_f64(double x) { return exp(x); }

#define REAL float
#define SPECIALISED 1
#define SUFFIX f32
#include "lanes.h"
#undef REAL
#undef SUFFIX
#undef SPECIALISED
#define REAL double
#define SPECIALISED 0
#define SUFFIX f64
#include "lanes.h"
