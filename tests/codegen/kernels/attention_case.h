// What tests of attention share: random cases, and the same in doubles.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../../slim/codegen/cpp/kernels/kernels.h"

using namespace slim;

namespace {

std::mt19937_64 random_bits;

i64 pick(std::initializer_list<i64> from) { return from.begin()[random_bits() % from.size()]; }
bool chance(int one_in) { return random_bits() % (unsigned)one_in == 0; }
float normal() {
    static std::normal_distribution<float> values;
    return values(random_bits);
}

[[noreturn]] void fail(const std::string& message) {
    std::printf("FAILED: %s\n", message.c_str());
    std::exit(1);
}


// Four dimensions, the first three in any order and with gaps; the data ends where the last row does.
template <class T>
struct Tensor {
    std::vector<T> data;
    i64 shape[4], strides[4];

    Tensor() = default;
    Tensor(i64 a, i64 b, i64 c, i64 d, T value = T(0.0f)) : shape{a, b, c, d}, strides{0, 0, 0, 1} {
        int order[3] = {0, 1, 2};
        if (chance(2)) std::shuffle(order, order + 3, random_bits);
        i64 stride = d + pick({0, 0, 3}), size = d;
        for (int i = 2; i >= 0; i--) {
            strides[order[i]] = stride;
            size += (shape[order[i]] - 1) * stride;
            stride = stride * shape[order[i]] + pick({0, 0, 5});
        }
        data.assign((size_t)size, value);
    }
    T* row(i64 a, i64 b, i64 c) { return data.data() + a * strides[0] + b * strides[1] + c * strides[2]; }
    void randomize(i64 first, i64 last) {
        for (i64 a = 0; a < shape[0]; a++)
            for (i64 b = 0; b < shape[1]; b++)
                for (i64 c = first; c < last; c++)
                    for (i64 d = 0; d < shape[3]; d++) row(a, b, c)[d] = T(normal());
    }
};

template <class T>
struct Case {
    Attention a{};
    bool cached = true;
    int threads = 1;
    Tensor<float> q, k, v, bias, cos, sin, out;
    Tensor<T> k_cache, v_cache, k_before, v_before;
    std::vector<u8> mask;
    std::vector<float> sinks, slopes, mass;
    i64 page_size = 0;         // 0: without pages
    std::vector<i32> table;      // [batch][columns]
    std::vector<i64> lengths;    // [batch], with pages
    std::vector<std::vector<Term>> terms;  // of each head; none keep everything
    std::vector<Pattern> patterns;

    std::string describe() const {
        char text[420];
        std::snprintf(text, sizeof text,
                      "batch %ld heads %ld/%ld queries %ld start %ld keys %ld widths %ld/%ld rope %ld%s cache %d "
                      "causal %d window %ld softcap %g mask %d bias %d sinks %d slopes %d mass %d/%ld threads %d",
                      (long)a.batch, (long)a.heads, (long)a.kv_heads, (long)a.queries, (long)a.start, (long)a.keys,
                      (long)a.key_width, (long)a.value_width, (long)a.rope_width, a.interleaved ? " pairs" : "",
                      cached ? (int)a.k_format : -1, a.causal, (long)a.window, (double)a.softcap,
                      a.key_mask != nullptr, a.bias != nullptr, a.sinks != nullptr, a.slopes != nullptr, a.mass != nullptr,
                      (long)a.votes, threads);
        return text;
    }
    // Whether the row may see the key, whatever is masked or left out.
    bool sees(i64 batch, i64 query, i64 key) const {
        i64 distance = a.start_of(batch) + query - key;
        return (!a.causal || distance >= 0) && (!a.window || (distance < a.window && -distance < a.window));
    }
    // A token of a row in a cache.
    T* token_of(Tensor<T>& cache, i64 b, i64 g, i64 token) {
        if (!page_size) return cache.row(b, g, token);
        return cache.row(table[(size_t)(b * a.columns + token / page_size)], g, token % page_size);
    }
    T* key(i64 b, i64 g, i64 token) { return token_of(k_cache, b, g, token); }
    T* value(i64 b, i64 g, i64 token) { return token_of(v_cache, b, g, token); }
};

template <class T>
void shape_case(Case<T>& c, Format format, bool cached) {
    Attention& a = c.a;
    c.cached = cached;
    c.threads = (int)pick({1, 2, 3});
    a.k_format = format;
    a.batch = pick({1, 1, 2, 9});
    a.kv_heads = pick({1, 2, 3, 8});
    a.heads = a.kv_heads * pick({1, 1, 2, 3, 4, 7, 17});
    a.key_width = pick({1, 4, 8, 16, 20, 32, 40, 64, 64, 80, 96, 100, 128, 256});
    a.value_width = chance(2) ? a.key_width : pick({4, 16, 33, 48, 64, 128});
    a.queries = pick({1, 1, 1, 2, 3, 4, 5, 13, 33, 70, 130});
    if (a.queries > 33 || a.key_width > 128) a.batch = std::min<i64>(a.batch, 2);
    i64 past = a.queries == 1 ? pick({0, 1, 5, 63, 64, 130, 300, 1000}) : pick({0, 0, 1, 17, 64, 200});
    a.start = cached || chance(2) ? past : 0;
    a.keys = cached ? a.start + a.queries : pick({a.start + a.queries, a.queries, 1, 37, 150});
    a.causal = !chance(4);
    a.window = chance(3) ? pick({1, 2, 7, 64, 100}) : 0;
    a.softcap = chance(4) ? 3.0f : 0.0f;
    a.scale = 1.0f / std::sqrt((float)a.key_width);
    bool may_turn = a.key_width > 1 && (cached || (a.keys == a.queries && a.start == 0));
    if (may_turn && !chance(3)) a.rope_width = chance(2) ? a.key_width / 2 * 2 : std::max<i64>(2, a.key_width / 4 * 2);
    a.interleaved = chance(2);
}

template <class T>
void fill_case(Case<T>& c) {
    Attention& a = c.a;
    i64 given = c.cached ? a.queries : a.keys, room = a.keys + pick({0, 9});
    c.q = Tensor<float>(a.batch, a.heads, a.queries, a.key_width);
    c.k = Tensor<float>(a.batch, a.kv_heads, given, a.key_width);
    c.v = Tensor<float>(a.batch, a.kv_heads, given, a.value_width);
    c.q.randomize(0, a.queries);
    c.k.randomize(0, given);
    c.v.randomize(0, given);
    c.out = Tensor<float>(a.batch, a.heads, a.queries, a.value_width, 77.0f);
    if (c.cached) {  // what no query sees is NaN: it must not be read
        c.k_cache = Tensor<T>(a.batch, a.kv_heads, room, a.key_width, T(NAN));
        c.v_cache = Tensor<T>(a.batch, a.kv_heads, room, a.value_width, T(NAN));
        i64 first = a.window ? std::max<i64>(0, a.start - a.window + 1) : 0;
        c.k_cache.randomize(first, a.start);
        c.v_cache.randomize(first, a.start);
        c.k_before = c.k_cache;
        c.v_before = c.v_cache;
    }
    if (a.rope_width) {
        c.cos = Tensor<float>(a.batch, 1, a.queries, a.rope_width / 2);
        c.sin = c.cos;
        c.cos.randomize(0, a.queries);
        c.sin.randomize(0, a.queries);
    }
    if (chance(4)) {
        c.bias = Tensor<float>(a.batch, a.heads, a.queries, a.keys);
        c.bias.randomize(0, a.queries);
    }
    if (chance(3))
        for (i64 i = 0; i < a.batch * a.keys; i++) c.mask.push_back(!chance(3));
    if (chance(4))
        for (i64 i = 0; i < a.heads; i++) c.sinks.push_back(chance(9) ? -INFINITY : normal());
    if (chance(4))
        for (i64 i = 0; i < a.heads; i++) c.slopes.push_back(0.1f * normal());
    if (c.cached && a.heads / a.kv_heads * a.queries * a.keys * a.key_width < 10000000 && !chance(3)) {
        a.votes = pick({0, 0, 1, 3, 32});
        a.mass_head = a.keys + pick({0, 5}), a.mass_batch = a.mass_head * a.kv_heads + pick({0, 3});
        for (i64 i = 0; i < a.batch * a.mass_batch; i++) c.mass.push_back(i % a.mass_batch % a.mass_head < a.start ? 1.0f : NAN);
    }
}

template <class T>
void point_case(Case<T>& c) {
    Attention& a = c.a;
    auto copy = [](const i64* from, i64& batch, i64& head, i64& token) {
        batch = from[0], head = from[1], token = from[2];
    };
    a.q = c.q.data.data(), a.k = c.k.data.data(), a.v = c.v.data.data(), a.out = c.out.data.data();
    copy(c.q.strides, a.q_batch, a.q_head, a.q_token);
    copy(c.k.strides, a.k_batch, a.k_head, a.k_token);
    copy(c.v.strides, a.v_batch, a.v_head, a.v_token);
    copy(c.out.strides, a.out_batch, a.out_head, a.out_token);
    if (c.cached) {
        a.k_cache = c.k_cache.data.data(), a.v_cache = c.v_cache.data.data();
        copy(c.k_cache.strides, a.kc_batch, a.kc_head, a.kc_token);
        copy(c.v_cache.strides, a.vc_batch, a.vc_head, a.vc_token);
    }
    if (a.rope_width) {
        a.cos = c.cos.data.data(), a.sin = c.sin.data.data();
        a.rope_batch = c.cos.strides[0], a.rope_token = c.cos.strides[2];
    }
    if (!c.bias.data.empty()) {
        a.bias = c.bias.data.data();
        copy(c.bias.strides, a.bias_batch, a.bias_head, a.bias_query);
        a.bias_key = 1;
        if (chance(2)) a.bias_batch = a.bias_head = 0;
        if (chance(4)) a.bias_query = 0;
        if (chance(4)) a.bias_key = 0;
    }
    a.key_mask = c.mask.empty() ? nullptr : c.mask.data();
    a.mask_batch = a.keys;
    a.sinks = c.sinks.empty() ? nullptr : c.sinks.data();
    a.slopes = c.slopes.empty() ? nullptr : c.slopes.data();
    a.mass = c.mass.empty() ? nullptr : c.mass.data();
}

void call(Attention& a, int threads) {
    a.most_keys = a.table ? a.columns * a.page_size : a.keys;
    i64 bytes = attention_scratch(a.batch, a.heads, a.kv_heads, a.queries, a.most_keys, a.key_width, a.value_width,
                                  a.top, a.slash_columns, a.mass != nullptr, threads);
    void* scratch = std::aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    std::memset(scratch, 0xff, (size_t)bytes);
    a.scratch = scratch;
    Team team;
    team.begin(threads);
    std::vector<std::thread> others;
    for (int id = 1; id < threads; id++)
        others.emplace_back([&, id] {
            Thread thread{team, id};
            attention(thread, a);
        });
    Thread thread{team, 0};
    attention(thread, a);
    for (auto& other : others) other.join();
    std::free(scratch);
}

template <class T>
std::vector<double> rotated(Case<T>& c, i64 batch, i64 index, const float* x) {
    const Attention& a = c.a;
    std::vector<double> y(x, x + a.key_width);
    i64 half = a.rope_width / 2;
    for (i64 p = 0; p < half; p++) {
        double cos = c.cos.row(batch, 0, index)[p], sin = c.sin.row(batch, 0, index)[p];
        i64 one = a.interleaved ? 2 * p : p, two = a.interleaved ? 2 * p + 1 : p + half;
        y[(size_t)one] = x[one] * cos - x[two] * sin;
        y[(size_t)two] = x[two] * cos + x[one] * sin;
    }
    return y;
}

// The cache holds the new rows, rounded to nearest, and the old ones as they were.
template <class T>
void check_cache(Case<T>& c) {
    const Attention& a = c.a;
    double unit = a.k_format == Format::f32 ? 3e-7 : a.k_format == Format::bf16 ? 1.0 / 256 : 1.0 / 2048;
    for (i64 b = 0; b < a.batch; b++)
        for (i64 g = 0; g < a.kv_heads; g++)
            for (i64 i = 0; i < a.queries; i++) {
                std::vector<double> key = rotated(c, b, i, c.k.row(b, g, i));
                i64 token = a.start_of(b) + i;
                T *k = c.key(b, g, token), *v = c.value(b, g, token);
                for (i64 p = 0; p < a.key_width; p++) {
                    double wanted = key[(size_t)p];
                    if (!(std::fabs((float)k[p] - wanted) <= unit * std::fabs(wanted) + 1e-6))
                        fail(c.describe() + ": key in the cache");
                    k[p] = c.token_of(c.k_before, b, g, token)[p];
                }
                for (i64 p = 0; p < a.value_width; p++) {
                    if ((float)v[p] != (float)T(c.v.row(b, g, i)[p])) fail(c.describe() + ": value in the cache");
                    v[p] = c.token_of(c.v_before, b, g, token)[p];
                }
            }
    auto same = [](const std::vector<T>& x, const std::vector<T>& y) {
        return std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
    };
    if (!same(c.k_cache.data, c.k_before.data) || !same(c.v_cache.data, c.v_before.data))
        fail(c.describe() + ": other rows of the cache changed");
}

// What a term keeps: slim/compiler/patterns/terms.py, but for what is chosen by looking.
bool keeps(const Term& term, i64 head, i64 t, i64 j) {
    auto block = [&](i64 token) { return token >= 0 ? token / term.a : -((term.a - 1 - token) / term.a); };
    i64 within = j - block(j) * term.a;
    switch (term.keep) {
        case Keep::window: return std::abs(t - j) < term.a;
        case Keep::columns: return j < term.a;
        case Keep::rows: return t < term.a;
        case Keep::stride: return (t - j) % term.a == 0;
        case Keep::blocks: return std::abs(block(t) - block(j)) < term.b;
        case Keep::summary: return within >= term.a - term.b;
        case Keep::random:
            for (i32 number = 0; number < term.b && block(t) > 0; number++) {
                u32 x = (u32)block(t) * 0xC2B2AE3Du + (u32)term.c * 0x9E3779B1u + (u32)head * 0x85EBCA77u +
                        (u32)number * 0x27D4EB2Fu;
                x = (x ^ (x >> 15)) * 0x2C1B3C6Du;
                x = (x ^ (x >> 12)) * 0x297A2D39u;
                if ((x ^ (x >> 15)) % (u32)block(t) == (u32)block(j) && j >= 0) return true;
            }
            return false;
        default: return true;
    }
}

template <class T>
bool keeps(const Case<T>& c, i64 b, i64 h, i64 i, i64 j) {
    if (c.terms.empty() || c.terms[(size_t)h].empty()) return true;
    i64 origin = 0;
    while (c.a.key_mask && origin < c.a.keys_of(b) && !c.a.key_mask[b * c.a.mask_batch + origin]) origin++;
    for (const Term& term : c.terms[(size_t)h])
        if (keeps(term, h, c.a.start_of(b) + i - origin, j - origin)) return true;
    return false;
}

template <class T>
std::vector<double> score_row(Case<T>& c, i64 b, i64 h, i64 i) {
    const Attention& a = c.a;
    std::vector<double> q = rotated(c, b, i, c.q.row(b, h, i)), scores;
    for (i64 j = 0; j < a.keys_of(b); j++) {
        if (!c.sees(b, i, j) || (a.key_mask && !a.key_mask[b * a.mask_batch + j]) || !keeps(c, b, h, i, j)) {
            scores.push_back(-INFINITY);
            continue;
        }
        i64 g = h / (a.heads / a.kv_heads);
        std::vector<double> key;
        if (c.cached) key.assign(c.key(b, g, j), c.key(b, g, j) + a.key_width);
        else if (a.rope_width) key = rotated(c, b, j, c.k.row(b, g, j));
        else key.assign(c.k.row(b, g, j), c.k.row(b, g, j) + a.key_width);
        double s = 0;
        for (size_t p = 0; p < q.size(); p++) s += q[p] * key[p];
        s *= a.scale;
        if (a.softcap != 0) s = std::tanh(s / a.softcap) * a.softcap;
        if (a.slopes) s += a.slopes[h] * (double)(j - a.start_of(b) - i);
        if (a.bias) s += a.bias[b * a.bias_batch + h * a.bias_head + i * a.bias_query + j * a.bias_key];
        scores.push_back(s);
    }
    return scores;
}

double largest_of(const std::vector<double>& scores) {
    double largest = 0;
    for (double s : scores) largest = std::max(largest, std::isfinite(s) ? std::fabs(s) : 0.0);
    return largest;
}

// softmax of a row's scores and its sink.
template <class T>
std::vector<double> weights_of(Case<T>& c, i64 h, std::vector<double> scores) {
    const Attention& a = c.a;
    double top = *std::max_element(scores.begin(), scores.end()), total = 0;
    if (a.sinks) top = std::max(top, (double)a.sinks[h]);
    if (a.sinks && std::isfinite(top)) total = std::exp(a.sinks[h] - top);
    for (double& s : scores) total += s = s == -INFINITY ? 0.0 : std::exp(s - top);
    for (double& s : scores) s = total == 0 ? 0.0 : s / total;
    return scores;
}

// What keys of some heads got is what their queries' weights add up to.
template <class T>
void check_mass(Case<T>& c) {
    const Attention& a = c.a;
    if (!a.mass) return;
    i64 pairs = a.batch * a.kv_heads, group = a.heads / a.kv_heads;
    i64 pair = (i64)(random_bits() % (unsigned)pairs), b = pair / a.kv_heads, g = pair % a.kv_heads;
    i64 kept = a.votes && a.queries >= a.votes ? 0 : a.start;
    const float *mass = c.mass.data() + b * a.mass_batch + g * a.mass_head;
    std::vector<double> wanted((size_t)a.keys, 0.0);
    for (i64 j = 0; j < kept; j++) wanted[(size_t)j] = 1.0;
    double largest = 0;
    for (i64 i = a.votes ? std::max<i64>(0, a.queries - a.votes) : 0; i < a.queries; i++)
        for (i64 h = g * group; h < (g + 1) * group; h++) {
            std::vector<double> scores = score_row(c, b, h, i), weights = weights_of(c, h, scores);
            largest = std::max(largest, largest_of(scores));
            for (size_t j = 0; j < weights.size(); j++) wanted[j] += weights[j];
        }
    for (i64 j = 0; j < a.keys; j++)
        if (!(std::fabs(mass[j] - wanted[(size_t)j]) <= (1e-5 + 1e-6 * largest) * (1 + wanted[(size_t)j])))
            fail(c.describe() + ": mass of key " + std::to_string(j) + " is " + std::to_string(mass[j]) + ", not " +
                 std::to_string(wanted[(size_t)j]));
    for (size_t i = 0; i < c.mass.size(); i++)
        if ((i64)i % a.mass_batch % a.mass_head >= a.keys && !std::isnan(c.mass[i])) fail(c.describe() + ": mass beyond");
}

template <class T>
void check_row(Case<T>& c, i64 b, i64 h, i64 i) {
    const Attention& a = c.a;
    std::vector<double> scores = score_row(c, b, h, i), wanted((size_t)a.value_width, 0.0);
    double largest = largest_of(scores);
    std::vector<double> weights = weights_of(c, h, scores);
    for (i64 j = 0; j < a.keys_of(b); j++) {
        double weight = weights[(size_t)j];
        if (weight == 0.0) continue;
        i64 g = h / (a.heads / a.kv_heads);
        for (i64 p = 0; p < a.value_width; p++)
            wanted[(size_t)p] += weight * (c.cached ? (double)(float)c.value(b, g, j)[p] : c.v.row(b, g, j)[p]);
    }
    for (i64 p = 0; p < a.value_width; p++) {
        double exact = wanted[(size_t)p];
        float got = c.out.row(b, h, i)[p];
        if (!(std::fabs(got - exact) <= 1e-5 + 1e-6 * largest))  // scores are floats: large ones are coarse
            fail(c.describe() + ": row " + std::to_string(b) + " " + std::to_string(h) + " " + std::to_string(i) + " " +
                 std::to_string(p) + " is " + std::to_string(got) + ", not " + std::to_string(exact));
    }
}

}  // namespace
