/* act(gain (h - mean) root + bias), h = x + shift, and its gradient: see native.py.

   Arrays are (examples, positions, channels) float32; what is by channel is (examples, channels).
   One example stays in the cache of its core from one walk to the next. A walk goes down the
   positions with LANES channels at a time; sums of BLOCK positions are summed. */

#include "lanes.h"

#include <stdlib.h>

#define BLOCK 32

/* sums over positions, by channel -> means over positions and group, by channel */
static void spread(float *sum, long channels, long groups, long positions) {
    long width = channels / groups;
    for (long g = 0; g < groups; g++) {
        double total = 0;
        for (long i = 0; i < width; i++) total += sum[g * width + i];
        for (long i = 0; i < width; i++) sum[g * width + i] = total / ((double)positions * width);
    }
}

/* by channel: the sums of x, or of (x - mean)^2 */
static inline __attribute__((always_inline)) void
summed(const float *x, const float *mean, float *sum, long positions, long channels, long c, long n) {
    V total = {0}, center = {0};
    if (mean) center = load(mean + c, n);
    for (long start = 0; start < positions; start += BLOCK) {
        long end = start + BLOCK < positions ? start + BLOCK : positions;
        V part = {0};
        for (long p = start; p < end; p++) {
            V d = load(x + p * channels + c, n) - center;
            part += mean ? d * d : d;
        }
        total += part;
    }
    store(sum + c, total, n);
}

static inline __attribute__((always_inline)) void
activated(const float *x, const float *mean, const float *root, const float *gain,
          const float *bias, float *y, long positions, long channels, int silu, long c, long n) {
    V center = load(mean + c, n), level = load(bias + c, n);
    V slope = load(root + c, n) * load(gain + c, n);
    for (long p = 0; p < positions; p++) {
        V z = (load(x + p * channels + c, n) - center) * slope + level;
        store(y + p * channels + c, silu ? z * sigmoid(z) : z, n);
    }
}

/* dz into dx; by channel the sums of dz and dz (x - mean) */
static inline __attribute__((always_inline)) void
inner(const float *dy, const float *x, const float *mean, const float *root, const float *gain,
      const float *bias, float *dx, float *first, float *second, long positions, long channels,
      int silu, long c, long n) {
    V center = load(mean + c, n), level = load(bias + c, n), one = {0}, two = {0};
    V slope = load(root + c, n) * load(gain + c, n);
    for (long start = 0; start < positions; start += BLOCK) {
        long end = start + BLOCK < positions ? start + BLOCK : positions;
        V part = {0}, other = {0};
        for (long p = start; p < end; p++) {
            V d = load(x + p * channels + c, n) - center, dz = load(dy + p * channels + c, n);
            if (silu) {
                V z = d * slope + level, s = sigmoid(z);
                dz *= s * (1.0f + z * (1.0f - s));
            }
            store(dx + p * channels + c, dz, n);
            part += dz;
            other += dz * d;
        }
        one += part;
        two += other;
    }
    store(first + c, one, n);
    store(second + c, two, n);
}

static inline __attribute__((always_inline)) void
outer(const float *x, const float *mean, const float *root, const float *gain, const float *flat,
      const float *tilt, float *dx, float *dshift, long positions, long channels, long c, long n) {
    V center = load(mean + c, n), level = load(flat + c, n), total = {0};
    V r = load(root + c, n), slope = r * load(gain + c, n), tilted = load(tilt + c, n) * r * r;
    for (long start = 0; start < positions; start += BLOCK) {
        long end = start + BLOCK < positions ? start + BLOCK : positions;
        V part = {0};
        for (long p = start; p < end; p++) {
            V d = load(x + p * channels + c, n) - center;
            V out = load(dx + p * channels + c, n) * slope - level - d * tilted;
            store(dx + p * channels + c, out, n);
            part += out;
        }
        total += part;
    }
    store(dshift + c, total, n);
}

/* call(..., c, n) for all channels: LANES known to the compiler where they are all there */
#define WALK(call, ...)                                                              \
    do {                                                                             \
        long c = 0;                                                                  \
        for (; c + LANES <= channels; c += LANES) call(__VA_ARGS__, c, LANES);       \
        if (c < channels) call(__VA_ARGS__, c, channels - c);                        \
    } while (0)

void norm_forward(const float *xs, const float *shifts, const float *gain, const float *bias,
                  float *ys, float *means, float *roots, long examples, long positions,
                  long channels, long groups, double eps, int silu) {
#pragma omp parallel for
    for (long b = 0; b < examples; b++) {
        long at = b * channels;
        const float *x = xs + at * positions, *shift = shifts ? shifts + at : 0;
        float *y = ys + at * positions, *mean = means + at, *root = roots + at;
        WALK(summed, x, 0, mean, positions, channels);
        if (shift) for (long c = 0; c < channels; c++) mean[c] += shift[c] * positions;
        spread(mean, channels, groups, positions);
        /* what is taken from x: the mean of x + shift, less the shift */
        if (shift) for (long c = 0; c < channels; c++) mean[c] -= shift[c];
        WALK(summed, x, mean, root, positions, channels);
        spread(root, channels, groups, positions);
        for (long c = 0; c < channels; c++) root[c] = 1.0 / __builtin_sqrt(root[c] + eps);
        if (silu) WALK(activated, x, mean, root, gain, bias, y, positions, channels, 1);
        else WALK(activated, x, mean, root, gain, bias, y, positions, channels, 0);
    }
}

/* means, roots: as found; dshift, dgain, dbias: (examples, channels) */
void norm_backward(const float *dys, const float *xs, const float *gain, const float *bias,
                   const float *means, const float *roots, float *dxs, float *dshifts,
                   float *dgains, float *dbiases, long examples, long positions, long channels,
                   long groups, int silu) {
#pragma omp parallel for
    for (long b = 0; b < examples; b++) {
        long at = b * channels, all = at * positions;
        const float *dy = dys + all, *x = xs + all, *mean = means + at, *root = roots + at;
        float *dx = dxs + all, *dshift = dshifts + at, *dgain = dgains + at, *dbias = dbiases + at;
        float *tilt = malloc(4 * channels), *flat = dshift;
        if (silu) WALK(inner, dy, x, mean, root, gain, bias, dx, dbias, dgain, positions, channels, 1);
        else WALK(inner, dy, x, mean, root, gain, bias, dx, dbias, dgain, positions, channels, 0);
        for (long c = 0; c < channels; c++) {
            float slope = root[c] * gain[c];
            flat[c] = dbias[c] * slope;
            tilt[c] = dgain[c] * slope;
            dgain[c] *= root[c];
        }
        spread(flat, channels, groups, positions);
        spread(tilt, channels, groups, positions);
        WALK(outer, x, mean, root, gain, flat, tilt, dx, dshift, positions, channels);
        free(tilt);
    }
}
