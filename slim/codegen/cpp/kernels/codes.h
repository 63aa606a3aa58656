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

// -- whole blocks for a prefill ----------------------------------------------------------------------------------------

// 4 bytes of a row become 2 + 2 words, in two steps.
static inline void store_words(vi bytes, u8* to) {
    vi first = (((bytes << 24) >> 24) & 0xffff) | (((bytes << 16) >> 8) & (i32)0xffff0000);
    vi second = (((bytes << 8) >> 24) & 0xffff) | ((bytes >> 8) & (i32)0xffff0000);
    store_bits(to, first);
    store_bits(to + LINE, second);
}

// Blocks as the steps that the tile kernels read: nibbles with the bias of int4, bytes with that of int8 or as words.
template <class Code, bool WORDS = false>
static void unpack_blocks(const u8* from, i64 count, u8* to) {
    constexpr i32 SHIFT = Code::BIAS == INT3_BIAS ? 0x01010101 * (INT4_BIAS - INT3_BIAS) : 0;
    for (i64 i = 0; i < count; i++) {
        for (int v = 0; v < VECTORS; v++) {
            vi lines[Code::LINES];
            for (int l = 0; l < Code::LINES; l++)
                lines[l] = load_bits(from + (i * Code::LINES + l) * LINE + v * sizeof(vi));
#pragma GCC unroll 8
            for (int s = 0; s < Code::STEPS; s++) {
                vi numbers = Code::step(lines, s) + SHIFT;
                u8* place = to + (i * Code::STEPS + s) * LINE * (WORDS ? 2 : 1) + v * sizeof(vi);
                if constexpr (WORDS) store_words(numbers, place);
                else store_bits(place, numbers);
            }
        }
    }
}

static inline void unpack_panel(Format format, const u8* from, i64 count, u8* to) {
    switch (format) {
        case Format::int8: return unpack_blocks<Int8Code<Bytes>, WIDENS>(from, count, to);
        case Format::nf4: return unpack_blocks<Nf4Code<Bytes>, WIDENS>(from, count, to);
        case Format::int3: return unpack_blocks<Int3Code>(from, count, to);
        default: return unpack_blocks<Int4Code>(from, count, to);
    }
}

}  // namespace slim
