// Functions on one float for loops over arrays: no branches, so that the compiler turns the loops into vector code.
// Each is within 1e-6 of the exact value, relatively, unless it says otherwise; infinities and NaN go where they
// should.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace slim {

static inline float bits_to_float(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static inline std::uint32_t float_to_bits(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

// e^x = 2^n (1 + fraction).
struct ExpParts {
    std::int32_t n;
    float fraction;
};

// Of x + rest, for x in -104..89 and a rest so small that it does not change n.
static inline ExpParts exp_parts(float x, float rest) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
    float shifted = x * 1.44269504088896341f + round;
    float n = shifted - round;
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f + rest;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return {(std::int32_t)(float_to_bits(shifted) - float_to_bits(round)), p * (r * r) + r};
}

static inline float power_of_two(std::int32_t n) { return bits_to_float((std::uint32_t)(n + 127) << 23); }

static inline float clamp_exponent(float x) { return x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x); }

// e^(x + rest) for a small rest.
static inline float exp_sum(float x, float rest) {
    ExpParts e = exp_parts(clamp_exponent(x), rest);
    std::int32_t half = e.n >> 1;  // 2^n in two halves: it may have no float of its own at either end
    return (1.0f + e.fraction) * power_of_two(half) * power_of_two(e.n - half);
}

static inline float exp_f(float x) { return exp_sum(x, 0.0f); }

static inline float expm1_f(float x) {
    ExpParts e = exp_parts(x < -30.0f ? -30.0f : (x > 89.0f ? 89.0f : x), 0.0f);
    float half = power_of_two(e.n - 1);
    return (half * e.fraction + (half - 0.5f)) * 2.0f;
}

static inline float log_f(float x) {
    bool tiny = x < 1.17549435e-38f;
    std::uint32_t bits = float_to_bits(tiny ? x * 33554432.0f : x);
    const std::uint32_t root_half = 0x3f3504f3;  // the mantissa is taken from sqrt(1/2) to sqrt(2)
    std::int32_t whole = (std::int32_t)(bits - root_half) >> 23;
    float n = (float)whole - (tiny ? 25.0f : 0.0f);
    float f = bits_to_float(bits - ((std::uint32_t)whole << 23)) - 1.0f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    float square = f * f;
    float y = p * f * square + n * -2.12194440e-4f - 0.5f * square;
    y = f + y + n * 0.693359375f;
    y = x == 0.0f ? -INFINITY : y;
    y = x < 0.0f ? NAN : y;
    return x - x == 0.0f ? y : (x < 0.0f ? NAN : x);
}

static inline float log1p_f(float x) {
    float u = 1.0f + x;
    float y = log_f(u) + (x - (u - 1.0f)) / u;  // what rounding 1 + x lost comes back by the derivative
    return u - u == 0.0f && u > 0.0f ? y : log_f(u);
}

static inline float tanh_f(float x) {
    float t = expm1_f(-2.0f * std::fabs(x));
    return std::copysign(t / (2.0f + t), x);
}

static inline float sigmoid_f(float x) { return 1.0f / (1.0f + exp_f(-x)); }

static inline float silu_f(float x) { return x / (1.0f + exp_f(-x)); }

static inline float softplus_f(float x) { return (x > 0.0f ? x : (x == x ? 0.0f : x)) + log1p_f(exp_f(-std::fabs(x))); }

// erfc(z) e^(z^2) for z from 0 to 10.5, 1e-7 relative.
static inline float scaled_erfc(float z) {
    float t = 1.0f / (1.0f + 0.3f * z);
    float p = -0.12955455f;
    p = p * t + 0.48572937f;
    p = p * t - 0.5126519f;
    p = p * t + 0.5481903f;
    p = p * t - 0.09501186f;
    p = p * t + 0.21509917f;
    p = p * t + 0.14828867f;
    p = p * t + 0.17072341f;
    p = p * t + 0.16918744f;
    return p * t;
}

// e^(-scale z^2) for z >= 0 and a power of two as scale: the square in two parts, as its rounding would show.
static inline float exp_of_square(float z, float scale) {
    z = z > 15.0f ? 15.0f : z;
    float high = bits_to_float(float_to_bits(z) & 0xfffff000);
    return exp_sum(-scale * (high * high), -scale * ((z - high) * (z + high)));
}

static inline float erf_f(float x) {
    float z = std::fabs(x), square = x * x;
    float p = 7.853858e-05f;
    p = p * square - 0.00080101925f;
    p = p * square + 0.0051883277f;
    p = p * square - 0.026853811f;
    p = p * square + 0.112835854f;
    p = p * square - 0.37612626f;
    p = p * square + 1.1283791f;
    float far = 1.0f - exp_of_square(z, 1.0f) * scaled_erfc(z);
    return z < 1.0f ? p * x : std::copysign(far, x);
}

// x Phi(x), by the tail of Phi below zero, so that small results keep their digits.
static inline float gelu_f(float x) {
    float z = std::fabs(x);
    float tail = 0.5f * exp_of_square(z, 0.5f) * scaled_erfc(z * 0.70710678118654752f);
    return x * (x > 0.0f ? 1.0f - tail : tail);
}

// Below 1e-7 in absolute terms the exponent's own rounding shows.
static inline float gelu_tanh_f(float x) {
    float u = x * (1.5957691216057308f + 0.07135481282553f * (x * x));  // 2 sqrt(2 / pi) (x + 0.044715 x^3)
    return x * sigmoid_f(u);
}

static inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }

struct Quadrant {
    std::int32_t n;
    float rest;
};

// x = n pi/2 + rest, for |x| < 2^31: in doubles, with pi/2 in parts whose products by n are exact.
static inline Quadrant quadrant(float x) {
    double n = (double)x * 0.63661977236758134308;
    n = (n + 6755399441055744.0) - 6755399441055744.0;
    double rest = (double)x - n * 1.570796012878418;
    rest -= n * 3.139164164167596e-07;
    rest -= n * 6.223372171896613e-14;
    return {(std::int32_t)n, (float)rest};
}

// Absolute error 1e-7.
static inline float sine_of(std::int32_t n, float r) {
    float square = r * r;
    float s = -1.9515295891e-4f;
    s = s * square + 8.3321608736e-3f;
    s = s * square - 1.6666654611e-1f;
    s = s * (square * r) + r;
    float c = 2.443315711809948e-5f;
    c = c * square - 1.388731625493765e-3f;
    c = c * square + 4.166664568298827e-2f;
    c = c * (square * square) - 0.5f * square + 1.0f;
    float y = n & 1 ? c : s;
    return n & 2 ? -y : y;
}

static inline float sin_f(float x) {
    Quadrant q = quadrant(x);
    return sine_of(q.n, q.rest);
}
static inline float cos_f(float x) {
    Quadrant q = quadrant(x);
    return sine_of(q.n + 1, q.rest);
}

static inline float pow_f(float x, float y) { return std::pow(x, y); }

}  // namespace slim
