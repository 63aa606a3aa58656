// bandwidth THREADS ROUNDS huge|small
//
// How fast so many cores read memory: the best of so many sums over 1 GB, in GB/s. In virtual machines the size of the
// pages can matter more than anything else, so that it is a choice here.
#include <omp.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

int main(int argc, char** argv) {
    const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
    const int rounds = argc > 2 ? std::atoi(argv[2]) : 10;
    const bool huge = argc > 3 && std::strcmp(argv[3], "huge") == 0;
    const std::int64_t words = std::int64_t{1} << 27;  // 8 bytes each
    void* const memory = std::aligned_alloc(std::size_t{1} << 21, 8 * words);
    if (!memory) return 1;
    madvise(memory, 8 * words, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    std::uint64_t* const data = static_cast<std::uint64_t*>(memory);
    omp_set_num_threads(threads);
    // Each thread touches first what it reads later, so that its pages lie near it.
#pragma omp parallel for schedule(static)
    for (std::int64_t i = 0; i < words; ++i) data[i] = i;
    double best = 1e30;
    std::uint64_t seen = 0;
    for (int round = 0; round < rounds; ++round) {
        const double start = omp_get_wtime();
        std::uint64_t sum = 0;
#pragma omp parallel for simd schedule(static) reduction(+ : sum)
        for (std::int64_t i = 0; i < words; ++i) sum += data[i];
        const double seconds = omp_get_wtime() - start;
        if (seconds < best) best = seconds;
        seen ^= sum;
    }
    std::fprintf(stderr, "%llu\n", static_cast<unsigned long long>(seen));  // so that no sum is optimised away
    std::printf("%.3f\n", 8.0 * words / best / 1e9);
}
