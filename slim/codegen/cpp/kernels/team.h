// The threads of one call: they share a barrier, and take pieces of work from one counter.
#pragma once
#include <atomic>

#include "simd.h"

namespace slim {

static inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Lives as long as a model does; used by one call at a time.
struct Team {
    static constexpr int LOOPS = 64;      // that threads may be apart, twice over
    static constexpr int MOST = 128;      // threads
    int size = 1;
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<unsigned> phase{0};
    struct alignas(64) Counter {
        std::atomic<i64> next{0};
    } taken[LOOPS][MOST];  // of each thread's own part of a loop

    std::atomic<bool> fault{false};  // an index was outside of what it indexes

    // Before a call, by the calling thread alone.
    void begin(int threads) {
        size = threads;
        fault.store(false, std::memory_order_relaxed);
        for (auto& loop : taken)
            for (int t = 0; t < size; t++) loop[t].next.store(0, std::memory_order_relaxed);
    }
};

void yield_processor();  // when a partner does not come: it may have no core

// One thread's view of its team.
struct Thread {
    Team& team;
    int id;
    i64 loop = 0;      // parallel loops begun so far: the same number in every thread
    i64 unsynced = 0;  // of them, since the last barrier

    void barrier() {
        unsynced = 0;
        if (team.size == 1) return;
        unsigned phase = team.phase.load(std::memory_order_relaxed);
        if (team.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == team.size) {
            team.arrived.store(0, std::memory_order_relaxed);
            team.phase.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; team.phase.load(std::memory_order_acquire) == phase; spins++) {
            if (spins < 1000) relax();  // some 50 us: longer, and the partner has no core
            else yield_processor();
        }
    }

    // An index that the caller brought, or 0 and a fault noted where there is no such place.
    i64 inside(i64 index, i64 count) {
        if (index >= 0 && index < count) return index;
        team.fault.store(true, std::memory_order_relaxed);
        return 0;
    }

    // Runs body(begin, end) over pieces of 0..total, at most `piece` long. Each thread goes through a part of its own,
    // front to back, as memory likes to be read; who is done takes pieces of the others' parts.
    // Every thread must call it; it does not wait for the others.
    template <class Body>
    void share(i64 total, i64 piece, Body&& body) {
        if (team.size == 1) {
            if (total > 0) body((i64)0, total);
            return;
        }
        if (++unsynced > Team::LOOPS / 4) barrier();  // nobody may be half the ring behind
        i64 index = loop++;
        // a loop far ahead, which nobody has begun
        team.taken[(index + Team::LOOPS / 2) % Team::LOOPS][id].next.store(0, std::memory_order_relaxed);
        for (int turn = 0; turn < team.size; turn++) {
            int owner = (id + turn) % team.size;
            i64 first = owner * total / team.size, last = (owner + 1) * total / team.size;
            auto& next = team.taken[index % Team::LOOPS][owner].next;
            while (next.load(std::memory_order_relaxed) < last - first) {
                i64 begin = first + next.fetch_add(piece, std::memory_order_relaxed);
                if (begin >= last) break;
                body(begin, begin + piece < last ? begin + piece : last);
            }
        }
    }
};

}  // namespace slim
