// Attention over a cache or over given keys: who does which rows and which keys.
#pragma once
#include "attention_few.h"
#include "attention_many.h"
#include "attention_mass.h"

namespace slim {
namespace {

// Scratch, in floats: for each thread what Packed points to, then slots for what units of few rows sum up by chunks of
// keys, then what the patterns of all heads chose.
struct Layout {
    i64 q, out, rows, keys, values, turned, weights, scores, thread, slot;

    Layout(i64 group, i64 key_width, i64 value_width, i64 most_keys, i64 top, i64 slash_columns, bool mass) {
        i64 choosing = top ? (group + 1) * (ceil_div(most_keys, top) + 4) : 0;
        q = 0;
        out = q + most(MANY_ROWS, top ? group : 0) * padded(key_width);
        rows = out + MANY_ROWS * padded(value_width);
        keys = rows + padded(MANY_ROWS * (i64)(sizeof(Row) / sizeof(float)));
        values = keys + padded(key_width) * KEY_BLOCK;
        turned = values + KEY_BLOCK * padded(value_width);
        weights = turned + 4 * padded(key_width);
        scores = weights + FEW_ROWS * KEY_BLOCK;
        i64 voting = slash_columns ? (VOTERS + 3) * most_keys : 0, weighing = mass ? FEW_ROWS * blocks_of(most_keys) : 0;
        thread = scores + padded(most(most(choosing, voting), weighing));
        slot = padded(2 * FEW_ROWS) + FEW_ROWS * padded(value_width);
    }

    explicit Layout(const Attention& a)
        : Layout(a.heads / a.kv_heads, a.key_width, a.value_width, a.most_keys, a.top, a.slash_columns, a.mass) {}
};

inline Choices choices_of(const Attention& a, u64* memory) {
    Choices choices{memory, memory, 0, 0};
    if (a.slash_columns) choices.vote_words = Choices::words_of_vote(a.most_keys);
    if (a.top) choices.top_words = Choices::words_of_top(a.most_keys, a.top);
    choices.tops += a.batch * a.heads * 2 * choices.vote_words;
    return choices;
}

constexpr i64 PIECES = 4;  // of work for a thread, where there can be so many
constexpr i64 SLOTS = 2 * PIECES;

// Pieces of work: rows by heads and queries, and keys by chunks.
struct Split {
    i64 heads, head_groups;  // of the query heads that share a key/value head
    i64 queries, query_blocks;
    i64 chunks;  // of the blocks of keys that a unit reads

    i64 rows() const { return head_groups * query_blocks; }
};

Split split_heads(const Attention& a, i64 heads_at_once) {
    i64 group = a.heads / a.kv_heads;
    Split split{};
    split.heads = ceil_div(group, ceil_div(group, heads_at_once));
    split.head_groups = ceil_div(group, split.heads);
    return split;
}

Split split_few(const Attention& a, i64 threads) {
    Split split = split_heads(a, FEW_ROWS / a.queries);
    split.queries = a.queries;
    split.query_blocks = 1;
    i64 most_blocks = 1, units = a.batch * a.kv_heads * split.head_groups;
    for (i64 batch = 0; batch < a.batch; batch++) {
        Range keys = seen_by(a, Rows{batch, 0, 0, 1, 0, a.queries});
        most_blocks = most(most_blocks, ceil_div(keys.last - keys.first, KEY_BLOCK));
    }
    split.chunks = threads == 1 || units >= PIECES * threads ? 1 : least(ceil_div(PIECES * threads, units), most_blocks);
    return split;
}

Split split_many(const Attention& a, i64 threads) {
    Split split = split_heads(a, FEW_ROWS);
    i64 units = a.batch * a.kv_heads * split.head_groups;
    split.queries = least(a.queries, MANY_ROWS / split.heads);
    while (split.queries * split.heads > MANY_ROWS / 4 && ceil_div(a.queries, split.queries) * units < PIECES * threads)
        split.queries = ceil_div(split.queries, 2);
    split.query_blocks = ceil_div(a.queries, split.queries);
    split.chunks = 1;
    return split;
}

// The rows of one unit of batch * kv_heads * split.rows(); the last queries, which see most keys, come first.
Rows rows_of(const Attention& a, const Split& split, i64 unit) {
    i64 pairs = a.batch * a.kv_heads * split.head_groups;
    i64 block = split.query_blocks - 1 - unit / pairs, pair = unit % pairs / split.head_groups;
    i64 first = unit % split.head_groups * split.heads, group = a.heads / a.kv_heads;
    Rows rows;
    rows.batch = pair / a.kv_heads;
    rows.kv_head = pair % a.kv_heads;
    rows.head = rows.kv_head * group + first;
    rows.heads = least(split.heads, group - first);
    rows.query = block * split.queries;
    rows.queries = least(split.queries, a.queries - rows.query);
    return rows;
}

template <class K, class V>
void append_all(Thread& thread, const Attention& a, float* row) {
    thread.share(a.batch * a.kv_heads * a.queries, 8, [&](i64 begin, i64 end) {
        for (i64 i = begin; i < end; i++) {
            i64 pair = i / a.queries;
            append<K, V>(a, pair / a.kv_heads, pair % a.kv_heads, i % a.queries, row);
        }
    });
    thread.barrier();
}

// Adds what one row summed over another chunk of keys.
void join(Total& total, float* summed, Total next, const float* other, i64 width) {
    float max = next.max > total.max ? next.max : total.max, base = max == -INFINITY ? 0.0f : max;
    float keep = exp_f(total.max - base), add = exp_f(next.max - base);
    for (i64 p = 0; p < width; p++) summed[p] = summed[p] * keep + other[p] * add;
    total = {max, total.sum * keep + next.sum * add};
}

void join_chunks(Thread& thread, const Attention& a, const Split& split, const Layout& layout, float* slots,
                 Row* list) {
    i64 width = padded(a.value_width);
    thread.share(a.batch * a.kv_heads * split.head_groups, 1, [&](i64 begin, i64 end) {
        for (i64 unit = begin; unit < end; unit++) {
            Rows rows = rows_of(a, split, unit);
            list_rows(a, rows, list);
            for (i64 r = 0; r < rows.count(); r++) {
                float* slot = slots + unit * split.chunks * layout.slot;
                float* summed = slot + padded(2 * FEW_ROWS) + r * width;
                list[r].total = ((const Total*)slot)[r];
                for (i64 c = 1; c < split.chunks; c++) {
                    Total next = ((const Total*)(slot + c * layout.slot))[r];
                    join(list[r].total, summed, next, summed + c * layout.slot, width);
                }
                finish_few(a, rows.batch, list[r], summed);
            }
        }
    });
}

// Where the keys of a piece begin, for a first look; the last piece is followed by the first.
template <class K, class V>
const K* first_key(const Attention& a, const Source<K, V>& source, const Split& split, i64 piece) {
    i64 unit = piece / split.chunks % (a.batch * a.kv_heads * split.head_groups);
    Rows rows = rows_of(a, split, unit);
    Chunk chunk(a, seen_by(a, rows), split.chunks, piece % split.chunks);
    return source.key(rows.batch, rows.kv_head, least(chunk.first, most(a.keys_of(rows.batch) - 1, 0)));
}

// What the patterns choose before anyone attends: bounds of blocks of keys, columns and slashes.
template <class K, class V>
void choose_all(Thread& thread, const Attention& a, const Source<K, V>& source, const Choices& choices,
                const Layout& layout, float* own) {
    if (a.top) {
        note_bounds(thread, a, source, own + layout.turned);
        choose_tops(thread, a, choices, own + layout.scores, own + layout.q);
    }
    if (a.slash_columns && a.queries >= VOTERS)
        vote_all(thread, a, source, choices, own + layout.scores, own + layout.q, padded(a.key_width), own + layout.turned);
}

template <class K, class V>
void run_few(Thread& thread, const Attention& a, const Source<K, V>& source, const Choices& choices,
             const Layout& layout, float* own) {
    i64 threads = thread.team.size;
    Split split = split_few(a, threads);
    float* slots = (float*)a.scratch + threads * layout.thread;
    Few few{own + layout.q,       own + layout.out,    (Row*)(own + layout.rows),
            own + layout.weights, own + layout.turned, padded(a.key_width), padded(a.value_width)};
    // New keys and values are appended by who reads them, where nobody else does.
    bool alone = split.head_groups == 1 && (split.chunks == 1 || a.queries == 1) && !a.top;
    if (a.k_cache && !alone) append_all<K, V>(thread, a, own + layout.turned);
    choose_all(thread, a, source, choices, layout, own);
    i64 units = a.batch * a.kv_heads * split.head_groups;
    thread.share(units * split.chunks, 1, [&](i64 begin, i64 end) {
        for (i64 piece = begin; piece < end; piece++) {
            i64 unit = piece / split.chunks, number = piece % split.chunks;
            Rows rows = rows_of(a, split, unit);
            Kept kept(a, rows, choices);
            Chunk chunk(a, seen_by(a, rows), split.chunks, number, kept);
            float* slot = slots + piece * layout.slot;
            if (split.chunks > 1) few.out = slot + padded(2 * FEW_ROWS);
            begin_few(a, rows, few);
            for (i64 r = 0; number == 0 && r < rows.count(); r++) add_sink(a, few.rows[r]);
            if (a.k_cache && alone && chunk.is_last)
                for (i64 i = 0; i < a.queries; i++) append<K, V>(a, rows.batch, rows.kv_head, i, own + layout.turned);
            attend_few(a, source, rows, kept, chunk, first_key(a, source, split, piece + 1), few);
            for (i64 r = 0; r < rows.count(); r++) {
                if (split.chunks > 1) ((Total*)slot)[r] = few.rows[r].total;
                else finish_few(a, rows.batch, few.rows[r], few.out + r * few.out_row);
            }
        }
    });
    if (split.chunks == 1) return;
    thread.barrier();
    join_chunks(thread, a, split, layout, slots, few.rows);
}

template <class K, class V>
void run_many(Thread& thread, const Attention& a, const Source<K, V>& source, const Choices& choices,
              const Layout& layout, float* own) {
    if (a.k_cache) append_all<K, V>(thread, a, own + layout.turned);
    choose_all(thread, a, source, choices, layout, own);
    Split split = split_many(a, thread.team.size);
    Packed packed{own + layout.q,      own + layout.out,    (Row*)(own + layout.rows), own + layout.keys,
                  own + layout.values, own + layout.turned, own + layout.weights,          padded(a.key_width),
                  padded(a.value_width)};
    thread.share(a.batch * a.kv_heads * split.rows(), 1, [&](i64 begin, i64 end) {
        for (i64 unit = begin; unit < end; unit++) {
            Rows rows = rows_of(a, split, unit);
            Kept kept(a, rows, choices);
            begin_many(a, rows, packed);
            attend_many(a, source, rows, kept, packed);
        }
    });
}

template <class K, class V>
void run(Thread& thread, const Attention& a, const Source<K, V>& source) {
    Layout layout(a);
    i64 threads = thread.team.size;
    float* own = (float*)a.scratch + thread.id * layout.thread;
    Choices choices = choices_of(a, (u64*)((float*)a.scratch + threads * (layout.thread + SLOTS * layout.slot)));
    bool few = a.queries <= FEW_QUERIES && a.key_width >= LANES && a.value_width >= LANES && !source.turn;
    if (few) run_few(thread, a, source, choices, layout, own);
    else run_many(thread, a, source, choices, layout, own);
    if (!a.mass) return;
    thread.barrier();  // every key is in its place
    Weighing weighing{own + layout.q, (Row*)(own + layout.rows), own + layout.weights, own + layout.turned,
                      own + layout.scores, padded(a.key_width), blocks_of(a.most_keys)};
    weigh_all(thread, a, source, weighing);
}

template <class K, class V = K>
void run_cached(Thread& thread, const Attention& a) {
    run(thread, a, Source<K, V>{a, (const K*)a.k_cache, (const V*)a.v_cache, a.kc_batch, a.kc_head, a.kc_token,
                                a.vc_batch, a.vc_head, a.vc_token, false, a.k_scale, a.v_scale, a.ks_batch, a.ks_head,
                                a.vs_batch, a.vs_head});
}

}  // namespace

// Over a cache of int8 or int4. A unit of its own, as kernels for each kind of keys and values take long to compile.
void attention_rounded(Thread& thread, const Attention& a);

}  // namespace slim
