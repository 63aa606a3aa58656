// How many int8 operations a second one core can do at most: nothing but vpdpbusd on registers.
// g++ -O2 -march=native benchmarks/vnni_peak.cpp -o /tmp/vnni_peak && /tmp/vnni_peak
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>

int main() {
    constexpr int CHAINS = 16, STEPS = 20000, RUNS = 2000, OPERATIONS = 128;  // 64 products and 64 sums each
    __m512i sums[CHAINS], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5), all = _mm512_setzero_si512();
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    double best = 1e9;
    for (int run = 0; run < RUNS; run++) {  // the best of many: others use the machine
        auto start = std::chrono::steady_clock::now();
        for (int step = 0; step < STEPS; step++)
#pragma GCC unroll 16
            for (auto& sum : sums) asm volatile("vpdpbusd %1, %2, %0" : "+v"(sum) : "v"(a), "v"(b));
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    for (auto& sum : sums) all = _mm512_add_epi32(all, sum);
    std::printf("%.0f G operations a second and core (sum %d)\n", 1.0 * CHAINS * STEPS * OPERATIONS / best / 1e9,
                _mm512_reduce_add_epi32(all));
}
