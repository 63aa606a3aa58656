#include "attention_run.h"

namespace slim {

// Grows with the widths and the threads alone, unless keys are chosen or weighed: what suits one number of keys suits all.
i64 attention_scratch(i64 batch, i64 heads, i64 kv_heads, i64 queries, i64 most_keys, i64 key_width, i64 value_width,
                      i64 top, i64 slash_columns, bool mass, int threads) {
    Layout layout(heads / kv_heads, key_width, value_width, most_keys, top, slash_columns, mass);
    i64 floats = threads * (layout.thread + SLOTS * layout.slot);
    i64 votes = slash_columns ? heads * 2 * Choices::words_of_vote(most_keys) : 0;
    i64 tops = top ? heads * queries * Choices::words_of_top(most_keys, top) : 0;
    return (i64)sizeof(float) * floats + (i64)sizeof(u64) * batch * (votes + tops);
}

void attention(Thread& thread, const Attention& a) {
    if (a.queries == 0 || a.batch == 0) return;
    if (!a.k_cache) {
        return run(thread, a, Source<float, float>{a, a.k, a.v, a.k_batch, a.k_head, a.k_token, a.v_batch, a.v_head,
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
