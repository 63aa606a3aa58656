// The one layer that knows how wide a vector is: float vectors by the compiler's own vector types, for every ISA.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "functions.h"

namespace slim {

using i64 = std::int64_t;
using i32 = std::int32_t;
using i16 = std::int16_t;
using i8 = std::int8_t;
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

#if defined(SLIM_SCALAR)
constexpr int LANES = 4;  // plain arithmetic: the compiler splits what the machine does not have
#elif defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef i32 vi __attribute__((vector_size(4 * LANES)));

static inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf splat(float x) { return x - vf{}; }  // x + 0 would have to turn -0 into 0
static inline float sum(vf v) {
#if defined(__AVX512F__) && !defined(SLIM_SCALAR)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float s = 0;
    for (int i = 0; i < LANES; i++) s += v[i];
    return s;
#endif
}

// -- numbers in storage -----------------------------------------------------------------------------------------------

struct bf16 {
    u16 bits;
    operator float() const {
        u32 wide = (u32)bits << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
    bf16() = default;
    bf16(float x) {  // to nearest, ties to even; NaN stays NaN
        u32 wide;
        std::memcpy(&wide, &x, 4);
        u32 rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
        bits = (u16)((wide & 0x7fffffff) > 0x7f800000 ? (wide >> 16) | 0x40 : rounded);
    }
};
#if defined(__aarch64__)
typedef __fp16 f16;  // g++ 12 has no _Float16 there
#else
typedef _Float16 f16;
#endif
struct fp8 {  // e4m3, finite: a sign, 4 bits of exponent, 3 of mantissa; all ones is NaN
    u8 bits;
    operator float() const {
        u32 magnitude = bits & 0x7fu;
        float x = magnitude < 8 ? (float)magnitude * 0x1p-9f : bits_to_float((magnitude << 20) + (120u << 23));
        x = magnitude == 0x7f ? NAN : x;
        return bits & 0x80 ? -x : x;
    }
};

// -- vectors from storage, a vector of floats from LANES numbers ------------------------------------------------------

static inline vf load(const bf16* p) {
    typedef u16 half __attribute__((vector_size(2 * LANES)));
    typedef u32 word __attribute__((vector_size(4 * LANES)));
    half v;
    std::memcpy(&v, p, sizeof v);
    return (vf)(__builtin_convertvector(v, word) << 16);
}

static inline vf load(const f16* p) {
#if defined(__AVX512F__) && !defined(SLIM_SCALAR)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && !defined(SLIM_SCALAR)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__) && !defined(SLIM_SCALAR)
    return (vf)vcvt_f32_f16(vld1_f16((const float16_t*)p));
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = (float)p[i];
    return v;
#endif
}

// The numbers as parts of STEP_OF<fp8>, which a scale makes good: as half precision has them that takes their bits. (All
// ones are 480 here, not NaN: weights that hold it are refused.)
template <class T>
constexpr float STEP_OF = 1;
template <>
constexpr float STEP_OF<fp8> = 256;

static inline vf load(const fp8* p) {
#if defined(__AVX512F__) && !defined(SLIM_SCALAR)
    __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
    return (vf)_mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16((i16)0xbf80)));
#elif defined(__F16C__) && defined(__AVX2__) && !defined(SLIM_SCALAR)
    __m128i words = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
    return (vf)_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(words, 7), _mm_set1_epi16((i16)0xbf80)));
#else
    typedef u8 bytes __attribute__((vector_size(LANES)));
    bytes v;
    std::memcpy(&v, p, sizeof v);
    vi bits = __builtin_convertvector(v, vi), sign = (bits & 0x80) << 24;
    vf normal = (vf)(((bits & 0x7f) << 20) + (112 << 23)), small = __builtin_convertvector(bits & 7, vf) * 0x1p-17f;
    return (vf)((vi)((bits & 0x78) != 0 ? normal : small) | sign);
#endif
}

}  // namespace slim
