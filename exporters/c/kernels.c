/* Kernels of a small transformer over one sample, which c_export.py puts in front of a model's weights.
 *
 * Activations lie feature by feature: element (feature, token) is at feature * STRIDE + token, so that every vector
 * holds LANES tokens of one feature. Layers of any width then need no tails, and softmax, normalisation and attention
 * no sums across lanes. Tokens are padded to STRIDE; what the padding holds is finite, and never read as a token.
 *
 * Vectors are GCC's and Clang's; other compilers get one lane, which is plain C99. Multiply-add is asked for by name
 * where the machine has it, so that results do not hang on -ffp-contract.
 */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifndef TOKENS /* of a model; these are for reading and checking this file alone */
#define TOKENS 100
#define STRIDE 112 /* floats; a multiple of 16, the widest vector */
#define HEAD_DIM 2
#define USES_REPEAT
#define USES_SOFTMAX
#define USES_SCALES
#define USES_PALETTES
#endif

#ifdef __FAST_MATH__
#error "exp2 below rounds by adding a large number, which -ffast-math removes; compile without it"
#endif

#if defined(__GNUC__) && defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define TILE_ROWS 8
#define WIDES 6
#elif defined(__GNUC__) && defined(__AVX__)
#include <immintrin.h>
#define LANES 8
#define TILE_ROWS 4
#elif defined(__GNUC__) && defined(__SSE2__)
#include <emmintrin.h>
#define LANES 4
#define TILE_ROWS 4
#elif defined(__GNUC__) && defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define LANES 4
#define TILE_ROWS 8
#define WIDES 6
#else
#define LANES 1
#define TILE_ROWS 4
#endif

#define VECTORS ((TOKENS + LANES - 1) / LANES) /* of one feature */
#define TILE_VECTORS 3 /* by TILE_ROWS outputs: sums that stay in registers, 12 of 16 or 24 of 32 */
#define QUERIES (LANES == 16 && HEAD_DIM <= 2 ? 4 : HEAD_DIM <= 4 ? 2 : 1) /* share a key, as registers last */

#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 64")
#else
#define UNROLL
#endif

#if LANES > 1
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
#else
typedef float vector;
typedef uint32_t bits;
#endif

INLINE vector load(const float *from)
{
    vector value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store(float *to, vector value)
{
    memcpy(to, &value, sizeof value);
}

INLINE vector splat(float value)
{
    const vector zero = {0};
    return value - zero; /* not zero + value, which would lose the sign of -0 and so cost an addition */
}

/* a * b + c, rounded once where the machine can */
INLINE vector multiply_add(vector a, vector b, vector c)
{
#if LANES == 16
    return (vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8 && defined(__FMA__)
    return (vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif LANES == 4 && defined(__aarch64__)
    return (vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE vector larger(vector a, vector b)
{
#if LANES == 16
    return (vector)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vector)_mm256_max_ps((__m256)a, (__m256)b);
#elif LANES == 4 && defined(__aarch64__)
    return (vector)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#elif LANES == 4
    return (vector)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

INLINE vector square_root(vector a)
{
#if LANES == 16
    return (vector)_mm512_sqrt_ps((__m512)a);
#elif LANES == 8
    return (vector)_mm256_sqrt_ps((__m256)a);
#elif LANES == 4 && defined(__aarch64__)
    return (vector)vsqrtq_f32((float32x4_t)a);
#elif LANES == 4
    return (vector)_mm_sqrt_ps((__m128)a);
#else
    return sqrtf(a);
#endif
}

/* 2**x for x <= 0 to 1.5e-7 relative; no more than 2**-125 below that, which is lost beside a softmax's largest, 1 */
INLINE vector exp2_of_negative(vector x)
{
#if LANES == 16
    const vector whole = (vector)_mm512_roundscale_ps((__m512)x, 0), f = x - whole; /* in [-0.5, 0.5] */
    vector p;
#else
    const float shift = 12582912.0f; /* 1.5 * 2**23: adding it rounds to a whole number, left in the lowest bits */
    bits exponent, result;
    vector shifted, f, p;
    x = larger(x, splat(-125.0f));
    shifted = x + shift;
    f = x - (shifted - shift); /* in [-0.5, 0.5] */
#endif
    p = multiply_add(splat(1.3269406e-3f), f, splat(9.6712941e-3f)); /* minimax: 9.3e-8 relative */
    p = multiply_add(p, f, splat(5.5507112e-2f));
    p = multiply_add(p, f, splat(2.4022247e-1f));
    p = multiply_add(p, f, splat(6.9314700e-1f));
    p = multiply_add(p, f, splat(1.0f));
#if LANES == 16
    return (vector)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    memcpy(&exponent, &shifted, sizeof exponent);
    memcpy(&result, &p, sizeof result);
    result += exponent << 23;
    memcpy(&p, &result, sizeof p);
    return p;
#endif
}

/* the same in double, half a vector at a time */
#if LANES > 1
#define HALF (LANES / 2)
typedef double wide __attribute__((vector_size(4 * LANES)));
#else
#define HALF 1
typedef double wide;
#endif
#define WIDE_ROWS 4 /* by WIDES: sums that stay in registers, 8 of 16 or 24 of 32 */
#ifndef WIDES
#define WIDES 2
#endif

INLINE wide widen(const float *from)
{
#if LANES == 16
    return (wide)_mm512_cvtps_pd(_mm256_loadu_ps(from));
#elif LANES == 8
    return (wide)_mm256_cvtps_pd(_mm_loadu_ps(from));
#elif LANES == 4 && defined(__aarch64__)
    return (wide)vcvt_f64_f32(vld1_f32(from));
#elif LANES == 4
    return (wide)_mm_cvtps_pd(_mm_loadl_pi(_mm_setzero_ps(), (const __m64 *)from));
#else
    return *from;
#endif
}

INLINE void narrow(float *to, wide value)
{
#if LANES == 16
    _mm256_storeu_ps(to, _mm512_cvtpd_ps((__m512d)value));
#elif LANES == 8
    _mm_storeu_ps(to, _mm256_cvtpd_ps((__m256d)value));
#elif LANES == 4 && defined(__aarch64__)
    vst1_f32(to, vcvt_f32_f64((float64x2_t)value));
#elif LANES == 4
    _mm_storel_pi((__m64 *)to, _mm_cvtpd_ps((__m128d)value));
#else
    *to = (float)value;
#endif
}

INLINE wide wide_splat(float value)
{
    const wide zero = {0};
    return (double)value - zero;
}

/* a * b + c, where a and b were floats: their product is exact, so that fused and not it is the same */
INLINE wide wide_multiply_add(wide a, wide b, wide c)
{
#if LANES == 16
    return (wide)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif LANES == 8 && defined(__FMA__)
    return (wide)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif LANES == 4 && defined(__aarch64__)
    return (wide)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}

/* rows x wides sums in registers: see dense_in_double */
INLINE void wide_tile(float *out, const float *x, const float *weight, const float *bias, size_t inputs,
                      const size_t rows, const size_t wides)
{
    wide sum[WIDE_ROWS][WIDES], column[WIDES];
    UNROLL
    for (size_t r = 0; r < rows; r++)
        UNROLL
        for (size_t v = 0; v < wides; v++)
            sum[r][v] = wide_splat(bias[r]);
    for (size_t k = 0; k < inputs; k++) {
        UNROLL
        for (size_t v = 0; v < wides; v++)
            column[v] = widen(x + k * STRIDE + v * HALF);
        UNROLL
        for (size_t r = 0; r < rows; r++)
            UNROLL
            for (size_t v = 0; v < wides; v++)
                sum[r][v] = wide_multiply_add(wide_splat(weight[r * inputs + k]), column[v], sum[r][v]);
    }
    UNROLL
    for (size_t r = 0; r < rows; r++)
        UNROLL
        for (size_t v = 0; v < wides; v++)
            narrow(out + r * STRIDE + v * HALF, sum[r][v]);
}

/* out = weight x + bias like dense, summed in double: for queries and keys. Scores are products of the two, and where
 * they reach hundreds, float32 sums moved a probability by 2e-6. */
static void dense_in_double(float *out, const float *x, const float *weight, const float *bias, size_t inputs,
                            size_t outputs)
{
    const size_t all = (VECTORS * LANES) / HALF;
    for (size_t v = 0, step; v < all; v += step) {
        step = all - v >= WIDES ? WIDES : all - v >= 2 ? 2 : 1;
        for (size_t n = 0, rows; n < outputs; n += rows) {
            float *const to = out + n * STRIDE + v * HALF;
            const float *const w = weight + n * inputs;
            rows = outputs - n < WIDE_ROWS ? 1 : WIDE_ROWS;
            if (step == WIDES && rows == WIDE_ROWS)
                wide_tile(to, x + v * HALF, w, bias + n, inputs, WIDE_ROWS, WIDES);
            else if (step == WIDES)
                wide_tile(to, x + v * HALF, w, bias + n, inputs, 1, WIDES);
            else if (step == 2 && rows == WIDE_ROWS)
                wide_tile(to, x + v * HALF, w, bias + n, inputs, WIDE_ROWS, 2);
            else if (step == 2)
                wide_tile(to, x + v * HALF, w, bias + n, inputs, 1, 2);
            else if (rows == WIDE_ROWS)
                wide_tile(to, x + v * HALF, w, bias + n, inputs, WIDE_ROWS, 1);
            else
                wide_tile(to, x + v * HALF, w, bias + n, inputs, 1, 1);
        }
    }
}

/* rows x vectors sums in registers: see dense */
INLINE void tile(float *out, const float *x, const float *weight, const float *bias, const float *add, size_t inputs,
                 int relu, const size_t rows, const size_t vectors)
{
    vector sum[TILE_ROWS][TILE_VECTORS], column[TILE_VECTORS];
    UNROLL
    for (size_t r = 0; r < rows; r++)
        UNROLL
        for (size_t v = 0; v < vectors; v++)
            sum[r][v] = splat(bias[r]);
    for (size_t k = 0; k < inputs; k++) {
        UNROLL
        for (size_t v = 0; v < vectors; v++)
            column[v] = load(x + k * STRIDE + v * LANES);
        UNROLL
        for (size_t r = 0; r < rows; r++)
            UNROLL
            for (size_t v = 0; v < vectors; v++)
                sum[r][v] = multiply_add(splat(weight[r * inputs + k]), column[v], sum[r][v]);
    }
    UNROLL
    for (size_t r = 0; r < rows; r++)
        UNROLL
        for (size_t v = 0; v < vectors; v++) {
            const size_t at = r * STRIDE + v * LANES;
            const vector value = relu ? larger(sum[r][v], splat(0.0f)) : sum[r][v];
            store(out + at, add ? value + load(add + at) : value);
        }
}

INLINE void tiles(float *out, const float *x, const float *weight, const float *bias, const float *add, size_t inputs,
                  size_t outputs, int relu, const size_t vectors)
{
    for (size_t n = 0, rows; n < outputs; n += rows) {
        float *const to = out + n * STRIDE;
        const float *const more = add ? add + n * STRIDE : add;
        rows = outputs - n < TILE_ROWS ? 1 : TILE_ROWS;
        if (rows == 1)
            tile(to, x, weight + n * inputs, bias + n, more, inputs, relu, 1, vectors);
        else
            tile(to, x, weight + n * inputs, bias + n, more, inputs, relu, TILE_ROWS, vectors);
    }
}

/* out (outputs, tokens) = weight (outputs, inputs) x (inputs, tokens) + bias, at least 0 if relu, then plus `add`
 * (outputs, tokens) unless it is NULL. Tokens go round outermost, so that their features stay in the first cache. */
static void dense(float *out, const float *x, const float *weight, const float *bias, const float *add, size_t inputs,
                  size_t outputs, int relu)
{
    for (size_t v = 0, step; v < VECTORS; v += step) {
        const size_t left = VECTORS - v, at = v * LANES;
        step = left == 4 ? 2 : left < TILE_VECTORS ? left : TILE_VECTORS; /* 2 + 2 is faster than 3 + 1 */
        const float *const more = add ? add + at : add;
        if (step == 3)
            tiles(out + at, x + at, weight, bias, more, inputs, outputs, relu, 3);
        else if (step == 2)
            tiles(out + at, x + at, weight, bias, more, inputs, outputs, relu, 2);
        else
            tiles(out + at, x + at, weight, bias, more, inputs, outputs, relu, 1);
    }
}

/* attention of one head for `vectors` vectors of queries: see below */
INLINE void attend(float *out, const float *query, const float *key, const float *value, const size_t vectors)
{
    const float power = 1.44269504f / sqrtf((float)HEAD_DIM); /* log2(e): powers of two are cheaper than of e */
    vector q[QUERIES][HEAD_DIM], mixed[QUERIES][HEAD_DIM], top[QUERIES], total[QUERIES];
    UNROLL
    for (size_t v = 0; v < vectors; v++) {
        top[v] = splat(-FLT_MAX);
        total[v] = splat(0.0f);
        UNROLL
        for (size_t d = 0; d < HEAD_DIM; d++) {
            q[v][d] = load(query + d * STRIDE + v * LANES) * power;
            mixed[v][d] = splat(0.0f);
        }
    }
    for (size_t token = 0; token < TOKENS; token++)
        UNROLL
        for (size_t v = 0; v < vectors; v++) {
            vector score = q[v][0] * key[token];
            UNROLL
            for (size_t d = 1; d < HEAD_DIM; d++)
                score = multiply_add(q[v][d], splat(key[d * STRIDE + token]), score);
            top[v] = larger(top[v], score);
        }
    for (size_t token = 0; token < TOKENS; token++)
        UNROLL
        for (size_t v = 0; v < vectors; v++) {
            vector score = -top[v];
            UNROLL
            for (size_t d = 0; d < HEAD_DIM; d++)
                score = multiply_add(q[v][d], splat(key[d * STRIDE + token]), score);
            score = exp2_of_negative(score);
            total[v] += score;
            UNROLL
            for (size_t d = 0; d < HEAD_DIM; d++)
                mixed[v][d] = multiply_add(score, splat(value[d * STRIDE + token]), mixed[v][d]);
        }
    UNROLL
    for (size_t v = 0; v < vectors; v++) {
        const vector share = 1.0f / total[v];
        UNROLL
        for (size_t d = 0; d < HEAD_DIM; d++)
            store(out + d * STRIDE + v * LANES, mixed[v][d] * share);
    }
}

/* out = softmax(query key / sqrt(HEAD_DIM)) value, all (heads * HEAD_DIM, tokens). Lanes are queries; the keys are gone
 * through twice, for the largest score and for the sums: small heads are cheaper to multiply again than to store. */
static void attention(float *out, const float *query, const float *key, const float *value, size_t heads)
{
    for (size_t head = 0; head < heads; head++) {
        const size_t first = head * HEAD_DIM * STRIDE;
        size_t v = 0;
        for (; v + QUERIES <= VECTORS; v += QUERIES)
            attend(out + first + v * LANES, query + first + v * LANES, key + first, value + first, QUERIES);
        for (; QUERIES > 2 && v + 2 <= VECTORS; v += 2)
            attend(out + first + v * LANES, query + first + v * LANES, key + first, value + first, 2);
        for (; v < VECTORS; v++)
            attend(out + first + v * LANES, query + first + v * LANES, key + first, value + first, 1);
    }
}

/* x (features, tokens) in place: mean 0 and variance 1 over a token's features, times gain plus bias */
static void layer_norm(float *x, const float *gain, const float *bias, size_t features, float epsilon)
{
    const float share = 1.0f / (float)features;
    for (size_t v = 0; v < VECTORS; v++) {
        float *const column = x + v * LANES;
        vector mean = splat(0.0f), variance = splat(0.0f), scale;
        for (size_t n = 0; n < features; n++)
            mean += load(column + n * STRIDE);
        mean *= share;
        for (size_t n = 0; n < features; n++) {
            const vector centred = load(column + n * STRIDE) - mean;
            variance = multiply_add(centred, centred, variance);
        }
        scale = 1.0f / square_root(variance * share + epsilon);
        for (size_t n = 0; n < features; n++) {
            const vector centred = load(column + n * STRIDE) - mean;
            store(column + n * STRIDE, multiply_add(centred * scale, splat(gain[n]), splat(bias[n])));
        }
    }
}

/* out (features, tokens) = x (rows, features) from token `first` on, and zeros in the padding behind */
static void transpose(float *out, const float *x, size_t first, size_t rows, size_t features)
{
    for (size_t n = 0; n < features; n++) {
        for (size_t t = 0; t < rows; t++)
            out[n * STRIDE + first + t] = x[t * features + n];
        for (size_t t = first + rows; t < STRIDE; t++)
            out[n * STRIDE + t] = 0.0f;
    }
}

#ifdef USES_REPEAT
/* out (length) = x (count) over and over */
static void repeat(float *out, const float *x, size_t count, size_t length)
{
    for (size_t i = 0; i < length; i++)
        out[i] = x[i % count];
}
#endif

/* out (features) = mean of x (features, tokens) over tokens */
static void mean_of_tokens(float *out, const float *x, size_t features)
{
    for (size_t n = 0; n < features; n++) {
        vector sums = splat(0.0f);
        float lanes[LANES];
        double sum = 0.0;
        size_t t = 0;
        for (; t + LANES <= TOKENS; t += LANES)
            sums += load(x + n * STRIDE + t);
        store(lanes, sums);
        for (size_t lane = 0; lane < LANES; lane++)
            sum += lanes[lane];
        for (; t < TOKENS; t++)
            sum += x[n * STRIDE + t];
        out[n] = (float)(sum / TOKENS);
    }
}

/* out (outputs) = weight (outputs, inputs) x (inputs) + bias */
static void dense_of_one(float *out, const float *x, const float *weight, const float *bias, size_t inputs, size_t outputs)
{
    for (size_t n = 0; n < outputs; n++) {
        double sum = bias[n];
        for (size_t k = 0; k < inputs; k++)
            sum += (double)weight[n * inputs + k] * x[k];
        out[n] = (float)sum;
    }
}

#ifdef USES_SOFTMAX
/* x (count) in place */
static void softmax(float *x, size_t count)
{
    float top = x[0];
    double sum = 0.0;
    for (size_t n = 1; n < count; n++)
        top = x[n] > top ? x[n] : top;
    for (size_t n = 0; n < count; n++)
        sum += x[n] = (float)exp((double)x[n] - top);
    for (size_t n = 0; n < count; n++)
        x[n] = (float)(x[n] / sum);
}
#endif

#ifdef USES_SCALES
/* out (rows, columns) = codes times the scale of their row, or times the only one */
static void decode_scaled(float *out, const int8_t *codes, const float *scale, size_t scales, size_t rows, size_t columns)
{
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < columns; c++)
            out[r * columns + c] = (float)codes[r * columns + c] * scale[scales == 1 ? 0 : r];
}
#endif

#ifdef USES_PALETTES
/* out (count) = the palette's entries that the codes name */
static void decode_palette(float *out, const uint8_t *codes, const float *palette, size_t count)
{
    for (size_t i = 0; i < count; i++)
        out[i] = palette[codes[i]];
}
#endif
