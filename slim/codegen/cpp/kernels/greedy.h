// Greedy decoding: what happens between one step of a language model and the next.
#pragma once
#include "kernels.h"

namespace slim {

// The first of the largest numbers; NaN is larger than all.
template <class T>
static inline i64 argmax(const T* x, i64 n) {
    constexpr i64 BLOCK = 16 * LANES;
    float best = -INFINITY;
    i64 place = 0;
    for (i64 first = 0; first < n; first += BLOCK) {
        i64 last = first + BLOCK < n ? first + BLOCK : n, i = first;
        vi above{};
        for (; i + LANES <= last; i += LANES) above |= ~(load(x + i) <= best);
        bool found = first == 0;
        for (int lane = 0; lane < LANES; lane++) found |= above[lane] != 0;
        for (; i < last; i++) found |= !((float)x[i] <= best);
        if (!found) continue;
        for (i = first; i < last; i++) {
            float number = (float)x[i];
            if (number != number) return i;
            if (number > best) best = number, place = i;
        }
    }
    return place;
}

// A loop of steps. Fields are as slim/codegen/cpp/decoding.py has them; arrays are the caller's.
struct Greedy {
    i64 steps, batch, vocabulary, capacity, end_count;
    i64 made;                // steps done
    i64 mask_index, length;  // places: of the mask in io, of the number of keys in dims; over pages the first is -1
    i64 pad;                 // what rows that have ended go on with
    const void* logits;      // [batch, vocabulary]
    Format format;           // of the logits
    i64 *tokens, *positions;  // [batch]: what the step reads; no positions where it reads none
    const u8* mask;          // [batch, capacity]
    u8* seen;                // room for as much: the mask of the keys there are, row after row
    i64* lengths;            // [batch], over pages: how many tokens each row holds before the step
    const i64* ends;         // [end_count]: tokens that end a row
    u8* finished;            // [batch]
    i64* chosen;             // [steps, batch]

    void begin(void** io, i64* dims) {
        for (i64 row = 0; positions && row < batch; row++) positions[row]++;
        if (mask_index < 0) return;
        i64 keys = ++dims[length];
        for (i64 row = 0; row < batch; row++) {
            if (batch > 1) std::memcpy(seen + row * keys, mask + row * capacity, keys);
        }
        io[mask_index] = batch > 1 ? seen : const_cast<u8*>(mask);
    }

    void choose(Thread& thread) {
        thread.barrier();
        thread.share(batch, 1, [&](i64 row, i64 last) {
            for (; row < last; row++) tokens[row] = likeliest(row);
        });
    }

    // Whether every row has ended.
    bool end() {
        bool all = true;
        for (i64 row = 0; row < batch; row++) {
            if (lengths) lengths[row]++;
            if (finished[row]) tokens[row] = pad;
            chosen[made * batch + row] = tokens[row];
            for (i64 e = 0; e < end_count; e++) finished[row] |= tokens[row] == ends[e];
            all &= finished[row] != 0;
        }
        made++;
        return all;
    }

private:
    i64 likeliest(i64 row) const {
        switch (format) {
            case Format::bf16: return argmax(static_cast<const bf16*>(logits) + row * vocabulary, vocabulary);
            case Format::f16: return argmax(static_cast<const f16*>(logits) + row * vocabulary, vocabulary);
            default: return argmax(static_cast<const float*>(logits) + row * vocabulary, vocabulary);
        }
    }
};

}  // namespace slim
