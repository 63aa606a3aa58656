# slim IR 1: Qwen3ForCausalLM, 87,584 parameters, 350,384 bytes
from __future__ import annotations

import math
import operator

import torch

aten, slim = torch.ops.aten, torch.ops.slim
inf, nan = math.inf, math.nan


def forward(weights, input_ids: i64[B, S], attention_mask: i64[B, S], position_ids: i64[B, S]):
    size_S: int = aten.sym_size.int(input_ids, 1)
    size_B: int = aten.sym_size.int(input_ids, 0)
    embedding: f32[B, S, 64] = aten.embedding.default(weights["model.embed_tokens.weight"], input_ids, 0)  # model.embed_tokens @ transformers/models/qwen3/modeling_qwen3.py:373
    _to_copy: bool[B, S] = aten._to_copy.default(attention_mask, dtype=torch.bool)  # model @ transformers/models/qwen3/modeling_qwen3.py:395
    rope_table: tuple[f32[B, S, 12], f32[B, S, 12]] = slim.rope_table.default(position_ids, weights["model.rotary_emb.inv_freq"])  # model.rotary_emb @ transformers/models/qwen3/modeling_qwen3.py:126
    getitem: f32[B, S, 12] = rope_table[0]  # model.rotary_emb @ transformers/models/qwen3/modeling_qwen3.py:126
    getitem_1: f32[B, S, 12] = rope_table[1]  # model.rotary_emb @ transformers/models/qwen3/modeling_qwen3.py:127
    rms_norm_1: f32[B, S, 64] = slim.rms_norm.default(embedding, weights["model.layers.0.input_layernorm.weight"], eps=1e-06)  # model.layers.0.input_layernorm @ transformers/models/qwen3/modeling_qwen3.py:63
    linear: f32[B, S, 96] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.q_proj.weight"], weights["model.layers.0.self_attn.q_proj.bias"])  # model.layers.0.self_attn.q_proj @ transformers/models/qwen3/modeling_qwen3.py:244
    reshape_2: f32[B, S, 4, 24] = aten.reshape.default(linear, [size_B, size_S, -1, 24])  # model.layers.0.self_attn @ transformers/models/qwen3/modeling_qwen3.py:244
    rms_norm_3: f32[B, S, 4, 24] = slim.rms_norm.default(reshape_2, weights["model.layers.0.self_attn.q_norm.weight"], eps=1e-06)  # model.layers.0.self_attn.q_norm @ transformers/models/qwen3/modeling_qwen3.py:63
    transpose: f32[B, 4, S, 24] = aten.transpose.int(rms_norm_3, 1, 2)  # model.layers.0.self_attn @ transformers/models/qwen3/modeling_qwen3.py:244
    linear_1: f32[B, S, 48] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.k_proj.weight"], weights["model.layers.0.self_attn.k_proj.bias"])  # model.layers.0.self_attn.k_proj @ transformers/models/qwen3/modeling_qwen3.py:245
    reshape_3: f32[B, S, 2, 24] = aten.reshape.default(linear_1, [size_B, size_S, -1, 24])  # model.layers.0.self_attn @ transformers/models/qwen3/modeling_qwen3.py:245
    rms_norm_5: f32[B, S, 2, 24] = slim.rms_norm.default(reshape_3, weights["model.layers.0.self_attn.k_norm.weight"], eps=1e-06)  # model.layers.0.self_attn.k_norm @ transformers/models/qwen3/modeling_qwen3.py:63
    transpose_1: f32[B, 2, S, 24] = aten.transpose.int(rms_norm_5, 1, 2)  # model.layers.0.self_attn @ transformers/models/qwen3/modeling_qwen3.py:245
    linear_2: f32[B, S, 48] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.v_proj.weight"], weights["model.layers.0.self_attn.v_proj.bias"])  # model.layers.0.self_attn.v_proj @ transformers/models/qwen3/modeling_qwen3.py:246
    reshape_4: f32[B, S, 2, 24] = aten.reshape.default(linear_2, [size_B, size_S, -1, 24])  # model.layers.0.self_attn @ transformers/models/qwen3/modeling_qwen3.py:246
    transpose_2: f32[B, 2, S, 24] = aten.transpose.int(reshape_4, 1, 2)  # model.layers.0.self_attn @ transformers/models/qwen3/modeling_qwen3.py:246
    rope: f32[B, 4, S, 24] = slim.rope.default(transpose, getitem, getitem_1)  # model.layers.0.self_attn @ transformers/models/qwen3/modeling_qwen3.py:249
    rope_1: f32[B, 2, S, 24] = slim.rope.default(transpose_1, getitem, getitem_1)  # model.layers.0.self_attn @ transformers/models/qwen3/modeling_qwen3.py:249
    attention_2: f32[B, 4, S, 24] = slim.attention.default(rope, rope_1, transpose_2, _to_copy, layer=0, scale=0.2041241452319315)  # model.layers.0.self_attn @ transformers/models/qwen3/modeling_qwen3.py:258
    transpose_3: f32[B, S, 4, 24] = aten.transpose.int(attention_2, 1, 2)  # model.layers.0.self_attn @ transformers/models/qwen3/modeling_qwen3.py:258
    reshape_5: f32[B, S, 96] = aten.reshape.default(transpose_3, [size_B, size_S, -1])  # model.layers.0.self_attn @ transformers/models/qwen3/modeling_qwen3.py:270
    linear_3: f32[B, S, 64] = aten.linear.default(reshape_5, weights["model.layers.0.self_attn.o_proj.weight"], weights["model.layers.0.self_attn.o_proj.bias"])  # model.layers.0.self_attn.o_proj @ transformers/models/qwen3/modeling_qwen3.py:271
    add_5: f32[B, S, 64] = aten.add.Tensor(embedding, linear_3)  # model.layers.0 @ transformers/models/qwen3/modeling_qwen3.py:308
    rms_norm_7: f32[B, S, 64] = slim.rms_norm.default(add_5, weights["model.layers.0.post_attention_layernorm.weight"], eps=1e-06)  # model.layers.0.post_attention_layernorm @ transformers/models/qwen3/modeling_qwen3.py:63
    linear_4: f32[B, S, 96] = aten.linear.default(rms_norm_7, weights["model.layers.0.mlp.gate_proj.weight"])  # model.layers.0.mlp.gate_proj @ transformers/models/qwen3/modeling_qwen3.py:81
    silu: f32[B, S, 96] = aten.silu.default(linear_4)  # model.layers.0.mlp.act_fn @ transformers/activations.py:103
    linear_5: f32[B, S, 96] = aten.linear.default(rms_norm_7, weights["model.layers.0.mlp.up_proj.weight"])  # model.layers.0.mlp.up_proj @ transformers/models/qwen3/modeling_qwen3.py:81
    mul_21: f32[B, S, 96] = aten.mul.Tensor(silu, linear_5)  # model.layers.0.mlp @ transformers/models/qwen3/modeling_qwen3.py:81
    linear_6: f32[B, S, 64] = aten.linear.default(mul_21, weights["model.layers.0.mlp.down_proj.weight"])  # model.layers.0.mlp.down_proj @ transformers/models/qwen3/modeling_qwen3.py:81
    add_7: f32[B, S, 64] = aten.add.Tensor(add_5, linear_6)  # model.layers.0 @ transformers/models/qwen3/modeling_qwen3.py:314
    rms_norm_9: f32[B, S, 64] = slim.rms_norm.default(add_7, weights["model.layers.1.input_layernorm.weight"], eps=1e-06)  # model.layers.1.input_layernorm @ transformers/models/qwen3/modeling_qwen3.py:63
    linear_7: f32[B, S, 96] = aten.linear.default(rms_norm_9, weights["model.layers.1.self_attn.q_proj.weight"], weights["model.layers.1.self_attn.q_proj.bias"])  # model.layers.1.self_attn.q_proj @ transformers/models/qwen3/modeling_qwen3.py:244
    reshape_6: f32[B, S, 4, 24] = aten.reshape.default(linear_7, [size_B, size_S, -1, 24])  # model.layers.1.self_attn @ transformers/models/qwen3/modeling_qwen3.py:244
    rms_norm_11: f32[B, S, 4, 24] = slim.rms_norm.default(reshape_6, weights["model.layers.1.self_attn.q_norm.weight"], eps=1e-06)  # model.layers.1.self_attn.q_norm @ transformers/models/qwen3/modeling_qwen3.py:63
    transpose_4: f32[B, 4, S, 24] = aten.transpose.int(rms_norm_11, 1, 2)  # model.layers.1.self_attn @ transformers/models/qwen3/modeling_qwen3.py:244
    linear_8: f32[B, S, 48] = aten.linear.default(rms_norm_9, weights["model.layers.1.self_attn.k_proj.weight"], weights["model.layers.1.self_attn.k_proj.bias"])  # model.layers.1.self_attn.k_proj @ transformers/models/qwen3/modeling_qwen3.py:245
    reshape_7: f32[B, S, 2, 24] = aten.reshape.default(linear_8, [size_B, size_S, -1, 24])  # model.layers.1.self_attn @ transformers/models/qwen3/modeling_qwen3.py:245
    rms_norm_13: f32[B, S, 2, 24] = slim.rms_norm.default(reshape_7, weights["model.layers.1.self_attn.k_norm.weight"], eps=1e-06)  # model.layers.1.self_attn.k_norm @ transformers/models/qwen3/modeling_qwen3.py:63
    transpose_5: f32[B, 2, S, 24] = aten.transpose.int(rms_norm_13, 1, 2)  # model.layers.1.self_attn @ transformers/models/qwen3/modeling_qwen3.py:245
    linear_9: f32[B, S, 48] = aten.linear.default(rms_norm_9, weights["model.layers.1.self_attn.v_proj.weight"], weights["model.layers.1.self_attn.v_proj.bias"])  # model.layers.1.self_attn.v_proj @ transformers/models/qwen3/modeling_qwen3.py:246
    reshape_8: f32[B, S, 2, 24] = aten.reshape.default(linear_9, [size_B, size_S, -1, 24])  # model.layers.1.self_attn @ transformers/models/qwen3/modeling_qwen3.py:246
    transpose_6: f32[B, 2, S, 24] = aten.transpose.int(reshape_8, 1, 2)  # model.layers.1.self_attn @ transformers/models/qwen3/modeling_qwen3.py:246
    rope_2: f32[B, 4, S, 24] = slim.rope.default(transpose_4, getitem, getitem_1)  # model.layers.1.self_attn @ transformers/models/qwen3/modeling_qwen3.py:249
    rope_3: f32[B, 2, S, 24] = slim.rope.default(transpose_5, getitem, getitem_1)  # model.layers.1.self_attn @ transformers/models/qwen3/modeling_qwen3.py:249
    attention_3: f32[B, 4, S, 24] = slim.attention.default(rope_2, rope_3, transpose_6, _to_copy, layer=1, scale=0.2041241452319315)  # model.layers.1.self_attn @ transformers/models/qwen3/modeling_qwen3.py:258
    transpose_7: f32[B, S, 4, 24] = aten.transpose.int(attention_3, 1, 2)  # model.layers.1.self_attn @ transformers/models/qwen3/modeling_qwen3.py:258
    reshape_9: f32[B, S, 96] = aten.reshape.default(transpose_7, [size_B, size_S, -1])  # model.layers.1.self_attn @ transformers/models/qwen3/modeling_qwen3.py:270
    linear_10: f32[B, S, 64] = aten.linear.default(reshape_9, weights["model.layers.1.self_attn.o_proj.weight"], weights["model.layers.1.self_attn.o_proj.bias"])  # model.layers.1.self_attn.o_proj @ transformers/models/qwen3/modeling_qwen3.py:271
    add_13: f32[B, S, 64] = aten.add.Tensor(add_7, linear_10)  # model.layers.1 @ transformers/models/qwen3/modeling_qwen3.py:308
    rms_norm_15: f32[B, S, 64] = slim.rms_norm.default(add_13, weights["model.layers.1.post_attention_layernorm.weight"], eps=1e-06)  # model.layers.1.post_attention_layernorm @ transformers/models/qwen3/modeling_qwen3.py:63
    linear_11: f32[B, S, 96] = aten.linear.default(rms_norm_15, weights["model.layers.1.mlp.gate_proj.weight"])  # model.layers.1.mlp.gate_proj @ transformers/models/qwen3/modeling_qwen3.py:81
    silu_1: f32[B, S, 96] = aten.silu.default(linear_11)  # model.layers.1.mlp.act_fn @ transformers/activations.py:103
    linear_12: f32[B, S, 96] = aten.linear.default(rms_norm_15, weights["model.layers.1.mlp.up_proj.weight"])  # model.layers.1.mlp.up_proj @ transformers/models/qwen3/modeling_qwen3.py:81
    mul_40: f32[B, S, 96] = aten.mul.Tensor(silu_1, linear_12)  # model.layers.1.mlp @ transformers/models/qwen3/modeling_qwen3.py:81
    linear_13: f32[B, S, 64] = aten.linear.default(mul_40, weights["model.layers.1.mlp.down_proj.weight"])  # model.layers.1.mlp.down_proj @ transformers/models/qwen3/modeling_qwen3.py:81
    add_15: f32[B, S, 64] = aten.add.Tensor(add_13, linear_13)  # model.layers.1 @ transformers/models/qwen3/modeling_qwen3.py:314
    rms_norm_17: f32[B, S, 64] = slim.rms_norm.default(add_15, weights["model.norm.weight"], eps=1e-06)  # model.norm @ transformers/models/qwen3/modeling_qwen3.py:63
    linear_14: f32[B, S, 101] = aten.linear.default(rms_norm_17, weights["lm_head.weight"])  # lm_head @ transformers/models/qwen3/modeling_qwen3.py:481
    return (linear_14,)
