/* LANES numbers at once, in the vector extensions that gcc and clang share. */

#ifndef LANES

#include <stdint.h>
#include <string.h>

#define LANES 16

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));

/* the vector at `from`; `n` of its lanes are there, the others become 0 */
static inline __attribute__((always_inline)) V load(const float *from, long n) {
    V v = {0};
    if (n == LANES) memcpy(&v, from, sizeof v);
    else memcpy(&v, from, 4 * n);
    return v;
}

static inline __attribute__((always_inline)) void store(float *to, V v, long n) {
    if (n == LANES) memcpy(to, &v, sizeof v);
    else memcpy(to, &v, 4 * n);
}

static inline __attribute__((always_inline)) V chosen(I where, V yes, V no) { return (V)((where & (I)yes) | (~where & (I)no)); }

/* exp within 2 units of the last place, of what float32 can hold; nan stays */
static inline __attribute__((always_inline)) V exponential(V x) {
    const V zero = {0}, low = zero - 87.0f, high = zero + 88.0f;
    x = chosen(x < low, low, x);
    x = chosen(x > high, high, x);
    /* the low bits of 1.5 * 2^23 + n hold the whole number n */
    V n = x * 1.44269504f + 12582912.0f;
    I whole = (I)n;
    n -= 12582912.0f;
    V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (V)((whole + 127) << 23);
}

static inline __attribute__((always_inline)) V sigmoid(V z) {
    return 1.0f / (1.0f + exponential(-z));
}

#endif
