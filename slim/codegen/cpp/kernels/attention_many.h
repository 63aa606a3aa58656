// Attention of many rows (prefill): blocks of keys and values are packed for a product that keeps tiles in registers.
#pragma once
#include "attention_few.h"

namespace slim {
namespace {

constexpr i64 MANY_ROWS = 192;  // of one unit: what packing a block of keys is spread over
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = LANES == 8 ? 2 : 4;  // 6 x 4 sums need 32 registers, 6 x 2 need 16

// Of one thread.
struct Packed {
    float* q;       // [MANY_ROWS][padded key_width], rotated and scaled
    float* out;     // [MANY_ROWS][padded value_width]
    Row* rows;      // [MANY_ROWS]
    float* keys;    // [key_width][KEY_BLOCK]
    float* values;  // [KEY_BLOCK][padded value_width]
    float* turned;  // [4][padded key_width]
    float* weights;  // [TILE_ROWS][KEY_BLOCK]
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

// The same for any number of vectors.
template <bool ADD>
void multiply(const float* x, i64 x_row, const float* y, i64 y_row, i64 depth, float* z, i64 z_row, i64 vectors) {
    for (; vectors >= TILE_VECTORS; vectors -= TILE_VECTORS) {
        multiply<TILE_VECTORS, ADD>(x, x_row, y, y_row, depth, z, z_row);
        y += TILE_VECTORS * LANES;
        z += TILE_VECTORS * LANES;
    }
    switch (vectors) {  // what cannot be left over gets the code of 1
        case 3: return multiply<TILE_VECTORS < 3 ? 1 : 3, ADD>(x, x_row, y, y_row, depth, z, z_row);
        case 2: return multiply<TILE_VECTORS < 2 ? 1 : 2, ADD>(x, x_row, y, y_row, depth, z, z_row);
        case 1: return multiply<1, ADD>(x, x_row, y, y_row, depth, z, z_row);
    }
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

// keys first..first + count - 1, transposed; the columns up to the next four repeat the last key.
template <class K, class V>
void pack_keys(const Attention& a, const Source<K, V>& source, const Rows& rows, i64 first, i64 count, const Packed& own) {
    for (i64 j = 0; j < count; j += 4) {
        const float* four[4];
        for (i64 i = 0; i < 4; i++) {
            i64 index = first + least(j + i, count - 1);
            const K* key = source.key(rows.batch, rows.kv_head, index);
            float* row = own.turned + i * own.q_row;
            four[i] = row;
            if constexpr (std::is_same<K, float>::value) {
                if (source.turn) rotate(a, rows.batch, index, key, 1.0f, row);
                else four[i] = key;
            } else {
                const float* scale = source.key_scale(rows.batch, rows.kv_head, index);
                widen(key, a.key_width, scale ? *scale : 1.0f, row);
            }
        }
        transpose_four(four, a.key_width, own.keys, j);
    }
}

template <class K, class V>
void pack_values(const Attention& a, const Source<K, V>& source, const Rows& rows, i64 first, i64 count,
                 const Packed& own) {
    const float* scale = source.value_scale(rows.batch, rows.kv_head, first);
    for (i64 j = 0; j < count; j++)
        widen(source.value(rows.batch, rows.kv_head, first + j), a.value_width, scale ? scale[j] : 1.0f,
              own.values + j * own.value_row);
}

// TILE_ROWS rows from `row` on against the packed block of keys first..last - 1. `values()` packs their values.
template <class K, class V, class Values>
[[gnu::noinline]] void attend_tile(const Attention& a, const Source<K, V>& source, const Rows& rows, i64 row, i64 first,
                                   i64 last, const Packed& own, Values&& values) {
    i64 end_row = least(row + TILE_ROWS, rows.count());
    u64 any = 0;
    for (i64 r = row; r < end_row; r++) any |= own.rows[r].kept;
    if (!any) return;
    i64 begin = most(own.rows[row].seen.first - first, 0);
    i64 end = least(own.rows[end_row - 1].seen.last, last) - first;
    if (begin >= end) return;
    i64 column = begin / LANES * LANES;
    multiply<false>(own.q + row * own.q_row, own.q_row, own.keys + column, KEY_BLOCK, a.key_width, own.weights + column,
                    KEY_BLOCK, vectors_of(end - column));
    bool counts = a.skip == 0.0f;
    for (i64 r = row; r < end_row; r++) {
        float* s = own.weights + (r - row) * KEY_BLOCK;
        Range seen = own.rows[r].seen;
        score_first(a, source, rows, own.rows[r], first, s, own.turned);
        adjust(a, rows.batch, own.rows[r], first, {seen.first, least(seen.last, last)}, s);
        counts |= a.skip != 0.0f && highest_of(s) - own.rows[r].total.max >= least_share(a, rows.batch);
    }
    if (!counts) return;
    values();
    for (i64 r = row; r < end_row; r++) {
        float* s = own.weights + (r - row) * KEY_BLOCK;
        float shrink = weigh(s, own.rows[r].total);
        if (shrink != 1.0f) scale_row(own.out + r * own.value_row, own.value_row, shrink);
    }
    multiply<true>(own.weights + begin, KEY_BLOCK, own.values + begin * own.value_row, own.value_row, end - begin,
                   own.out + row * own.value_row, own.value_row, vectors_of(a.value_width));
}

// Loads and rotates the queries.
inline void begin_many(const Attention& a, const Rows& rows, const Packed& own) {
    i64 count = rows.count(), tiled = (count + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    std::memset(own.out, 0, sizeof(float) * (size_t)(tiled * own.value_row));
    std::memset(own.q + count * own.q_row, 0, sizeof(float) * (size_t)((tiled - count) * own.q_row));
    list_rows(a, rows, own.rows);
    for (i64 r = 0; r < count; r++) {
        add_sink(a, own.rows[r]);
        rotate_query(a, rows.batch, own.rows[r], own.q + r * own.q_row);
    }
}

template <class K, class V>
void attend_many(const Attention& a, const Source<K, V>& source, const Rows& rows, const Kept& kept, const Packed& own) {
    i64 count = rows.count();
    Chunk all(a, seen_by(a, rows), 1, 0, kept);
    auto attend = [&](i64 first) {
        if (!kept.note(own.rows, first)) return;
        i64 last = least(first + KEY_BLOCK, all.last);
        bool packed = false;
        pack_keys(a, source, rows, first, last - first, own);
        for (i64 row = 0; row < count; row += TILE_ROWS)
            attend_tile(a, source, rows, row, first, last, own, [&] {
                if (!packed) pack_values(a, source, rows, first, last - first, own);
                packed = true;
            });
    };
    i64 newest = NEVER;
    if (a.skip != 0.0f && all.last > all.base) {  // what scores high early lets more be skipped
        newest = all.base + (all.last - 1 - all.base) / KEY_BLOCK * KEY_BLOCK;
        attend(newest);
    }
    for (i64 first = kept.next_block(all.base, all.base); first < all.last;
         first = kept.next_block(all.base, first + KEY_BLOCK))
        if (first != newest) attend(first);
    for (i64 r = 0; r < count; r++) {
        float* out = out_of(a, rows.batch, own.rows[r]);
        const float* summed = own.out + r * own.value_row;
        float factor = inverse(own.rows[r].total.sum);
        for (i64 p = 0; p < a.value_width; p++) out[p] = summed[p] * factor;
    }
}

}  // namespace
}  // namespace slim
