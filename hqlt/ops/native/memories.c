/* Both memories of an HQLT layer on a CPU, token by token, for float or, with -DDOUBLE, double.

   A lane is one head of one document; its tokens are rows, H K numbers apart, of a [tokens, H, K] tensor. Rows are held in
   vectors, padded with zeros, a fast weight in the first-level cache or, if small, in registers. Each function does the lanes
   first ... last - 1 of its work, and returns 0 or NO_MEMORY. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#define SEGMENT 16 /* tokens between stored fast weights; the backward pass repeats the writes in between */
#define NO_MEMORY 1

/* Constant sizes keep small fast weights in registers. In double they would not fit. */
#ifdef DOUBLE
#define BY_SIZE(call) { int NK = (int)VECS(K), NV = (int)VECS(V); (void)NK; call; }
#else
#define BY_SIZE(call) { int NK = (int)VECS(K), NV = (int)VECS(V); \
    if (NK == 1 && NV == 1) { enum { NK = 1, NV = 1 }; call; } \
    else if (NK == 2 && NV == 2) { enum { NK = 2, NV = 2 }; call; } \
    else { call; } }
#endif
/* A lane is head n % H of document n / H, whose tokens are rows starts[n / H] ... of [tokens, H, K]. */
#define LANE long h = n % H, start = starts[n / H], T = starts[n / H + 1] - start, \
    key = (start * H + h) * K, val = (start * H + h) * V, one = start * H + h;
#define AT(x, place) (x ? x + (place) : 0)

#include "delta.h"
#include "window.h"
#include "rows.h"
