// Attention of few rows (decoding): keys and values are read once, where they lie, and serve all rows from registers.
#pragma once
#include "attention_rows.h"

namespace slim {
namespace {

constexpr i64 FEW_ROWS = 16;                    // of one unit
constexpr i64 FEW_QUERIES = 4;                  // above, packing keys pays
constexpr int ROW_TILE = LANES == 8 ? 2 : 4;    // rows in registers at a time
constexpr int VALUE_TILE = 4;                   // vectors of a value in registers at a time
constexpr i64 VALUE_STEP = 16;                  // keys whose values stay in L1 from tile to tile

// A row of n >= LANES numbers as vectors: the last one ends with the row, overlapping the one before it.
constexpr i64 vector_start(i64 vector, i64 n) { return least(vector * LANES, n - LANES); }

template <int... I>
inline vf low_pairs(vf x, vf y, std::integer_sequence<int, I...>) {
    return __builtin_shuffle(x, y, vi{((I & ~3) + I % 4 / 2 + I % 2 * LANES)...});
}
template <int... I>
inline vf high_pairs(vf x, vf y, std::integer_sequence<int, I...>) {
    return __builtin_shuffle(x, y, vi{((I & ~3) + 2 + I % 4 / 2 + I % 2 * LANES)...});
}
template <int... I>
inline vf low_halves(vf x, vf y, std::integer_sequence<int, I...>) {
    return __builtin_shuffle(x, y, vi{((I & ~3) + I % 2 + I % 4 / 2 * LANES)...});
}
template <int... I>
inline vf high_halves(vf x, vf y, std::integer_sequence<int, I...>) {
    return __builtin_shuffle(x, y, vi{((I & ~3) + 2 + I % 2 + I % 4 / 2 * LANES)...});
}

// The sums of four vectors.
inline v4 sums(const vf* x) {
    std::make_integer_sequence<int, LANES> all;
    vf a = low_pairs(x[0], x[1], all) + high_pairs(x[0], x[1], all);
    vf b = low_pairs(x[2], x[3], all) + high_pairs(x[2], x[3], all);
    vf both = low_halves(a, b, all) + high_halves(a, b, all);
    return fold(both, [](v4 p, v4 q) { return p + q; });
}

// scores[row][0..3] of ROWS queries against four keys.
template <class T, int ROWS>
void dots(const T* const* keys, i64 width, const float* q, i64 q_row, float* scores) {
    vf acc[ROWS][4] = {};
    for (i64 n = 0; n < vectors_of(width); n++) {
        i64 at = vector_start(n, width);
        vf k0 = load(keys[0] + at), k1 = load(keys[1] + at), k2 = load(keys[2] + at), k3 = load(keys[3] + at);
        for (int r = 0; r < ROWS; r++) {
            vf x = load(q + r * q_row + n * LANES);
            acc[r][0] += x * k0;
            acc[r][1] += x * k1;
            acc[r][2] += x * k2;
            acc[r][3] += x * k3;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        v4 four = sums(acc[r]);
        std::memcpy(scores + r * KEY_BLOCK, &four, sizeof four);
    }
}

// out[row] += weights[row][j] value j, for ROWS rows, `count` keys and N vectors of the values from `vector` on.
template <class T, int ROWS, int N>
void mix(const T* value, i64 v_token, i64 count, i64 width, i64 vector, const float* weights, float* out, i64 out_row) {
    i64 at[N];
    vf acc[ROWS][N];
    for (int n = 0; n < N; n++) at[n] = vector_start(vector + n, width);
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < N; n++) acc[r][n] = load(out + r * out_row + (vector + n) * LANES);
    for (i64 j = 0; j < count; j++, value += v_token) {
        vf x[N];
        for (int n = 0; n < N; n++) x[n] = load(value + at[n]);
        for (int r = 0; r < ROWS; r++) {
            vf weight = splat(weights[r * KEY_BLOCK + j]);
            for (int n = 0; n < N; n++) acc[r][n] += weight * x[n];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < N; n++) store(out + r * out_row + (vector + n) * LANES, acc[r][n]);
}

template <class T, int ROWS>
void mix_tile(const T* value, i64 v_token, i64 count, i64 width, const float* weights, float* out, i64 out_row) {
    i64 vectors = vectors_of(width), vector = 0;
    for (; vector + VALUE_TILE <= vectors; vector += VALUE_TILE)
        mix<T, ROWS, VALUE_TILE>(value, v_token, count, width, vector, weights, out, out_row);
    switch (vectors - vector) {
        case 3: return mix<T, ROWS, 3>(value, v_token, count, width, vector, weights, out, out_row);
        case 2: return mix<T, ROWS, 2>(value, v_token, count, width, vector, weights, out, out_row);
        case 1: return mix<T, ROWS, 1>(value, v_token, count, width, vector, weights, out, out_row);
    }
}

// Calls tile(row, size) with the size as a constant, over all rows.
template <class Tile>
void tile_rows(i64 rows, Tile&& tile) {
    i64 row = 0;
    for (; row + ROW_TILE <= rows; row += ROW_TILE) tile(row, std::integral_constant<int, ROW_TILE>{});
    switch (rows - row) {  // what cannot be left over gets the code of 1
        case 3: return tile(row, std::integral_constant<int, ROW_TILE < 3 ? 1 : 3>{});
        case 2: return tile(row, std::integral_constant<int, ROW_TILE < 2 ? 1 : 2>{});
        case 1: return tile(row, std::integral_constant<int, 1>{});
    }
}

// One unit's rows: queries as `dots` wants them, and values summed so far, in vectors as they were read.
struct Few {
    float* q;
    float* out;
    Row* rows;
    float* weights;  // [FEW_ROWS][KEY_BLOCK]
    i64 q_row, out_row;
};

// Loads and rotates the queries. `turned` holds key_width floats.
inline void begin_few(const Attention& a, const Rows& rows, const Few& few, float* turned) {
    list_rows(a, rows, few.rows);
    for (i64 r = 0; r < rows.count(); r++) {
        rotate_query(a, rows.batch, few.rows[r], turned);
        float* q = few.q + r * few.q_row;
        for (i64 n = 0; n < vectors_of(a.key_width); n++) {
            i64 at = vector_start(n, a.key_width);
            for (i64 p = 0; p < LANES; p++) q[n * LANES + p] = at + p < n * LANES ? 0.0f : turned[at + p];
        }
        std::memset(few.out + r * few.out_row, 0, sizeof(float) * (size_t)few.out_row);
    }
}

// Asks for a row ahead of its use: blocks of keys and of values alternate, which the processor does not foresee.
template <class T>
inline void fetch(const T* row, i64 width) {
    for (i64 p = 0; p < width; p += 64 / (i64)sizeof(T)) __builtin_prefetch(row + p);
}

// Sums weighted values of keys.first..keys.last - 1.
template <class T>
void attend_few(const Attention& a, const Source<T>& source, const Rows& rows, Range keys, const Few& few) {
    float* weights = few.weights;
    for (i64 first = keys.first; first < keys.last; first += KEY_BLOCK) {
        i64 count = least(KEY_BLOCK, keys.last - first);
        for (i64 j = 0; j < count; j += 4) {
            const T* four[4];
            for (i64 i = 0; i < 4; i++) {
                i64 index = first + least(j + i, count - 1);
                four[i] = source.key(rows.batch, rows.kv_head, index);
                fetch(source.value(rows.batch, rows.kv_head, index), a.value_width);
            }
            tile_rows(rows.count(), [&](i64 r, auto size) {
                dots<T, size>(four, a.key_width, few.q + r * few.q_row, few.q_row, weights + r * KEY_BLOCK + j);
            });
        }
        for (i64 r = 0; r < rows.count(); r++) {
            Row& row = few.rows[r];
            float* s = weights + r * KEY_BLOCK;
            adjust(a, rows.batch, row, first, {row.seen.first, least(row.seen.last, keys.last)}, s);
            float shrink = weigh(s, row.total);
            if (shrink != 1.0f) scale_row(few.out + r * few.out_row, few.out_row, shrink);
        }
        for (i64 j = 0; j < count; j += VALUE_STEP) {
            const T* value = source.value(rows.batch, rows.kv_head, first + j);
            i64 step = least(VALUE_STEP, count - j);
            for (i64 i = j; i < j + step && first + KEY_BLOCK + i < keys.last; i++)
                fetch(source.key(rows.batch, rows.kv_head, first + KEY_BLOCK + i), a.key_width);
            tile_rows(rows.count(), [&](i64 r, auto size) {
                mix_tile<T, size>(value, source.v_token, step, a.value_width, weights + r * KEY_BLOCK + j,
                                  few.out + r * few.out_row, few.out_row);
            });
        }
    }
}

// Stores what `attend_few` summed.
inline void finish_few(const Attention& a, i64 batch, const Row& row, const float* summed) {
    float* out = out_of(a, batch, row);
    float factor = inverse(row.total.sum);
    for (i64 n = 0; n < vectors_of(a.value_width); n++)
        store(out + vector_start(n, a.value_width), load(summed + n * LANES) * factor);
}

}  // namespace
}  // namespace slim
