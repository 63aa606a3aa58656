#include "attention_run.h"

namespace slim {

void attention_rounded(Thread& thread, const Attention& a) {
    bool small_keys = a.k_format == Format::int4, small_values = a.v_format == Format::int4;
    if (small_keys) return small_values ? run_cached<nibbles>(thread, a) : run_cached<nibbles, i8>(thread, a);
    return small_values ? run_cached<i8, nibbles>(thread, a) : run_cached<i8>(thread, a);
}

}  // namespace slim
