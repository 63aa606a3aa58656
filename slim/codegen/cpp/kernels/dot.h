// Multiply-accumulate of small numbers on each ISA. A step is 4 bytes of the input (4 int8, 2 int16 or 1 float) against
// the same columns of LANES output rows: one vector. Sums stay in the lanes of their rows.
#pragma once
#include "simd.h"

namespace slim {

constexpr int VECTORS = 16 / LANES;  // of a panel

static inline vi load_bits(const void* p) {
    vi v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store_bits(void* p, vi v) { std::memcpy(p, &v, sizeof v); }
static inline vi splat_bits(const u32* p) { return vi{} + (i32)*p; }
static inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }

#if defined(__AVX512VNNI__) && !defined(SLIM_SCALAR)
#define SLIM_VNNI 1
#endif
#if !defined(SLIM_SCALAR) && !defined(SLIM_VNNI)
#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define SLIM_MADDUBS 1
#endif
#endif

constexpr int INT4_BIAS = 8;  // stored as 0..15
constexpr int INT3_BIAS = 4;  // stored as 0..7
#if defined(SLIM_VNNI)
constexpr int INT8_BIAS = 128;  // vpdpbusd wants one side unsigned
#else
constexpr int INT8_BIAS = 0;
#endif

// -- products of 16 bits ----------------------------------------------------------------------------------------------

#if defined(__AVX512BW__) && !defined(SLIM_SCALAR)
static inline vi multiply_words(vi a, vi b) { return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__) && !defined(__AVX512F__) && !defined(SLIM_SCALAR)
static inline vi multiply_words(vi a, vi b) { return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#else
#define SLIM_NO_WORDS 1
#endif

// a * b for numbers of 16 bits, a as small() has them: x86 has no fast product of 32 bits.
#if defined(SLIM_NO_WORDS)
static inline vi small(vi v) { return v; }
static inline vi multiply_small(vi a, vi b) { return a * b; }
#else
static inline vi small(vi v) { return v & 0xffff; }
static inline vi multiply_small(vi a, vi b) { return multiply_words(a, b); }
#endif

// -- kinds ------------------------------------------------------------------------------------------------------------

// Every kind has: RUN, the steps after which a sum must be folded into 32 bits (0: it is 32 bits wide);
// add(sum, w, x).

#if defined(SLIM_VNNI)

struct Bytes {  // u8 weights, i8 input
    static constexpr int RUN = 0;
    static vi add(vi sum, vi w, vi x) { return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x); }
};
using Nibbles = Bytes;

#elif defined(SLIM_MADDUBS)

#if defined(__AVX512BW__)
static inline vi multiply_bytes(vi u, vi s) { return (vi)_mm512_maddubs_epi16((__m512i)u, (__m512i)s); }
static inline vi add_words(vi a, vi b) { return (vi)_mm512_add_epi16((__m512i)a, (__m512i)b); }
static inline vi ones() { return (vi)_mm512_set1_epi16(1); }
static inline vi magnitude(vi w) { return (vi)_mm512_abs_epi8((__m512i)w); }
static inline vi with_sign(vi x, vi w) {
    __mmask64 negative = _mm512_movepi8_mask((__m512i)w);
    return (vi)_mm512_mask_sub_epi8((__m512i)x, negative, _mm512_setzero_si512(), (__m512i)x);
}
#else
static inline vi multiply_bytes(vi u, vi s) { return (vi)_mm256_maddubs_epi16((__m256i)u, (__m256i)s); }
static inline vi add_words(vi a, vi b) { return (vi)_mm256_add_epi16((__m256i)a, (__m256i)b); }
static inline vi ones() { return (vi)_mm256_set1_epi16(1); }
static inline vi magnitude(vi w) { return (vi)_mm256_abs_epi8((__m256i)w); }
static inline vi with_sign(vi x, vi w) { return (vi)_mm256_sign_epi8((__m256i)x, (__m256i)w); }
#endif

struct Bytes {  // i8 weights: |w| * (x with w's sign), 2 * 128 * 127 fits 16 bits; an input of -128 does not
    static constexpr int RUN = 0;
    static vi add(vi sum, vi w, vi x) {
        return sum + multiply_words(multiply_bytes(magnitude(w), with_sign(x, w)), ones());
    }
};

struct FullBytes {  // the same for any input: both sides widened, even columns and odd ones
    static constexpr int RUN = 0;
    typedef i16 words __attribute__((vector_size(4 * LANES)));
    static vi even(vi v) { return (vi)(((words)v << 8) >> 8); }
    static vi odd(vi v) { return (vi)((words)v >> 8); }
    static vi add(vi sum, vi w, vi x) {
        return sum + multiply_words(even(w), even(x)) + multiply_words(odd(w), odd(x));
    }
};

struct Nibbles {  // u4 weights: 8 sums of 2 * 15 * 128 fit 16 bits
    static constexpr int RUN = 8;
    static vi add(vi sum, vi w, vi x) { return add_words(sum, multiply_bytes(w, x)); }
    static vi fold(vi total, vi sum) { return total + multiply_words(sum, ones()); }
};

struct Words {  // i16 weights and input: fewer instructions than Bytes once the weights are widened
    static constexpr int RUN = 0;
    static vi add(vi sum, vi w, vi x) { return sum + multiply_words(w, x); }
};

#elif defined(__aarch64__) && !defined(SLIM_SCALAR)

struct Bytes {
    static constexpr int RUN = 0;
    static vi add(vi sum, vi w, vi x) {
        int8x16_t a = (int8x16_t)w, b = (int8x16_t)x;
#if defined(__ARM_FEATURE_DOTPROD)
        return (vi)vdotq_s32((int32x4_t)sum, a, b);
#else
        int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
        int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
        return sum + (vi)vpaddq_s32(low, high);
#endif
    }
};
using Nibbles = Bytes;

#else

struct Bytes {
    static constexpr int RUN = 0;
    static vi add(vi sum, vi w, vi x) {
        i8 a[4 * LANES], b[4 * LANES];
        std::memcpy(a, &w, sizeof a);
        std::memcpy(b, &x, sizeof b);
        for (int lane = 0; lane < LANES; lane++)
            for (int j = 0; j < 4; j++) sum[lane] += a[4 * lane + j] * b[4 * lane + j];
        return sum;
    }
};
using Nibbles = Bytes;

#endif

// What a prefill multiplies int8 weights with, and whether they must be widened for it.
#if defined(SLIM_MADDUBS)
constexpr bool WIDENS = true;
using PrefillInt8 = Words;
#else
constexpr bool WIDENS = false;
using PrefillInt8 = Bytes;
using FullBytes = Bytes;
#endif

// Floats go through the same tiles; as bits, except for the sums, which would be spilt.
struct Floats {
    static constexpr int RUN = 0;
    static vf add(vf sum, vi w, vi x) { return (vf)w * (vf)x + sum; }
};

// -- conversions ------------------------------------------------------------------------------------------------------

// To nearest, ties to even.
static inline vi round_to_int(vf x) {
#if defined(SLIM_SCALAR)
    vi v;
    for (int i = 0; i < LANES; i++) v[i] = (i32)std::nearbyint(x[i]);
    return v;
#elif defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)x);
#elif defined(__aarch64__)
    return (vi)vcvtnq_s32_f32((float32x4_t)x);
#else
    vi v;
    for (int i = 0; i < LANES; i++) v[i] = (i32)std::nearbyint(x[i]);
    return v;
#endif
}

template <class T>
static inline void narrow(vi v, T* to) {
    typedef T narrowed __attribute__((vector_size(sizeof(T) * LANES)));
    narrowed n = __builtin_convertvector(v, narrowed);
    std::memcpy(to, &n, sizeof n);
}

// The first count numbers, zeros after them: reads nothing behind the end of an array.
template <class T>
static inline vf load_some(const T* p, i64 count) {
    T numbers[LANES] = {};
    for (i64 i = 0; i < count; i++) numbers[i] = p[i];
    return load(numbers);
}

static inline vi absolute_bits(vf x) { return (vi)x & 0x7fffffff; }

static inline i32 sum_lanes(vi v) {
    i32 s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
}
static inline i32 max_lanes(vi v) {
    i32 s = v[0];
    for (int i = 1; i < LANES; i++) s = v[i] > s ? v[i] : s;
    return s;
}

}  // namespace slim
