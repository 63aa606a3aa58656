// Few input rows: every weight is read once and multiplied with all of them. Bound by memory, so weights stream through
// in the order they lie in, and nothing is written but results.
#pragma once
#include "quantize.h"

namespace slim {

constexpr i64 RUN_COLUMNS = 256;  // of results handed out at once

// Input rows at a time: as many as registers hold sums for. Few of them go against several panels at once, each a stream
// of its own: a core reads several a good tenth faster than one.
constexpr int GEMV_HEIGHT = VECTORS == 1 ? 8 : 4;
constexpr int GEMV_FLOAT_HEIGHT = VECTORS == 1 ? 4 : 2;
constexpr int MOST_STREAMS = VECTORS == 1 ? 4 : 2;
constexpr int gemv_streams(int height) { return height == 1 ? MOST_STREAMS : height <= 3 && VECTORS == 1 ? 2 : 1; }
constexpr int PREFETCH = 2048;  // bytes ahead: the hardware's own stops at each page

// -- int8 and int4 ----------------------------------------------------------------------------------------------------

// Half or whole of a line, as 4 columns of LANES rows each.
template <bool NIBBLES>
static inline vi line_half(vi raw, int half) {
    if (!NIBBLES) return raw;
    return half ? high_nibbles(raw) : low_nibbles(raw);
}

// Where the numbers of a unit lie, in each of several panels that are `stride` bytes apart.
struct GemvUnit {
    const u8* w;
    i64 stride, ahead;  // ahead: bytes from a line to the one to ask for
    const u32* x;
    const i32* starts;
    i64 lines;
};

// total[panel][r] += lines of the panels times row r of a tile. LINES: how many, where it is known (0: it is not).
template <class Kind, bool NIBBLES, int HEIGHT, int PANELS, int LINES>
static inline void gemv_lines(vi (&total)[PANELS][HEIGHT][VECTORS], const GemvUnit& unit) {
    constexpr int HALVES = NIBBLES ? 2 : 1;
    constexpr int UNROLL = Kind::RUN ? Kind::RUN / HALVES : (HEIGHT * VECTORS * PANELS > 4 ? 1 : 4);
    const i64 count = LINES ? LINES : unit.lines;
    vi sums[PANELS][HEIGHT][VECTORS] = {};
    auto line = [&](i64 i) {
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) {
            const u8* w = unit.w + p * unit.stride + i * LINE;
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                vi raw = load_bits(w + v * sizeof(vi));
#pragma GCC unroll 2
                for (int half = 0; half < HALVES; half++) {
                    vi numbers = line_half<NIBBLES>(raw, half);
#pragma GCC unroll 8
                    for (int r = 0; r < HEIGHT; r++) {
                        vi x = splat_bits(unit.x + (i * HALVES + half) * HEIGHT + r);
                        if constexpr (Kind::RUN) sums[p][r][v] = Kind::add(sums[p][r][v], numbers, x);
                        else total[p][r][v] = Kind::add(total[p][r][v], numbers, x);
                    }
                }
            }
            __builtin_prefetch(w + unit.ahead);
        }
    };
    auto flush = [&] {
        if constexpr (Kind::RUN)
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 8
                for (int r = 0; r < HEIGHT; r++)
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++) {
                        total[p][r][v] = Kind::fold(total[p][r][v], sums[p][r][v]);
                        sums[p][r][v] = vi{};
                    }
    };
    i64 i = 0;
#pragma GCC unroll 4
    for (; i + UNROLL <= count; i += UNROLL) {
#pragma GCC unroll 8
        for (int u = 0; u < UNROLL; u++) line(i + u);
        flush();
    }
    for (; i < count; i++) line(i);
    flush();
}

// total = a unit's integer products, free of the bias that its weights are stored with.
template <class Kind, bool NIBBLES, int HEIGHT, int PANELS>
static inline void gemv_unit(vi (&total)[PANELS][HEIGHT][VECTORS], const GemvUnit& unit) {
    constexpr int SHORT = NIBBLES ? 4 : 8;  // lines of a group of 32: so few that a loop would cost
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; r++) {
        vi start = vi{} + unit.starts[r] * (NIBBLES ? 1 : INT8_BIAS / INT4_BIAS);
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) total[p][r][v] = start;
    }
    if (unit.lines == SHORT) gemv_lines<Kind, NIBBLES, HEIGHT, PANELS, SHORT>(total, unit);
    else gemv_lines<Kind, NIBBLES, HEIGHT, PANELS, 0>(total, unit);
}

// Panels of a weight that are read side by side.
struct Streams {
    i64 first, apart;  // panels first, first + apart, ...
    i64 left;          // bytes until each of them turns to another place
    i64 jump;          // how far that is from where it would go on
};

// y[r][panel * PANEL..): panels times row r of a tile, without the scales of whole weight rows.
template <class Kind, bool NIBBLES, int HEIGHT, int PANELS>
static void gemv_panels(const Packed& w, const Streams& at, i64 group, const Input& in, i64 tile, float* y,
                        i64 stride) {
    constexpr i64 COLUMNS = NIBBLES ? 8 : 4;  // of a line
    const Grouping& by = in.grouping;
    const float* scales = Input::tile(in.scales, in.tiles, tile, by.units);
    i64 unit_lines = by.unit / COLUMNS, left = w.lines, units_per_group = group / by.unit;
    GemvUnit unit{w.numbers(at.first), at.apart * w.panel_bytes, PREFETCH,
                  Input::tile(in.bytes, in.tiles, tile, in.padded / 4),
                  Input::tile(in.starts, in.tiles, tile, by.units), 0};
    vf result[PANELS][HEIGHT][VECTORS] = {};
    for (i64 u = 0, g = 0, in_group = 0; u < by.units; u++) {
        unit.lines = left < unit_lines ? left : unit_lines;
        if (at.left - (w.lines - left) * LINE <= PREFETCH) unit.ahead = PREFETCH + at.jump;
        vi total[PANELS][HEIGHT][VECTORS];
        gemv_unit<Kind, NIBBLES, HEIGHT, PANELS>(total, unit);
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                vf scale = group ? w.group_scale(at.first + p * at.apart, g, v) : splat(1);
#pragma GCC unroll 8
                for (int r = 0; r < HEIGHT; r++)
                    result[p][r][v] += to_float(total[p][r][v]) * (scale * scales[u * HEIGHT + r]);
            }
        left -= unit_lines;
        unit.w += unit_lines * LINE;
        unit.x += unit_lines * (COLUMNS / 4) * HEIGHT;
        unit.starts += HEIGHT;
        if (++in_group == units_per_group) g++, in_group = 0;
    }
    for (int p = 0; p < PANELS; p++)
        for (int r = 0; r < HEIGHT; r++)
            for (int v = 0; v < VECTORS; v++)
                store(y + p * at.apart * PANEL + r * stride + v * LANES, result[p][r][v]);
}

// Panels begin..end against one tile; `next` is what is read after them.
template <class Kind, bool NIBBLES, int HEIGHT, int PANELS = gemv_streams(HEIGHT)>
static void gemv_run(const Packed& w, i64 begin, i64 end, const u8* next, i64 group, const Input& in, i64 tile,
                            float* y, i64 stride) {
    i64 apart = (end - begin) / PANELS, jump = next - w.numbers(begin + apart);
    for (i64 p = 0; p < apart; p++)
        gemv_panels<Kind, NIBBLES, HEIGHT, PANELS>(w, {begin + p, apart, (apart - p) * w.panel_bytes, jump}, group, in,
                                                   tile, y + p * PANEL, stride);
    begin += apart * PANELS;
    if constexpr (PANELS > 1)
        if (begin < end)
            gemv_run<Kind, NIBBLES, HEIGHT, PANELS / 2>(w, begin, end, next, group, in, tile,
                                                               y + apart * PANELS * PANEL, stride);
}

template <class Kind, bool NIBBLES, int HEIGHT = GEMV_HEIGHT>
static void gemv_tile(const Packed& w, i64 begin, i64 end, const u8* next, i64 group, const Input& in, i64 tile,
                      float* y, i64 stride) {
    if constexpr (HEIGHT > 1)
        if (in.tiles.height(tile) < HEIGHT)
            return gemv_tile<Kind, NIBBLES, HEIGHT - 1>(w, begin, end, next, group, in, tile, y, stride);
    gemv_run<Kind, NIBBLES, HEIGHT>(w, begin, end, next, group, in, tile, y, stride);
}

static inline void gemv_packed(const Matrix& w, const Input& in, i64 begin, i64 end, const u8* next, float* y) {
    Packed packed(w);
    for (i64 t = 0; t < in.tiles.count; t++) {
        float* to = y + in.tiles.begin(t) * RUN_COLUMNS;
        if (w.format == Format::int8)
            gemv_tile<Bytes, false>(packed, begin, end, next, w.group, in, t, to, RUN_COLUMNS);
        else gemv_tile<Nibbles, true>(packed, begin, end, next, w.group, in, t, to, RUN_COLUMNS);
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

// y[row][0..): panels begin..end of a weight, at most RUN_COLUMNS numbers. Panel next_panel of `next` comes after them.
static inline void gemv(const Matrix& w, const Input& in, i64 begin, i64 end, const Matrix& next, i64 next_panel,
                        float* y) {
    switch (w.format) {
        case Format::f32: return gemv_rows<float>(w, in, begin, end, y);
        case Format::bf16: return gemv_rows<bf16>(w, in, begin, end, y);
        case Format::f16: return gemv_rows<f16>(w, in, begin, end, y);
        default: {
            bool foreseen = is_quantized(next);
            const u8* after = Packed(foreseen ? next : w).numbers(foreseen ? next_panel : end);
            return gemv_packed(w, in, begin, end, after, y);
        }
    }
}

}  // namespace slim
