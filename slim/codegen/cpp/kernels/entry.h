// The C entry points of a generated program. Included at its end, when it has said what `Sizes`, `Stage`s and buffers
// it has: STAGES, ARGUMENTS, sizes(), plan(), and the counts WEIGHTS, BUFFERS, TEMPS and SLOTS.
#pragma once
#include <omp.h>

#include <cstdlib>
#include <new>

#include "greedy.h"

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
        slim::i64 roomier = capacity + capacity / 2;  // for what grows a little at each step
        if (bytes < roomier) bytes = roomier;
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

    // after(thread): what every thread does when the last stage is done.
    template <class After>
    void run(const Sizes& z, int first, int last, int threads, After&& after) {
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
            after(thread);
        }
    }

    void take(void* const* io) {
        for (int i = 0; i < BUFFERS - TEMPS - WEIGHTS; i++) buffers[WEIGHTS + i] = static_cast<char*>(io[i]);
    }
};

enum Status { OK = 0, NO_MEMORY = 1, BAD_INDEX = 2 };

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void* slim_create(void* const* weights) {
    State* state = new (std::nothrow) State();
    if (state != nullptr)
        for (int i = 0; i < WEIGHTS; i++) state->buffers[i] = static_cast<char*>(weights[i]);
    return state;
}

__attribute__((visibility("default"))) void slim_destroy(void* state) { delete static_cast<State*>(state); }

// Runs the stages first..last of a call; `io` are the buffers that the caller brings.
__attribute__((visibility("default"))) int slim_run(void* held, void* const* io, const slim::i64* dims, int first,
                                                    int last, int threads) {
    State& state = *static_cast<State*>(held);
    Sizes z = sizes(dims);
    if (first == 0 && !state.lay_out(z, threads)) return NO_MEMORY;
    state.take(io);
    state.run(z, first, last, threads, [](slim::Thread&) {});
    return state.team.fault.load() ? BAD_INDEX : OK;
}

// Runs all stages once a step, each on the tokens that the step before chose; `dims` are those of the step before the
// first. A state that is not OK ends it.
__attribute__((visibility("default"))) int slim_decode(void* held, void** io, slim::i64* dims, slim::Greedy* loop,
                                                       int threads) {
    State& state = *static_cast<State*>(held);
    for (loop->made = 0; loop->made < loop->steps;) {
        loop->begin(io, dims);
        Sizes z = sizes(dims);
        if (!state.lay_out(z, threads)) return NO_MEMORY;
        state.take(io);
        state.run(z, 0, sizeof STAGES / sizeof *STAGES, threads, [&](slim::Thread& thread) { loop->choose(thread); });
        if (state.team.fault.load()) return BAD_INDEX;
        if (loop->end()) break;
    }
    return OK;
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
