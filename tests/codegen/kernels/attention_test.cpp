// attention() and math.h against the same in doubles: attention_test [seed] [cases]
#include "attention_case.h"

namespace {

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
