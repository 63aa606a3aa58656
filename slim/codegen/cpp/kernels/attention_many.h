// Attention of many rows (prefill): blocks of keys and values are packed for a product that keeps tiles in registers.
#pragma once
#include "attention_rows.h"

namespace slim {
namespace {

constexpr i64 MANY_ROWS = 96;  // of one unit: what packing a block of keys is spread over
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = LANES == 8 ? 2 : 4;  // 6 x 4 sums need 32 registers, 6 x 2 need 16

// Of one thread.
struct Packed {
    float* q;       // [MANY_ROWS][padded key_width], rotated and scaled
    float* out;     // [MANY_ROWS][padded value_width]
    Total* totals;  // [MANY_ROWS]
    float* keys;    // [key_width][KEY_BLOCK]
    float* values;  // [KEY_BLOCK][padded value_width]
    float* row;     // [4][padded key_width]
    float* weights; // [TILE_ROWS][KEY_BLOCK]
    i64 q_row, value_row;
};

// z[TILE_ROWS][N vectors] = or += x[TILE_ROWS][depth] y[depth][N vectors]
template <int N, bool ADD>
void multiply(const float* x, i64 x_row, const float* y, i64 y_row, i64 depth, float* z, i64 z_row) {
    vf acc[TILE_ROWS][N];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int n = 0; n < N; n++) acc[r][n] = ADD ? load(z + r * z_row + n * LANES) : vf{};
    for (i64 d = 0; d < depth; d++) {
        vf v[N];
        for (int n = 0; n < N; n++) v[n] = load(y + d * y_row + n * LANES);
        for (int r = 0; r < TILE_ROWS; r++) {
            vf factor = splat(x[r * x_row + d]);
            for (int n = 0; n < N; n++) acc[r][n] += factor * v[n];
        }
    }
    for (int r = 0; r < TILE_ROWS; r++)
        for (int n = 0; n < N; n++) store(z + r * z_row + n * LANES, acc[r][n]);
}

// Four rows of `width` floats become columns `column`..column + 3 of `packed`.
inline void transpose_four(const float* const* rows, i64 width, float* packed, i64 column) {
    i64 p = 0;
    for (; p + 4 <= width; p += 4) {
        v4 x[4];
        for (int i = 0; i < 4; i++) std::memcpy(&x[i], rows[i] + p, sizeof x[i]);
        v4 a = __builtin_shuffle(x[0], x[1], (vi4){0, 4, 1, 5}), b = __builtin_shuffle(x[2], x[3], (vi4){0, 4, 1, 5});
        v4 c = __builtin_shuffle(x[0], x[1], (vi4){2, 6, 3, 7}), d = __builtin_shuffle(x[2], x[3], (vi4){2, 6, 3, 7});
        v4 y[4] = {__builtin_shuffle(a, b, (vi4){0, 1, 4, 5}), __builtin_shuffle(a, b, (vi4){2, 3, 6, 7}),
                   __builtin_shuffle(c, d, (vi4){0, 1, 4, 5}), __builtin_shuffle(c, d, (vi4){2, 3, 6, 7})};
        for (int i = 0; i < 4; i++) std::memcpy(packed + (p + i) * KEY_BLOCK + column, &y[i], sizeof y[i]);
    }
    for (; p < width; p++)
        for (int i = 0; i < 4; i++) packed[p * KEY_BLOCK + column + i] = rows[i][p];
}

template <class T>
void widen(const T* x, i64 n, float* y) {
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, load(x + i));
    for (; i < n; i++) y[i] = (float)x[i];
}

// keys first..first + count - 1, transposed; the columns up to the next four repeat the last key.
template <class T>
void pack_keys(const Attention& a, const Source<T>& source, const Rows& rows, i64 first, i64 count, const Packed& own) {
    for (i64 j = 0; j < count; j += 4) {
        const float* four[4];
        for (i64 i = 0; i < 4; i++) {
            i64 index = first + least(j + i, count - 1);
            const T* key = source.key(rows.batch, rows.kv_head, index);
            float* row = own.row + i * own.q_row;
            four[i] = row;
            if constexpr (sizeof(T) == sizeof(float)) {
                if (source.turn) rotate(a, rows.batch, index, key, 1.0f, row);
                else four[i] = key;
            } else {
                widen(key, a.key_width, row);
            }
        }
        transpose_four(four, a.key_width, own.keys, j);
    }
}

template <class T>
void pack_values(const Attention& a, const Source<T>& source, const Rows& rows, i64 first, i64 count,
                 const Packed& own) {
    for (i64 j = 0; j < count; j++)
        widen(source.value(rows.batch, rows.kv_head, first + j), a.value_width, own.values + j * own.value_row);
}

// out[TILE_ROWS] += weights x values, for keys begin..end - 1 of the block.
inline void add_values(const Attention& a, const float* weights, i64 begin, i64 end, float* out, const Packed& own) {
    const float* x = weights + begin;
    const float* y = own.values + begin * own.value_row;
    i64 depth = end - begin, vectors = vectors_of(a.value_width), n = 0, row = own.value_row;
    for (; n + TILE_VECTORS <= vectors; n += TILE_VECTORS)
        multiply<TILE_VECTORS, true>(x, KEY_BLOCK, y + n * LANES, row, depth, out + n * LANES, row);
    switch (vectors - n) {
        case 3: return multiply<3, true>(x, KEY_BLOCK, y + n * LANES, row, depth, out + n * LANES, row);
        case 2: return multiply<2, true>(x, KEY_BLOCK, y + n * LANES, row, depth, out + n * LANES, row);
        case 1: return multiply<1, true>(x, KEY_BLOCK, y + n * LANES, row, depth, out + n * LANES, row);
    }
}

// TILE_ROWS rows from `row` on against the packed block of keys first..last - 1.
inline void attend_tile(const Attention& a, const Rows& rows, i64 row, i64 first, i64 last, const Packed& own) {
    i64 end_row = least(row + TILE_ROWS, rows.count());
    Range tile{seen_by(a, rows.query_of(row)).first, seen_by(a, rows.query_of(end_row - 1)).last};
    i64 begin = most(tile.first - first, 0), end = least(tile.last, last) - first;
    if (begin >= end) return;
    float* weights = own.weights;
    constexpr i64 step = TILE_VECTORS * LANES;
    for (i64 j = begin / step * step; j < end; j += step)
        multiply<TILE_VECTORS, false>(own.q + row * own.q_row, own.q_row, own.keys + j, KEY_BLOCK, a.key_width,
                                      weights + j, KEY_BLOCK);
    for (i64 r = row; r < row + TILE_ROWS; r++) {
        float* s = weights + (r - row) * KEY_BLOCK;
        if (r >= end_row) {
            std::memset(s, 0, KEY_BLOCK * sizeof(float));
            continue;
        }
        Range seen = seen_by(a, rows.query_of(r));
        adjust(a, rows, r, first, {seen.first, least(seen.last, last)}, s);
        float shrink = weigh(s, own.totals[r]);
        if (shrink != 1.0f) scale_row(own.out + r * own.value_row, own.value_row, shrink);
    }
    add_values(a, weights, begin, end, own.out + row * own.value_row, own);
}

template <class T>
void attend_many(const Attention& a, const Source<T>& source, const Rows& rows, const Packed& own) {
    i64 count = rows.count(), tiled = (count + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    std::memset(own.out, 0, sizeof(float) * (size_t)(tiled * own.value_row));
    std::memset(own.q + count * own.q_row, 0, sizeof(float) * (size_t)((tiled - count) * own.q_row));
    for (i64 r = 0; r < count; r++) {
        rotate_query(a, rows, r, own.q + r * own.q_row);
        own.totals[r] = total_before(a, rows.head_of(r));
    }
    Range seen = seen_by(a, rows);
    for (i64 first = seen.first; first < seen.last; first += KEY_BLOCK) {
        i64 last = least(first + KEY_BLOCK, seen.last);
        pack_keys(a, source, rows, first, last - first, own);
        pack_values(a, source, rows, first, last - first, own);
        for (i64 row = 0; row < count; row += TILE_ROWS) attend_tile(a, rows, row, first, last, own);
    }
    for (i64 r = 0; r < count; r++) {
        float* out = a.out + rows.batch * a.out_batch + rows.head_of(r) * a.out_head + rows.query_of(r) * a.out_token;
        const float* summed = own.out + r * own.value_row;
        float factor = inverse(own.totals[r].sum);
        for (i64 p = 0; p < a.value_width; p++) out[p] = summed[p] * factor;
    }
}

}  // namespace
}  // namespace slim
