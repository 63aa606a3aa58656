// Attention of few rows (decoding): keys and values are read once, where they lie, and serve all rows from registers.
#pragma once
#include "attention_pattern.h"

namespace slim {
namespace {

constexpr i64 FEW_ROWS = 16;                    // of one unit
constexpr i64 FEW_QUERIES = 4;                  // above, packing keys pays
constexpr int ROW_TILE = LANES == 8 ? 2 : 4;    // rows in registers at a time
constexpr int VALUE_TILE = 4;                   // vectors of a value in registers at a time
constexpr i64 VALUE_STEP = 32;                  // keys whose values stay in L1 from tile to tile

// A row of n >= LANES numbers as vectors: the last one ends with the row, overlapping the one before it.
constexpr i64 vector_start(i64 vector, i64 n) { return least(vector * LANES, n - LANES); }

// Keys or values of one head, from one token on; and what memory is asked for meanwhile, row by row: values while keys
// are read, the next keys while values are. Two streams are faster than one, and the processor does not foresee the turns.
template <class T>
struct Tokens {
    const T* first;
    i64 apart, count, width;
    const char* next;
    i64 next_apart;  // in bytes

    // Vector n of row j. Requests are spread over the arithmetic: in bursts they would hold it up.
    void fetch(i64 j, i64 n) const {
        i64 bytes = bytes_of<T>(n * LANES);
        if (bytes % 64 == 0) __builtin_prefetch(next + j * next_apart + bytes);
    }
};

// Where vector n of a row begins; of rows of whole vectors it is known beforehand.
template <bool WHOLE>
constexpr i64 place(i64 n, i64 width) { return WHOLE ? n * LANES : vector_start(n, width); }

// scores[row][j] of ROWS queries against all keys. VECTORS: of a key, where they are whole and so many, or 0.
template <class T, int ROWS, int VECTORS>
[[gnu::noinline]] void dots(Tokens<T> keys, const float* q, i64 q_row, float* scores, bool ahead) {
    const i64 vectors = VECTORS ? VECTORS : vectors_of(keys.width);
    for (i64 j = 0; j < keys.count; j += 4) {
        const T* k[4];
        for (i64 i = 0; i < 4; i++) k[i] = keys.first + least(j + i, keys.count - 1) * keys.apart;
        vf acc[ROWS][4] = {};
#pragma GCC unroll 8
        for (i64 n = 0; n < vectors; n++) {
            i64 p = place<VECTORS != 0>(n, keys.width);
            vf numbers[4] = {load(at(k[0], p)), load(at(k[1], p)), load(at(k[2], p)), load(at(k[3], p))};
            for (i64 i = 0; ahead && i < 4; i++) keys.fetch(j + i, n);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                vf x = load(q + r * q_row + n * LANES);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) acc[r][i] += x * numbers[i];
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            v4 four = sums(acc[r]);
            std::memcpy(scores + r * KEY_BLOCK + j, &four, sizeof four);
        }
    }
}

template <class T, int ROWS>
void dots_of_width(const Tokens<T>& keys, const float* q, i64 q_row, float* scores, bool ahead) {
    if (keys.width == 4 * LANES) return dots<T, ROWS, 4>(keys, q, q_row, scores, ahead);
    if (keys.width == 8 * LANES) return dots<T, ROWS, 8>(keys, q, q_row, scores, ahead);
    dots<T, ROWS, 0>(keys, q, q_row, scores, ahead);
}

// out[row] += sum(weights[row][j] value j), for ROWS rows and N vectors of the values from `vector` on.
template <class T, int ROWS, int N, bool WHOLE>
[[gnu::noinline]] void mix(Tokens<T> values, i64 vector, const float* weights, float* out, i64 out_row, bool ahead) {
    vf acc[ROWS][N];
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < N; n++) acc[r][n] = load(out + r * out_row + (vector + n) * LANES);
    const T* value = values.first;
    for (i64 j = 0; j < values.count; j++, value += values.apart) {
        vf x[N];
        for (int n = 0; n < N; n++) x[n] = load(at(value, place<WHOLE>(vector + n, values.width)));
        for (int r = 0; r < ROWS; r++) {
            vf weight = splat(weights[r * KEY_BLOCK + j]);
            for (int n = 0; n < N; n++) acc[r][n] += weight * x[n];
        }
        if (ahead)
            for (i64 n = 0; n < N; n++) values.fetch(j, vector + n);
    }
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < N; n++) store(out + r * out_row + (vector + n) * LANES, acc[r][n]);
}

template <class T, int ROWS, bool WHOLE>
void mix_tile(const Tokens<T>& values, const float* weights, float* out, i64 out_row, bool ahead) {
    i64 vectors = vectors_of(values.width), vector = 0;
    for (; vector + VALUE_TILE <= vectors; vector += VALUE_TILE)
        mix<T, ROWS, VALUE_TILE, WHOLE>(values, vector, weights, out, out_row, ahead);
    switch (vectors - vector) {
        case 3: return mix<T, ROWS, 3, WHOLE>(values, vector, weights, out, out_row, ahead);
        case 2: return mix<T, ROWS, 2, WHOLE>(values, vector, weights, out, out_row, ahead);
        case 1: return mix<T, ROWS, 1, WHOLE>(values, vector, weights, out, out_row, ahead);
    }
}

template <class T, int ROWS>
void mix_of_width(const Tokens<T>& values, const float* weights, float* out, i64 out_row, bool ahead) {
    if (values.width % LANES == 0) return mix_tile<T, ROWS, true>(values, weights, out, out_row, ahead);
    mix_tile<T, ROWS, false>(values, weights, out, out_row, ahead);
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
    float* turned;   // [key_width]
    i64 q_row, out_row;
};

// Loads and rotates a query, for `dots`; `turned` holds key_width floats.
inline void load_query(const Attention& a, i64 batch, const Row& row, float* turned, float* q) {
    rotate_query(a, batch, row, turned);
    for (i64 n = 0; n < vectors_of(a.key_width); n++) {
        i64 at = vector_start(n, a.key_width);
        for (i64 p = 0; p < LANES; p++) q[n * LANES + p] = at + p < n * LANES ? 0.0f : turned[at + p];
    }
}

[[gnu::noinline]] void begin_few(const Attention& a, const Rows& rows, const Few& few) {
    list_rows(a, rows, few.rows);
    for (i64 r = 0; r < rows.count(); r++) {
        load_query(a, rows.batch, few.rows[r], few.turned, few.q + r * few.q_row);
        std::memset(few.out + r * few.out_row, 0, sizeof(float) * (size_t)few.out_row);
    }
}

// One of `chunks` equal parts of the blocks of keys that a unit reads.
struct Chunk {
    i64 base, first, end;  // blocks begin at base, base + KEY_BLOCK, ...; those of this part from first on, before end
    i64 last;              // the end of the last key
    bool is_last;          // whether the newest key is among them

    // Of all blocks, whatever a pattern keeps.
    Chunk(const Attention& a, Range keys, i64 chunks, i64 number) {
        base = a.table || a.patterns ? keys.first / KEY_BLOCK * KEY_BLOCK : keys.first;
        last = keys.last;
        i64 count = ceil_div(last - base, KEY_BLOCK), each = ceil_div(count, chunks);
        first = least(base + number * each * KEY_BLOCK, last);
        end = least(first + each * KEY_BLOCK, last);
        is_last = count ? number == (count - 1) / each : number == 0;
    }

    // Of those that the pattern may keep.
    Chunk(const Attention& a, Range keys, i64 chunks, i64 number, const Kept& kept) : Chunk(a, keys, chunks, number) {
        if (!kept.has_bounds || chunks == 1) return;
        i64 count = 0;
        for (i64 at = kept.next_block(base, base); at < last; at = kept.next_block(base, at + KEY_BLOCK)) count++;
        i64 each = ceil_div(count, chunks);
        first = nth(kept, kept.next_block(base, base), number * each);
        end = nth(kept, first, each);
        is_last = count ? number == (count - 1) / each : number == 0;
    }

private:
    i64 nth(const Kept& kept, i64 at, i64 steps) const {
        for (; steps > 0 && at < last; steps--) at = kept.next_block(base, at + KEY_BLOCK);
        return least(at, last);
    }
};

// The keys of a block that any row keeps, in runs of whole groups.
constexpr i64 GROUP = 16;

// The first key of a block from `j` on that begins or lies in a group of which `any` bit is set.
inline i64 next_run(u64 any, i64 j, i64 count) {
    while (j < count && !(any >> j & ((1 << GROUP) - 1))) j += GROUP;
    return j;
}

template <class Run>
void each_run(u64 any, i64 count, Run&& run) {
    if (any == EVERY) return run(0, count, count);
    for (i64 j = next_run(any, 0, count); j < count;) {
        i64 end = j + GROUP;
        while (end < count && next_run(any, end, end + GROUP) == end) end += GROUP;
        i64 next = next_run(any, end, count);
        run(j, least(end, count), next);
        j = next;
    }
}

// The most that any key of a block scores.
inline float highest_of(const float* s) {
    vf top = load(s);
    for (i64 j = LANES; j < KEY_BLOCK; j += LANES) {
        vf x = load(s + j);
        top = x > top ? x : top;
    }
    return highest(top);
}

// ln of the share that one key must reach to count; what `skip` leaves out then adds up to no more than it says.
inline float least_share(const Attention& a, i64 batch) { return std::log(a.skip / (float)most(a.keys_of(batch), 1)); }

// Sums weighted values of one block of keys from `first` on, of which `any` are kept by some row. `next` are the keys
// that are read after them.
template <class K, class V>
void attend_block(const Attention& a, const Source<K, V>& source, const Rows& rows, i64 first, i64 last, u64 any,
                  const K* next, const Few& few) {
    float* weights = few.weights;
    i64 key_bytes = source.k_token * (i64)sizeof(K), value_bytes = source.v_token * (i64)sizeof(V);
    i64 count = least(KEY_BLOCK, last - first);
    const K* key = source.key(rows.batch, rows.kv_head, first);
    const V* value = source.value(rows.batch, rows.kv_head, first);
    each_run(any, count, [&](i64 from, i64 to, i64) {
        Tokens<K> k{key + from * source.k_token, source.k_token, to - from, a.key_width,
                    (const char*)value + from * value_bytes, value_bytes};
        tile_rows(rows.count(), [&](i64 r, auto size) {
            dots_of_width<K, size>(k, few.q + r * few.q_row, few.q_row, weights + r * KEY_BLOCK + from, r == 0);
        });
    });
    bool counts = a.skip == 0.0f;
    for (i64 r = 0; r < rows.count(); r++) {
        Row& row = few.rows[r];
        float* s = weights + r * KEY_BLOCK;
        scale_keys(s, source.key_scale(rows.batch, rows.kv_head, first), count);
        score_first(a, source, rows, row, first, s, few.turned);
        adjust(a, rows.batch, row, first, {row.seen.first, least(row.seen.last, last)}, s);
        counts |= a.skip != 0.0f && highest_of(s) - row.total.max >= least_share(a, rows.batch);
    }
    if (!counts) return;
    for (i64 r = 0; r < rows.count(); r++) {
        Row& row = few.rows[r];
        float* s = weights + r * KEY_BLOCK;
        float shrink = weigh(s, row.total);
        if (shrink != 1.0f) scale_row(few.out + r * few.out_row, few.out_row, shrink);
        scale_keys(s, source.value_scale(rows.batch, rows.kv_head, first), count);
    }
    each_run(any, count, [&](i64 from, i64 to, i64 following) {
        const char* ahead = (const char*)(following < count ? key + following * source.k_token : next);
        for (i64 j = from; j < to; j += VALUE_STEP) {
            Tokens<V> v{value + j * source.v_token, source.v_token, least(VALUE_STEP, to - j), a.value_width,
                        ahead + (j - from) * key_bytes, key_bytes};
            tile_rows(rows.count(), [&](i64 r, auto size) {
                mix_of_width<V, size>(v, weights + r * KEY_BLOCK + j, few.out + r * few.out_row, few.out_row, r == 0);
            });
        }
    });
}

// A block of keys of which some row keeps some.
struct Found {
    i64 first;
    u64 any;
};

// The next one from `first` on, of a chunk that ends before key `end`; its first is `end` where there is none.
inline Found find_block(const Kept& kept, const Row* list, i64 base, i64 first, i64 end) {
    for (; first < end; first = kept.next_block(base, first + KEY_BLOCK))
        if (u64 any = kept.any(list, first)) return {first, any};
    return {end, 0};
}

// Sums weighted values of the keys of a chunk. `after` are the keys that are read next.
template <class K, class V>
void attend_few(const Attention& a, const Source<K, V>& source, const Rows& rows, const Kept& kept, const Chunk& chunk,
                const K* after, const Few& few) {
    auto attend = [&](const Found& block, const K* next) {
        kept.note(few.rows, block.first);
        attend_block(a, source, rows, block.first, chunk.last, block.any, next, few);
    };
    i64 newest = NEVER;
    if (a.skip != 0.0f && chunk.is_last && chunk.end - chunk.first > KEY_BLOCK) {  // high scores first: more is skipped
        newest = chunk.base + (chunk.last - 1 - chunk.base) / KEY_BLOCK * KEY_BLOCK;
        if (u64 any = kept.any(few.rows, newest)) attend({newest, any}, after);
    }
    Found block = find_block(kept, few.rows, chunk.base, chunk.first, chunk.end);
    while (block.first < chunk.end) {
        i64 from = kept.next_block(chunk.base, block.first + KEY_BLOCK);
        Found following = find_block(kept, few.rows, chunk.base, from, chunk.end);
        i64 run = following.any ? following.first + next_run(following.any, 0, KEY_BLOCK) : 0;
        if (block.first != newest)
            attend(block, following.any ? source.key(rows.batch, rows.kv_head, run) : after);
        block = following;
    }
}

// Stores what `attend_few` summed.
[[gnu::noinline]] void finish_few(const Attention& a, i64 batch, const Row& row, const float* summed) {
    float* out = out_of(a, batch, row);
    float factor = inverse(row.total.sum);
    for (i64 n = 0; n < vectors_of(a.value_width); n++)
        store(out + vector_start(n, a.value_width), load(summed + n * LANES) * factor);
}

}  // namespace
}  // namespace slim
