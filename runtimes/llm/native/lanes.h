/* Vectors of 16 floats, 16 integers or 64 bytes, for AVX-512 with VNNI, AVX2, NEON, and plain C.
 *
 * All kernels work on these and on nothing narrower or wider, and every operation is exact or rounds once in the same
 * way everywhere. So all machines compute the same bits; plain C is the reference of the others.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "-ffast-math changes the order of sums, and results would depend on the compiler; compile without it"
#endif

#define INLINE static inline __attribute__((always_inline))
#define PREFETCH(address) __builtin_prefetch(address)

#if defined(PLAIN_C)
#define LANES_NAME "plain C"
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define WIDE512
#define LANES_NAME "AVX-512 VNNI"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define WIDE256
#define LANES_NAME "AVX2"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#define WIDE128
#ifdef __ARM_FEATURE_DOTPROD
#define LANES_NAME "NEON dot product"
#else
#define LANES_NAME "NEON"
#endif
#else
#define PLAIN_C
#define LANES_NAME "plain C"
#endif

/* Loops over registers must be unrolled so that arrays become registers; in plain C that would only be long. */
#ifdef PLAIN_C
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

/* --- one half-precision number, for the code that is not hot */

INLINE float half_to_float(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    uint32_t bits;
    float value;
    if (exponent == 0) { /* zero and subnormal numbers: fraction * 2**-24 */
        value = (float)fraction * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    memcpy(&value, &bits, 4);
    return value;
}

/* rounds to the nearest, ties to even; what is too large becomes infinite */
INLINE uint16_t float_to_half(float value)
{
    uint32_t bits, rest;
    uint16_t half;
    memcpy(&bits, &value, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000)
        return sign | 0x7e00;
    if (bits >= 0x477ff000) /* 65520 and more */
        return sign | 0x7c00;
    if (bits < 0x38800000) { /* below 2**-14: the half is subnormal, and this sum rounds it */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&rest, &magnitude, 4);
        return sign | (uint16_t)(rest - 0x3f000000);
    }
    half = (uint16_t)(bits >> 13) - (112 << 10);
    rest = bits & 0x1fff;
    return sign | (uint16_t)(half + (rest > 0x1000 || (rest == 0x1000 && (half & 1))));
}

#if defined(WIDE512)

typedef __m512 floats;
typedef __m512i integers;
typedef __m512i bytes;

INLINE floats splat(float x) { return _mm512_set1_ps(x); }
INLINE floats load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, floats x) { _mm512_storeu_ps(to, x); }
INLINE floats load_halves(const uint16_t *from)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}
INLINE void store_halves(uint16_t *to, floats x)
{
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
INLINE floats load_bfloat16(const uint16_t *from)
{
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
INLINE floats subtract(floats a, floats b) { return _mm512_sub_ps(a, b); }
INLINE floats multiply(floats a, floats b) { return _mm512_mul_ps(a, b); }
INLINE floats divide(floats a, floats b) { return _mm512_div_ps(a, b); }
INLINE floats multiply_add(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE floats larger(floats a, floats b) { return _mm512_max_ps(a, b); }
INLINE floats smaller(floats a, floats b) { return _mm512_min_ps(a, b); }
INLINE floats absolute(floats a) { return _mm512_abs_ps(a); }
INLINE integers nearest(floats a) { return _mm512_cvtps_epi32(a); }
INLINE floats to_floats(integers a) { return _mm512_cvtepi32_ps(a); }
INLINE floats power_of_two(integers a)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(127)), 23));
}
INLINE floats first_lanes(int number, floats a, floats other)
{
    return _mm512_mask_mov_ps(other, number >= 16 ? 0xffff : number <= 0 ? 0 : (1u << number) - 1, a);
}
INLINE integers splat_integer(int32_t x) { return _mm512_set1_epi32(x); }
INLINE integers add_integers(integers a, integers b) { return _mm512_add_epi32(a, b); }
INLINE integers subtract_integers(integers a, integers b) { return _mm512_sub_epi32(a, b); }
INLINE integers times_128(integers a) { return _mm512_slli_epi32(a, 7); }
INLINE integers over_128(integers a) { return _mm512_srai_epi32(_mm512_add_epi32(a, _mm512_set1_epi32(64)), 7); }
INLINE void store_signed_bytes(int8_t *to, integers a)
{
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(a));
}
INLINE bytes load_bytes(const uint8_t *from) { return _mm512_loadu_si512(from); }
INLINE bytes low_nibbles(bytes a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
INLINE bytes high_nibbles(bytes a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
INLINE integers dot(integers sum, bytes a, const int8_t *four)
{
    int32_t word;
    memcpy(&word, four, 4);
    return _mm512_dpbusd_epi32(sum, a, _mm512_set1_epi32(word));
}
INLINE integers dot_nibbles(integers sum, bytes a, const int8_t *four) { return dot(sum, a, four); }

#elif defined(WIDE256)

typedef struct { __m256 part[2]; } floats;
typedef struct { __m256i part[2]; } integers;
typedef integers bytes;

#define BOTH(expression_0, expression_1) {{expression_0, expression_1}}
#define EACH(type, name, parameters, expression) \
    INLINE type name parameters \
    { \
        type result; \
        for (int i = 0; i < 2; i++) \
            result.part[i] = expression; \
        return result; \
    }
EACH(floats, splat, (float x), _mm256_set1_ps(x))
EACH(floats, load, (const float *from), _mm256_loadu_ps(from + 8 * i))
INLINE void store(float *to, floats x)
{
    _mm256_storeu_ps(to, x.part[0]);
    _mm256_storeu_ps(to + 8, x.part[1]);
}
EACH(floats, load_halves, (const uint16_t *from), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + 8 * i))))
INLINE void store_halves(uint16_t *to, floats x)
{
    for (int i = 0; i < 2; i++)
        _mm_storeu_si128((__m128i *)(to + 8 * i), _mm256_cvtps_ph(x.part[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
EACH(floats, load_bfloat16, (const uint16_t *from),
     _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(from + 8 * i))), 16)))
EACH(floats, add, (floats a, floats b), _mm256_add_ps(a.part[i], b.part[i]))
EACH(floats, subtract, (floats a, floats b), _mm256_sub_ps(a.part[i], b.part[i]))
EACH(floats, multiply, (floats a, floats b), _mm256_mul_ps(a.part[i], b.part[i]))
EACH(floats, divide, (floats a, floats b), _mm256_div_ps(a.part[i], b.part[i]))
EACH(floats, multiply_add, (floats a, floats b, floats c), _mm256_fmadd_ps(a.part[i], b.part[i], c.part[i]))
EACH(floats, larger, (floats a, floats b), _mm256_max_ps(a.part[i], b.part[i]))
EACH(floats, smaller, (floats a, floats b), _mm256_min_ps(a.part[i], b.part[i]))
EACH(floats, absolute, (floats a), _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.part[i]))
EACH(integers, nearest, (floats a), _mm256_cvtps_epi32(a.part[i]))
EACH(floats, to_floats, (integers a), _mm256_cvtepi32_ps(a.part[i]))
EACH(floats, power_of_two, (integers a),
     _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(a.part[i], _mm256_set1_epi32(127)), 23)))
INLINE floats first_lanes(int number, floats a, floats other)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    floats result;
    for (int i = 0; i < 2; i++) {
        const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(number - 8 * i), lane);
        result.part[i] = _mm256_blendv_ps(other.part[i], a.part[i], _mm256_castsi256_ps(inside));
    }
    return result;
}
EACH(integers, splat_integer, (int32_t x), _mm256_set1_epi32(x))
EACH(integers, add_integers, (integers a, integers b), _mm256_add_epi32(a.part[i], b.part[i]))
EACH(integers, subtract_integers, (integers a, integers b), _mm256_sub_epi32(a.part[i], b.part[i]))
EACH(integers, times_128, (integers a), _mm256_slli_epi32(a.part[i], 7))
EACH(integers, over_128, (integers a),
     _mm256_srai_epi32(_mm256_add_epi32(a.part[i], _mm256_set1_epi32(64)), 7))
INLINE void store_signed_bytes(int8_t *to, integers a)
{
    int32_t values[16];
    memcpy(values, &a, sizeof values);
    for (int i = 0; i < 16; i++)
        to[i] = (int8_t)values[i];
}
EACH(bytes, load_bytes, (const uint8_t *from), _mm256_loadu_si256((const __m256i *)(from + 32 * i)))
EACH(bytes, low_nibbles, (bytes a), _mm256_and_si256(a.part[i], _mm256_set1_epi8(15)))
EACH(bytes, high_nibbles, (bytes a),
     _mm256_and_si256(_mm256_srli_epi16(a.part[i], 4), _mm256_set1_epi8(15)))
/* products of bytes up to 255: the even and the odd ones as 16-bit numbers, so that nothing saturates */
INLINE integers dot(integers sum, bytes a, const int8_t *four)
{
    const __m256i even = _mm256_set1_epi32((uint16_t)four[0] | (uint32_t)(uint16_t)four[2] << 16);
    const __m256i odd = _mm256_set1_epi32((uint16_t)four[1] | (uint32_t)(uint16_t)four[3] << 16);
    for (int i = 0; i < 2; i++) {
        const __m256i low = _mm256_and_si256(a.part[i], _mm256_set1_epi16(255)), high = _mm256_srli_epi16(a.part[i], 8);
        const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(low, even), _mm256_madd_epi16(high, odd));
        sum.part[i] = _mm256_add_epi32(sum.part[i], both);
    }
    return sum;
}
/* bytes up to 15: a sum of two products fits 16 bits */
INLINE integers dot_nibbles(integers sum, bytes a, const int8_t *four)
{
    int32_t word;
    memcpy(&word, four, 4);
    for (int i = 0; i < 2; i++) {
        const __m256i pairs = _mm256_maddubs_epi16(a.part[i], _mm256_set1_epi32(word));
        sum.part[i] = _mm256_add_epi32(sum.part[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sum;
}
#undef BOTH

#elif defined(WIDE128)

typedef struct { float32x4_t part[4]; } floats;
typedef struct { int32x4_t part[4]; } integers;
typedef struct { uint8x16_t part[4]; } bytes;

#define EACH(type, name, parameters, expression) \
    INLINE type name parameters \
    { \
        type result; \
        for (int i = 0; i < 4; i++) \
            result.part[i] = expression; \
        return result; \
    }
EACH(floats, splat, (float x), vdupq_n_f32(x))
EACH(floats, load, (const float *from), vld1q_f32(from + 4 * i))
INLINE void store(float *to, floats x)
{
    for (int i = 0; i < 4; i++)
        vst1q_f32(to + 4 * i, x.part[i]);
}
EACH(floats, load_halves, (const uint16_t *from), vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4 * i))))
INLINE void store_halves(uint16_t *to, floats x)
{
    for (int i = 0; i < 4; i++)
        vst1_u16(to + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.part[i])));
}
EACH(floats, load_bfloat16, (const uint16_t *from), vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from + 4 * i), 16)))
EACH(floats, add, (floats a, floats b), vaddq_f32(a.part[i], b.part[i]))
EACH(floats, subtract, (floats a, floats b), vsubq_f32(a.part[i], b.part[i]))
EACH(floats, multiply, (floats a, floats b), vmulq_f32(a.part[i], b.part[i]))
EACH(floats, divide, (floats a, floats b), vdivq_f32(a.part[i], b.part[i]))
EACH(floats, multiply_add, (floats a, floats b, floats c), vfmaq_f32(c.part[i], a.part[i], b.part[i]))
EACH(floats, larger, (floats a, floats b), vmaxq_f32(a.part[i], b.part[i]))
EACH(floats, smaller, (floats a, floats b), vminq_f32(a.part[i], b.part[i]))
EACH(floats, absolute, (floats a), vabsq_f32(a.part[i]))
EACH(integers, nearest, (floats a), vcvtnq_s32_f32(a.part[i]))
EACH(floats, to_floats, (integers a), vcvtq_f32_s32(a.part[i]))
EACH(floats, power_of_two, (integers a),
     vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(a.part[i], vdupq_n_s32(127)), 23)))
INLINE floats first_lanes(int number, floats a, floats other)
{
    const int32_t numbers[4] = {0, 1, 2, 3};
    floats result;
    for (int i = 0; i < 4; i++) {
        const uint32x4_t inside = vcltq_s32(vld1q_s32(numbers), vdupq_n_s32(number - 4 * i));
        result.part[i] = vbslq_f32(inside, a.part[i], other.part[i]);
    }
    return result;
}
EACH(integers, splat_integer, (int32_t x), vdupq_n_s32(x))
EACH(integers, add_integers, (integers a, integers b), vaddq_s32(a.part[i], b.part[i]))
EACH(integers, subtract_integers, (integers a, integers b), vsubq_s32(a.part[i], b.part[i]))
EACH(integers, times_128, (integers a), vshlq_n_s32(a.part[i], 7))
EACH(integers, over_128, (integers a), vshrq_n_s32(vaddq_s32(a.part[i], vdupq_n_s32(64)), 7))
INLINE void store_signed_bytes(int8_t *to, integers a)
{
    const int16x8_t low = vcombine_s16(vmovn_s32(a.part[0]), vmovn_s32(a.part[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.part[2]), vmovn_s32(a.part[3]));
    vst1q_s8(to, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
EACH(bytes, load_bytes, (const uint8_t *from), vld1q_u8(from + 16 * i))
EACH(bytes, low_nibbles, (bytes a), vandq_u8(a.part[i], vdupq_n_u8(15)))
EACH(bytes, high_nibbles, (bytes a), vshrq_n_u8(a.part[i], 4))
/* bytes up to 15, as signed ones */
INLINE integers dot_nibbles(integers sum, bytes a, const int8_t *four)
{
    int32_t word;
    memcpy(&word, four, 4);
    const int8x16_t other = vreinterpretq_s8_s32(vdupq_n_s32(word));
    for (int i = 0; i < 4; i++) {
        const int8x16_t mine = vreinterpretq_s8_u8(a.part[i]);
#ifdef __ARM_FEATURE_DOTPROD
        sum.part[i] = vdotq_s32(sum.part[i], mine, other);
#else
        const int16x8_t low = vmull_s8(vget_low_s8(mine), vget_low_s8(other));
        const int16x8_t high = vmull_s8(vget_high_s8(mine), vget_high_s8(other));
        sum.part[i] = vaddq_s32(sum.part[i], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
    }
    return sum;
}
/* bytes up to 255 are 128 more than signed ones */
INLINE integers dot(integers sum, bytes a, const int8_t *four)
{
    bytes moved;
    for (int i = 0; i < 4; i++)
        moved.part[i] = veorq_u8(a.part[i], vdupq_n_u8(128));
    sum = add_integers(sum, splat_integer(128 * (four[0] + four[1] + four[2] + four[3])));
    return dot_nibbles(sum, moved, four);
}

#else /* plain C */

typedef struct { float lane[16]; } floats;
typedef struct { int32_t lane[16]; } integers;
typedef struct { uint8_t byte[64]; } bytes;

#define EACH(type, name, parameters, expression) \
    INLINE type name parameters \
    { \
        type result; \
        for (int i = 0; i < 16; i++) \
            result.lane[i] = expression; \
        return result; \
    }
EACH(floats, splat, (float x), x)
EACH(floats, load, (const float *from), from[i])
INLINE void store(float *to, floats x) { memcpy(to, &x, sizeof x); }
EACH(floats, load_halves, (const uint16_t *from), half_to_float(from[i]))
INLINE void store_halves(uint16_t *to, floats x)
{
    for (int i = 0; i < 16; i++)
        to[i] = float_to_half(x.lane[i]);
}
INLINE float bfloat16_to_float(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
EACH(floats, load_bfloat16, (const uint16_t *from), bfloat16_to_float(from[i]))
EACH(floats, add, (floats a, floats b), a.lane[i] + b.lane[i])
EACH(floats, subtract, (floats a, floats b), a.lane[i] - b.lane[i])
EACH(floats, multiply, (floats a, floats b), a.lane[i] * b.lane[i])
EACH(floats, divide, (floats a, floats b), a.lane[i] / b.lane[i])
EACH(floats, multiply_add, (floats a, floats b, floats c), fmaf(a.lane[i], b.lane[i], c.lane[i]))
EACH(floats, larger, (floats a, floats b), a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i])
EACH(floats, smaller, (floats a, floats b), a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i])
EACH(floats, absolute, (floats a), fabsf(a.lane[i]))
EACH(integers, nearest, (floats a), (int32_t)lrintf(a.lane[i]))
EACH(floats, to_floats, (integers a), (float)a.lane[i])
EACH(floats, power_of_two, (integers a), ldexpf(1.0f, a.lane[i]))
EACH(floats, first_lanes, (int number, floats a, floats other), i < number ? a.lane[i] : other.lane[i])
EACH(integers, splat_integer, (int32_t x), x)
EACH(integers, add_integers, (integers a, integers b), a.lane[i] + b.lane[i])
EACH(integers, subtract_integers, (integers a, integers b), a.lane[i] - b.lane[i])
EACH(integers, times_128, (integers a), a.lane[i] * 128)
EACH(integers, over_128, (integers a), (a.lane[i] + 64) >> 7)
INLINE void store_signed_bytes(int8_t *to, integers a)
{
    for (int i = 0; i < 16; i++)
        to[i] = (int8_t)a.lane[i];
}
INLINE bytes load_bytes(const uint8_t *from)
{
    bytes result;
    memcpy(&result, from, sizeof result);
    return result;
}
INLINE bytes low_nibbles(bytes a)
{
    for (int i = 0; i < 64; i++)
        a.byte[i] &= 15;
    return a;
}
INLINE bytes high_nibbles(bytes a)
{
    for (int i = 0; i < 64; i++)
        a.byte[i] >>= 4;
    return a;
}
INLINE integers dot(integers sum, bytes a, const int8_t *four)
{
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 4; j++)
            sum.lane[i] += a.byte[4 * i + j] * four[j];
    return sum;
}
INLINE integers dot_nibbles(integers sum, bytes a, const int8_t *four) { return dot(sum, a, four); }

#endif
#undef EACH

/* dot: to lane i, add the sum of bytes 4 i to 4 i + 3, unsigned, times the four signed ones */

INLINE floats zeros(void) { return splat(0.0f); }

/* The sum and the largest of 16 lanes. The order of the sum is part of the result: lane i and lane i + 8 first, then i
 * and i + 4, i + 2, i + 1. */
#if defined(WIDE512) || defined(WIDE256)
#define HALVES_OF(name, wide, narrow, single) \
    INLINE float name(floats a) \
    { \
        const __m256 eight = wide; \
        const __m128 four = narrow(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
        const __m128 two = narrow(four, _mm_movehl_ps(four, four)); \
        return _mm_cvtss_f32(single(two, _mm_movehdup_ps(two))); \
    }
#if defined(WIDE512)
#define LOW_HALF _mm512_castps512_ps256(a)
#define HIGH_HALF _mm512_extractf32x8_ps(a, 1)
#else
#define LOW_HALF a.part[0]
#define HIGH_HALF a.part[1]
#endif
HALVES_OF(sum_of, _mm256_add_ps(LOW_HALF, HIGH_HALF), _mm_add_ps, _mm_add_ss)
HALVES_OF(largest_of, _mm256_max_ps(LOW_HALF, HIGH_HALF), _mm_max_ps, _mm_max_ss)
#else
INLINE float sum_of(floats a)
{
    float lane[16];
    store(lane, a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

INLINE float largest_of(floats a)
{
    float lane[16];
    store(lane, a);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}
#endif

/* e**x to 2e-7 relative, for x up to 88; e**-87 for what is smaller */
INLINE floats exponential(floats x)
{
    const floats scaled = multiply(smaller(larger(x, splat(-87.0f)), splat(88.0f)), splat(1.44269504f));
    const integers whole = nearest(scaled);
    const floats rest = subtract(scaled, to_floats(whole)); /* -0.5 to 0.5; the series of 2**rest */
    floats sum = splat(1.5403530e-4f);
    sum = multiply_add(sum, rest, splat(1.3333558e-3f));
    sum = multiply_add(sum, rest, splat(9.6181291e-3f));
    sum = multiply_add(sum, rest, splat(5.5504109e-2f));
    sum = multiply_add(sum, rest, splat(2.4022651e-1f));
    sum = multiply_add(sum, rest, splat(6.9314718e-1f));
    sum = multiply_add(sum, rest, splat(1.0f));
    return multiply(sum, power_of_two(whole));
}

/* cap * tanh(x / cap) */
INLINE floats capped(floats x, float cap)
{
    const floats both = add(exponential(multiply(x, splat(2.0f / cap))), splat(1.0f));
    return multiply(splat(cap), subtract(splat(1.0f), divide(splat(2.0f), both)));
}
