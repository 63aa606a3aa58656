// How the numbers of each packed format become bytes for a dot product. A block, which is unpacked together, is LINES
// lines with the STEPS x 4 columns of a panel; step(lines, s) is its step s, plus BIAS, as Kind takes it.
#pragma once
#include "dot.h"
#include "packed.h"

namespace slim {

template <class Dot>
struct Int8Code {
    using Kind = Dot;
    static constexpr int LINES = 1, STEPS = 1, BIAS = INT8_BIAS;
    static vi step(const vi (&lines)[LINES], int) { return lines[0]; }
};

struct Int4Code {
    using Kind = Nibbles;
    static constexpr int LINES = 1, STEPS = 2, BIAS = INT4_BIAS;
    static vi step(const vi (&lines)[LINES], int s) { return (s ? lines[0] >> 4 : lines[0]) & 0x0f0f0f0f; }
};

struct Int3Code {
    using Kind = Nibbles;
    static constexpr int LINES = 3, STEPS = 8, BIAS = INT3_BIAS;
    static vi step(const vi (&lines)[LINES], int s) {
        vi high = s < 2 ? lines[2] << (2 - s) : lines[2] >> (s - 2);
        return ((lines[s / 4] >> (2 * (s % 4))) & 0x03030303) | (high & 0x04040404);
    }
};

// The level that each byte of 0..15 stands for, plus BIAS.
static inline vi nf4_levels(vi codes) {
    alignas(16) static constexpr u8 LEVELS[16] = {
        (u8)(INT8_BIAS - 127), (u8)(INT8_BIAS - 88), (u8)(INT8_BIAS - 67), (u8)(INT8_BIAS - 50),
        (u8)(INT8_BIAS - 36), (u8)(INT8_BIAS - 23), (u8)(INT8_BIAS - 12), (u8)INT8_BIAS,
        (u8)(INT8_BIAS + 10), (u8)(INT8_BIAS + 20), (u8)(INT8_BIAS + 31), (u8)(INT8_BIAS + 43),
        (u8)(INT8_BIAS + 56), (u8)(INT8_BIAS + 71), (u8)(INT8_BIAS + 92), (u8)(INT8_BIAS + 127)};
#if defined(__AVX512BW__) && !defined(SLIM_SCALAR)
    return (vi)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)LEVELS)), (__m512i)codes);
#elif defined(__AVX2__) && !defined(__AVX512F__) && !defined(SLIM_SCALAR)
    __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)LEVELS));
    return (vi)_mm256_shuffle_epi8(table, (__m256i)codes);
#elif defined(__aarch64__) && !defined(SLIM_SCALAR)
    return (vi)vqtbl1q_u8(vld1q_u8(LEVELS), (uint8x16_t)codes);
#else
    u8 bytes[sizeof codes];
    std::memcpy(bytes, &codes, sizeof bytes);
    for (u8& byte : bytes) byte = LEVELS[byte];
    return load_bits(bytes);
#endif
}

template <class Dot>
struct Nf4Code {
    using Kind = Dot;
    static constexpr int LINES = 1, STEPS = 2, BIAS = INT8_BIAS;
    static vi step(const vi (&lines)[LINES], int s) { return nf4_levels(Int4Code::step(lines, s)); }
};

}  // namespace slim
