// Few input rows: every weight is read once and multiplied with all of them. Bound by memory, so weights stream through
// in the order they lie in, and nothing is written but results.
#pragma once
#include "quantize.h"

namespace slim {

constexpr i64 RUN_COLUMNS = 128;  // of results handed out at once

// Input rows against one panel at a time: as many as registers hold sums for.
constexpr int GEMV_HEIGHT = VECTORS == 1 ? 8 : 4;
constexpr int GEMV_FLOAT_HEIGHT = VECTORS == 1 ? 4 : 2;
constexpr int PREFETCH = 2048;  // bytes ahead: the hardware's own stops at each page

// -- int8 and int4 ----------------------------------------------------------------------------------------------------

// Half or whole of a line, as 4 columns of LANES rows each.
template <bool NIBBLES>
static inline vi line_half(vi raw, int half) {
    if (!NIBBLES) return raw;
    return half ? high_nibbles(raw) : low_nibbles(raw);
}

// total[r] += lines of one panel times row r of a tile. LINES: how many, where it is known (0: it is not).
template <class Kind, bool NIBBLES, int HEIGHT, int LINES>
static inline void gemv_lines(vi (&total)[HEIGHT][VECTORS], const u8* w, const u32* x, i64 lines) {
    constexpr int HALVES = NIBBLES ? 2 : 1;
    // with few rows, several chains of additions, so that none waits for the one before
    constexpr int CHAINS = Kind::RUN || HEIGHT * VECTORS > 4 ? 1 : (HEIGHT * VECTORS > 2 || LINES ? 2 : 4);
    constexpr int UNROLL = Kind::RUN ? Kind::RUN / HALVES : (HEIGHT * VECTORS > 4 ? 1 : 4);
    const i64 count = LINES ? LINES : lines;
    vi sums[CHAINS][HEIGHT][VECTORS] = {};
    auto line = [&](i64 i, int chain) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            vi raw = load_bits(w + i * LINE + v * sizeof(vi));
#pragma GCC unroll 2
            for (int half = 0; half < HALVES; half++) {
                vi numbers = line_half<NIBBLES>(raw, half);
#pragma GCC unroll 8
                for (int r = 0; r < HEIGHT; r++) {
                    vi& sum = sums[(chain + half) % CHAINS][r][v];
                    sum = Kind::add(sum, numbers, splat_bits(x + (i * HALVES + half) * HEIGHT + r));
                }
            }
        }
        __builtin_prefetch(w + i * LINE + PREFETCH);
    };
    auto flush = [&] {
#pragma GCC unroll 4
        for (int s = 0; s < CHAINS; s++)
#pragma GCC unroll 8
            for (int r = 0; r < HEIGHT; r++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    if constexpr (Kind::RUN) total[r][v] = Kind::fold(total[r][v], sums[s][r][v]);
                    else total[r][v] += sums[s][r][v];
                    sums[s][r][v] = vi{};
                }
    };
    i64 i = 0;
#pragma GCC unroll 4
    for (; i + UNROLL <= count; i += UNROLL) {
#pragma GCC unroll 8
        for (int u = 0; u < UNROLL; u++) line(i + u, u * HALVES);
        if constexpr (Kind::RUN) flush();
    }
    for (; i < count; i++) line(i, 0);
    flush();
}

// Where the numbers of a unit lie.
struct GemvUnit {
    const u8* w;
    const u32* x;
    const i32* starts;
    i64 lines;
};

// total = a unit's integer products, free of the bias that its weights are stored with.
template <class Kind, bool NIBBLES, int HEIGHT>
static inline void gemv_unit(vi (&total)[HEIGHT][VECTORS], const GemvUnit& unit) {
    constexpr int SHORT = NIBBLES ? 4 : 8;  // lines of a group of 32: so few that a loop would cost
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; r++) {
        vi start = vi{} + unit.starts[r] * (NIBBLES ? 1 : INT8_BIAS / INT4_BIAS);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) total[r][v] = start;
    }
    if (unit.lines == SHORT) gemv_lines<Kind, NIBBLES, HEIGHT, SHORT>(total, unit.w, unit.x, SHORT);
    else gemv_lines<Kind, NIBBLES, HEIGHT, 0>(total, unit.w, unit.x, unit.lines);
}

// y[r][0..16): panel times row r of a tile, without the scales of whole weight rows.
template <class Kind, bool NIBBLES, int HEIGHT>
static void gemv_panel(const Packed& w, i64 panel, i64 group, const Input& in, i64 tile, float* y, i64 stride) {
    constexpr i64 COLUMNS = NIBBLES ? 8 : 4;  // of a line
    const Grouping& by = in.grouping;
    const float* scales = Input::tile(in.scales, in.tiles, tile, by.units);
    i64 unit_lines = by.unit / COLUMNS, left = w.lines, units_per_group = group / by.unit;
    GemvUnit unit{w.numbers(panel), Input::tile(in.bytes, in.tiles, tile, in.padded / 4),
                  Input::tile(in.starts, in.tiles, tile, by.units), 0};
    vf result[HEIGHT][VECTORS] = {};
    for (i64 u = 0, g = 0, in_group = 0; u < by.units; u++) {
        unit.lines = left < unit_lines ? left : unit_lines;
        vi total[HEIGHT][VECTORS];
        gemv_unit<Kind, NIBBLES, HEIGHT>(total, unit);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            vf scale = group ? w.group_scale(panel, g, v) : splat(1);
#pragma GCC unroll 8
            for (int r = 0; r < HEIGHT; r++) result[r][v] += to_float(total[r][v]) * (scale * scales[u * HEIGHT + r]);
        }
        left -= unit_lines;
        unit.w += unit_lines * LINE;
        unit.x += unit_lines * (COLUMNS / 4) * HEIGHT;
        unit.starts += HEIGHT;
        if (++in_group == units_per_group) g++, in_group = 0;
    }
    for (int r = 0; r < HEIGHT; r++)
        for (int v = 0; v < VECTORS; v++) store(y + r * stride + v * LANES, result[r][v]);
}

template <class Kind, bool NIBBLES, int HEIGHT = GEMV_HEIGHT>
static void gemv_tile(const Packed& w, i64 panel, i64 group, const Input& in, i64 tile, float* y, i64 stride) {
    if constexpr (HEIGHT > 1)
        if (in.tiles.height(tile) < HEIGHT)
            return gemv_tile<Kind, NIBBLES, HEIGHT - 1>(w, panel, group, in, tile, y, stride);
    gemv_panel<Kind, NIBBLES, HEIGHT>(w, panel, group, in, tile, y, stride);
}

static inline void gemv_packed(const Matrix& w, const Input& in, i64 begin, i64 end, float* y) {
    Packed packed(w);
    for (i64 p = begin; p < end; p++) {
        for (i64 t = 0; t < in.tiles.count; t++) {
            float* to = y + in.tiles.begin(t) * RUN_COLUMNS + (p - begin) * PANEL;
            if (w.format == Format::int8) gemv_tile<Bytes, false>(packed, p, w.group, in, t, to, RUN_COLUMNS);
            else gemv_tile<Nibbles, true>(packed, p, w.group, in, t, to, RUN_COLUMNS);
        }
    }
    i64 columns = (end * PANEL < w.m ? end * PANEL : w.m) - begin * PANEL;
    if (!w.group) scale_columns(y, RUN_COLUMNS, in.tiles.rows, w.scale + begin * PANEL, columns);
}

// -- weights in floating point, read in place -------------------------------------------------------------------------

// y[r][0..ROWS): dot products of ROWS weight rows with the rows of a tile.
template <class T, int ROWS, int HEIGHT>
static void dot_rows(const T* w, i64 n, i64 padded, const float* x, float* y, i64 stride) {
    vf sums[ROWS][HEIGHT] = {};
    auto step = [&](i64 i, auto get) {
#pragma GCC unroll 8
        for (int j = 0; j < ROWS; j++) {
            vf numbers = get(w + j * n + i);
#pragma GCC unroll 8
            for (int r = 0; r < HEIGHT; r++) sums[j][r] += numbers * load(x + r * padded + i);
        }
    };
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) step(i, [](const T* p) { return load(p); });
    if (i < n) step(i, [&](const T* p) { return load_some(p, n - i); });
    for (int j = 0; j < ROWS; j++)
        for (int r = 0; r < HEIGHT; r++) y[r * stride + j] = sum(sums[j][r]);
}

template <class T, int ROWS, int HEIGHT = GEMV_FLOAT_HEIGHT>
static void dot_tile(const T* w, const Input& in, i64 first, i64 height, float* y) {
    if constexpr (HEIGHT > 1)
        if (height < HEIGHT) return dot_tile<T, ROWS, HEIGHT - 1>(w, in, first, height, y);
    dot_rows<T, ROWS, HEIGHT>(w, in.n, in.padded, in.floats + first * in.padded, y + first * RUN_COLUMNS, RUN_COLUMNS);
}

// y[row][0..ROWS): all input rows.
template <class T, int ROWS>
static void dot_all(const T* w, const Input& in, float* y) {
    Tiles tiles(in.tiles.rows, GEMV_FLOAT_HEIGHT);
    for (i64 t = 0; t < tiles.count; t++) dot_tile<T, ROWS>(w, in, tiles.begin(t), tiles.height(t), y);
}

template <class T>
static void gemv_rows(const Matrix& w, const Input& in, i64 begin, i64 end, float* y) {
    const T* data = static_cast<const T*>(w.data);
    i64 first = begin * PANEL, last = end * PANEL < w.m ? end * PANEL : w.m, j = first;
    for (; j + 4 <= last; j += 4) dot_all<T, 4>(data + j * w.n, in, y + j - first);
    for (; j < last; j++) dot_all<T, 1>(data + j * w.n, in, y + j - first);
}

// -- all formats ------------------------------------------------------------------------------------------------------

// y[row][0..): panels begin..end of a weight, at most RUN_COLUMNS numbers.
static inline void gemv(const Matrix& w, const Input& in, i64 begin, i64 end, float* y) {
    switch (w.format) {
        case Format::f32: return gemv_rows<float>(w, in, begin, end, y);
        case Format::bf16: return gemv_rows<bf16>(w, in, begin, end, y);
        case Format::f16: return gemv_rows<f16>(w, in, begin, end, y);
        default: return gemv_packed(w, in, begin, end, y);
    }
}

}  // namespace slim
