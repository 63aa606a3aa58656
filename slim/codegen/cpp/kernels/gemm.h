// Many input rows: blocks of weights that stay in the first-level cache while all rows of a row block pass by.
#pragma once
#include <utility>

#include "quantize.h"

namespace slim {

constexpr int TILE_HEIGHT = 6;
constexpr int BLOCK_PANELS = 4;
constexpr i64 BLOCK_COLUMNS = BLOCK_PANELS * PANEL;
constexpr i64 BLOCK_ROWS = 192;
constexpr i64 BLOCK_DEPTH = Grouping::MAX_UNIT;  // input columns of a block, quantised
constexpr i64 BLOCK_DEPTH_FLOAT = 64;
constexpr i64 BLOCK_STEPS = BLOCK_DEPTH / 2;  // at most: int8 widened to 16 bits

// Panels multiplied at once: 6 rows x 4 vectors of sums (or 2, next to as many of partial results) fill 32 registers.
constexpr int TILE_PANELS = VECTORS == 1 ? 4 : 1;
constexpr int TILE_PANELS_GROUPED = VECTORS == 1 ? 2 : 1;

// One thread's memory.
struct GemmBuffers {
    alignas(LINE) u8 weights[BLOCK_PANELS * BLOCK_STEPS * LINE];
    alignas(LINE) float scales[BLOCK_PANELS * PANEL * (BLOCK_DEPTH / GROUP_STEP)];
    alignas(LINE) float results[2 * BLOCK_ROWS * BLOCK_COLUMNS];  // [lane][row][column]
};

// Up to BLOCK_PANELS panels times a range of steps, as the tile kernel reads them.
struct Block {
    const u8* weights;  // [panel][step][16 rows] of 4 bytes, panels `stride` bytes apart
    i64 stride, panels, steps;
    i64 unit_begin, unit_end, unit_steps;
    i64 depth_begin;      // its first column
    i64 first_units;      // units up to where the input's scale changes first
    const float* scales;  // of groups: [unit][BLOCK_PANELS][16], or null
    i32 start_factor;     // see Input::starts
};

// -- bringing weights into blocks -------------------------------------------------------------------------------------

static inline void unpack_nibbles(const u8* lines, i64 count, u8* to) {
    for (i64 i = 0; i < count; i++) {
        for (int v = 0; v < VECTORS; v++) {
            vi raw = load_bits(lines + i * LINE + v * sizeof(vi));
            store_bits(to + 2 * i * LINE + v * sizeof(vi), low_nibbles(raw));
            store_bits(to + (2 * i + 1) * LINE + v * sizeof(vi), high_nibbles(raw));
        }
    }
}

// 4 bytes of a row become 2 + 2 words, in two steps.
static inline void widen_bytes(const u8* lines, i64 count, u8* to) {
    for (i64 i = 0; i < count; i++) {
        for (int v = 0; v < VECTORS; v++) {
            vi raw = load_bits(lines + i * LINE + v * sizeof(vi));
            vi first = (((raw << 24) >> 24) & 0xffff) | (((raw << 16) >> 8) & (i32)0xffff0000);
            vi second = (((raw << 8) >> 24) & 0xffff) | ((raw >> 8) & (i32)0xffff0000);
            store_bits(to + 2 * i * LINE + v * sizeof(vi), first);
            store_bits(to + (2 * i + 1) * LINE + v * sizeof(vi), second);
        }
    }
}

template <int HALF, int LANE, bool SECOND>
constexpr i32 exchanged() {
    if (!SECOND) return LANE & HALF ? LANES + (LANE ^ HALF) : LANE;
    return LANE & HALF ? LANES + LANE : LANE ^ HALF;
}

// Exchanges the off-diagonal quarters of every 2 HALF x 2 HALF square, then goes on within the quarters.
template <int HALF, int... LANE>
static inline void transpose(vf (&rows)[LANES], std::integer_sequence<int, LANE...> lanes) {
    const vi to_first = {exchanged<HALF, LANE, false>()...}, to_second = {exchanged<HALF, LANE, true>()...};
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (i & HALF) continue;
        vf first = rows[i], second = rows[i + HALF];
        rows[i] = __builtin_shuffle(first, second, to_first);
        rows[i + HALF] = __builtin_shuffle(first, second, to_second);
    }
    if constexpr (HALF > 1) transpose<HALF / 2>(rows, lanes);
}

// A panel's columns begin.. of row-major weights, as [column][16 rows] floats.
template <class T>
static void gather_columns(const T* w, i64 n, i64 rows, i64 begin, i64 columns, float* to) {
    for (i64 c = 0; c < columns; c += LANES) {
        for (int first = 0; first < PANEL; first += LANES) {
            vf square[LANES];
            for (int r = 0; r < LANES; r++) {
                const T* p = w + (first + r) * n + begin + c;
                if (first + r >= rows) square[r] = vf{};
                else square[r] = columns - c < LANES ? load_some(p, columns - c) : load(p);
            }
            transpose<LANES / 2>(square, std::make_integer_sequence<int, LANES>());
            for (int i = 0; i < LANES && c + i < columns; i++) store(to + (c + i) * PANEL + first, square[i]);
        }
    }
}

static inline void block_scales(const Packed& w, const Matrix& matrix, i64 panel, const Block& b, i64 unit, float* to) {
    i64 units_per_group = matrix.group / unit;
    for (i64 u = b.unit_begin; u < b.unit_end; u++) {
        i64 group = units_per_group == 1 ? u : u / units_per_group;
        for (i64 p = 0; p < b.panels; p++) {
            float* place = to + ((u - b.unit_begin) * BLOCK_PANELS + p) * PANEL;
            for (int v = 0; v < VECTORS; v++) store(place + v * LANES, w.group_scale(panel + p, group, v));
        }
    }
}

// Columns depth.. of panels panel.. of an int8 or int4 weight.
static inline Block quantized_block(const Matrix& w, i64 panel, i64 panels, i64 depth, const Grouping& by,
                                    GemmBuffers& buffers) {
    Packed packed(w);
    i64 columns = w.format == Format::int4 ? 8 : 4, first = depth / columns;
    i64 lines = packed.lines - first < BLOCK_DEPTH / columns ? packed.lines - first : BLOCK_DEPTH / columns;
    bool expand = w.format == Format::int4 || WIDENS;
    Block b{};
    b.panels = panels;
    b.depth_begin = depth;
    b.steps = expand ? lines * 2 : lines;
    b.unit_steps = by.unit / columns * (expand ? 2 : 1);
    b.unit_begin = depth / by.unit;
    b.unit_end = b.unit_begin + ceil_div(b.steps, b.unit_steps);
    b.first_units = by.units_per_scale - b.unit_begin % by.units_per_scale;
    b.start_factor = w.format == Format::int4 ? 1 : INT8_BIAS / INT4_BIAS;
    b.weights = expand ? buffers.weights : packed.numbers(panel) + first * LINE;
    b.stride = expand ? b.steps * LINE : packed.panel_bytes;
    for (i64 p = 0; expand && p < panels; p++) {
        const u8* from = packed.numbers(panel + p) + first * LINE;
        if (w.format == Format::int4) unpack_nibbles(from, lines, buffers.weights + p * b.stride);
        else widen_bytes(from, lines, buffers.weights + p * b.stride);
    }
    if (w.group) {
        block_scales(packed, w, panel, b, by.unit, buffers.scales);
        b.scales = buffers.scales;
    }
    return b;
}

template <class T>
static Block float_block(const Matrix& w, i64 panel, i64 panels, i64 depth, GemmBuffers& buffers) {
    Block b{};
    b.panels = panels;
    b.depth_begin = depth;
    b.steps = w.n - depth < BLOCK_DEPTH_FLOAT ? w.n - depth : BLOCK_DEPTH_FLOAT;
    b.weights = buffers.weights;
    b.stride = b.steps * LINE;
    for (i64 p = 0; p < panels; p++) {
        i64 row = (panel + p) * PANEL;
        gather_columns(static_cast<const T*>(w.data) + row * w.n, w.n, w.m - row, depth, b.steps,
                       reinterpret_cast<float*>(buffers.weights + p * b.stride));
    }
    return b;
}

// -- tiles ------------------------------------------------------------------------------------------------------------

// sums[r] += steps of `panels` panels times row r of a tile.
template <class Kind, class Sum, int HEIGHT, int COUNT>
static inline void tile_steps(Sum (&sums)[HEIGHT][COUNT], const u8* w, i64 stride, const u32* x, i64 steps) {
    for (i64 s = 0; s < steps; s++) {
        vi numbers[COUNT];
#pragma GCC unroll 8
        for (int c = 0; c < COUNT; c++)
            numbers[c] = load_bits(w + s * LINE + c / VECTORS * stride + c % VECTORS * sizeof(vi));
#pragma GCC unroll 8
        for (int r = 0; r < HEIGHT; r++) {
            vi input = splat_bits(x + s * HEIGHT + r);
#pragma GCC unroll 8
            for (int c = 0; c < COUNT; c++) sums[r][c] = Kind::add(sums[r][c], numbers[c], input);
        }
    }
}

// The same where sums are narrow: every RUN steps they go into wide ones.
template <class Kind, int HEIGHT, int COUNT>
static inline void tile_runs(vi (&totals)[HEIGHT][COUNT], const u8* w, i64 stride, const u32* x, i64 steps) {
    if constexpr (Kind::RUN == 0) {
        tile_steps<Kind>(totals, w, stride, x, steps);
    } else {
        for (i64 s = 0; s < steps; s += Kind::RUN) {
            vi sums[HEIGHT][COUNT] = {};
            tile_steps<Kind>(sums, w + s * LINE, stride, x + s * HEIGHT, steps - s < Kind::RUN ? steps - s : Kind::RUN);
#pragma GCC unroll 8
            for (int r = 0; r < HEIGHT; r++)
#pragma GCC unroll 8
                for (int c = 0; c < COUNT; c++) totals[r][c] = Kind::fold(totals[r][c], sums[r][c]);
        }
    }
}

// What a tile needs of the input.
struct TileInput {
    const u32* x;         // from the block's first step on
    const float* scales;  // [unit][row of the tile]
    const i32* starts;
    i64 units_per_scale;
};

// totals = the integer products of unit u.
template <class Kind, int HEIGHT, int COUNT>
static inline void tile_unit(vi (&totals)[HEIGHT][COUNT], const Block& b, const u8* w, const TileInput& in, i64 u) {
    i64 begin = (u - b.unit_begin) * b.unit_steps;
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; r++) {
        vi start = splat_bits(reinterpret_cast<const u32*>(in.starts) + u * HEIGHT + r);  // by the load port alone
        if (b.start_factor != 1) start *= b.start_factor;
#pragma GCC unroll 8
        for (int c = 0; c < COUNT; c++) totals[r][c] = start;
    }
    tile_runs<Kind>(totals, w + begin * LINE, b.stride, in.x + begin * HEIGHT,
                    b.steps - begin < b.unit_steps ? b.steps - begin : b.unit_steps);
}

template <int HEIGHT, int COUNT>
static inline void add_scaled(const vf (&part)[HEIGHT][COUNT], const float* scales, float* results) {
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; r++) {
        vf scale = splat(scales[r]);
#pragma GCC unroll 8
        for (int c = 0; c < COUNT; c++) {
            float* to = results + r * BLOCK_COLUMNS + c * LANES;
            store(to, load(to) + part[r][c] * scale);
        }
    }
}

// results += a block's panels panel.. times a tile, both quantised.
template <class Kind, int HEIGHT, int PANELS>
static void quantized_tile(const Block& b, i64 panel, const TileInput& in, float* results) {
    constexpr int COUNT = PANELS * VECTORS;
    const u8* w = b.weights + panel * b.stride;
    for (i64 u = b.unit_begin; u < b.unit_end; u++) {
        vi totals[HEIGHT][COUNT];
        tile_unit<Kind>(totals, b, w, in, u);
        vf part[HEIGHT][COUNT];
#pragma GCC unroll 8
        for (int r = 0; r < HEIGHT; r++)
#pragma GCC unroll 8
            for (int c = 0; c < COUNT; c++) part[r][c] = to_float(totals[r][c]);
        add_scaled(part, in.scales + u * HEIGHT, results);
    }
}

// The same for weights with scales by group: partial results between two changes of the input's scale.
template <class Kind, int HEIGHT, int PANELS>
static void grouped_tile(const Block& b, i64 panel, const TileInput& in, float* results) {
    constexpr int COUNT = PANELS * VECTORS;
    const u8* w = b.weights + panel * b.stride;
    const float* scale = b.scales + panel * PANEL;
    i64 last = b.unit_begin + b.first_units;
    for (i64 u = b.unit_begin; u < b.unit_end; last += in.units_per_scale) {
        const float* scales = in.scales + u * HEIGHT;
        vf part[HEIGHT][COUNT] = {};
        for (; u < last && u < b.unit_end; u++, scale += BLOCK_PANELS * PANEL) {
            vi totals[HEIGHT][COUNT];
            tile_unit<Kind>(totals, b, w, in, u);
#pragma GCC unroll 8
            for (int c = 0; c < COUNT; c++)
#pragma GCC unroll 8
                for (int r = 0; r < HEIGHT; r++) part[r][c] += to_float(totals[r][c]) * load(scale + c * LANES);
        }
        add_scaled(part, scales, results);
    }
}

template <int HEIGHT, int PANELS>
static void float_tile(const Block& b, i64 panel, const TileInput& in, float* results) {
    constexpr int COUNT = PANELS * VECTORS;
    vf sums[HEIGHT][COUNT] = {};
    tile_steps<Floats>(sums, b.weights + panel * b.stride, b.stride, in.x, b.steps);
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; r++)
#pragma GCC unroll 8
        for (int c = 0; c < COUNT; c++) {
            float* to = results + r * BLOCK_COLUMNS + c * LANES;
            store(to, load(to) + sums[r][c]);
        }
}

enum class TileKind { floats, int8, int4, int8_grouped, int4_grouped };

template <TileKind KIND, int HEIGHT, int PANELS>
static void tile_panels(const Block& b, i64 panel, const TileInput& in, float* results) {
    if constexpr (KIND == TileKind::floats) float_tile<HEIGHT, PANELS>(b, panel, in, results);
    if constexpr (KIND == TileKind::int8) quantized_tile<PrefillInt8, HEIGHT, PANELS>(b, panel, in, results);
    if constexpr (KIND == TileKind::int4) quantized_tile<Nibbles, HEIGHT, PANELS>(b, panel, in, results);
    if constexpr (KIND == TileKind::int8_grouped) grouped_tile<PrefillInt8, HEIGHT, PANELS>(b, panel, in, results);
    if constexpr (KIND == TileKind::int4_grouped) grouped_tile<Nibbles, HEIGHT, PANELS>(b, panel, in, results);
}

// The panels of a block from `panel` on: as many at once as there are registers for, then the rest.
template <TileKind KIND, int HEIGHT, int PANELS>
static void tile_row(const Block& b, i64 panel, const TileInput& in, float* results) {
    for (; panel + PANELS <= b.panels; panel += PANELS)
        tile_panels<KIND, HEIGHT, PANELS>(b, panel, in, results + panel * PANEL);
    if constexpr (PANELS > 1) tile_row<KIND, HEIGHT, PANELS / 2>(b, panel, in, results);
}

template <TileKind KIND, int HEIGHT = TILE_HEIGHT>
static void tile_of_height(const Block& b, i64 height, const TileInput& in, float* results) {
    constexpr bool GROUPED = KIND == TileKind::int8_grouped || KIND == TileKind::int4_grouped;
    if constexpr (HEIGHT > 1)
        if (height < HEIGHT) return tile_of_height<KIND, HEIGHT - 1>(b, height, in, results);
    tile_row<KIND, HEIGHT, GROUPED ? TILE_PANELS_GROUPED : TILE_PANELS>(b, 0, in, results);
}

static inline TileKind tile_kind(const Matrix& w) {
    if (w.format == Format::int8) return w.group ? TileKind::int8_grouped : TileKind::int8;
    if (w.format == Format::int4) return w.group ? TileKind::int4_grouped : TileKind::int4;
    return TileKind::floats;
}

static inline void tile_block(const Matrix& w, const Block& b, i64 height, const TileInput& in, float* results) {
    switch (tile_kind(w)) {
        case TileKind::floats: return tile_of_height<TileKind::floats>(b, height, in, results);
        case TileKind::int8: return tile_of_height<TileKind::int8>(b, height, in, results);
        case TileKind::int4: return tile_of_height<TileKind::int4>(b, height, in, results);
        case TileKind::int8_grouped: return tile_of_height<TileKind::int8_grouped>(b, height, in, results);
        case TileKind::int4_grouped: return tile_of_height<TileKind::int4_grouped>(b, height, in, results);
    }
}

// -- a block of the result --------------------------------------------------------------------------------------------

static inline TileInput tile_input(const Matrix& w, const Block& b, const Input& in, i64 tile) {
    i64 height = in.tiles.height(tile), units = in.grouping.units;
    bool words = WIDENS && w.format == Format::int8;
    i64 columns = !is_quantized(w) ? 1 : (words ? 2 : 4);  // of the input, in 4 bytes
    const u32* x = columns == 4 ? in.bytes : (columns == 2 ? in.words : reinterpret_cast<const u32*>(in.floats));
    TileInput t{};
    t.x = Input::tile(x, in.tiles, tile, in.padded / columns) + b.depth_begin / columns * height;
    if (columns == 1) return t;
    t.scales = Input::tile(in.scales, in.tiles, tile, units);
    t.starts = Input::tile(in.starts, in.tiles, tile, units);
    t.units_per_scale = in.grouping.units_per_scale;
    return t;
}

static inline Block load_block(const Matrix& w, i64 panel, i64 panels, i64 depth, const Input& in,
                               GemmBuffers& buffers) {
    switch (w.format) {
        case Format::f32: return float_block<float>(w, panel, panels, depth, buffers);
        case Format::bf16: return float_block<bf16>(w, panel, panels, depth, buffers);
        case Format::f16: return float_block<f16>(w, panel, panels, depth, buffers);
        default: return quantized_block(w, panel, panels, depth, in.grouping, buffers);
    }
}

// results[row][0..BLOCK_COLUMNS): panels panel.. of a weight times tiles tile_begin..tile_end.
static inline void gemm(const Matrix& w, const Input& in, i64 tile_begin, i64 tile_end, i64 panel, i64 panels,
                        GemmBuffers& buffers, float* results) {
    i64 first = in.tiles.begin(tile_begin), rows = in.tiles.begin(tile_end) - first;
    bool quantized = is_quantized(w);
    std::memset(results, 0, rows * BLOCK_COLUMNS * sizeof(float));
    for (i64 depth = 0; depth < w.n; depth += quantized ? BLOCK_DEPTH : BLOCK_DEPTH_FLOAT) {
        Block b = load_block(w, panel, panels, depth, in, buffers);
        for (i64 t = tile_begin; t < tile_end; t++)
            tile_block(w, b, in.tiles.height(t), tile_input(w, b, in, t),
                       results + (in.tiles.begin(t) - first) * BLOCK_COLUMNS);
    }
    i64 columns = w.m - panel * PANEL < BLOCK_COLUMNS ? w.m - panel * PANEL : BLOCK_COLUMNS;
    if (quantized && !w.group) scale_columns(results, BLOCK_COLUMNS, rows, w.scale + panel * PANEL, columns);
}

}  // namespace slim
