#include "attention_run.h"

namespace slim {

// Grows with the widths and the threads alone: what suits one number of queries and keys suits all.
i64 attention_scratch(i64, i64, i64, i64, i64, i64 key_width, i64 value_width, int threads) {
    Layout layout(key_width, value_width);
    return (i64)sizeof(float) * threads * (layout.thread + SLOTS * layout.slot);
}

void attention(Thread& thread, const Attention& a) {
    if (a.queries == 0 || a.batch == 0) return;
    if (!a.k_cache) {
        return run(thread, a, Source<float, float>{a.k, a.v, a.k_batch, a.k_head, a.k_token, a.v_batch, a.v_head,
                                                   a.v_token, a.cos != nullptr, nullptr, nullptr, 0, 0, 0, 0});
    }
    if (a.k_scale) return attention_rounded(thread, a);
    switch (a.k_format) {
        case Format::bf16: return run_cached<bf16>(thread, a);
        case Format::f16: return run_cached<f16>(thread, a);
        default: return run_cached<float>(thread, a);
    }
}

}  // namespace slim
