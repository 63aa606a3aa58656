// Many input rows: blocks of weights that stay in the first-level cache while all rows of a row block pass by.
#pragma once
#include "quantize.h"

namespace slim {

constexpr int TILE_HEIGHT = 6;
constexpr int BLOCK_PANELS = 4;
constexpr i64 BLOCK_COLUMNS = BLOCK_PANELS * PANEL;
constexpr i64 BLOCK_ROWS = 192;
constexpr i64 BLOCK_DEPTH = Grouping::MAX_UNIT;  // input columns of a block, quantised
constexpr i64 BLOCK_DEPTH_FLOAT = 64;
constexpr i64 BLOCK_STEPS = BLOCK_DEPTH / 2;  // at most: int8 widened to 16 bits

// One thread's memory.
struct GemmBuffers {
    alignas(LINE) u8 weights[BLOCK_PANELS * BLOCK_STEPS * LINE];
    alignas(LINE) float scales[BLOCK_PANELS * PANEL * (BLOCK_DEPTH / GROUP_STEP)];
    alignas(LINE) i32 zeros[BLOCK_PANELS * PANEL * (BLOCK_DEPTH / GROUP_STEP)];
    alignas(LINE) float results[2 * BLOCK_ROWS * BLOCK_COLUMNS];  // [lane][row][column]
};

// results[row][0..BLOCK_COLUMNS): panels panel.. of a weight times tiles tile_begin..tile_end.
void gemm(const Matrix& w, const Input& in, i64 tile_begin, i64 tile_end, i64 panel, i64 panels, GemmBuffers& buffers,
          float* results);

}  // namespace slim
