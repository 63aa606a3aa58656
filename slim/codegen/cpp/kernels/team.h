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
    static constexpr int COUNTERS = 64;
    int size = 1;
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<unsigned> phase{0};
    struct alignas(64) Counter {
        std::atomic<i64> next{0};
    } counters[COUNTERS];

    std::atomic<bool> fault{false};  // an index was outside of what it indexes

    // Before a call, by the calling thread alone.
    void begin(int threads) {
        size = threads;
        fault.store(false, std::memory_order_relaxed);
        for (auto& counter : counters) counter.next.store(0, std::memory_order_relaxed);
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

    // Runs body(begin, end) over pieces of 0..total, `piece` long, each by the thread that comes for it first.
    // Every thread must call it; it does not wait for the others.
    template <class Body>
    void share(i64 total, i64 piece, Body&& body) {
        if (team.size == 1) {
            if (total > 0) body((i64)0, total);
            return;
        }
        if (++unsynced > Team::COUNTERS / 4) barrier();  // nobody may be half the ring behind
        i64 index = loop++;
        // counters far ahead are cleared by all: nobody uses them yet
        team.counters[(index + Team::COUNTERS / 2) % Team::COUNTERS].next.store(0, std::memory_order_relaxed);
        auto& next = team.counters[index % Team::COUNTERS].next;
        for (;;) {
            i64 begin = next.fetch_add(piece, std::memory_order_relaxed);
            if (begin >= total) return;
            i64 end = begin + piece < total ? begin + piece : total;
            body(begin, end);
        }
    }
};

}  // namespace slim
