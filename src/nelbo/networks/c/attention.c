/* softmax(q k^T / sqrt(width)) v, linear maps of positions, and their gradients: see native.py.

   `all` is (examples, positions, 3, heads, width): q, k, v of a position lie together. ROWS queries
   at a time see every key, and their scores stay in the cache; for the gradient they are computed
   again. */

#include "lanes.h"

#include <math.h>
#include <stdlib.h>

#define ROWS 64
#define HIGH 8
#define WIDE 2

static inline __attribute__((always_inline)) void
tile(const float *a, long down, long along, const float *b, long b_line, float *c, long c_line,
     long inner, int add, const int high, const int wide, long n) {
    V sum[HIGH][WIDE] = {0};
    for (long k = 0; k < inner; k++) {
        V row[WIDE];
        for (int j = 0; j < wide; j++) row[j] = load(b + k * b_line + j * LANES, n);
        for (int i = 0; i < high; i++)
            for (int j = 0; j < wide; j++) sum[i][j] += row[j] * a[i * down + k * along];
    }
    for (int i = 0; i < high; i++)
        for (int j = 0; j < wide; j++) {
            float *to = c + i * c_line + j * LANES;
            store(to, add ? load(to, n) + sum[i][j] : sum[i][j], n);
        }
}

#define DOWN(wide, n)                                                                           \
    do {                                                                                        \
        long i = 0;                                                                             \
        for (; i + HIGH <= rows; i += HIGH)                                                     \
            tile(a + i * down, down, along, b + j, b_line, c + i * c_line + j, c_line, inner,   \
                 add, HIGH, wide, n);                                                           \
        for (; i < rows; i++)                                                                   \
            tile(a + i * down, down, along, b + j, b_line, c + i * c_line + j, c_line, inner,   \
                 add, 1, wide, n);                                                              \
    } while (0)

/* c (rows, columns) = or += a b, with a[i, k] at i * down + k * along */
static void product(const float *a, long down, long along, const float *b, long b_line, float *c,
                    long c_line, long rows, long columns, long inner, int add) {
    long j = 0;
    for (; j + WIDE * LANES <= columns; j += WIDE * LANES) DOWN(WIDE, LANES);
    for (; j + LANES <= columns; j += LANES) DOWN(1, LANES);
    if (j < columns) DOWN(1, columns - j);
}

/* (positions, width) with lines of `line` -> scale times its transpose, (width, positions) */
static void turn(const float *from, long line, float *to, long positions, long width, float scale) {
    for (long start = 0; start < positions; start += LANES) {
        long end = start + LANES < positions ? start + LANES : positions;
        for (long i = 0; i < width; i++)
            for (long l = start; l < end; l++) to[i * positions + l] = scale * from[l * line + i];
    }
}

static void softmax(float *row, long count) {
    V sum = {0}, top = sum - INFINITY;
    float most = -INFINITY, total = 0;
    long l = 0;
    for (; l + LANES <= count; l += LANES) {
        V x = load(row + l, LANES);
        top = chosen(x > top, x, top);
    }
    for (int i = 0; i < LANES; i++) most = top[i] > most ? top[i] : most;
    for (; l < count; l++) most = row[l] > most ? row[l] : most;
    top = sum + most;
    l = 0;
    for (; l + LANES <= count; l += LANES) {
        V e = exponential(load(row + l, LANES) - top);
        store(row + l, e, LANES);
        sum += e;
    }
    for (; l < count; l++) total += row[l] = expf(row[l] - most);
    for (int i = 0; i < LANES; i++) total += sum[i];
    total = 1 / total;
    for (l = 0; l < count; l++) row[l] *= total;
}

/* p: probabilities of a row, d: the gradient by them -> d: by the scores */
static void unsoftmax(const float *restrict p, float *restrict d, long count) {
    V sum = {0};
    float total = 0;
    long l = 0;
    for (; l + LANES <= count; l += LANES) sum += load(p + l, LANES) * load(d + l, LANES);
    for (; l < count; l++) total += p[l] * d[l];
    for (int i = 0; i < LANES; i++) total += sum[i];
    for (l = 0; l < count; l++) d[l] = p[l] * (d[l] - total);
}

void attention_forward(const float *all, float *out, long examples, long positions, long heads,
                       long width) {
    const long line = 3 * heads * width, to = heads * width;
    const float scale = 1.0 / sqrt(width);
#pragma omp parallel for
    for (long e = 0; e < examples * heads; e++) {
        const float *q = all + e / heads * positions * line + e % heads * width;
        const float *k = q + to, *v = k + to;
        float *o = out + e / heads * positions * to + e % heads * width;
        float *room = malloc(4 * positions * (width + ROWS)), *p = room + positions * width;
        turn(k, line, room, positions, width, scale);
        for (long at = 0; at < positions; at += ROWS) {
            long rows = at + ROWS < positions ? ROWS : positions - at;
            product(q + at * line, line, 1, room, positions, p, positions, rows, positions, width, 0);
            for (long r = 0; r < rows; r++) softmax(p + r * positions, positions);
            product(p, positions, 1, v, line, o + at * to, to, rows, width, positions, 0);
        }
        free(room);
    }
}

void attention_backward(const float *dout, const float *all, float *dall, long examples,
                        long positions, long heads, long width) {
    const long line = 3 * heads * width, to = heads * width;
    const float scale = 1.0 / sqrt(width);
#pragma omp parallel for
    for (long e = 0; e < examples * heads; e++) {
        const long start = e / heads * positions * line + e % heads * width;
        const float *q = all + start, *k = q + to, *v = k + to;
        float *dq = dall + start, *dk = dq + to, *dv = dk + to;
        const float *g = dout + e / heads * positions * to + e % heads * width;
        float *kt = malloc(4 * positions * 2 * (width + ROWS)), *vt = kt + positions * width;
        float *p = vt + positions * width, *d = p + positions * ROWS;
        turn(k, line, kt, positions, width, scale);
        turn(v, line, vt, positions, width, 1);
        for (long at = 0; at < positions; at += ROWS) {
            long rows = at + ROWS < positions ? ROWS : positions - at;
            const float *q_at = q + at * line, *g_at = g + at * to;
            product(q_at, line, 1, kt, positions, p, positions, rows, positions, width, 0);
            for (long r = 0; r < rows; r++) softmax(p + r * positions, positions);
            product(p, 1, positions, g_at, to, dv, line, positions, width, rows, at > 0);
            product(g_at, to, 1, vt, positions, d, positions, rows, positions, width, 0);
            for (long r = 0; r < rows; r++)
                unsoftmax(p + r * positions, d + r * positions, positions);
            for (long i = 0; i < rows * positions; i++) d[i] *= scale;
            product(d, positions, 1, k, line, dq + at * line, line, rows, width, positions, 0);
            product(d, 1, positions, q_at, line, dk, line, positions, width, rows, at > 0);
        }
        free(kt);
    }
}

/* x (examples, positions, in), weight (out, in), bias (out) -> y = x weight^T + bias */
void map_forward(const float *x, const float *weight, const float *bias, float *y, long examples,
                 long positions, long in, long out) {
    float *turned = malloc(4 * in * out);
    turn(weight, in, turned, out, in, 1);
#pragma omp parallel for
    for (long e = 0; e < examples; e++) {
        float *to = y + e * positions * out;
        for (long l = 0; l < positions; l++) memcpy(to + l * out, bias, 4 * out);
        product(x + e * positions * in, in, 1, turned, out, to, out, positions, out, in, 1);
    }
    free(turned);
}

/* dweights (examples, out, in), dbiases (examples, out): to be summed */
void map_backward(const float *dy, const float *x, const float *weight, float *dx, float *dweights,
                  float *dbiases, long examples, long positions, long in, long out) {
#pragma omp parallel for
    for (long e = 0; e < examples; e++) {
        const float *g = dy + e * positions * out, *from = x + e * positions * in;
        float *dbias = dbiases + e * out;
        product(g, out, 1, weight, in, dx + e * positions * in, in, positions, in, out, 0);
        product(g, 1, out, from, in, dweights + e * out * in, in, out, in, positions, 0);
        memcpy(dbias, g, 4 * out);
        for (long l = 1; l < positions; l++)
            for (long i = 0; i < out; i++) dbias[i] += g[l * out + i];
    }
}
