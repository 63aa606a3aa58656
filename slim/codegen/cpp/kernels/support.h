// Small functions that generated kernels use in place.
#pragma once
#include "kernels.h"
#include "functions.h"

namespace slim {

static inline i64 size_max(i64 a, i64 b) { return a > b ? a : b; }
static inline i64 size_min(i64 a, i64 b) { return a < b ? a : b; }

// Division and remainder as Python has them: towards minus infinity.
static inline i64 floor_div(i64 a, i64 b) {
    i64 quotient = a / b;
    return quotient - (a % b != 0 && (a < 0) != (b < 0));
}
static inline i64 floor_mod(i64 a, i64 b) { return a - floor_div(a, b) * b; }
static inline float floor_mod_f(float a, float b) { return a - std::floor(a / b) * b; }

// The k largest of x[0], x[stride], ... in falling order; of equal ones the first goes first.
template <class X, class V, class I>
static inline void top_k(const X* x, i64 n, i64 stride, i64 k, V* values, I* indices) {
    for (i64 rank = 0; rank < k; rank++) {
        i64 best = -1;
        for (i64 i = 0; i < n; i++) {
            X candidate = x[i * stride];
            if (rank > 0) {  // only what comes after the one chosen last
                X last = (X)values[rank - 1];
                if (candidate > last || (candidate == last && i <= (i64)indices[rank - 1])) continue;
            }
            if (best < 0 || candidate > x[best * stride]) best = i;
        }
        if (best < 0) best = 0;  // nothing but NaN is left
        values[rank] = (V)x[best * stride];
        indices[rank] = (I)best;
    }
}

// -- experts ----------------------------------------------------------------------------------------------------------

// starts [experts + 1] and the rows in the order of their experts.
static inline i64 expert_scratch(i64 rows, i64 experts) { return ((experts + 1 + rows) * 8 + 63) / 64 * 64; }

template <class I>
static inline void sort_by_expert(Thread& t, const I* ids, i64 stride, i64 rows, i64 experts, i64* starts) {
    i64* order = starts + experts + 1;
    for (i64 e = 0; e <= experts; e++) starts[e] = 0;
    for (i64 r = 0; r < rows; r++) starts[t.inside(ids[r * stride], experts) + 1]++;
    for (i64 e = 0; e < experts; e++) starts[e + 1] += starts[e];
    for (i64 r = 0; r < rows; r++) order[starts[t.inside(ids[r * stride], experts)]++] = r;
    for (i64 e = experts; e > 0; e--) starts[e] = starts[e - 1];  // filling moved each start to the next one
    starts[0] = 0;
}

}  // namespace slim
