// Many input rows against weights of any format.
#include "gemm.h"

#include <utility>

#include "codes.h"

namespace slim {

// Panels multiplied at once: 6 rows x 4 vectors of sums (or 2, next to as many of partial results) fill 32 registers.
constexpr int TILE_PANELS = VECTORS == 1 ? 4 : 1;
constexpr int TILE_PANELS_GROUPED = VECTORS == 1 ? 2 : 1;

// Up to BLOCK_PANELS panels times a range of steps, as the tile kernel reads them.
struct Block {
    const u8* weights;  // [panel][step][16 rows] of 4 bytes, panels `stride` bytes apart
    i64 stride, panels, steps;
    i64 unit_begin, unit_end, unit_steps;
    i64 depth_begin;      // its first column
    i64 first_units;      // units up to where the input's scale changes first
    const float* scales;  // of groups: [unit][BLOCK_PANELS][16], or null
    const i32* zeros;     // likewise: what sums of the input count, for zero points and bias, as small(); or null
    i32 start_factor;     // see Input::starts
};

// -- bringing weights into blocks -------------------------------------------------------------------------------------

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

// A panel's columns begin.. of row-major weights from row `row` on, as [column][16 rows] floats.
template <class T>
static void gather_columns(const Matrix& w, i64 row, i64 begin, i64 columns, float* to) {
    i64 group = w.group ? w.group : w.n, groups = w.n / group, rows = w.m - row;
    for (i64 c = 0; c < columns; c += LANES) {
        for (int first = 0; first < PANEL; first += LANES) {
            vf square[LANES];
            for (int r = 0; r < LANES; r++) {
                const T* p = static_cast<const T*>(w.data) + (row + first + r) * w.n + begin + c;
                if (first + r >= rows) square[r] = vf{};
                else square[r] = columns - c < LANES ? load_some(p, columns - c) : load(p);
                if (w.scale && first + r < rows)
                    square[r] *= w.scale[(row + first + r) * groups + (begin + c) / group] * STEP_OF<T>;
            }
            transpose<LANES / 2>(square, std::make_integer_sequence<int, LANES>());
            for (int i = 0; i < LANES && c + i < columns; i++) store(to + (c + i) * PANEL + first, square[i]);
        }
    }
}

// The scales, and what goes with the sums of the input, of a block's units.
static inline void block_groups(const Packed& w, i64 group, i64 panel, i64 unit, Block& b, GemmBuffers& buffers) {
    i64 units_per_group = group / unit;
    b.scales = buffers.scales;
    if (w.zeros) b.zeros = buffers.zeros;
    for (i64 u = b.unit_begin; u < b.unit_end; u++) {
        i64 g = units_per_group == 1 ? u : u / units_per_group;
        for (i64 p = 0; p < b.panels; p++) {
            for (int v = 0; v < VECTORS; v++) {
                i64 place = ((u - b.unit_begin) * BLOCK_PANELS + p) * PANEL + v * LANES;
                const u8* head = w.panel(panel + p);
                store(buffers.scales + place, w.group_scale(head, g, v));
                if (w.zeros)
                    store_bits(buffers.zeros + place, small(w.group_zero(head, g, v) - (ZERO_BIAS + INT4_BIAS)));
            }
        }
    }
}

// Columns depth.. of panels panel.. of a packed weight.
static inline Block packed_block(const Matrix& w, i64 panel, i64 panels, i64 depth, const Grouping& by,
                                 GemmBuffers& buffers) {
    Packed packed(w);
    i64 first = depth / packed.columns, rest = packed.blocks - first, most = BLOCK_DEPTH / packed.columns;
    i64 blocks = rest < most ? rest : most, block_bytes = packed.block_lines * LINE;
    bool words = WIDENS && is_bytes(w.format), expand = words || w.format != Format::int8;
    i64 step_columns = words ? 2 : 4;
    Block b{};
    b.panels = panels;
    b.depth_begin = depth;
    b.steps = blocks * packed.columns / step_columns;
    b.unit_steps = by.unit / step_columns;
    b.unit_begin = depth / by.unit;
    b.unit_end = b.unit_begin + ceil_div(b.steps, b.unit_steps);
    b.first_units = by.units_per_scale - b.unit_begin % by.units_per_scale;
    b.start_factor = is_bytes(w.format) ? INT8_BIAS / INT4_BIAS : 1;
    b.weights = expand ? buffers.weights : packed.numbers(panel) + first * block_bytes;
    b.stride = expand ? b.steps * LINE : packed.panel_bytes;
    for (i64 p = 0; expand && p < panels; p++)
        unpack_panel(w.format, packed.numbers(panel + p) + first * block_bytes, blocks, buffers.weights + p * b.stride);
    if (w.group) block_groups(packed, w.group, panel, by.unit, b, buffers);
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
    for (i64 p = 0; p < panels; p++)
        gather_columns<T>(w, (panel + p) * PANEL, depth, b.steps,
                          reinterpret_cast<float*>(buffers.weights + p * b.stride));
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

// totals = the integer products of unit u. zeros: Block::zeros of the unit, read where ZEROS.
template <class Kind, bool ZEROS, int HEIGHT, int COUNT>
static inline void tile_unit(vi (&totals)[HEIGHT][COUNT], const Block& b, const u8* w, const TileInput& in, i64 u,
                             const i32* zeros) {
    i64 begin = (u - b.unit_begin) * b.unit_steps;
#pragma GCC unroll 8
    for (int r = 0; r < HEIGHT; r++) {
        vi start = splat_bits(reinterpret_cast<const u32*>(in.starts) + u * HEIGHT + r);  // by the load port alone
        if (ZEROS) start = -(start >> 3);  // the sum itself
        else if (b.start_factor != 1) start *= b.start_factor;
#pragma GCC unroll 8
        for (int c = 0; c < COUNT; c++)
            totals[r][c] = ZEROS ? multiply_small(load_bits(zeros + c * LANES), start) : start;
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
        tile_unit<Kind, false>(totals, b, w, in, u, nullptr);
        vf part[HEIGHT][COUNT];
#pragma GCC unroll 8
        for (int r = 0; r < HEIGHT; r++)
#pragma GCC unroll 8
            for (int c = 0; c < COUNT; c++) part[r][c] = to_float(totals[r][c]);
        add_scaled(part, in.scales + u * HEIGHT, results);
    }
}

// The same for weights with scales by group: partial results between two changes of the input's scale.
template <class Kind, bool ZEROS, int HEIGHT, int PANELS>
static void grouped_tile(const Block& b, i64 panel, const TileInput& in, float* results) {
    constexpr int COUNT = PANELS * VECTORS;
    const u8* w = b.weights + panel * b.stride;
    const float* scale = b.scales + panel * PANEL;
    const i32* zeros = ZEROS ? b.zeros + panel * PANEL : nullptr;
    i64 last = b.unit_begin + b.first_units;
    for (i64 u = b.unit_begin; u < b.unit_end; last += in.units_per_scale) {
        const float* scales = in.scales + u * HEIGHT;
        vf part[HEIGHT][COUNT] = {};
        for (; u < last && u < b.unit_end; u++, scale += BLOCK_PANELS * PANEL) {
            vi totals[HEIGHT][COUNT];
            tile_unit<Kind, ZEROS>(totals, b, w, in, u, zeros);
            if (ZEROS) zeros += BLOCK_PANELS * PANEL;
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

enum class TileKind { floats, bytes, nibbles, bytes_grouped, nibbles_grouped, nibbles_zeros };

template <TileKind KIND, int HEIGHT, int PANELS>
static void tile_panels(const Block& b, i64 panel, const TileInput& in, float* results) {
    if constexpr (KIND == TileKind::floats) float_tile<HEIGHT, PANELS>(b, panel, in, results);
    if constexpr (KIND == TileKind::bytes) quantized_tile<PrefillInt8, HEIGHT, PANELS>(b, panel, in, results);
    if constexpr (KIND == TileKind::nibbles) quantized_tile<Nibbles, HEIGHT, PANELS>(b, panel, in, results);
    if constexpr (KIND == TileKind::bytes_grouped)
        grouped_tile<PrefillInt8, false, HEIGHT, PANELS>(b, panel, in, results);
    if constexpr (KIND == TileKind::nibbles_grouped)
        grouped_tile<Nibbles, false, HEIGHT, PANELS>(b, panel, in, results);
    if constexpr (KIND == TileKind::nibbles_zeros) grouped_tile<Nibbles, true, HEIGHT, PANELS>(b, panel, in, results);
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
    constexpr bool GROUPED = KIND > TileKind::nibbles;
    if constexpr (HEIGHT > 1)
        if (height < HEIGHT) return tile_of_height<KIND, HEIGHT - 1>(b, height, in, results);
    tile_row<KIND, HEIGHT, GROUPED ? TILE_PANELS_GROUPED : TILE_PANELS>(b, 0, in, results);
}

static inline TileKind tile_kind(const Matrix& w, const Block& b) {
    if (!is_packed(w.format)) return TileKind::floats;
    if (is_bytes(w.format)) return w.group ? TileKind::bytes_grouped : TileKind::bytes;
    if (b.zeros) return TileKind::nibbles_zeros;
    return w.group ? TileKind::nibbles_grouped : TileKind::nibbles;
}

static inline void tile_block(const Matrix& w, const Block& b, i64 height, const TileInput& in, float* results) {
    switch (tile_kind(w, b)) {
        case TileKind::floats: return tile_of_height<TileKind::floats>(b, height, in, results);
        case TileKind::bytes: return tile_of_height<TileKind::bytes>(b, height, in, results);
        case TileKind::nibbles: return tile_of_height<TileKind::nibbles>(b, height, in, results);
        case TileKind::bytes_grouped: return tile_of_height<TileKind::bytes_grouped>(b, height, in, results);
        case TileKind::nibbles_grouped: return tile_of_height<TileKind::nibbles_grouped>(b, height, in, results);
        case TileKind::nibbles_zeros: return tile_of_height<TileKind::nibbles_zeros>(b, height, in, results);
    }
}

// -- a block of the result --------------------------------------------------------------------------------------------

static inline TileInput tile_input(const Matrix& w, const Block& b, const Input& in, i64 tile) {
    i64 height = in.tiles.height(tile), units = in.grouping.units;
    bool words = WIDENS && is_bytes(w.format);
    i64 columns = !is_packed(w.format) ? 1 : (words ? 2 : 4);  // of the input, in 4 bytes
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
        case Format::fp8: return float_block<fp8>(w, panel, panels, depth, buffers);
        default: return packed_block(w, panel, panels, depth, in.grouping, buffers);
    }
}

void gemm(const Matrix& w, const Input& in, i64 tile_begin, i64 tile_end, i64 panel, i64 panels, GemmBuffers& buffers,
          float* results) {
    i64 first = in.tiles.begin(tile_begin), rows = in.tiles.begin(tile_end) - first;
    bool quantized = is_packed(w.format);
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
