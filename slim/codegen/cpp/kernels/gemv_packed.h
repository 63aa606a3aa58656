// Few input rows against packed weights: what the units of each format are made of.
#pragma once
#include <type_traits>

#include "codes.h"
#include "gemv.h"

namespace slim {

constexpr int PREFETCH = 2048;  // bytes ahead: the hardware's own stops at each page

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
    constexpr int SHORT = 8 / Code::STEPS;  // blocks of a group of 32: so few that a loop would cost beside few rows
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
    if constexpr (HEIGHT <= 4 || Code::STEPS < 8)  // beside many rows of long blocks it does not
        if (unit.blocks == SHORT) return gemv_blocks<Code, HEIGHT, PANELS, SHORT>(total, unit);
    gemv_blocks<Code, HEIGHT, PANELS, 0>(total, unit);
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

// Panels begin..end of a run against one tile.
template <class Code, bool ZEROS, int HEIGHT, int PANELS = gemv_streams(HEIGHT)>
static void gemv_range(const GemvRun& run, i64 begin, i64 end, i64 tile, float* y) {
    i64 apart = (end - begin) / PANELS, jump = run.next - run.w.numbers(begin + apart);
    for (i64 p = 0; p < apart; p++)
        gemv_panels<Code, ZEROS, HEIGHT, PANELS>(run.w, {begin + p, apart, (apart - p) * run.w.panel_bytes, jump},
                                                 run.group, run.in, tile, y + p * PANEL, RUN_COLUMNS);
    begin += apart * PANELS;
    if constexpr (PANELS > 1)
        if (begin < end) gemv_range<Code, ZEROS, HEIGHT, PANELS / 2>(run, begin, end, tile, y + apart * PANELS * PANEL);
}

template <class Code, bool ZEROS, int HEIGHT = GEMV_HEIGHT>
static void gemv_tile(const GemvRun& run, i64 tile, float* y) {
    if constexpr (HEIGHT > 1)
        if (run.in.tiles.height(tile) < HEIGHT) return gemv_tile<Code, ZEROS, HEIGHT - 1>(run, tile, y);
    gemv_range<Code, ZEROS, HEIGHT>(run, run.begin, run.end, tile, y);
}

template <class Code, bool ZEROS = false>
static void gemv_tiles(const GemvRun& run) {
    for (i64 t = 0; t < run.in.tiles.count; t++)
        gemv_tile<Code, ZEROS>(run, t, run.y + run.in.tiles.begin(t) * RUN_COLUMNS);
}

// What becomes bytes where it is multiplied.
template <template <class> class Code>
static void gemv_bytes(const GemvRun& run) {
    if constexpr (!std::is_same_v<Bytes, FullBytes>)
        if (run.in.clips) return gemv_tiles<Code<FullBytes>>(run);
    gemv_tiles<Code<Bytes>>(run);
}

// What becomes nibbles there, perhaps with zero points.
template <class Code>
static void gemv_nibbles(const GemvRun& run) {
    if (run.w.zeros) gemv_tiles<Code, true>(run);
    else gemv_tiles<Code>(run);
}

}  // namespace slim
