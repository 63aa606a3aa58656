// How pack() lays the numbers of int8, int4, int3 and nf4 weights out. A panel is 16 output rows, padded with zeros; after
// a header the panels follow one another, each its group scales and zero points, then its numbers, both starting on a
// cache line.
#pragma once
#include "kernels.h"

namespace slim {

constexpr int PANEL = 16;
constexpr i64 LINE = 64;        // bytes; also of the 16 rows x 4 columns (int4: 8) that are stored side by side
constexpr i64 GROUP_STEP = 16;  // groups, of weights and of activations, are multiples of this
constexpr i64 INT3_STEP = 32;   // those of int3, and of what shares an input with it, of this
constexpr int ZERO_BIAS = 127;  // a zero point z is stored as 127 - z, 0..255: what sums of the input are multiplied by

static inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
static inline i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

enum class ScaleFormat : i32 { none = 0, f16 = 1, f32 = 2 };

static inline bool is_packed(Format format) {
    return format == Format::int8 || format == Format::int4 || format == Format::int3 || format == Format::nf4;
}
// Whether the numbers are bytes where they are multiplied; else they are nibbles.
static inline bool is_bytes(Format format) { return format == Format::int8 || format == Format::nf4; }

struct PackedHeader {
    ScaleFormat scales;
    i32 zeros;  // whether there are zero points
    u8 unused[LINE - sizeof(ScaleFormat) - sizeof(i32)];
};

// Numbers of a panel, in blocks of whole lines of 64 bytes. int8: a line of 16 x 4, [row][column]. int4 and nf4: a line
// of 16 x 8, where a byte holds columns c (low nibble) and c + 4, so that either nibble of the line is 16 x 4 again. int3:
// three lines of 16 x 32; a byte of the first holds the two low bits of columns c, c + 4, c + 8 and c + 12, one of the
// second those of c + 16 and on, and one of the third the high bits of all eight.
struct PackedLayout {
    i64 panels, groups;
    i64 columns, block_lines, blocks;  // columns and lines of a block; blocks of a panel
    i64 scale_size, group_bytes;       // of the scales and zero points of a group, which lie side by side
    i64 data_offset, panel_bytes;

    PackedLayout(Format format, i64 m, i64 n, i64 group, ScaleFormat scales, bool zeros) {
        panels = ceil_div(m, PANEL);
        columns = format == Format::int8 ? 4 : (format == Format::int3 ? INT3_STEP : 8);
        block_lines = format == Format::int3 ? 3 : 1;
        blocks = ceil_div(n, columns);
        groups = group ? n / group : 0;
        scale_size = scales == ScaleFormat::f16 ? 2 : 4;
        group_bytes = PANEL * (scale_size + (zeros ? 1 : 0));
        data_offset = round_up(groups * group_bytes, LINE);
        panel_bytes = data_offset + blocks * block_lines * LINE;
    }
};

// A packed weight, opened for reading.
struct Packed : PackedLayout {
    const u8* base;
    ScaleFormat scales;
    bool zeros;

    explicit Packed(const Matrix& w) : Packed(w, *static_cast<const PackedHeader*>(w.data)) {}

    const u8* panel(i64 index) const { return base + index * panel_bytes; }
    const u8* numbers(i64 index) const { return panel(index) + data_offset; }
    // Of LANES of a panel's rows, the vector'th ones.
    vf group_scale(const u8* panel, i64 group, int vector) const {
        const u8* at = panel + group * group_bytes;
        if (scales == ScaleFormat::f16) return load(reinterpret_cast<const f16*>(at) + vector * LANES);
        return load(reinterpret_cast<const float*>(at) + vector * LANES);
    }
    vi group_zero(const u8* panel, i64 group, int vector) const {
        typedef u8 bytes __attribute__((vector_size(LANES)));
        bytes v;
        std::memcpy(&v, panel + group * group_bytes + PANEL * scale_size + vector * LANES, sizeof v);
        return __builtin_convertvector(v, vi);
    }

private:
    Packed(const Matrix& w, const PackedHeader& header)
        : PackedLayout(w.format, w.m, w.n, w.group, header.scales, header.zeros) {
        base = static_cast<const u8*>(w.data) + sizeof(PackedHeader);
        scales = header.scales;
        zeros = header.zeros;
    }
};

}  // namespace slim
