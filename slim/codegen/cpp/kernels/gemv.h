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

// y[row][0..): panels begin..end of a weight, at most RUN_COLUMNS numbers. Panel next_panel of `next` comes after them.
void gemv(const Matrix& w, const Input& in, i64 begin, i64 end, const Matrix& next, i64 next_panel, float* y);

// Panels begin..end of a packed weight against all rows, without the scales of whole weight rows. `next` is what is read
// after them. A unit each: they are what takes longest to compile.
struct GemvRun {
    const Packed& w;
    i64 begin, end;
    const u8* next;
    i64 group;
    const Input& in;
    float* y;  // [row][RUN_COLUMNS]
};
void gemv_int8(const GemvRun& run);
void gemv_int4(const GemvRun& run);
void gemv_int3(const GemvRun& run);
void gemv_nf4(const GemvRun& run);

}  // namespace slim
