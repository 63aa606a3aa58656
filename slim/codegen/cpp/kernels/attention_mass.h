// What the keys of a cache get of attention: softmax's weights, summed over the queries that read them.
#pragma once
#include "attention_few.h"

namespace slim {
namespace {

// Scores of so many keys, in whole blocks.
constexpr i64 blocks_of(i64 keys) { return ceil_div(keys, KEY_BLOCK) * KEY_BLOCK; }

// Of one thread.
struct Weighing {
    float* q;       // [FEW_ROWS][padded key_width], rotated and scaled
    Row* rows;      // [FEW_ROWS]
    float* block;   // [FEW_ROWS][KEY_BLOCK]
    float* turned;  // [padded key_width]
    float* scores;  // [FEW_ROWS][blocks of all keys]
    i64 q_row, scores_row;
};

// The scores of one block of keys from `first` on, for all rows.
template <class K, class V>
void score_block(const Attention& a, const Source<K, V>& source, const Rows& rows, i64 first, i64 last,
                 const Weighing& own) {
    i64 count = least(KEY_BLOCK, last - first);
    if (a.key_width >= LANES) {
        Tokens<K> keys{source.key(rows.batch, rows.kv_head, first), source.k_token, count, a.key_width, nullptr, 0};
        tile_rows(rows.count(), [&](i64 r, auto size) {
            dots_of_width<K, size>(keys, own.q + r * own.q_row, own.q_row, own.block + r * KEY_BLOCK, false);
        });
        for (i64 r = 0; r < rows.count(); r++)
            scale_keys(own.block + r * KEY_BLOCK, source.key_scale(rows.batch, rows.kv_head, first), count);
    } else {
        for (i64 j = 0; j < count; j++) {
            const float* key = key_as_floats(a, source, rows.batch, rows.kv_head, first + j, own.turned);
            for (i64 r = 0; r < rows.count(); r++) {
                const float* q = own.q + r * own.q_row;
                float score = 0.0f;
                for (i64 p = 0; p < a.key_width; p++) score += q[p] * key[p];
                own.block[r * KEY_BLOCK + j] = score;
            }
        }
    }
    for (i64 r = 0; r < rows.count(); r++) {
        Row& row = own.rows[r];
        float *s = own.block + r * KEY_BLOCK, *kept = own.scores + r * own.scores_row + first;
        adjust(a, rows.batch, row, first, {row.seen.first, least(row.seen.last, last)}, s);
        row.total.max = larger(row.total.max, highest_of(s));
        std::memcpy(kept, s, sizeof(float) * KEY_BLOCK);
    }
}

// Adds the weights of one row's scores of keys 0..last - 1. Before, its total is the highest score and that of a sink.
inline void add_weights(const Attention& a, const Row& row, float* scores, i64 last, float* mass) {
    float base = row.total.max == -INFINITY ? 0.0f : row.total.max;
    vf sums{};
    for (i64 j = 0; j < last; j += LANES) {
        vf weight = exp_below(load(scores + j) - base);
        store(scores + j, weight);
        sums += weight;
    }
    float sink = row.total.sum == 0.0f ? 0.0f : exp_f(a.sinks[row.head] - base), factor = inverse(sum(sums) + sink);
    for (i64 j = 0; j < last; j++) mass[j] += scores[j] * factor;
}

template <class K, class V>
void weigh_head(const Attention& a, const Source<K, V>& source, i64 batch, i64 kv_head, const Weighing& own) {
    i64 group = a.heads / a.kv_heads, keys = a.keys_of(batch), start = a.start_of(batch);
    i64 counted = a.votes ? least(a.votes, a.queries) : a.queries;
    float* mass = a.mass + batch * a.mass_batch + kv_head * a.mass_head;
    for (i64 j = a.votes && a.queries >= a.votes ? 0 : start; j < keys; j++) mass[j] = 0.0f;
    i64 heads = least(group, FEW_ROWS), queries = FEW_ROWS / heads;
    for (i64 query = a.queries - counted; query < a.queries; query += queries)
        for (i64 head = 0; head < group; head += heads) {
            Rows rows{batch, kv_head, kv_head * group + head, least(heads, group - head),
                      query, least(queries, a.queries - query)};
            list_rows(a, rows, own.rows);
            for (i64 r = 0; r < rows.count(); r++) {
                add_sink(a, own.rows[r]);
                float* q = own.q + r * own.q_row;
                if (a.key_width >= LANES) load_query(a, batch, own.rows[r], own.turned, q);
                else rotate_query(a, batch, own.rows[r], q);
            }
            i64 last = seen_by(a, rows).last;
            for (i64 first = 0; first < last; first += KEY_BLOCK) score_block(a, source, rows, first, last, own);
            for (i64 r = 0; r < rows.count(); r++)
                add_weights(a, own.rows[r], own.scores + r * own.scores_row, last, mass);
        }
}

// A head's keys belong to one thread.
template <class K, class V>
void weigh_all(Thread& thread, const Attention& a, const Source<K, V>& source, const Weighing& own) {
    thread.share(a.batch * a.kv_heads, 1, [&](i64 begin, i64 end) {
        for (i64 pair = begin; pair < end; pair++) weigh_head(a, source, pair / a.kv_heads, pair % a.kv_heads, own);
    });
}

}  // namespace
}  // namespace slim
