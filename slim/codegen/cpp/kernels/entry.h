// The C entry points of a generated program. Included at its end, when it has said what `Sizes`, `Stage`s and buffers
// it has: STAGES, ARGUMENTS, sizes(), plan(), and the counts WEIGHTS, BUFFERS, TEMPS and SLOTS.
#pragma once
#include <omp.h>

#include <cstdlib>
#include <new>

namespace {

// What a program holds between calls. One call at a time: the caller sees to that.
struct State {
    slim::Team team;
    char* arena = nullptr;
    slim::i64 capacity = 0;
    char* buffers[BUFFERS + 1] = {};  // weights, what the caller brings, temps; the last is the kernels' scratch

    ~State() { std::free(arena); }

    bool reserve(slim::i64 bytes) {
        if (bytes <= capacity) return true;
        std::free(arena);
        arena = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
        capacity = arena == nullptr ? 0 : bytes;
        return arena != nullptr;
    }

    // Lays the temps of a call out; those that are never alive together share a slot.
    bool lay_out(const Sizes& z, int threads) {
        slim::i64 offsets[SLOTS + 2];
        slim::i64 bytes[SLOTS + 1];
        plan(z, threads, bytes);
        offsets[0] = 0;
        for (int slot = 0; slot <= SLOTS; slot++) offsets[slot + 1] = offsets[slot] + (bytes[slot] + 63) / 64 * 64;
        if (!reserve(offsets[SLOTS + 1] + 64)) return false;
        for (int temp = 0; temp < TEMPS; temp++) buffers[BUFFERS - TEMPS + temp] = arena + offsets[SLOT_OF[temp]];
        buffers[BUFFERS] = arena + offsets[SLOTS];
        return true;
    }

    void run(const Sizes& z, int first, int last, int threads) {
        if (threads > slim::Team::MOST) threads = slim::Team::MOST;
#pragma omp parallel num_threads(threads)
        {
#pragma omp single
            team.begin(omp_get_num_threads());
            slim::Thread thread{team, omp_get_thread_num()};
            char* arguments[MOST_ARGUMENTS + 1];
            for (int index = first; index < last; index++) {
                const Stage& stage = STAGES[index];
                for (int i = 0; i < stage.count; i++) arguments[i] = buffers[ARGUMENTS[stage.arguments + i]];
                if (stage.barrier && index > first) thread.barrier();
                stage.run(z, thread, arguments);
            }
        }
    }
};

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void* slim_create(void* const* weights) {
    State* state = new (std::nothrow) State();
    if (state != nullptr)
        for (int i = 0; i < WEIGHTS; i++) state->buffers[i] = static_cast<char*>(weights[i]);
    return state;
}

__attribute__((visibility("default"))) void slim_destroy(void* state) { delete static_cast<State*>(state); }

// Runs the stages first..last of a call; `io` are the buffers that the caller brings. 0; 1: memory ran out; 2: an
// index was out of range.
__attribute__((visibility("default"))) int slim_run(void* held, void* const* io, const slim::i64* dims, int first,
                                                    int last, int threads) {
    State& state = *static_cast<State*>(held);
    Sizes z = sizes(dims);
    if (first == 0 && !state.lay_out(z, threads)) return 1;
    for (int i = 0; i < BUFFERS - TEMPS - WEIGHTS; i++) state.buffers[WEIGHTS + i] = static_cast<char*>(io[i]);
    state.run(z, first, last, threads);
    return state.team.fault.load() ? 2 : 0;
}

// Where a buffer lies in the call that runs.
__attribute__((visibility("default"))) void* slim_buffer(void* state, int index) {
    return static_cast<State*>(state)->buffers[index];
}

// How many bytes the temps of a call with these sizes take.
__attribute__((visibility("default"))) slim::i64 slim_arena(const slim::i64* dims, int threads) {
    slim::i64 bytes[SLOTS + 1], total = 0;
    plan(sizes(dims), threads, bytes);
    for (slim::i64 slot : bytes) total += slot;
    return total;
}
}
