// How pack() lays int8 and int4 weights out. A panel is 16 output rows, padded with zeros; after a header the panels
// follow one another, each its group scales, then its numbers, both starting on a cache line.
#pragma once
#include "kernels.h"

namespace slim {

constexpr int PANEL = 16;
constexpr i64 LINE = 64;        // bytes; also of the 16 rows x 4 columns (int4: 8) that are stored side by side
constexpr i64 GROUP_STEP = 16;  // groups, of weights and of activations, are multiples of this

static inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
static inline i64 round_up(i64 a, i64 b) { return ceil_div(a, b) * b; }

enum class ScaleFormat : i32 { none = 0, f16 = 1, f32 = 2 };

static inline bool is_quantized(const Matrix& w) { return w.format == Format::int8 || w.format == Format::int4; }

struct PackedHeader {
    ScaleFormat scales;
    u8 unused[LINE - sizeof(ScaleFormat)];
};

// Numbers of a panel, in lines of 64 bytes: 16 x 4 int8, [row][column]; or 16 x 8 int4, where a byte holds columns c
// (low nibble) and c + 4, so that either nibble of the line is 16 x 4 again.
struct PackedLayout {
    i64 panels, lines, groups;  // lines and groups of a panel
    i64 scale_size;
    i64 data_offset, panel_bytes;

    PackedLayout(Format format, i64 m, i64 n, i64 group, ScaleFormat scales) {
        panels = ceil_div(m, PANEL);
        lines = ceil_div(n, format == Format::int4 ? 8 : 4);
        groups = group ? n / group : 0;
        scale_size = scales == ScaleFormat::f16 ? 2 : 4;
        data_offset = round_up(groups * PANEL * scale_size, LINE);
        panel_bytes = data_offset + lines * LINE;
    }
};

// A packed weight, opened for reading.
struct Packed : PackedLayout {
    const u8* base;
    ScaleFormat scales;

    explicit Packed(const Matrix& w) : Packed(w, static_cast<const PackedHeader*>(w.data)->scales) {}

    const u8* numbers(i64 panel) const { return base + panel * panel_bytes + data_offset; }
    // Of LANES of the panel's rows, the vector'th ones.
    vf group_scale(i64 panel, i64 group, int vector) const {
        const u8* all = base + panel * panel_bytes;
        i64 index = group * PANEL + vector * LANES;
        if (scales == ScaleFormat::f16) return load(reinterpret_cast<const f16*>(all) + index);
        return load(reinterpret_cast<const float*>(all) + index);
    }

private:
    Packed(const Matrix& w, ScaleFormat format) : PackedLayout(w.format, w.m, w.n, w.group, format) {
        base = static_cast<const u8*>(w.data) + sizeof(PackedHeader);
        scales = format;
    }
};

}  // namespace slim
