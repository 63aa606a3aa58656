// Which keys a sparsity pattern keeps: a bit for each key of a block. slim/compiler/patterns has the meaning.
#pragma once
#include <algorithm>

#include "attention_rows.h"
#include "support.h"

namespace slim {
namespace {

constexpr i64 VOTERS = 64;  // queries that choose columns and slashes
constexpr i64 NEVER = (i64)1 << 62;

constexpr i64 ceil_div(i64 x, i64 y) { return (x + y - 1) / y; }
inline float larger(float x, float y) { return x > y ? x : y; }

// Bits of keys begin..end - 1 in the block that begins at `first`.
inline u64 between(i64 begin, i64 end, i64 first) {
    i64 low = most(begin - first, 0), high = least(end - first, KEY_BLOCK);
    if (low >= high) return 0;
    return (high == KEY_BLOCK ? EVERY : ((u64)1 << high) - 1) & ~(((u64)1 << low) - 1);
}

// 64 bits from bit `at` on, of a map of `words` words; zeros beyond it.
inline u64 cut(const u64* map, i64 words, i64 at) {
    i64 word = floor_div(at, 64), shift = at - word * 64;
    u64 low = word >= 0 && word < words ? map[word] >> shift : 0;
    u64 high = shift && word + 1 >= 0 && word + 1 < words ? map[word + 1] << (64 - shift) : 0;
    return low | high;
}

// The number-th draw of a head for a block of queries: Random in slim/compiler/patterns/terms.py.
inline u32 draw(i64 block, i64 head, i32 number, i32 seed) {
    u32 x = (u32)block * 0xC2B2AE3Du + (u32)seed * 0x9E3779B1u + (u32)head * 0x85EBCA77u + (u32)number * 0x27D4EB2Fu;
    x = (x ^ (x >> 15)) * 0x2C1B3C6Du;
    x = (x ^ (x >> 12)) * 0x297A2D39u;
    return x ^ (x >> 15);
}

// What the choices of one call are kept in, as bits, shared by its threads: for each row of the batch and head the
// columns that it keeps, then its distances, the longest first; for each row, kv head and query its best blocks.
struct Choices {
    u64 *votes, *tops;
    i64 vote_words, top_words;

    static i64 words_of_vote(i64 most_keys) { return most_keys / 64 + 2; }
    static i64 words_of_top(i64 most_keys, i64 top) { return ceil_div(ceil_div(most_keys, top), 64); }
    u64* columns(const Attention& a, i64 batch, i64 head) const { return votes + (batch * a.heads + head) * 2 * vote_words; }
    u64* slashes(const Attention& a, i64 batch, i64 head) const { return columns(a, batch, head) + vote_words; }
    u64* top(const Attention& a, i64 batch, i64 kv_head, i64 query) const {
        return tops + ((batch * a.kv_heads + kv_head) * a.queries + query) * top_words;
    }
};

// How many keys of a row come before its first real one.
inline i64 padding_of(const Attention& a, i64 batch) {
    i64 count = 0, keys = a.keys_of(batch);
    if (a.patterns && a.key_mask)
        while (count < keys && !a.key_mask[batch * a.mask_batch + count]) count++;
    return count;
}

// One unit of rows, as a pattern sees it. Tokens count from the first that is no padding.
struct Kept {
    const Attention& a;
    const Rows& rows;
    Choices choices;
    i64 origin;
    bool has_bounds;

    Kept(const Attention& attention, const Rows& unit, const Choices& chosen)
        : a(attention), rows(unit), choices(chosen), origin(padding_of(a, rows.batch)), has_bounds(bounded()) {}

    u64 of(const Term& term, const Row& row, i64 t, i64 first) const {
        i64 size = term.a;
        switch (term.keep) {
            case Keep::window: return between(t - size + 1, t + size, first);
            case Keep::columns: return between(-NEVER, size, first);
            case Keep::rows: return t < size ? EVERY : 0;
            case Keep::stride: {
                u64 bits = 0;
                for (i64 j = floor_mod(t - first, size); j < KEY_BLOCK; j += size) bits |= (u64)1 << j;
                return bits;
            }
            case Keep::blocks: {
                i64 block = floor_div(t, size);
                return between((block - term.b + 1) * size, (block + term.b) * size, first);
            }
            case Keep::summary: {
                u64 bits = 0;
                for (i64 block = floor_div(first, size); block * size < first + KEY_BLOCK; block++)
                    bits |= between(block * size + most(size - term.b, 0), (block + 1) * size, first);
                return bits;
            }
            case Keep::random: {
                i64 block = floor_div(t, size);
                u64 bits = 0;
                for (i32 number = 0; block > 0 && number < term.b; number++) {
                    i64 drawn = (i64)draw(block, row.head, number, term.c) % block;
                    bits |= between(drawn * size, (drawn + 1) * size, first);
                }
                return bits;
            }
            case Keep::top: {
                i64 own = floor_div(t, size);
                u64 bits = between(own * size, (own + 1) * size, first);
                const u64* top = choices.top(a, rows.batch, rows.kv_head, row.query);
                for (i64 block = most(floor_div(first, size), 0); block < own && block * size < first + KEY_BLOCK; block++)
                    if (top[block / 64] >> block % 64 & 1) bits |= between(block * size, (block + 1) * size, first);
                return bits;
            }
            case Keep::vertical_slash: {
                if (a.queries < VOTERS) return EVERY;
                i64 words = choices.vote_words;
                return cut(choices.columns(a, rows.batch, row.head), words, first) |
                       cut(choices.slashes(a, rows.batch, row.head), words, a.most_keys - t + first);
            }
        }
        return EVERY;
    }

    u64 of(const Row& row, i64 first) const {
        const Pattern& pattern = a.patterns[row.head];
        if (!pattern.count) return EVERY;
        u64 bits = 0;
        for (i32 i = 0; i < pattern.count && bits != EVERY; i++)
            bits |= of(pattern.terms[i], row, row.index - origin, first - origin);
        return bits;
    }

    // Notes what each row keeps of a block, and returns what any of them does.
    u64 note(Row* list, i64 first) const {
        if (!a.patterns) return EVERY;
        u64 any = 0;
        for (i64 r = 0; r < rows.count(); r++) {
            list[r].kept = r > 0 && alike(list[r - 1], list[r]) ? list[r - 1].kept : of(list[r], first);
            any |= list[r].kept;
        }
        return any;
    }

    // What any row keeps of a block.
    u64 any(const Row* list, i64 first) const {
        u64 bits = a.patterns ? 0 : EVERY;
        for (i64 r = 0; r < rows.count() && bits != EVERY; r++)
            if (r == 0 || !alike(list[r - 1], list[r])) bits |= of(list[r], first);
        return bits;
    }

    // Whether two rows keep the same: those of one query whose heads have one pattern that does not tell heads apart.
    bool alike(const Row& one, const Row& other) const {
        const Pattern &p = a.patterns[one.head], &q = a.patterns[other.head];
        if (one.index != other.index || p.terms != q.terms) return false;
        for (i32 i = 0; i < p.count; i++)
            if (p.terms[i].keep == Keep::random || p.terms[i].keep == Keep::vertical_slash) return false;
        return true;
    }

    // The first key from `first` on that the term may keep of any query.
    i64 next(const Term& term, i64 first) const {
        i64 t = a.start_of(rows.batch) + rows.query - origin, last = t + rows.queries - 1;
        Range range{first, NEVER};
        i64 size = term.a;
        switch (term.keep) {
            case Keep::window: range = {t - size + 1, last + size}; break;
            case Keep::columns: range = {first, size}; break;
            case Keep::rows: range = {first, t < size ? NEVER : first}; break;
            case Keep::blocks:
                range = {(floor_div(t, size) - term.b + 1) * size, (floor_div(last, size) + term.b) * size};
                break;
            default: break;
        }
        i64 from = most(first, range.first);
        return from < range.last ? from : NEVER;
    }

    // Whether the terms alone tell where nothing is kept; what is drawn or chosen may lie anywhere.
    bool bounded() const {
        for (i64 head = rows.head; a.patterns && head < rows.head + rows.heads; head++)
            for (i32 i = 0; i < a.patterns[head].count; i++) {
                Keep keep = a.patterns[head].terms[i].keep;
                if (keep != Keep::window && keep != Keep::columns && keep != Keep::rows && keep != Keep::blocks) return false;
            }
        return a.patterns != nullptr;
    }

    // The first block from `first` on, of those `base`, `base` + KEY_BLOCK, ..., that may hold a key that is kept.
    i64 next_block(i64 base, i64 first) const {
        if (!has_bounds) return first;
        i64 found = NEVER;
        for (i64 head = rows.head; head < rows.head + rows.heads && found > first - origin; head++) {
            const Pattern& pattern = a.patterns[head];
            if (head > rows.head && pattern.terms == a.patterns[head - 1].terms) continue;
            if (!pattern.count) return first;
            for (i32 i = 0; i < pattern.count; i++) found = least(found, next(pattern.terms[i], first - origin));
        }
        return found == NEVER ? NEVER : base + floor_div(found + origin - base, KEY_BLOCK) * KEY_BLOCK;
    }
};

// A key as the queries see it: rotated, in floats. `row` holds key_width of them.
template <class K, class V>
const float* key_as_floats(const Attention& a, const Source<K, V>& source, i64 batch, i64 head, i64 index, float* row) {
    const K* key = source.key(batch, head, index);
    if constexpr (std::is_same<K, float>::value) {
        if (!source.turn) return key;
        rotate(a, batch, index, key, 1.0f, row);
    } else {
        const float* scale = source.key_scale(batch, head, index);
        widen(key, a.key_width, scale ? *scale : 1.0f, row);
    }
    return row;
}

// Scores of those keys of the block from `first` on that are looked at with queries of their own.
template <class K, class V>
void score_first(const Attention& a, const Source<K, V>& source, const Rows& rows, const Row& row, i64 first, float* s,
                 float* key_row) {
    if (!a.q_first) return;
    const float* q = a.q_first + rows.batch * a.qf_batch + row.head * a.qf_head + row.query * a.qf_token;
    for (i64 j = first; j < least(a.first, a.keys_of(rows.batch)) && j < first + KEY_BLOCK; j++) {
        const float* key = key_as_floats(a, source, rows.batch, rows.kv_head, j, key_row);
        float score = 0.0f;
        for (i64 p = 0; p < a.key_width; p++) score += q[p] * key[p];
        s[j - first] = score * a.scale;
    }
}

// Lowest, then highest number of each channel in a block of keys.
inline float* bounds_of(const Attention& a, i64 batch, i64 head, i64 block) {
    i64 token = block * a.top;
    return a.k_bounds + a.place(batch, token) * a.kb_batch + head * a.kb_head + a.within(token) / a.top * 2 * a.key_width;
}

// Notes the bounds of all blocks that the call's new keys belong to.
template <class K, class V>
void note_bounds(Thread& thread, const Attention& a, const Source<K, V>& source, float* row) {
    thread.share(a.batch * a.kv_heads, 1, [&](i64 begin, i64 end) {
        for (i64 pair = begin; pair < end; pair++) {
            i64 batch = pair / a.kv_heads, head = pair % a.kv_heads, origin = padding_of(a, batch);
            i64 keys = a.keys_of(batch), grown = most(a.k_cache ? a.start_of(batch) - origin : 0, 0);
            for (i64 block = grown / a.top; block * a.top + origin < keys; block++) {
                float *low = bounds_of(a, batch, head, block), *high = low + a.key_width;
                i64 first = origin + block * a.top;
                for (i64 j = first; j < least(first + a.top, keys); j++) {
                    const float* key = key_as_floats(a, source, batch, head, j, row);
                    for (i64 p = 0; p < a.key_width; p++) {
                        low[p] = j == first || key[p] < low[p] ? key[p] : low[p];
                        high[p] = j == first || key[p] > high[p] ? key[p] : high[p];
                    }
                }
            }
        }
    });
    thread.barrier();
}

// The most that a query can score in each of four blocks of keys.
inline v4 reach(const Attention& a, const float* q, const float* const* low) {
    vf total[4] = {};
    i64 p = 0;
    for (; p + LANES <= a.key_width; p += LANES) {
        vf x = load(q + p);
        for (int i = 0; i < 4; i++) {
            vf least_one = x * load(low[i] + p), other = x * load(low[i] + a.key_width + p);
            total[i] += least_one > other ? least_one : other;
        }
    }
    v4 found = sums(total);
    for (; p < a.key_width; p++)
        for (int i = 0; i < 4; i++) found[i] += larger(q[p] * low[i][p], q[p] * low[i][a.key_width + p]);
    return found;
}

// The count-th highest of n numbers, which it mixes up.
inline float nth_highest(float* x, i64 n, i64 count) {
    std::nth_element(x, x + count - 1, x + n, [](float p, float q) { return p > q; });
    return x[count - 1];
}

// The blocks before a query's own that may matter most to its heads, as bits. `scores` holds a number for each block and
// four more, for each head of a group and once again; `turned` a query for each head.
[[gnu::noinline]] void choose_top(const Attention& a, i64 batch, i64 kv_head, i64 query, i64 origin, float* scores,
                                  float* turned, u64* map) {
    i64 own = floor_div(a.start_of(batch) + query - origin, a.top), group = a.heads / a.kv_heads;
    if (own <= 0) return;
    i64 row = own + 4, width = padded(a.key_width);
    float* ranks = scores + group * row;
    for (i64 h = 0; h < group; h++) {
        Row one{};
        one.head = kv_head * group + h, one.query = query;
        rotate_query(a, batch, one, turned + h * width);
    }
    for (i64 b = 0; b < own; b += 4) {
        const float* low[4];
        for (i64 i = 0; i < 4; i++) low[i] = bounds_of(a, batch, kv_head, least(b + i, own - 1));
        for (i64 h = 0; h < group; h++) {
            v4 four = reach(a, turned + h * width, low);
            std::memcpy(scores + h * row + b, &four, sizeof four);
        }
    }
    for (i64 b = 0; b < own; b++) ranks[b] = -INFINITY;
    for (i64 h = 0; h < group; h++) {
        const float* own_scores = scores + h * row;
        float best = -INFINITY;
        for (i64 b = 0; b < own; b++) best = larger(best, own_scores[b]);
        for (i64 b = 0; b < own; b++) ranks[b] = larger(ranks[b], own_scores[b] - best);
    }
    std::memcpy(scores, ranks, sizeof(float) * (size_t)own);
    float last = nth_highest(scores, own, ceil_div(own, a.share));
    std::memset(map, 0, sizeof(u64) * (size_t)ceil_div(own, 64));
    for (i64 b = 0; b < own; b++)
        if (ranks[b] >= last) map[b / 64] |= (u64)1 << b % 64;
}

// The choices of all queries of a call.
inline void choose_tops(Thread& thread, const Attention& a, const Choices& choices, float* scores, float* turned) {
    thread.share(a.batch * a.kv_heads * a.queries, 1, [&](i64 begin, i64 end) {
        for (i64 i = begin; i < end; i++) {
            i64 query = i % a.queries, pair = i / a.queries, batch = pair / a.kv_heads, kv_head = pair % a.kv_heads;
            choose_top(a, batch, kv_head, query, padding_of(a, batch), scores, turned,
                       choices.top(a, batch, kv_head, query));
        }
    });
    thread.barrier();
}

// Marks the count highest of n numbers, and what equals the last of them; bit i, or top - i where that is given.
inline void mark_highest(const float* x, i64 n, i64 count, float* room, i64 top, u64* map) {
    std::memcpy(room, x, sizeof(float) * (size_t)n);
    float last = nth_highest(room, n, least(count, n));
    for (i64 i = 0; i < n; i++) {
        i64 bit = top < 0 ? i : top - i;
        if (x[i] >= last) map[bit / 64] |= (u64)1 << bit % 64;
    }
}

// The columns and slashes that the last queries of one head look at most. `room` holds VOTERS + 3 numbers a key and
// VOTERS queries of `q_row`, `turned` a key.
template <class K, class V>
void vote(const Attention& a, const Source<K, V>& source, i64 batch, i64 head, const Choices& choices, float* room,
          float* queries, i64 q_row, float* turned) {
    i64 keys = a.keys_of(batch), kv_head = head / (a.heads / a.kv_heads), origin = padding_of(a, batch);
    float *column = room + VOTERS * keys, *slash = column + keys, *spare = slash + keys;
    std::memset(column, 0, 2 * sizeof(float) * (size_t)keys);
    for (i64 i = 0; i < VOTERS; i++) {
        Row row{};
        row.head = head, row.query = a.queries - VOTERS + i;
        rotate_query(a, batch, row, queries + i * q_row);
    }
    for (i64 j = 0; j < keys; j++) {
        const float* key = key_as_floats(a, source, batch, kv_head, j, turned);
        for (i64 i = 0; i < VOTERS; i++) {
            float score = 0.0f;
            for (i64 p = 0; p < a.key_width; p++) score += queries[i * q_row + p] * key[p];
            room[i * keys + j] = score;
        }
    }
    for (i64 i = 0; i < VOTERS; i++) {
        i64 query = a.queries - VOTERS + i, index = a.start_of(batch) + query;
        Range seen = seen_by(a, batch, query);
        float *s = room + i * keys, max = -INFINITY, sum = 0.0f;
        for (i64 j = seen.first; j < seen.last; j++) {
            if (a.key_mask && !a.key_mask[batch * a.mask_batch + j]) s[j] = -INFINITY;
            max = larger(max, s[j]);
        }
        if (max == -INFINITY) continue;
        for (i64 j = seen.first; j < seen.last; j++) sum += s[j] = exp_f(s[j] - max);
        for (i64 j = seen.first; j < seen.last; j++) {
            column[j - origin < 0 ? keys + j - origin : j - origin] += s[j] / sum;
            slash[index - j] += s[j] / sum;
        }
    }
    u64 *columns = choices.columns(a, batch, head), *slashes = choices.slashes(a, batch, head);
    std::memset(columns, 0, 2 * sizeof(u64) * (size_t)choices.vote_words);
    mark_highest(column, keys, a.slash_columns, spare, -1, columns);
    mark_highest(slash, keys, a.slashes, spare, a.most_keys, slashes);
    slashes[a.most_keys / 64] |= (u64)1 << a.most_keys % 64;
    if (keys - origin < VOTERS) std::memset(columns, 0xff, sizeof(u64) * (size_t)choices.vote_words);
}

template <class K, class V>
void vote_all(Thread& thread, const Attention& a, const Source<K, V>& source, const Choices& choices, float* room,
              float* queries, i64 q_row, float* turned) {
    thread.share(a.batch * a.heads, 1, [&](i64 begin, i64 end) {
        for (i64 i = begin; i < end; i++)
            vote(a, source, i / a.heads, i % a.heads, choices, room, queries, q_row, turned);
    });
    thread.barrier();
}

}  // namespace
}  // namespace slim
