// What both ways to attend share: where keys and values lie, which rows belong together, rotation, online softmax.
#pragma once
#include <type_traits>
#include <utility>

#include "attention_numbers.h"

namespace slim {
namespace {

typedef float v4 __attribute__((vector_size(16)));
typedef i32 vi4 __attribute__((vector_size(16)));

constexpr i64 KEY_BLOCK = 64;  // keys whose scores are held at a time; pages are whole blocks
constexpr u64 EVERY = ~(u64)0;  // a bit for each key of a block

// Floats that a row of n takes in scratch: whole vectors and cache lines on every machine.
constexpr i64 padded(i64 n) { return (n + 15) / 16 * 16; }
constexpr i64 vectors_of(i64 n) { return (n + LANES - 1) / LANES; }
constexpr i64 least(i64 x, i64 y) { return x < y ? x : y; }
constexpr i64 most(i64 x, i64 y) { return x > y ? x : y; }

// The keys and values that are attended to: the cache, or what the caller gave. Tokens from `index` on lie side by side
// up to the end of a page.
template <class K, class V>
struct Source {
    const Attention& a;
    const K* k;
    const V* v;
    i64 k_batch, k_head, k_token, v_batch, v_head, v_token;
    bool turn;  // the keys are still to be rotated, by their own index
    const float *k_scale, *v_scale;
    i64 ks_batch, ks_head, vs_batch, vs_head;

    const K* key(i64 batch, i64 head, i64 index) const {
        return k + a.place(batch, index) * k_batch + head * k_head + a.within(index) * k_token;
    }
    const V* value(i64 batch, i64 head, i64 index) const {
        return v + a.place(batch, index) * v_batch + head * v_head + a.within(index) * v_token;
    }
    // What the numbers of keys and values from `index` on stand for; null where they stand for themselves.
    const float* key_scale(i64 batch, i64 head, i64 index) const {
        return QUANTIZED<K> ? k_scale + a.place(batch, index) * ks_batch + head * ks_head + a.within(index) : nullptr;
    }
    const float* value_scale(i64 batch, i64 head, i64 index) const {
        return QUANTIZED<V> ? v_scale + a.place(batch, index) * vs_batch + head * vs_head + a.within(index) : nullptr;
    }
};

struct Range {
    i64 first, last;  // up to last - 1
};

// Rows (query, head) that read one key/value head, query by query.
struct Rows {
    i64 batch, kv_head, head, heads, query, queries;

    i64 count() const { return heads * queries; }
};

// The keys that causality and the window leave to a query.
inline Range seen_by(const Attention& a, i64 batch, i64 query) {
    i64 token = a.start_of(batch) + query, keys = a.keys_of(batch);
    Range seen{0, keys};
    if (a.causal) seen.last = least(keys, token + 1);
    if (a.window) {
        seen.first = least(keys, most(0, token - a.window + 1));
        seen.last = least(seen.last, token + a.window);
    }
    return seen;
}

inline Range seen_by(const Attention& a, const Rows& rows) {
    return {seen_by(a, rows.batch, rows.query).first, seen_by(a, rows.batch, rows.query + rows.queries - 1).last};
}

// y = x times factor, rotated as token `index` of the new ones where there is a rotation.
[[gnu::noinline]] void rotate(const Attention& a, i64 batch, i64 index, const float* x, float factor, float* __restrict y) {
    i64 half = a.cos ? a.rope_width / 2 : 0;
    for (i64 p = 2 * half; p < a.key_width; p++) y[p] = x[p] * factor;
    if (!half) return;
    const float* cos = a.cos + batch * a.rope_batch + index * a.rope_token;
    const float* sin = a.sin + batch * a.rope_batch + index * a.rope_token;
    if (a.interleaved) {
        for (i64 p = 0; p < half; p++) {
            float even = x[2 * p] * factor, odd = x[2 * p + 1] * factor;
            y[2 * p] = even * cos[p] - odd * sin[p];
            y[2 * p + 1] = odd * cos[p] + even * sin[p];
        }
        return;
    }
    for (i64 p = 0; p < half; p++) {
        float low = x[p] * factor, high = x[p + half] * factor;
        y[p] = low * cos[p] - high * sin[p];
        y[p + half] = high * cos[p] + low * sin[p];
    }
}

// Appends new key and value `index` of one head to the cache; `row` holds key_width floats.
template <class K, class V>
void append(const Attention& a, i64 batch, i64 head, i64 index, float* row) {
    rotate(a, batch, index, a.k + batch * a.k_batch + head * a.k_head + index * a.k_token, 1.0f, row);
    if (a.k_offset)
        for (i64 p = 0; p < a.key_width; p++) row[p] -= a.k_offset[head * a.ko_head + p];
    i64 token = a.start_of(batch) + index, place = a.place(batch, token), at = a.within(token);
    put(row, a.key_width, (K*)a.k_cache + place * a.kc_batch + head * a.kc_head + at * a.kc_token,
        QUANTIZED<K> ? a.k_scale + place * a.ks_batch + head * a.ks_head + at : nullptr);
    put(a.v + batch * a.v_batch + head * a.v_head + index * a.v_token, a.value_width,
        (V*)a.v_cache + place * a.vc_batch + head * a.vc_head + at * a.vc_token,
        QUANTIZED<V> ? a.v_scale + place * a.vs_batch + head * a.vs_head + at : nullptr);
}

// -- softmax over keys that come block by block -----------------------------------------------------------------------

struct Total {
    float max, sum;
};

struct Row {
    i64 head, query;
    i64 index;  // of its own token among the keys
    Range seen;
    Total total;
    u64 kept;  // of the block of keys at hand, what the head's pattern keeps
};

[[gnu::noinline]] void list_rows(const Attention& a, const Rows& rows, Row* list) {
    for (i64 query = rows.query; query < rows.query + rows.queries; query++) {
        Range seen = seen_by(a, rows.batch, query);
        for (i64 head = rows.head; head < rows.head + rows.heads; head++)
            *list++ = {head, query, a.start_of(rows.batch) + query, seen, {-INFINITY, 0.0f}, EVERY};
    }
}

// A sink is a key without a value.
inline void add_sink(const Attention& a, Row& row) {
    if (a.sinks && a.sinks[row.head] > -INFINITY) row.total = {a.sinks[row.head], 1.0f};
}

inline void rotate_query(const Attention& a, i64 batch, const Row& row, float* y) {
    const float* x = a.q + batch * a.q_batch + row.head * a.q_head + row.query * a.q_token;
    rotate(a, batch, row.query, x, a.scale, y);
}

inline float* out_of(const Attention& a, i64 batch, const Row& row) {
    return a.out + batch * a.out_batch + row.head * a.out_head + row.query * a.out_token;
}

// What to multiply a sum of values by; a row that saw nothing becomes zeros.
inline float inverse(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// e^x for x <= 0; 0 where that is no normal number.
inline vf exp_below(vf x) {
    const vf round = splat(12582912.0f + 127.0f);  // leaves the exponent's bits lowest
    vf held = x < -87.0f ? splat(-87.0f) : x;
    vf shifted = held * 1.44269504088896341f + round;
    vf n = shifted - round;
    vf r = held - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vf y = p * (vf)((vi)shifted << 23);
    return x < -87.0f ? vf{} : y;
}

// Joins the vector's quarters or halves down to four lanes.
template <class V, class Join>
v4 fold(V v, Join join) {
    v4 part[sizeof(V) / 16];
    std::memcpy(part, &v, sizeof v);
    for (unsigned i = 1; i < sizeof(V) / 16; i++) part[0] = join(part[0], part[i]);
    return part[0];
}

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

inline float highest(vf v) {
    v4 m = fold(v, [](v4 x, v4 y) { return x > y ? x : y; });
    float low = m[0] > m[1] ? m[0] : m[1], high = m[2] > m[3] ? m[2] : m[3];
    return low > high ? low : high;
}

// -inf for scores whose bit is not set.
inline void leave_out(u64 kept, float* s) {
    vi lane_bit;
    for (int lane = 0; lane < LANES; lane++) lane_bit[lane] = 1 << lane;
    for (i64 j = 0; j < KEY_BLOCK; j += LANES)
        store(s + j, ((vi{} + (i32)(kept >> j)) & lane_bit) != 0 ? load(s + j) : splat(-INFINITY));
}

// Softcap, slopes, bias and masks on the scores s of keys first..first + KEY_BLOCK - 1, of which only `seen` count.
[[gnu::noinline]] void adjust(const Attention& a, i64 batch, const Row& row, i64 first, Range seen, float* s) {
    i64 begin = least(most(seen.first - first, 0), KEY_BLOCK), end = most(least(seen.last - first, KEY_BLOCK), 0);
    if (a.softcap != 0.0f) {
        float inverse_cap = 1.0f / a.softcap;
        for (i64 j = 0; j < KEY_BLOCK; j++) s[j] = a.softcap * tanh_f(s[j] * inverse_cap);
    }
    if (a.slopes) {
        i32 distance = (i32)(first - row.index);
        for (i32 j = 0; j < (i32)KEY_BLOCK; j++) s[j] += a.slopes[row.head] * (float)(distance + j);
    }
    if (a.bias) {
        const float* bias = a.bias + batch * a.bias_batch + row.head * a.bias_head + row.query * a.bias_query;
        for (i64 j = begin; j < end; j++) s[j] += bias[(first + j) * a.bias_key];
    }
    if (a.key_mask) {
        const u8* mask = a.key_mask + batch * a.mask_batch + first;
        for (i64 j = begin; j < end; j++) s[j] = mask[j] ? s[j] : -INFINITY;
    }
    if (row.kept != EVERY) leave_out(row.kept, s);
    for (i64 j = 0; j < begin; j++) s[j] = -INFINITY;
    for (i64 j = end; j < KEY_BLOCK; j++) s[j] = -INFINITY;
}

// Makes weights of the scores, against the highest score so far. Returns what the row's earlier sums shrink by.
[[gnu::noinline]] float weigh(float* s, Total& total) {
    vf top = load(s);
    for (i64 j = LANES; j < KEY_BLOCK; j += LANES) {
        vf x = load(s + j);
        top = x > top ? x : top;
    }
    float max = highest(top);
    max = max > total.max ? max : total.max;
    float base = max == -INFINITY ? 0.0f : max;
    vf sums = vf{};
    for (i64 j = 0; j < KEY_BLOCK; j += LANES) {
        vf weight = exp_below(load(s + j) - base);
        store(s + j, weight);
        sums += weight;
    }
    float shrink = max == total.max ? 1.0f : exp_f(total.max - base);
    total = {max, total.sum * shrink + sum(sums)};
    return shrink;
}

// s[j] *= scale[j] for `count` keys of a block, if there is a scale.
inline void scale_keys(float* s, const float* scale, i64 count) {
    if (scale)
        for (i64 j = 0; j < count; j++) s[j] *= scale[j];
}

inline void scale_row(float* x, i64 n, float factor) {
    for (i64 i = 0; i < n; i++) x[i] *= factor;
}

}  // namespace
}  // namespace slim
