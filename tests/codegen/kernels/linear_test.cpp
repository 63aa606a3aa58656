// Checks linear() on random shapes, formats and threads against double precision. linear_test [seed] [cases]
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

using namespace slim;

extern "C" void slim_unpack(i32, i64, i64, i64, const void*, void*);

namespace {

using Random = std::mt19937;

i64 uniform(Random& random, i64 low, i64 high) { return std::uniform_int_distribution<i64>(low, high)(random); }

template <class T>
T any_of(Random& random, std::initializer_list<T> choices) {
    return choices.begin()[uniform(random, 0, (i64)choices.size() - 1)];
}

// Memory whose end is the end of what was asked for, so that the address sanitizer sees every read behind it.
struct Bytes64 {
    explicit Bytes64(i64 size) : memory(new u8[size + 64]) {
        data = memory.get() + (64 - (reinterpret_cast<std::uintptr_t>(memory.get()) & 63));
    }
    std::unique_ptr<u8[]> memory;
    u8* data;
};

struct Weight {
    Matrix matrix;
    std::vector<double> exact;      // [m, n], of the integers without their scales
    std::vector<float> scales;      // one a row, or [m, n / group]
    std::vector<float> row_floats;
    std::vector<bf16> row_bf16;
    std::vector<f16> row_f16;
    std::vector<fp8> row_fp8;
    std::unique_ptr<Bytes64> packed;

    double scale(i64 row, i64 column) const {
        if (scales.empty()) return 1;
        return matrix.group ? scales[row * (matrix.n / matrix.group) + column / matrix.group] : scales[row];
    }
    bool quantized() const { return matrix.format >= Format::int8 && matrix.format <= Format::nf4; }
};

void make_floats(Random& random, Weight& w) {
    std::normal_distribution<float> normal;
    i64 count = w.matrix.m * w.matrix.n;
    for (i64 i = 0; i < count; i++) {
        float x = normal(random);
        w.row_floats.push_back(x);
        w.row_bf16.push_back(bf16(x));
        w.row_f16.push_back((f16)x);
        if (w.matrix.format == Format::bf16) x = (float)w.row_bf16.back();
        if (w.matrix.format == Format::f16) x = (float)w.row_f16.back();
        w.exact.push_back(x);
    }
    if (w.matrix.format == Format::f32) w.matrix.data = w.row_floats.data();
    if (w.matrix.format == Format::bf16) w.matrix.data = w.row_bf16.data();
    if (w.matrix.format == Format::f16) w.matrix.data = w.row_f16.data();
}

void make_scales(Random& random, Weight& w) {
    bool half = uniform(random, 0, 1);
    for (i64 i = 0; i < w.matrix.m * (w.matrix.group ? w.matrix.n / w.matrix.group : 1); i++) {
        float scale = (float)uniform(random, 100, 1000) / 32768;
        w.scales.push_back(half ? (float)(f16)scale : scale * 1.0001f);
    }
}

// Every number of the format but NaN.
void make_fp8(Random& random, Weight& w) {
    for (i64 i = 0; i < w.matrix.m * w.matrix.n; i++) {
        w.row_fp8.push_back(fp8{(u8)(uniform(random, 0, 126) | uniform(random, 0, 1) << 7)});
        u8 bits = w.row_fp8.back().bits;
        int exponent = bits >> 3 & 15, fraction = bits & 7;
        double size = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
        w.exact.push_back(bits & 0x80 ? -size : size);
    }
    w.matrix.data = w.row_fp8.data();
    make_scales(random, w);
    w.matrix.scale = w.scales.data();
}

constexpr int LEVELS[] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

void make_integers(Random& random, Weight& w) {
    Matrix& m = w.matrix;
    bool whole = m.format == Format::int8, three = m.format == Format::int3, levels = m.format == Format::nf4;
    i64 row_bytes = whole ? m.n : (three ? m.n / 8 * 3 : (m.n + 1) / 2), groups = m.group ? m.n / m.group : 0;
    std::vector<u8> q(m.m * row_bytes);
    std::vector<i8> zeros;
    if (groups && !whole && !levels && uniform(random, 0, 1))
        for (i64 i = 0; i < m.m * groups; i++)
            zeros.push_back((i8)(uniform(random, 0, 3) ? uniform(random, -8, 7) : uniform(random, -128, 127)));
    for (i64 r = 0; r < m.m; r++) {
        for (i64 c = 0; c < m.n; c++) {
            i64 value = whole ? uniform(random, -128, 127) : (three ? uniform(random, -4, 3) : uniform(random, -8, 7));
            i64 bit = c % 8 * 3;
            u8* row = q.data() + r * row_bytes;
            if (whole) row[c] = (u8)(i8)value;
            else if (!three) row[c / 2] |= (u8)((value + 8) << (c % 2 * 4));
            else
                for (int b = 0; b < 3; b++)
                    row[c / 8 * 3 + (bit + b) / 8] |= (u8)(((value + 4) >> b & 1) << (bit + b) % 8);
            if (levels) value = LEVELS[value + 8];
            w.exact.push_back((double)value - (zeros.empty() ? 0 : zeros[r * groups + c / m.group]));
        }
    }
    make_scales(random, w);
    const float* grid = m.group ? w.scales.data() : nullptr;
    const i8* zero = zeros.empty() ? nullptr : zeros.data();
    if (!m.group) m.scale = w.scales.data();
    i64 bytes = slim_packed_bytes((i32)m.format, m.m, m.n, m.group, grid, zero);
    if (!bytes) std::printf("no kernel for group %ld\n", (long)m.group), std::exit(1);
    w.packed = std::make_unique<Bytes64>(bytes);
    slim_pack((i32)m.format, m.m, m.n, m.group, q.data(), grid, zero, w.packed->data);
    m.data = w.packed->data;
    std::vector<u8> back(q.size(), 0xff);
    slim_unpack((i32)m.format, m.m, m.n, m.group, m.data, back.data());
    if (back != q) std::printf("unpacking format %d gives other numbers\n", (int)m.format), std::exit(1);
}

enum class Step { none, token, given };

struct Case {
    i64 rows, n, act_group, threads;
    Step step;
    float given;
    std::vector<float> x;
    std::vector<std::unique_ptr<Weight>> weights;
    std::vector<Part> parts;
    std::vector<std::unique_ptr<struct Output>> outputs;
};

struct Output {
    i64 rows, m, lanes;
    std::vector<float> y[2];
    std::vector<int> stores;  // of every number: exactly one is right
    bool aligned = true;
};

void take(const void* env, i64 row, i64 column, i64 count, const float* const* y) {
    Output& out = *static_cast<Output*>(const_cast<void*>(env));
    if (column % 16 || count < 1 || count > 256 || row >= out.rows || column + count > out.m) {
        out.aligned = false;
        return;
    }
    for (i64 i = 0; i < count; i++) {
        out.stores[row * out.m + column + i]++;
        for (i64 l = 0; l < out.lanes; l++) out.y[l][row * out.m + column + i] = y[l][i];
    }
}

void give(const void* env, i64 row, float* x) {
    const Case& c = *static_cast<const Case*>(env);
    std::memcpy(x, c.x.data() + row * c.n, c.n * sizeof(float));
}

float step_of(const void* env, i64 row, const float* x) {
    const Case& c = *static_cast<const Case*>(env);
    if (std::memcmp(x, c.x.data() + row * c.n, c.n * sizeof(float))) std::printf("another row is rounded\n"), std::exit(1);
    return c.step == Step::token ? token_scale(x, c.n) : c.given;
}

Case make_case(Random& random, int index) {
    Case c;
    c.rows = any_of<i64>(random, {1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 31, 64, 130});
    c.n = index % 8 ? uniform(random, 1, 600) : uniform(random, 600, 2600);
    if (index % 40 == 7) c.rows = 513, c.n = uniform(random, 1, 300);
    c.threads = uniform(random, 1, 3);
    c.act_group = any_of<i64>(random, {0, 128, 128, 128, 32, 16, 48, 51, 640, 1024});
    bool mixed = uniform(random, 0, 3) == 0;
    Format common = (Format)uniform(random, 0, 7);
    bool three = mixed ? uniform(random, 0, 1) : common == Format::int3;
    i64 group = any_of<i64>(random, {0, 0, 16, 32, 64, 128, 48, 256});
    if (three && group % 32) group *= 2;
    if (three && !group) c.n = (c.n + 7) / 8 * 8;
    if (group) c.n = (c.n + group - 1) / group * group;
    c.step = any_of(random, {Step::none, Step::none, Step::token, Step::given});
    std::normal_distribution<float> normal;
    float size = std::exp(normal(random) * 3);
    for (i64 i = 0; i < c.rows * c.n; i++) c.x.push_back(normal(random) * size);
    if (uniform(random, 0, 9) == 0) std::fill(c.x.begin(), c.x.begin() + c.n, 0.0f);
    c.given = size / any_of<float>(random, {32, 60, 200, 1e6});  // some clip, the last one nearly all
    for (i64 parts = uniform(random, 1, 3), p = 0; p < parts; p++) {
        i64 m = c.rows > 100 || c.n > 600 ? uniform(random, 1, 100) : uniform(random, 1, 300);
        Part part{};
        part.lane_count = (i32)uniform(random, 1, 2);
        part.store = take;
        auto out = std::make_unique<Output>();
        out->rows = c.rows, out->m = m, out->lanes = part.lane_count;
        out->stores.resize(c.rows * m);
        for (i64 l = 0; l < part.lane_count; l++) {
            auto w = std::make_unique<Weight>();
            Format format = mixed ? (Format)uniform(random, 0, 7) : common;
            if (format == Format::int3 && !three) format = Format::int4;
            w->matrix = {format, nullptr, nullptr, m, c.n, 0};
            if (format >= Format::int8) w->matrix.group = mixed && uniform(random, 0, 1) ? 0 : group;
            if (w->quantized()) make_integers(random, *w);
            else if (format == Format::fp8) make_fp8(random, *w);
            else make_floats(random, *w);
            out->y[l].resize(c.rows * m);
            part.lanes[l] = &w->matrix;
            c.weights.push_back(std::move(w));
        }
        part.env = out.get();
        c.outputs.push_back(std::move(out));
        c.parts.push_back(part);
    }
    return c;
}

void run(Case& c) {
    Bytes64 scratch(linear_scratch(c.rows, c.n, (int)c.threads));
    Linear args{c.rows, c.n, give, &c, c.parts.data(), (i32)c.parts.size(), c.act_group, scratch.data};
    if (c.step != Step::none) args.step = step_of, args.clips = c.step == Step::given;
    Team team;
    team.begin((int)c.threads);
    auto work = [&](int id) {
        Thread thread{team, id};
        linear(thread, args);
    };
    std::vector<std::thread> others;
    for (int id = 1; id < c.threads; id++) others.emplace_back(work, id);
    work(0);
    for (auto& other : others) other.join();
}

// The granularity of the input's scales that the kernels promise: whole rows, or act_group rounded up to 16 or 32.
std::vector<double> quantized_row(const Case& c, i64 row) {
    std::vector<double> result(c.n);
    const float* x = c.x.data() + row * c.n;
    if (c.step != Step::none) {
        volatile float step = c.given;
        if (c.step == Step::token) {
            float most = 0;
            for (i64 i = 0; i < c.n; i++) most = std::max(most, std::fabs(x[i]));
            step = std::max(most / 127.0f, 0x1p-126f);
        }
        for (i64 i = 0; i < c.n; i++) {
            volatile float steps = x[i] / step;
            result[i] = std::min(std::max(std::nearbyint((double)steps), -128.0), 127.0) * (double)step;
        }
        return result;
    }
    i64 least = 16;
    for (const auto& w : c.weights) least = w->matrix.format == Format::int3 ? 32 : least;
    i64 group = c.act_group <= 0 || c.act_group >= c.n ? c.n : (c.act_group + least - 1) / least * least;
    for (i64 begin = 0; begin < c.n; begin += group) {
        i64 end = std::min(begin + group, c.n);
        float largest = 0;
        for (i64 i = begin; i < end; i++) largest = std::max(largest, std::fabs(x[i]));
        float inverse = largest > 0 ? 127.0f / largest : 0;
        for (i64 i = begin; i < end; i++) {
            volatile float scaled = x[i] * inverse;
            result[i] = std::nearbyint(scaled) * (double)(largest / 127.0f);
        }
    }
    return result;
}

struct Errors {
    double worst = 0, worst_unquantized = 0;
};

// The largest error of a row, relative to the largest that its factors allow.
bool check_weight(const Case& c, const Weight& w, const std::vector<float>& y, Errors& errors) {
    i64 n = c.n, m = w.matrix.m;
    for (i64 row = 0; row < c.rows; row++) {
        const float* given = c.x.data() + row * n;
        std::vector<double> exact(given, given + n), x = exact;
        if (w.quantized() || c.step != Step::none) x = quantized_row(c, row);
        for (i64 j = 0; j < m; j++) {
            double sum = 0, unquantized = 0, norm_x = 0, norm_w = 0;
            for (i64 i = 0; i < n; i++) {
                double weight = w.exact[j * n + i] * w.scale(j, i);
                sum += weight * x[i];
                unquantized += weight * exact[i];
                norm_x += std::max(exact[i] * exact[i], x[i] * x[i]);
                norm_w += weight * weight;
            }
            double norm = std::sqrt(norm_x * norm_w) + 1e-30, got = y[row * m + j];
            double error = std::fabs(got - sum) / norm;
            errors.worst = std::max(errors.worst, error);
            errors.worst_unquantized = std::max(errors.worst_unquantized, std::fabs(got - unquantized) / norm);
            if (!(error < 1e-5)) {
                std::printf("row %ld column %ld: %g, expected %g\n", (long)row, (long)j, got, sum);
                return false;
            }
        }
    }
    return true;
}

bool check(const Case& c, Errors& errors) {
    size_t index = 0;
    for (const auto& out : c.outputs) {
        for (int stores : out->stores) {
            if (stores != 1 || !out->aligned) {
                std::printf("a result was stored %d times, runs %s\n", stores, out->aligned ? "aligned" : "misaligned");
                return false;
            }
        }
        for (i64 l = 0; l < out->lanes; l++)
            if (!check_weight(c, *c.weights[index++], out->y[l], errors)) return false;
    }
    return true;
}

std::string describe(const Case& c) {
    std::string text = "rows " + std::to_string(c.rows) + " n " + std::to_string(c.n) + " act_group " +
                       std::to_string(c.act_group) + " threads " + std::to_string(c.threads) + " step " + std::to_string((int)c.step) + " " + std::to_string(c.given);
    for (const auto& w : c.weights)
        text += ", format " + std::to_string((int)w->matrix.format) + " m " + std::to_string(w->matrix.m) + " group " +
                std::to_string(w->matrix.group);
    return text;
}

// An expert may get any number of the rows that its call has.
bool suffices_for_fewer_rows(i64 rows, i64 n, int threads) {
    for (i64 fewer = 1; fewer <= rows; fewer++) {
        if (linear_scratch(fewer, n, threads) <= linear_scratch_up_to(rows, n, threads)) continue;
        std::printf("%ld of %ld rows of %ld need more scratch, %d threads\n", (long)fewer, (long)rows, (long)n, threads);
        return false;
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    unsigned seed = argc > 1 ? (unsigned)std::atoi(argv[1]) : 0;
    int cases = argc > 2 ? std::atoi(argv[2]) : 200;
    for (i64 rows : {1, 9, 16, 17, 100, 512, 513, 1040, 1537})
        for (i64 n : {1, 64, 1024, 5000, 20000})
            for (int threads : {1, 3, 64})
                if (!suffices_for_fewer_rows(rows, n, threads)) return 1;
    Errors errors;
    for (int i = 0; i < cases; i++) {
        Random random(seed * 1000003u + (unsigned)i);
        Case c = make_case(random, i);
        run(c);
        if (!check(c, errors)) {
            std::printf("FAILED seed %u case %d: %s\n", seed, i, describe(c).c_str());
            return 1;
        }
    }
    std::printf("%d cases, worst error %.2g; against inputs not quantised %.2g\n", cases, errors.worst,
                errors.worst_unquantized);
    return 0;
}
