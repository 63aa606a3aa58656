// Few input rows: weights in floating point, read in place, and the choice among all formats.
#include "gemv.h"

namespace slim {

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

static void gemv_packed(const Matrix& w, const Input& in, i64 begin, i64 end, const u8* next, float* y) {
    Packed packed(w);
    GemvRun run{packed, begin, end, next, w.group, in, y};
    switch (w.format) {
        case Format::int8: gemv_int8(run); break;
        case Format::nf4: gemv_nf4(run); break;
        case Format::int3: gemv_int3(run); break;
        default: gemv_int4(run);
    }
    i64 columns = (end * PANEL < w.m ? end * PANEL : w.m) - begin * PANEL;
    if (!w.group) scale_columns(y, RUN_COLUMNS, in.tiles.rows, w.scale + begin * PANEL, columns);
}

void gemv(const Matrix& w, const Input& in, i64 begin, i64 end, const Matrix& next, i64 next_panel, float* y) {
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
