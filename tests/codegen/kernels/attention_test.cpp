// attention() and math.h against the same in doubles: attention_test [seed] [cases]
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

// -- math.h -----------------------------------------------------------------------------------------------------------

struct Function {
    const char* name;
    float (*fast)(float);
    double (*exact)(double);
    double low, high;
    double absolute;  // an error this small is no error
};

const double ROOT_2 = std::sqrt(2.0);
double gelu_tanh(double x) {
    double u = std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x);
    return x / (1.0 + std::exp(-2.0 * u));
}

const Function FUNCTIONS[] = {
    {"exp", exp_f, [](double x) { return std::exp(x); }, -87.0, 88.7, 0},
    {"exp, tiny", exp_f, [](double x) { return std::exp(x); }, -110.0, -87.0, 3e-45},
    {"expm1", expm1_f, [](double x) { return std::expm1(x); }, -20.0, 88.7, 0},
    {"expm1, near 0", expm1_f, [](double x) { return std::expm1(x); }, -1.0, 1.0, 0},
    {"log", log_f, [](double x) { return std::log(x); }, 1e-6, 10.0, 0},
    {"log, large", log_f, [](double x) { return std::log(x); }, 1.0, 3e38, 0},
    {"log, tiny", log_f, [](double x) { return std::log(x); }, 1e-44, 1.2e-38, 0},
    {"log1p", log1p_f, [](double x) { return std::log1p(x); }, -0.999, 20.0, 0},
    {"log1p, near 0", log1p_f, [](double x) { return std::log1p(x); }, -1e-3, 1e-3, 0},
    {"tanh", tanh_f, [](double x) { return std::tanh(x); }, -12.0, 12.0, 0},
    {"tanh, near 0", tanh_f, [](double x) { return std::tanh(x); }, -1e-2, 1e-2, 0},
    {"sigmoid", sigmoid_f, [](double x) { return 1.0 / (1.0 + std::exp(-x)); }, -80.0, 80.0, 0},
    {"silu", silu_f, [](double x) { return x / (1.0 + std::exp(-x)); }, -80.0, 80.0, 0},
    {"softplus", softplus_f, [](double x) { return std::log1p(std::exp(x)); }, -80.0, 80.0, 0},
    {"erf", erf_f, [](double x) { return std::erf(x); }, -5.0, 5.0, 0},
    {"gelu", gelu_f, [](double x) { return 0.5 * x * std::erfc(-x / ROOT_2); }, -12.0, 12.0, 0},
    {"gelu_tanh", gelu_tanh_f, gelu_tanh, -12.0, 12.0, 1e-7},
    {"rsqrt", rsqrt, [](double x) { return 1.0 / std::sqrt(x); }, 1e-20, 1e3, 0},
    {"sin", sin_f, [](double x) { return std::sin(x); }, -10.0, 10.0, 2e-7},
    {"cos", cos_f, [](double x) { return std::cos(x); }, -10.0, 10.0, 2e-7},
    {"sin, far", sin_f, [](double x) { return std::sin(x); }, -1e9, 1e9, 2e-7},
    {"cos, far", cos_f, [](double x) { return std::cos(x); }, -1e5, 1e5, 2e-7},
};

void test_functions() {
    for (const Function& f : FUNCTIONS) {
        double worst = 0;
        std::uniform_real_distribution<double> points(f.low, f.high);
        for (int i = 0; i < 200000; i++) {
            float x = (float)points(random_bits);
            double exact = f.exact((double)x), error = std::fabs((double)f.fast(x) - exact);
            if (error <= f.absolute) continue;
            worst = std::max(worst, error / std::fabs(exact));
            if (!(error <= 1e-6 * std::fabs(exact)))
                fail(std::string(f.name) + " at " + std::to_string(x) + ": " + std::to_string(f.fast(x)));
        }
        if (std::getenv("VERBOSE")) std::printf("%-14s %.1e\n", f.name, worst);
    }
}

void expect(const char* what, float x, float wanted) {
    if (x != wanted && !(std::isnan(x) && std::isnan(wanted))) fail(std::string(what) + " gives " + std::to_string(x));
}

void test_edges() {
    const float inf = INFINITY;
    expect("exp(inf)", exp_f(inf), inf);
    expect("exp(89)", exp_f(89.0f), inf);
    expect("exp(-inf)", exp_f(-inf), 0.0f);
    expect("expm1(inf)", expm1_f(inf), inf);
    expect("expm1(-inf)", expm1_f(-inf), -1.0f);
    expect("log(0)", log_f(0.0f), -inf);
    expect("log(-1)", log_f(-1.0f), NAN);
    expect("log(-inf)", log_f(-inf), NAN);
    expect("log(inf)", log_f(inf), inf);
    expect("log1p(-1)", log1p_f(-1.0f), -inf);
    expect("log1p(inf)", log1p_f(inf), inf);
    expect("log1p(-2)", log1p_f(-2.0f), NAN);
    expect("tanh(inf)", tanh_f(inf), 1.0f);
    expect("tanh(-inf)", tanh_f(-inf), -1.0f);
    expect("sigmoid(-inf)", sigmoid_f(-inf), 0.0f);
    expect("sigmoid(inf)", sigmoid_f(inf), 1.0f);
    expect("silu(inf)", silu_f(inf), inf);
    expect("softplus(inf)", softplus_f(inf), inf);
    expect("softplus(-inf)", softplus_f(-inf), 0.0f);
    expect("erf(inf)", erf_f(inf), 1.0f);
    expect("erf(-30)", erf_f(-30.0f), -1.0f);
    expect("gelu(inf)", gelu_f(inf), inf);
    expect("gelu(-40)", gelu_f(-40.0f), 0.0f);
    expect("gelu_tanh(100)", gelu_tanh_f(100.0f), 100.0f);
    expect("gelu_tanh(-100)", gelu_tanh_f(-100.0f), 0.0f);
    expect("sin(0)", sin_f(0.0f), 0.0f);
    expect("cos(0)", cos_f(0.0f), 1.0f);
    expect("pow(2, 10)", pow_f(2.0f, 10.0f), 1024.0f);
    float (*const all[])(float) = {exp_f, expm1_f, log_f, log1p_f, tanh_f, sigmoid_f, silu_f, softplus_f,
                                   erf_f, gelu_f,  gelu_tanh_f, rsqrt, sin_f, cos_f};
    for (auto f : all) expect("f(NaN)", f(NAN), NAN);
}

// -- attention --------------------------------------------------------------------------------------------------------

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
    // Whether the row may see the key, whatever is masked.
    bool sees(i64 query, i64 key) const {
        i64 distance = a.start + query - key;
        return (!a.causal || distance >= 0) && (!a.window || (distance < a.window && -distance < a.window));
    }
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
    a.most_keys = a.keys;
    i64 bytes = attention_scratch(a.batch, a.heads, a.kv_heads, a.queries, a.keys, a.key_width, a.value_width, 0, 0,
                                  a.mass != nullptr, threads);
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
                T *k = c.k_cache.row(b, g, a.start + i), *v = c.v_cache.row(b, g, a.start + i);
                for (i64 p = 0; p < a.key_width; p++) {
                    double wanted = key[(size_t)p];
                    if (!(std::fabs((float)k[p] - wanted) <= unit * std::fabs(wanted) + 1e-6))
                        fail(c.describe() + ": key in the cache");
                    k[p] = c.k_before.row(b, g, a.start + i)[p];
                }
                for (i64 p = 0; p < a.value_width; p++) {
                    if ((float)v[p] != (float)T(c.v.row(b, g, i)[p])) fail(c.describe() + ": value in the cache");
                    v[p] = c.v_before.row(b, g, a.start + i)[p];
                }
            }
    auto same = [](const std::vector<T>& x, const std::vector<T>& y) {
        return std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
    };
    if (!same(c.k_cache.data, c.k_before.data) || !same(c.v_cache.data, c.v_before.data))
        fail(c.describe() + ": other rows of the cache changed");
}

template <class T>
std::vector<double> score_row(Case<T>& c, i64 b, i64 h, i64 i) {
    const Attention& a = c.a;
    std::vector<double> q = rotated(c, b, i, c.q.row(b, h, i)), scores;
    for (i64 j = 0; j < a.keys; j++) {
        if (!c.sees(i, j) || (a.key_mask && !a.key_mask[b * a.mask_batch + j])) {
            scores.push_back(-INFINITY);
            continue;
        }
        i64 g = h / (a.heads / a.kv_heads);
        std::vector<double> key;
        if (c.cached) key.assign(c.k_cache.row(b, g, j), c.k_cache.row(b, g, j) + a.key_width);
        else if (a.rope_width) key = rotated(c, b, j, c.k.row(b, g, j));
        else key.assign(c.k.row(b, g, j), c.k.row(b, g, j) + a.key_width);
        double s = 0;
        for (size_t p = 0; p < q.size(); p++) s += q[p] * key[p];
        s *= a.scale;
        if (a.softcap != 0) s = std::tanh(s / a.softcap) * a.softcap;
        if (a.slopes) s += a.slopes[h] * (double)(j - a.start - i);
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
    for (i64 j = 0; j < a.keys; j++) {
        double weight = weights[(size_t)j];
        if (weight == 0.0) continue;
        i64 g = h / (a.heads / a.kv_heads);
        for (i64 p = 0; p < a.value_width; p++)
            wanted[(size_t)p] += weight * (c.cached ? (double)(float)c.v_cache.row(b, g, j)[p] : c.v.row(b, g, j)[p]);
    }
    for (i64 p = 0; p < a.value_width; p++) {
        double exact = wanted[(size_t)p];
        float got = c.out.row(b, h, i)[p];
        if (!(std::fabs(got - exact) <= 1e-5 + 1e-6 * largest))  // scores are floats: large ones are coarse
            fail(c.describe() + ": row " + std::to_string(b) + " " + std::to_string(h) + " " + std::to_string(i) + " " +
                 std::to_string(p) + " is " + std::to_string(got) + ", not " + std::to_string(exact));
    }
}

template <class T>
void test_attention(Format format, bool cached) {
    Case<T> c;
    shape_case(c, format, cached);
    fill_case(c);
    point_case(c);
    call(c.a, c.threads);
    i64 rows = c.a.batch * c.a.heads * c.a.queries, step = std::max<i64>(1, rows / 200);
    for (i64 row = (i64)(random_bits() % (unsigned)step); row < rows; row += step)
        check_row(c, row / c.a.queries / c.a.heads, row / c.a.queries % c.a.heads, row % c.a.queries);
    check_mass(c);
    if (cached) check_cache(c);
}

// -- a cache of int8 or int4 numbers ----------------------------------------------------------------------------------

// One side of it, and the floats that it stands for.
struct Numbers {
    Format format;
    Tensor<u8> bytes, before;
    std::vector<float> scale, scale_before;
    i64 batch, head;  // of the scales

    bool packed() const { return format == Format::int4; }
    float* scale_of(i64 b, i64 g, i64 token) { return scale.data() + b * batch + g * head + token; }
    float number(i64 b, i64 g, i64 token, i64 p) {
        u8 byte = bytes.row(b, g, token)[packed() ? p / 2 : p];
        return (float)(packed() ? (byte >> p % 2 * 4 & 15) - 8 : (i8)byte);
    }
    float value(i64 b, i64 g, i64 token, i64 p) { return number(b, g, token, p) * *scale_of(b, g, token); }

    // Random numbers for tokens first..last - 1 of `floats`, which becomes what they stand for; NaN scales elsewhere.
    Numbers(Format format, Tensor<float>& floats, i64 first, i64 last) : format(format) {
        i64 rows = floats.shape[0], heads = floats.shape[1], room = floats.shape[2], width = floats.shape[3];
        bytes = Tensor<u8>(rows, heads, room, packed() ? width / 2 : width);
        head = room + pick({0, 3}), batch = heads * head + pick({0, 5});
        scale.assign((size_t)(rows * batch), NAN);
        for (i64 b = 0; b < rows; b++)
            for (i64 g = 0; g < heads; g++)
                for (i64 token = first; token < last; token++) {
                    *scale_of(b, g, token) = (packed() ? 0.2f : 0.01f) * normal();
                    for (i64 i = 0; i < bytes.shape[3]; i++) bytes.row(b, g, token)[i] = (u8)random_bits();
                    for (i64 p = 0; p < width; p++) floats.row(b, g, token)[p] = value(b, g, token, p);
                }
        before = bytes, scale_before = scale;
    }

    // The new token was rounded to the nearest of the steps that slim.token_scale says; `floats` becomes that.
    void check_new(const std::string& what, i64 b, i64 g, i64 token, const std::vector<double>& x,
                   Tensor<float>& floats) {
        double extreme = 0;
        for (double v : x) extreme = std::fabs(v) > std::fabs(extreme) ? v : extreme;
        double step = packed() ? extreme / -8 : std::fabs(extreme) / 127, got = *scale_of(b, g, token);
        if (packed() && std::fabs(got + step) < std::fabs(got - step)) step = -step;  // extremes of both signs
        if (!(std::fabs(got - step) <= 1e-5 * std::fabs(step) + 1e-37)) fail(what + ": scale in the cache");
        for (size_t p = 0; p < x.size(); p++) {
            double steps = std::min(std::max(x[p] / step, packed() ? -8.0 : -128.0), packed() ? 7.0 : 127.0);
            if (!(std::fabs(number(b, g, token, (i64)p) - steps) <= 0.501)) fail(what + ": number in the cache");
            floats.row(b, g, token)[p] = value(b, g, token, (i64)p);
        }
        std::memcpy(before.row(b, g, token), bytes.row(b, g, token), (size_t)bytes.shape[3]);
        scale_before[(size_t)(b * batch + g * head + token)] = *scale_of(b, g, token);
    }
    void check_old(const std::string& what) const {
        if (bytes.data != before.data ||
            std::memcmp(scale.data(), scale_before.data(), scale.size() * sizeof(float)) != 0)
            fail(what + ": other rows of the cache changed");
    }
};

void test_quantised() {
    Case<float> c;
    shape_case(c, Format::f32, true);
    Attention& a = c.a;
    a.k_format = chance(2) ? Format::int8 : Format::int4, a.v_format = chance(2) ? Format::int8 : Format::int4;
    if (a.k_format == Format::int4) a.key_width += a.key_width % 2;
    if (a.v_format == Format::int4) a.value_width += a.value_width % 2;
    if (a.rope_width > a.key_width) a.rope_width = a.key_width;
    fill_case(c);
    point_case(c);
    i64 first = a.window ? std::max<i64>(0, a.start - a.window + 1) : 0;
    Numbers k(a.k_format, c.k_cache, first, a.start), v(a.v_format, c.v_cache, first, a.start);
    a.k_cache = k.bytes.data.data(), a.v_cache = v.bytes.data.data();
    a.kc_batch = k.bytes.strides[0], a.kc_head = k.bytes.strides[1], a.kc_token = k.bytes.strides[2];
    a.vc_batch = v.bytes.strides[0], a.vc_head = v.bytes.strides[1], a.vc_token = v.bytes.strides[2];
    a.k_scale = k.scale.data(), a.ks_batch = k.batch, a.ks_head = k.head;
    a.v_scale = v.scale.data(), a.vs_batch = v.batch, a.vs_head = v.head;
    std::vector<float> offset;
    if (chance(2))
        for (i64 i = 0; i < a.kv_heads * a.key_width; i++) offset.push_back(normal());
    if (!offset.empty()) a.k_offset = offset.data(), a.ko_head = a.key_width;
    call(a, c.threads);
    std::string what = c.describe() + " k format " + std::to_string((int)a.k_format) + " v format " +
                       std::to_string((int)a.v_format);
    for (i64 b = 0; b < a.batch; b++)
        for (i64 g = 0; g < a.kv_heads; g++)
            for (i64 i = 0; i < a.queries; i++) {
                std::vector<double> key = rotated(c, b, i, c.k.row(b, g, i));
                for (size_t p = 0; p < key.size() && !offset.empty(); p++)
                    key[p] -= offset[(size_t)(g * a.key_width) + p];
                k.check_new(what, b, g, a.start + i, key, c.k_cache);
                const float* value = c.v.row(b, g, i);
                v.check_new(what, b, g, a.start + i, std::vector<double>(value, value + a.value_width), c.v_cache);
            }
    k.check_old(what), v.check_old(what);
    i64 rows = a.batch * a.heads * a.queries, step = std::max<i64>(1, rows / 200);
    for (i64 row = (i64)(random_bits() % (unsigned)step); row < rows; row += step)
        check_row(c, row / a.queries / a.heads, row / a.queries % a.heads, row % a.queries);
    check_mass(c);
}

}  // namespace

int main(int argc, char** argv) {
    random_bits.seed(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1);
    int cases = argc > 2 ? std::atoi(argv[2]) : 500;
    test_functions();
    test_edges();
    for (int i = 0; i < cases; i++) {
        switch (i % 8) {
            case 0: test_attention<bf16>(Format::bf16, true); break;
            case 1: test_attention<f16>(Format::f16, true); break;
            case 2: test_attention<float>(Format::f32, false); break;
            case 3: case 4: case 5: test_quantised(); break;
            default: test_attention<float>(Format::f32, true);
        }
    }
    std::printf("%d cases\n", cases);
}
