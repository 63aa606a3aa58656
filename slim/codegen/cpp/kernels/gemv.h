// Few input rows: every weight is read once and multiplied with all of them. Bound by memory, so weights stream through
// in the order they lie in, and nothing is written but results.
#pragma once
#include <type_traits>

#include "codes.h"
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

// -- packed weights ---------------------------------------------------------------------------------------------------

// Where the numbers of a unit lie, in each of several panels that are `stride` bytes apart.
struct GemvUnit {
    const u8* w;
    i64 stride, ahead;  // ahead: bytes from a line to the one to ask for
    const u32* x;
    const i32* starts;
    i64 blocks;
};

// total[panel][r] += blocks of the panels times row r of a tile. BLOCKS: how many, where it is known (0: it is not).
template <class Code, int HEIGHT, int PANELS, int BLOCKS>
static inline void gemv_blocks(vi (&total)[PANELS][HEIGHT][VECTORS], const GemvUnit& unit) {
    using Kind = typename Code::Kind;
    constexpr int UNROLL = Kind::RUN ? Kind::RUN / Code::STEPS
                                     : (HEIGHT * VECTORS * PANELS > 4 || Code::STEPS > 2 ? 1 : 4);
    const i64 count = BLOCKS ? BLOCKS : unit.blocks;
    vi sums[PANELS][HEIGHT][VECTORS] = {};
    auto block = [&](i64 i) {
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++) {
            const u8* w = unit.w + p * unit.stride + i * Code::LINES * LINE;
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                vi lines[Code::LINES];
#pragma GCC unroll 4
                for (int l = 0; l < Code::LINES; l++) lines[l] = load_bits(w + l * LINE + v * sizeof(vi));
#pragma GCC unroll 8
                for (int s = 0; s < Code::STEPS; s++) {
                    vi numbers = Code::step(lines, s);
#pragma GCC unroll 8
                    for (int r = 0; r < HEIGHT; r++) {
                        vi x = splat_bits(unit.x + (i * Code::STEPS + s) * HEIGHT + r);
                        if constexpr (Kind::RUN) sums[p][r][v] = Kind::add(sums[p][r][v], numbers, x);
                        else total[p][r][v] = Kind::add(total[p][r][v], numbers, x);
                    }
                }
            }
#pragma GCC unroll 4
            for (int l = 0; l < Code::LINES; l++) __builtin_prefetch(w + l * LINE + unit.ahead);
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
        for (int u = 0; u < UNROLL; u++) block(i + u);
        flush();
    }
    for (; i < count; i++) block(i);
    flush();
}

// total = a unit's integer products, free of the bias that its weights are stored with, and of their zero points.
template <class Code, bool ZEROS, int HEIGHT, int PANELS>
static inline void gemv_unit(vi (&total)[PANELS][HEIGHT][VECTORS], const GemvUnit& unit,
                             const vi (&zeros)[PANELS][VECTORS]) {
    constexpr int SHORT = 8 / Code::STEPS;  // blocks of a group of 32: so few that a loop would cost
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; r++) {
        i32 sum = -unit.starts[r] / INT4_BIAS;
        vi start = vi{} - sum * (Code::BIAS + (ZEROS ? ZERO_BIAS : 0));
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                total[p][r][v] = ZEROS ? start + multiply_small(zeros[p][v], vi{} + sum) : start;
    }
    if (unit.blocks == SHORT) gemv_blocks<Code, HEIGHT, PANELS, SHORT>(total, unit);
    else gemv_blocks<Code, HEIGHT, PANELS, 0>(total, unit);
}

// Panels of a weight that are read side by side.
struct Streams {
    i64 first, apart;  // panels first, first + apart, ...
    i64 left;          // bytes until each of them turns to another place
    i64 jump;          // how far that is from where it would go on
};

// y[r][panel * PANEL..): panels times row r of a tile, without the scales of whole weight rows.
template <class Code, bool ZEROS, int HEIGHT, int PANELS>
static void gemv_panels(const Packed& w, const Streams& at, i64 group, const Input& in, i64 tile, float* y,
                        i64 stride) {
    constexpr i64 COLUMNS = 4 * Code::STEPS, BYTES = Code::LINES * LINE;  // of a block
    const Grouping& by = in.grouping;
    const float* scales = Input::tile(in.scales, in.tiles, tile, by.units);
    i64 unit_blocks = by.unit / COLUMNS, left = w.blocks, units_per_group = group / by.unit;
    GemvUnit unit{w.numbers(at.first), at.apart * w.panel_bytes, PREFETCH,
                  Input::tile(in.bytes, in.tiles, tile, in.padded / 4),
                  Input::tile(in.starts, in.tiles, tile, by.units), 0};
    const u8* heads[PANELS];
    for (int p = 0; p < PANELS; p++) heads[p] = w.panel(at.first + p * at.apart);
    vf result[PANELS][HEIGHT][VECTORS] = {};
    vi zeros[PANELS][VECTORS] = {};
    for (i64 u = 0, g = 0, in_group = 0; u < by.units; u++) {
        unit.blocks = left < unit_blocks ? left : unit_blocks;
        if (at.left - (w.blocks - left) * BYTES <= PREFETCH) unit.ahead = PREFETCH + at.jump;
        if constexpr (ZEROS)
            for (int p = 0; p < PANELS; p++)
                for (int v = 0; v < VECTORS; v++) zeros[p][v] = w.group_zero(heads[p], g, v);
        vi total[PANELS][HEIGHT][VECTORS];
        gemv_unit<Code, ZEROS, HEIGHT, PANELS>(total, unit, zeros);
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; p++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                vf scale = group ? w.group_scale(heads[p], g, v) : splat(1);
#pragma GCC unroll 8
                for (int r = 0; r < HEIGHT; r++)
                    result[p][r][v] += to_float(total[p][r][v]) * (scale * scales[u * HEIGHT + r]);
            }
        left -= unit_blocks;
        unit.w += unit_blocks * BYTES;
        unit.x += unit_blocks * Code::STEPS * HEIGHT;
        unit.starts += HEIGHT;
        if (++in_group == units_per_group) g++, in_group = 0;
    }
    for (int p = 0; p < PANELS; p++)
        for (int r = 0; r < HEIGHT; r++)
            for (int v = 0; v < VECTORS; v++)
                store(y + p * at.apart * PANEL + r * stride + v * LANES, result[p][r][v]);
}

// Panels begin..end against one tile; `next` is what is read after them.
template <class Code, bool ZEROS, int HEIGHT, int PANELS = gemv_streams(HEIGHT)>
static void gemv_run(const Packed& w, i64 begin, i64 end, const u8* next, i64 group, const Input& in, i64 tile,
                     float* y, i64 stride) {
    i64 apart = (end - begin) / PANELS, jump = next - w.numbers(begin + apart);
    for (i64 p = 0; p < apart; p++)
        gemv_panels<Code, ZEROS, HEIGHT, PANELS>(w, {begin + p, apart, (apart - p) * w.panel_bytes, jump}, group, in,
                                                 tile, y + p * PANEL, stride);
    begin += apart * PANELS;
    if constexpr (PANELS > 1)
        if (begin < end)
            gemv_run<Code, ZEROS, HEIGHT, PANELS / 2>(w, begin, end, next, group, in, tile,
                                                      y + apart * PANELS * PANEL, stride);
}

template <class Code, bool ZEROS, int HEIGHT = GEMV_HEIGHT>
static void gemv_tile(const Packed& w, i64 begin, i64 end, const u8* next, i64 group, const Input& in, i64 tile,
                      float* y, i64 stride) {
    if constexpr (HEIGHT > 1)
        if (in.tiles.height(tile) < HEIGHT)
            return gemv_tile<Code, ZEROS, HEIGHT - 1>(w, begin, end, next, group, in, tile, y, stride);
    gemv_run<Code, ZEROS, HEIGHT>(w, begin, end, next, group, in, tile, y, stride);
}

// y[row][0..): panels begin..end against all rows.
template <class Code, bool ZEROS = false>
static void gemv_tiles(const Packed& w, i64 begin, i64 end, const u8* next, i64 group, const Input& in, float* y) {
    for (i64 t = 0; t < in.tiles.count; t++)
        gemv_tile<Code, ZEROS>(w, begin, end, next, group, in, t, y + in.tiles.begin(t) * RUN_COLUMNS, RUN_COLUMNS);
}

template <template <class> class Code>
static void gemv_bytes(const Packed& w, i64 begin, i64 end, const u8* next, i64 group, const Input& in, float* y) {
    if constexpr (!std::is_same_v<Bytes, FullBytes>)
        if (in.clips) return gemv_tiles<Code<FullBytes>>(w, begin, end, next, group, in, y);
    gemv_tiles<Code<Bytes>>(w, begin, end, next, group, in, y);
}

template <class Code>
static void gemv_nibbles(const Packed& w, i64 begin, i64 end, const u8* next, i64 group, const Input& in, float* y) {
    if (w.zeros) gemv_tiles<Code, true>(w, begin, end, next, group, in, y);
    else gemv_tiles<Code>(w, begin, end, next, group, in, y);
}

static inline void gemv_packed(const Matrix& w, const Input& in, i64 begin, i64 end, const u8* next, float* y) {
    Packed packed(w);
    switch (w.format) {
        case Format::int8: gemv_bytes<Int8Code>(packed, begin, end, next, w.group, in, y); break;
        case Format::nf4: gemv_bytes<Nf4Code>(packed, begin, end, next, w.group, in, y); break;
        case Format::int3: gemv_nibbles<Int3Code>(packed, begin, end, next, w.group, in, y); break;
        default: gemv_nibbles<Int4Code>(packed, begin, end, next, w.group, in, y);
    }
    i64 columns = (end * PANEL < w.m ? end * PANEL : w.m) - begin * PANEL;
    if (!w.group) scale_columns(y, RUN_COLUMNS, in.tiles.rows, w.scale + begin * PANEL, columns);
}

// -- weights in floating point, read in place -------------------------------------------------------------------------

// ROWS rows of a weight from number `column` on, and where their scales lie; null for a weight that has none.
template <class T>
struct RowRun {
    const T* w;
    i64 n, columns;
    const float* scale;  // of the first row; the next one's is `scales` further
    i64 scales;
};

// y[r][0..ROWS): dot products of ROWS weight rows with the rows of a tile; added to what is there where ADD.
template <class T, int ROWS, int HEIGHT>
static void dot_rows(const RowRun<T>& run, i64 padded, const float* x, float* y, bool add) {
    vf sums[ROWS][HEIGHT] = {};
    auto step = [&](i64 i, auto get) {
#pragma GCC unroll 8
        for (int j = 0; j < ROWS; j++) {
            vf numbers = get(run.w + j * run.n + i);
#pragma GCC unroll 8
            for (int r = 0; r < HEIGHT; r++) sums[j][r] += numbers * load(x + r * padded + i);
        }
    };
    i64 i = 0;
    for (; i + LANES <= run.columns; i += LANES) step(i, [](const T* p) { return load(p); });
    if (i < run.columns) step(i, [&](const T* p) { return load_some(p, run.columns - i); });
    for (int j = 0; j < ROWS; j++) {
        float scale = run.scale ? run.scale[j * run.scales] * STEP_OF<T> : 1;
        for (int r = 0; r < HEIGHT; r++) {
            float& to = y[r * RUN_COLUMNS + j];
            to = sum(sums[j][r]) * scale + (add ? to : 0);
        }
    }
}

template <class T, int ROWS, int HEIGHT = GEMV_FLOAT_HEIGHT>
static void dot_tile(const RowRun<T>& run, const Input& in, i64 column, i64 first, i64 height, float* y) {
    if constexpr (HEIGHT > 1)
        if (height < HEIGHT) return dot_tile<T, ROWS, HEIGHT - 1>(run, in, column, first, height, y);
    dot_rows<T, ROWS, HEIGHT>(run, in.padded, in.floats + first * in.padded + column, y + first * RUN_COLUMNS,
                              column > 0);
}

// y[row][0..ROWS): weight rows from `row` on with all input rows.
template <class T, int ROWS>
static void dot_all(const Matrix& w, i64 row, const Input& in, float* y) {
    Tiles tiles(in.tiles.rows, GEMV_FLOAT_HEIGHT);
    i64 group = w.group ? w.group : w.n, groups = w.n / group;
    for (i64 t = 0; t < tiles.count; t++)
        for (i64 g = 0; g < groups; g++) {
            RowRun<T> run{static_cast<const T*>(w.data) + row * w.n + g * group, w.n, group,
                          w.scale ? w.scale + row * groups + g : nullptr, groups};
            dot_tile<T, ROWS>(run, in, g * group, tiles.begin(t), tiles.height(t), y);
        }
}

template <class T>
static void gemv_rows(const Matrix& w, const Input& in, i64 begin, i64 end, float* y) {
    i64 first = begin * PANEL, last = end * PANEL < w.m ? end * PANEL : w.m, j = first;
    for (; j + 4 <= last; j += 4) dot_all<T, 4>(w, j, in, y + j - first);
    for (; j < last; j++) dot_all<T, 1>(w, j, in, y + j - first);
}

// -- all formats ------------------------------------------------------------------------------------------------------

// y[row][0..): panels begin..end of a weight, at most RUN_COLUMNS numbers. Panel next_panel of `next` comes after them.
static inline void gemv(const Matrix& w, const Input& in, i64 begin, i64 end, const Matrix& next, i64 next_panel,
                        float* y) {
    switch (w.format) {
        case Format::f32: return gemv_rows<float>(w, in, begin, end, y);
        case Format::bf16: return gemv_rows<bf16>(w, in, begin, end, y);
        case Format::f16: return gemv_rows<f16>(w, in, begin, end, y);
        case Format::fp8: return gemv_rows<fp8>(w, in, begin, end, y);
        default: {
            bool foreseen = is_packed(next.format);
            const u8* after = Packed(foreseen ? next : w).numbers(foreseen ? next_panel : end);
            return gemv_packed(w, in, begin, end, after, y);
        }
    }
}

}  // namespace slim
