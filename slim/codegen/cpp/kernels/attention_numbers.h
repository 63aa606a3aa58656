// Numbers of a cache as attention reads and writes them: floats of any width, int8, two int4 in a byte.
#pragma once
#include "dot.h"
#include "kernels.h"

namespace slim {

struct nibbles {  // two numbers, each plus 8; the first in the low half
    u8 both;
};

template <class T>
static constexpr bool QUANTIZED = std::is_same<T, i8>::value || std::is_same<T, nibbles>::value;
template <class T>
static constexpr i64 IN_ONE = std::is_same<T, nibbles>::value ? 2 : 1;  // numbers in a T

// Where number i of a row is; i is even for nibbles.
template <class T>
static constexpr const T* at(const T* row, i64 i) { return row + i / IN_ONE<T>; }
// Bytes of n numbers.
template <class T>
static constexpr i64 bytes_of(i64 n) { return n / IN_ONE<T> * (i64)sizeof(T); }

static inline vf load(const i8* p) {
    typedef i8 narrow __attribute__((vector_size(LANES)));
    narrow v;
    std::memcpy(&v, p, sizeof v);
#if defined(__AVX512F__) && !defined(SLIM_SCALAR)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)v));
#elif defined(__AVX2__) && !defined(SLIM_SCALAR)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return to_float(__builtin_convertvector(v, vi));
#endif
}

// LANES numbers of LANES / 2 bytes, in their order: each lane shifts its own nibble down.
static inline vf load(const nibbles* p) {
#if defined(__AVX512F__) && !defined(SLIM_SCALAR)
    const __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i shift = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512 number = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m512i bits = _mm512_permutexvar_epi32(half, _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i*)p)));
    return (vf)_mm512_permutexvar_ps(_mm512_srlv_epi32(bits, shift), number);  // which looks at four bits alone
#elif defined(__AVX2__) && !defined(SLIM_SCALAR)
    i32 four;
    std::memcpy(&four, p, 4);
    __m256i bits = _mm256_srlv_epi32(_mm256_set1_epi32(four), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    return (vf)_mm256_cvtepi32_ps(_mm256_and_si256(bits, _mm256_set1_epi32(15))) - 8.0f;
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = (float)((p[i / 2].both >> i % 2 * 4 & 15) - 8);
    return v;
#endif
}

// n numbers as floats, times a factor.
template <class T>
static void widen(const T* x, i64 n, float factor, float* y) {
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, load(at(x, i)) * factor);
    for (; i < n; i++) {
        if constexpr (IN_ONE<T> == 2) y[i] = factor * (float)((x[i / 2].both >> i % 2 * 4 & 15) - 8);
        else y[i] = factor * (float)x[i];
    }
}

// Whole numbers nearest to x / step, ties to even, between low and 127 or 7.
template <class T>
static void round_row(const float* __restrict x, i64 n, float step, T* __restrict y) {
    constexpr float low = IN_ONE<T> == 2 ? -8.0f : -128.0f, high = IN_ONE<T> == 2 ? 7.0f : 127.0f;
    auto number = [&](i64 i) {
        float steps = std::nearbyint(x[i] / step);
        steps = steps > low ? steps : low;
        return (i32)(steps < high ? steps : high);
    };
    if constexpr (IN_ONE<T> == 2) {
        for (i64 i = 0; i < n; i += 2) y[i / 2].both = (u8)((number(i) + 8) | (number(i + 1) + 8) << 4);
    } else {
        for (i64 i = 0; i < n; i++) y[i] = (T)number(i);
    }
}

// slim.token_scale: what a row of n is rounded in.
template <class T>
static float step_of(const float* x, i64 n) {
    float low = x[0], high = x[0];
    for (i64 i = 1; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    constexpr float tiny = 1.17549435e-38f;
    if (IN_ONE<T> == 2) {
        float step = (high > -low ? high : low) / -8.0f;
        return std::fabs(step) < tiny ? tiny : step;
    }
    float step = (high > -low ? high : -low) / 127.0f;
    return step > tiny ? step : tiny;
}

// Puts n floats into the cache.
template <class T>
static void put(const float* __restrict x, i64 n, T* __restrict y, float* scale) {
    if constexpr (QUANTIZED<T>) {
        *scale = step_of<T>(x, n);
        round_row(x, n, *scale, y);
    } else {
        (void)scale;
        for (i64 i = 0; i < n; i++) y[i] = T(x[i]);
    }
}

}  // namespace slim
