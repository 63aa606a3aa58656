// What generated code calls: compiled once a machine, linked into every model.
//
// All functions here are called by every thread of a team with equal arguments, and hold their own barriers inside;
// none allocates. When one returns, the calling thread's part is done: a barrier before others read the result is the
// caller's.
#pragma once
#include "simd.h"
#include "team.h"

namespace slim {

// -- linear -----------------------------------------------------------------------------------------------------------

enum class Format : i32 { f32 = 0, bf16 = 1, f16 = 2, int8 = 3, int4 = 4, int3 = 5, nf4 = 6, fp8 = 7 };

// One weight [m, n].
struct Matrix {
    Format format;
    const void* data;    // f32, bf16, f16, fp8: rows as PyTorch keeps them, n numbers each, read in place. int8, int4,
                         // int3, nf4: as pack() wrote it, 64-byte aligned
    const float* scale;  // of packed weights with one scale a row: [m]; null where the scales are by group (inside data)
                         // or absent. fp8: [m], or [m, n / group]
    i64 m, n;
    i64 group;           // numbers of a row that share a scale; 0: one scale a row
};

// Fills x[0..n) with the input row `row`, whatever it is computed from.
using LoadRow = void (*)(const void* env, i64 row, float* x);
// The step by which row `row`, which is x[0..n), is rounded to int8.
using RowStep = float (*)(const void* env, i64 row, const float* x);
// Takes count results of row `row` from column `column` on: y[lane][0..count), one lane for each matrix of the part.
using StoreRow = void (*)(const void* env, i64 row, i64 column, i64 count, const float* const* y);

// Matrices of one m whose results are needed together (gate and up), and who takes them. `column` always is a multiple
// of 16 and count at most 256; different threads store different columns or rows.
struct Part {
    const Matrix* lanes[2];
    i32 lane_count;
    StoreRow store;
    const void* env;
};

struct Linear {
    i64 rows, n;
    LoadRow load;
    const void* env;
    const Part* parts;  // all over the same input: one sweep
    i32 part_count;
    i64 act_group;      // for packed weights: numbers of an input row that share a scale; 0: one scale a row
    void* scratch;      // linear_scratch() bytes, 64-byte aligned, the same for all threads
    // Where the program itself rounds its rows, whatever the weights are: to clamp(round(x / step), -128, 127) steps,
    // and act_group does not count. clips: whether that can make -128 of anything.
    RowStep step = nullptr;
    bool clips = true;
};

constexpr i64 ACT_GROUP = 128;  // the default of act_group

i64 linear_scratch(i64 rows, i64 n, int threads);
// For any number of rows up to this one: fewer rows can take more, since 513 are two chunks of 257, and 512 are one.
i64 linear_scratch_up_to(i64 rows, i64 n, int threads);
void linear(Thread& thread, const Linear& args);

// slim.token_scale of a row: the step that sends its largest magnitude to 127, which clips nothing.
float token_scale(const float* x, i64 n);

// -- attention --------------------------------------------------------------------------------------------------------

// What a term of a sparsity pattern keeps; slim/compiler/patterns/terms.py has the meaning of its kind and numbers.
enum class Keep : i32 { window, columns, rows, stride, blocks, summary, random, top, vertical_slash };

struct Term {
    Keep keep;
    i32 a, b, c;
};

// The terms of one head; none keep everything.
struct Pattern {
    const Term* terms;
    i32 count;
};

// softmax(scale * q k^T + ...) v, after rotating q and k and appending k and v to the cache. Strides are in elements,
// the innermost dimension is contiguous everywhere. See slim/compiler/dialect/attention.py for the meaning.
struct Attention {
    i64 batch, heads, kv_heads, queries, key_width, value_width;
    i64 keys;                          // all of them, the new ones included
    const float* q;                    // [batch, heads, queries, key_width]
    i64 q_batch, q_head, q_token;
    const float *k, *v;                // with a cache: the new ones [batch, kv_heads, queries, width]; without: all keys
    i64 k_batch, k_head, k_token, v_batch, v_head, v_token;
    void *k_cache, *v_cache;           // null without a cache; new rows go to index start and on
    Format k_format, v_format;         // f32, bf16 or f16, the same for both; or each int8 or int4 (as pack() takes it)
    i64 kc_batch, kc_head, kc_token, vc_batch, vc_head, vc_token;  // of int4: in bytes
    float *k_scale, *v_scale;          // of int8 and int4: [batch, kv_heads, token], what a token's numbers stand for
    i64 ks_batch, ks_head, vs_batch, vs_head;
    const float* k_offset;             // [kv_heads, key_width] or null: taken off rotated keys before they are stored
    i64 ko_head;
    i64 start;                         // row i of the queries is token start + i
    // With a table the caches, and their scales, are [page, kv_heads, page_size, width]: kc_batch and the like are from
    // page to page. Token i of a row lies in page table[i / page_size]; columns from `fixed` on take turns.
    const i32* table;                  // [batch, columns] or null
    i64 table_batch, columns, page_size, fixed;
    const float* q_first;              // like q, rotated, or null: what the `first` keys of each row are looked at with
    i64 qf_batch, qf_head, qf_token, first;
    const i64* lengths;                // [batch]: instead of start and keys, what each row holds before its new tokens
    const float *cos, *sin;            // [batch, queries, rope_width / 2], null: q and k are rotated already
    i64 rope_batch, rope_token, rope_width;
    bool interleaved;
    const u8* key_mask;                // bool [batch, keys] or null
    i64 mask_batch;
    const float* bias;                 // added, or null: [batch, heads, queries, keys], strides may be 0
    i64 bias_batch, bias_head, bias_query, bias_key;
    const float* sinks;                // [heads] or null
    const float* slopes;               // [heads] or null
    float scale;
    float softcap;                     // 0: none
    bool causal;
    i64 window;                        // 0: none
    const Pattern* patterns;           // [heads], or null: every head keeps everything
    float skip;                        // share of a row's attention that may be left out; 0: none
    i64 top, share;                    // of the pattern's term `top`: keys of a block, and 1 in how many; 0: no such term
    i64 slash_columns, slashes;        // of its term `vertical_slash`; 0: no such term
    float* k_bounds;                   // with `top`: [batch or page, kv_heads, blocks, 2, key_width], lowest and highest
    i64 kb_batch, kb_head;
    float* mass;                       // [batch, kv_heads, token] or null: to what keys get of attention is added here;
    i64 mass_batch, mass_head;         // new keys begin at 0, and so do all where `votes` queries or more come at once
    i64 votes;                         // the last queries, which count; 0: all of them
    float* out;                        // [batch, heads, queries, value_width]
    i64 out_batch, out_head, out_token;
    i64 most_keys;                     // that a row can have: what the choices of a pattern need room for
    void* scratch;                     // attention_scratch() bytes, 64-byte aligned, the same for all threads

    i64 start_of(i64 row) const { return lengths ? lengths[row] : start; }
    i64 keys_of(i64 row) const { return lengths ? lengths[row] + queries : keys; }
    // Where the tokens of a block of a row lie: the first index of the caches.
    i64 place(i64 row, i64 token) const {
        if (!table) return row;
        i64 column = token / page_size;
        if (column >= columns) column = fixed + (column - fixed) % (columns - fixed);
        return table[row * table_batch + column];
    }
    i64 within(i64 token) const { return table ? token & (page_size - 1) : token; }
};

// top and slash_columns as in Attention; mass: whether that is counted.
i64 attention_scratch(i64 batch, i64 heads, i64 kv_heads, i64 queries, i64 most_keys, i64 key_width, i64 value_width,
                      i64 top, i64 slash_columns, bool mass, int threads);
void attention(Thread& thread, const Attention& args);

}  // namespace slim

// -- packing: called once a weight, before anything runs --------------------------------------------------------------

extern "C" {
// Bytes that slim_pack writes for a weight; 0 for a combination that has no kernel. scale and zero as slim_pack takes them.
std::int64_t slim_packed_bytes(std::int32_t format, std::int64_t m, std::int64_t n, std::int64_t group,
                               const float* scale, const std::int8_t* zero);
// q: int8: [m, n] signed. int4: [m, n / 2] bytes, column 2j in the low nibble and 2j + 1 in the high one, as value + 8.
// nf4: likewise, codes of levels. int3: [m, 3 n / 8] bytes, 8 columns in 24 bits, the first in the lowest, as value + 4.
// scale: [m, n / group] float for groups, null for one scale a row (which Matrix::scale holds). n is a multiple of group.
// zero: [m, n / group] of int4 and int3, for w = (q - zero) scale; else null.
void slim_pack(std::int32_t format, std::int64_t m, std::int64_t n, std::int64_t group, const void* q,
               const float* scale, const std::int8_t* zero, void* packed);
}
