// Speed of linear(): decode in GB/s of weights beside plain reading, prefill in GOP/s. kernels [threads] [pattern]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

using namespace slim;

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

u8* aligned(i64 bytes) {
    void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    std::memset(p, 0x3c, bytes);  // a number of usual size in every format: subnormal ones would be slow
    return static_cast<u8*>(p);
}

// Threads that stay, as in a model: starting them would cost more than a small linear.
struct Workers {
    Team team;
    int count;
    void (*job)(const void*, Thread&) = nullptr;
    const void* data = nullptr;
    std::atomic<int> turn{0}, done{0};
    std::vector<std::thread> threads;

    explicit Workers(int count) : count(count) {
        for (int id = 1; id < count; id++) threads.emplace_back([this, id] { serve(id); });
    }
    ~Workers() {
        job = nullptr;
        turn++;
        for (auto& t : threads) t.join();
    }
    void serve(int id) {
        for (int seen = 0;;) {
            while (turn.load() == seen) relax();
            seen++;
            if (!job) return;
            Thread thread{team, id};
            job(data, thread);
            done++;
        }
    }
    template <class Job>
    void run(const Job& j) {
        team.begin(count);
        data = &j;
        job = [](const void* d, Thread& t) { (*static_cast<const Job*>(d))(t); };
        done = 0;
        turn++;
        Thread thread{team, 0};
        j(thread);
        while (done.load() != count - 1) relax();
    }
};

struct Shape {
    Format format;
    i64 group, m, n;
    bool zeros;

    Shape(Format format, i64 wanted_group, bool zeros, i64 m, i64 n)
        : format(format), group(wanted_group), m(m), n(n), zeros(zeros) {
        while (group && n % group) group /= 2;
    }
};

const char* name(const Shape& s) {
    static char text[64];
    const char* formats[] = {"f32", "bf16", "f16", "int8", "int4", "int3", "nf4", "fp8"};
    std::snprintf(text, sizeof text, "%s%s g%ld %ldx%ld", formats[(int)s.format], s.zeros ? " zeros" : "",
                  (long)s.group, (long)s.m, (long)s.n);
    return text;
}

// Several copies, so that a small weight need not come from the cache.
struct Weights {
    std::vector<Matrix> matrices;
    std::vector<float> scale;
    i64 bytes;

    Weights(const Shape& s, i64 total) : scale(s.m * (s.group ? s.n / s.group : 1), 0.5f) {
        bool packed = s.format >= Format::int8 && s.format != Format::fp8;
        const float* groups = s.group ? scale.data() : nullptr;
        std::vector<i8> points(s.zeros ? scale.size() : 0, 3);
        const i8* zeros = s.zeros ? points.data() : nullptr;
        i64 size = s.format == Format::fp8 ? 1 : (s.format == Format::f32 ? 4 : 2);
        bytes = packed ? slim_packed_bytes((i32)s.format, s.m, s.n, s.group, groups, zeros) : s.m * s.n * size;
        for (i64 i = 0; i < std::max<i64>(1, total / bytes); i++) {
            u8* data = aligned(bytes);
            if (packed) {
                u8* q = aligned(s.m * s.n);
                slim_pack((i32)s.format, s.m, s.n, s.group, q, groups, zeros, data);
                std::free(q);
            }
            matrices.push_back({s.format, data, s.group && packed ? nullptr : scale.data(), s.m, s.n, s.group});
        }
    }
    ~Weights() {
        for (auto& m : matrices) std::free(const_cast<void*>(m.data));
    }
};

void give(const void* env, i64 row, float* x) {
    (void)row;
    i64 n = *static_cast<const i64*>(env);
    for (i64 i = 0; i < n; i++) x[i] = (float)(i & 15) - 8;
}

void take(const void* env, i64 row, i64 column, i64 count, const float* const* y) {
    float* out = *static_cast<float* const*>(env);
    (void)row;
    for (i64 i = 0; i < count; i++) out[column + i] = y[0][i];
}

// Best seconds of one linear. Each call takes the next copy; where there is but one, many calls are timed together, as
// starting them would count otherwise. Short timings, best of many: other processes may use the cores.
double time_linear(Workers& workers, const Shape& s, const Weights& weights, i64 rows, double budget) {
    std::vector<float> out(s.m);
    float* to = out.data();
    u8* scratch = aligned(linear_scratch(rows, s.n, workers.count));
    size_t copies = weights.matrices.size(), next = 0;
    int repeat = copies > 1 || rows > 8 ? 1 : 20;
    double best = 1e9;
    for (double start = now(); now() - start < budget; next++) {
        double begin = now();
        workers.run([&](Thread& thread) {
            for (int i = 0; i < repeat; i++) {
                const Matrix& w = weights.matrices[next % copies];
                Part part{{&w, nullptr}, 1, take, &to};
                linear(thread, {rows, s.n, give, &s.n, &part, 1, ACT_GROUP, scratch});
                thread.barrier();
            }
        });
        best = std::min(best, (now() - begin) / repeat);
    }
    std::free(scratch);
    return best;
}

void read(const u8* from, i64 bytes) {
    vi a{}, b{}, c{}, d{}, v;
    for (i64 i = 0; i + 4 * (i64)sizeof v <= bytes; i += 4 * sizeof v) {
        std::memcpy(&v, from + i, sizeof v), a ^= v;
        std::memcpy(&v, from + i + sizeof v, sizeof v), b ^= v;
        std::memcpy(&v, from + i + 2 * sizeof v, sizeof v), c ^= v;
        std::memcpy(&v, from + i + 3 * sizeof v, sizeof v), d ^= v;
    }
    a ^= b ^ c ^ d;
    asm volatile("" : : "m"(a));
}

// Best GB/s of reading the copies, one after the other, in equal shares.
double read_bandwidth(Workers& workers, const Weights& weights, double budget) {
    size_t copies = weights.matrices.size(), next = 0;
    int repeat = copies > 1 ? 1 : 20;
    double best = 1e9;
    for (double start = now(); now() - start < budget; next++) {
        double begin = now();
        workers.run([&](Thread& thread) {
            i64 share = weights.bytes / workers.count / 256 * 256;
            const u8* from = static_cast<const u8*>(weights.matrices[next % copies].data);
            for (int i = 0; i < repeat; i++) read(from + share * thread.id, share);
        });
        best = std::min(best, (now() - begin) / repeat);
    }
    return weights.bytes / best * 1e-9;
}

void decode(Workers& workers, const Shape& s, bool cached) {
    Weights weights(s, cached ? 0 : (i64)192 << 20);
    double plain = 0, one = 1e9, eight = 1e9;
    for (int round = 0; round < 5; round++) {
        one = std::min(one, time_linear(workers, s, weights, 1, 0.06));
        plain = std::max(plain, read_bandwidth(workers, weights, 0.06));
        eight = std::min(eight, time_linear(workers, s, weights, 8, 0.06));
    }
    double speed = weights.bytes / one * 1e-9, speed8 = weights.bytes / eight * 1e-9;
    std::printf("decode  %-24s%s %6.1f GB/s, plain reading %6.1f (%3.0f %%), %6.1f G weights/s; ", name(s),
                cached ? " cached" : "       ", speed, plain, 100 * speed / plain, 1e-9 * s.m * s.n / one);
    std::printf("8 rows %6.1f GB/s, %.1f times the tokens\n", speed8, 8 * one / eight);
}

void prefill(Workers& workers, const Shape& s, i64 rows) {
    Weights weights(s, 0);
    double seconds = time_linear(workers, s, weights, rows, 0.3);
    std::printf("prefill %-28s %4ld rows %8.1f GOP/s\n", name(s), (long)rows, 2e-9 * rows * s.m * s.n / seconds);
}

}  // namespace

int main(int argc, char** argv) {
    int threads = argc > 1 ? std::atoi(argv[1]) : 2;
    std::string pattern = argc > 2 ? argv[2] : "";
    auto wanted = [&](const char* what, const Shape& s) {
        return (std::string(what) + " " + name(s)).find(pattern) != std::string::npos;
    };
    Workers workers(threads);
    const struct {
        Format format;
        i64 group;
        bool zeros;
    } formats[] = {{Format::int8, 0, false}, {Format::int8, 128, false}, {Format::int4, 32, false},
                   {Format::int4, 64, false}, {Format::int4, 128, false}, {Format::int4, 32, true},
                   {Format::int3, 32, false}, {Format::int3, 64, false}, {Format::int3, 64, true},
                   {Format::nf4, 64, false}, {Format::fp8, 0, false}, {Format::bf16, 0, false},
                   {Format::f32, 0, false}};
    const i64 large[][2] = {{2048, 2048}, {8192, 2048}, {2048, 8192}, {128256, 2048}, {576, 576}, {1536, 576},
                            {576, 1536}, {49152, 576}};
    const i64 small[][2] = {{288, 288}, {768, 288}, {288, 768}};
    for (auto [format, group, zeros] : formats) {
        for (auto [m, n] : large)
            if (Shape s(format, group, zeros, m, n); wanted("decode", s)) decode(workers, s, false);
        for (auto [m, n] : small)
            if (Shape s(format, group, zeros, m, n); wanted("cached", s)) decode(workers, s, true);
        for (auto [m, n] : large)
            for (i64 rows : {32, 128, 512})
                if (Shape s(format, group, zeros, m, n); m < 40000 && wanted("prefill", s)) prefill(workers, s, rows);
    }
    return 0;
}
