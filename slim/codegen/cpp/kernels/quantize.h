// The input of a linear, loaded once and put into the order in which the kernels read it.
#pragma once
#include "dot.h"
#include "packed.h"

namespace slim {

// Rows are cut into tiles of nearly equal height, the higher ones first; a tile is multiplied at once.
struct Tiles {
    i64 rows, count;

    Tiles(i64 rows, i64 height) : rows(rows), count(ceil_div(rows, height)) {
        low = rows / count;
        higher = rows % count;
    }
    i64 begin(i64 tile) const { return tile * low + (tile < higher ? tile : higher); }
    i64 height(i64 tile) const { return low + (tile < higher); }
    i64 of(i64 row) const {
        i64 in_higher = higher * (low + 1);
        return row < in_higher ? row / (low + 1) : higher + (row - in_higher) / low;
    }

private:
    i64 low, higher;
};

template <class Function>
static inline void for_each_weight(const Linear& args, Function&& function) {
    for (i64 p = 0; p < args.part_count; p++)
        for (i64 l = 0; l < args.parts[p].lane_count; l++) function(*args.parts[p].lanes[l]);
}

// A unit is a run of columns in which neither the scale of the input nor that of any weight changes: within it sums
// are integers.
struct Grouping {
    static constexpr i64 MAX_UNIT = 256;
    i64 unit, units, units_per_scale;  // unit divides MAX_UNIT

    Grouping(const Linear& args) {
        bool whole = args.step || args.act_group <= 0 || args.act_group >= args.n;
        i64 least = GROUP_STEP;
        for_each_weight(args, [&](const Matrix& w) { least = w.format == Format::int3 ? INT3_STEP : least; });
        i64 act = whole ? round_up(args.n, MAX_UNIT) : round_up(args.act_group, least);
        unit = divisor(MAX_UNIT, act);
        for_each_weight(args, [&](const Matrix& w) {
            if (w.group && is_packed(w.format)) unit = divisor(unit, w.group);
        });
        units = ceil_div(args.n, unit);
        units_per_scale = act / unit;
    }

private:
    static i64 divisor(i64 a, i64 b) { return b ? divisor(b, a % b) : a; }
};

struct Input {
    Tiles tiles;
    Grouping grouping;
    i64 n, padded;  // padded: to whole vectors and blocks, with zeros
    bool by_row;    // floats are [row][padded]; else all are [tile][step][row of the tile], 4 bytes each
    bool clips;     // see Linear
    float* floats;  // null where no weight wants them; so with bytes and words
    u32* bytes;
    u32* words;
    float* scales;  // [tile][unit][row of the tile], of the input
    i32* starts;    // likewise: what to start sums of int4 with, as its weights are stored with a bias

    Input(Tiles tiles, Grouping grouping) : tiles(tiles), grouping(grouping) {}
    template <class T>
    static T* tile(T* all, const Tiles& tiles, i64 index, i64 row_length) {
        return all + tiles.begin(index) * row_length;
    }
};

static inline i64 padded_width(i64 n) { return round_up(n, INT3_STEP); }

// Bytes of an Input's arrays, and where each starts.
struct InputLayout {
    i64 floats, bytes, words, scales, starts, total;

    InputLayout(i64 rows, i64 n) {
        i64 numbers = rows * padded_width(n), units = rows * ceil_div(n, GROUP_STEP);
        floats = 0;
        bytes = floats + round_up(numbers * 4, LINE);
        words = bytes + round_up(numbers, LINE);
        scales = words + (WIDENS ? round_up(numbers * 2, LINE) : 0);
        starts = scales + round_up(units * 4, LINE);
        total = starts + round_up(units * 4, LINE);
    }
};

static inline i64 row_buffer_bytes(i64 n) { return round_up(padded_width(n) * 5, LINE); }

// Integer maximum of the bits: unlike a float one it keeps NaN and infinity, which then reach the result.
static inline float largest_magnitude(const float* x, i64 count) {
    vi largest{};
    for (i64 i = 0; i < count; i += LANES) {
        vi bits = absolute_bits(load(x + i));
        largest = bits > largest ? bits : largest;
    }
    return bits_to_float((u32)max_lanes(largest));
}

// Returns the sum of q.
static inline i32 quantize_unit(const float* x, i64 count, float inverse, i8* q) {
    vi sum{};
    for (i64 i = 0; i < count; i += LANES) {
        vi v = round_to_int(load(x + i) * inverse);
        sum += v;
        narrow(v, q + i);
    }
    return sum_lanes(sum);
}

// The same for x / step, which may be out of range.
static inline i32 clamp_unit(const float* x, i64 count, float step, i8* q) {
    const vf low = splat(-128), high = splat(127);
    vi sum{};
    for (i64 i = 0; i < count; i += LANES) {
        vf steps = load(x + i) / step;
        steps = steps < low ? low : steps;
        vi v = round_to_int(steps > high ? high : steps);
        sum += v;
        narrow(v, q + i);
    }
    return sum_lanes(sum);
}

// Rounds x[0..padded) into q by one step, as the program says; scales and starts of the units, `stride` apart.
static inline void round_row(const Input& in, const float* x, i8* q, float step, float* scales, i32* starts,
                             i64 stride) {
    const Grouping& by = in.grouping;
    for (i64 u = 0; u < by.units; u++) {
        i64 from = u * by.unit, to = from + by.unit < in.padded ? from + by.unit : in.padded;
        scales[u * stride] = step;
        starts[u * stride] = -INT4_BIAS * clamp_unit(x + from, to - from, step, q + from);
    }
}

// Quantises x[0..padded) into q by steps of the kernels' own; scales and starts as of round_row.
static inline void quantize_row(const Input& in, const float* x, i8* q, float* scales, i32* starts, i64 stride) {
    const Grouping& by = in.grouping;
    for (i64 u = 0; u < by.units; u += by.units_per_scale) {
        i64 last = u + by.units_per_scale < by.units ? u + by.units_per_scale : by.units;
        i64 begin = u * by.unit, end = last * by.unit < in.padded ? last * by.unit : in.padded;
        float largest = largest_magnitude(x + begin, end - begin);
        float inverse = largest < 1e-30f ? 0.0f : 127.0f / largest;
        for (i64 v = u; v < last; v++) {
            i64 from = v * by.unit, to = from + by.unit < end ? from + by.unit : end;
            scales[v * stride] = largest / 127.0f;
            starts[v * stride] = -INT4_BIAS * quantize_unit(x + from, to - from, inverse, q + from);
        }
    }
}

template <class T>
static inline void interleave(const T* steps, i64 count, u32* to, i64 stride) {
    if (stride == 1) {
        std::memcpy(to, steps, count * 4);
        return;
    }
    for (i64 s = 0; s < count; s++) std::memcpy(to + s * stride, reinterpret_cast<const u8*>(steps) + s * 4, 4);
}

static inline void interleave_words(const i8* q, i64 count, u32* to, i64 stride) {
    for (i64 s = 0; s < count; s++) to[s * stride] = (u16)(i16)q[2 * s] | (u32)(u16)(i16)q[2 * s + 1] << 16;
}

// Loads row `row` (of the linear: first + row) and prepares it. buffer: row_buffer_bytes().
static inline void prepare_row(const Input& in, const Linear& args, i64 first, i64 row, void* buffer) {
    i64 tile = in.tiles.of(row), height = in.tiles.height(tile), place = row - in.tiles.begin(tile);
    bool direct = in.floats && in.by_row;
    float* x = direct ? in.floats + row * in.padded : static_cast<float*>(buffer);
    args.load(args.env, first + row, x);
    for (i64 i = in.n; i < in.padded; i++) x[i] = 0;
    i8* q = reinterpret_cast<i8*>(static_cast<float*>(buffer) + in.padded);
    i64 units = in.grouping.units;
    float* scales = Input::tile(in.scales, in.tiles, tile, units) + place;
    i32* starts = Input::tile(in.starts, in.tiles, tile, units) + place;
    if (args.step) {
        float step = args.step(args.env, first + row, x);
        round_row(in, x, q, step, scales, starts, height);
        for (i64 i = 0; in.floats && i < in.n; i++) x[i] = q[i] * step;
    } else if (in.bytes || in.words) {
        quantize_row(in, x, q, scales, starts, height);
    }
    if (in.floats && !direct)
        interleave(x, in.padded, reinterpret_cast<u32*>(Input::tile(in.floats, in.tiles, tile, in.padded)) + place,
                   height);
    if (in.bytes) interleave(q, in.padded / 4, Input::tile(in.bytes, in.tiles, tile, in.padded / 4) + place, height);
    if (in.words)
        interleave_words(q, in.padded / 2, Input::tile(in.words, in.tiles, tile, in.padded / 2) + place, height);
}

// y[row][column] *= scale[column]
static inline void scale_columns(float* y, i64 stride, i64 rows, const float* scale, i64 columns) {
    for (i64 c = 0; c < columns; c += LANES) {
        vf factor = columns - c < LANES ? load_some(scale + c, columns - c) : load(scale + c);
        for (i64 r = 0; r < rows; r++) store(y + r * stride + c, load(y + r * stride + c) * factor);
    }
}

}  // namespace slim
