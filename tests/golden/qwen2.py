# slim IR 1: Qwen2ForCausalLM, 74,944 parameters, 299,808 bytes
from __future__ import annotations

import math
import operator

import torch

aten, slim = torch.ops.aten, torch.ops.slim
inf, nan = math.inf, math.nan


def forward(weights, input_ids: i64[B, S], attention_mask: i64[B, S], position_ids: i64[B, S]):
    size_S: int = aten.sym_size.int(input_ids, 1)
    size_B: int = aten.sym_size.int(input_ids, 0)
    embedding: f32[B, S, 64] = aten.embedding.default(weights["model.embed_tokens.weight"], input_ids, 0)  # model.embed_tokens @ transformers/models/qwen2/modeling_qwen2.py:348
    _to_copy: bool[B, S] = aten._to_copy.default(attention_mask, dtype=torch.bool)  # model @ transformers/models/qwen2/modeling_qwen2.py:370
    rope_table: tuple[f32[B, S, 8], f32[B, S, 8]] = slim.rope_table.default(position_ids, weights["model.rotary_emb.inv_freq"])  # model.rotary_emb @ transformers/models/qwen2/modeling_qwen2.py:91
    getitem: f32[B, S, 8] = rope_table[0]  # model.rotary_emb @ transformers/models/qwen2/modeling_qwen2.py:91
    getitem_1: f32[B, S, 8] = rope_table[1]  # model.rotary_emb @ transformers/models/qwen2/modeling_qwen2.py:92
    rms_norm_1: f32[B, S, 64] = slim.rms_norm.default(embedding, weights["model.layers.0.input_layernorm.weight"], eps=1e-06)  # model.layers.0.input_layernorm @ transformers/models/qwen2/modeling_qwen2.py:244
    linear: f32[B, S, 64] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.q_proj.weight"], weights["model.layers.0.self_attn.q_proj.bias"])  # model.layers.0.self_attn.q_proj @ transformers/models/qwen2/modeling_qwen2.py:198
    reshape_2: f32[B, S, 4, 16] = aten.reshape.default(linear, [size_B, size_S, -1, 16])  # model.layers.0.self_attn @ transformers/models/qwen2/modeling_qwen2.py:198
    transpose: f32[B, 4, S, 16] = aten.transpose.int(reshape_2, 1, 2)  # model.layers.0.self_attn @ transformers/models/qwen2/modeling_qwen2.py:198
    linear_1: f32[B, S, 32] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.k_proj.weight"], weights["model.layers.0.self_attn.k_proj.bias"])  # model.layers.0.self_attn.k_proj @ transformers/models/qwen2/modeling_qwen2.py:199
    reshape_3: f32[B, S, 2, 16] = aten.reshape.default(linear_1, [size_B, size_S, -1, 16])  # model.layers.0.self_attn @ transformers/models/qwen2/modeling_qwen2.py:199
    transpose_1: f32[B, 2, S, 16] = aten.transpose.int(reshape_3, 1, 2)  # model.layers.0.self_attn @ transformers/models/qwen2/modeling_qwen2.py:199
    linear_2: f32[B, S, 32] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.v_proj.weight"], weights["model.layers.0.self_attn.v_proj.bias"])  # model.layers.0.self_attn.v_proj @ transformers/models/qwen2/modeling_qwen2.py:200
    reshape_4: f32[B, S, 2, 16] = aten.reshape.default(linear_2, [size_B, size_S, -1, 16])  # model.layers.0.self_attn @ transformers/models/qwen2/modeling_qwen2.py:200
    transpose_2: f32[B, 2, S, 16] = aten.transpose.int(reshape_4, 1, 2)  # model.layers.0.self_attn @ transformers/models/qwen2/modeling_qwen2.py:200
    rope: f32[B, 4, S, 16] = slim.rope.default(transpose, getitem, getitem_1)  # model.layers.0.self_attn @ transformers/models/qwen2/modeling_qwen2.py:203
    rope_1: f32[B, 2, S, 16] = slim.rope.default(transpose_1, getitem, getitem_1)  # model.layers.0.self_attn @ transformers/models/qwen2/modeling_qwen2.py:203
    attention_2: f32[B, 4, S, 16] = slim.attention.default(rope, rope_1, transpose_2, _to_copy, layer=0, scale=0.25)  # model.layers.0.self_attn @ transformers/models/qwen2/modeling_qwen2.py:212
    transpose_3: f32[B, S, 4, 16] = aten.transpose.int(attention_2, 1, 2)  # model.layers.0.self_attn @ transformers/models/qwen2/modeling_qwen2.py:212
    reshape_5: f32[B, S, 64] = aten.reshape.default(transpose_3, [size_B, size_S, -1])  # model.layers.0.self_attn @ transformers/models/qwen2/modeling_qwen2.py:224
    linear_3: f32[B, S, 64] = aten.linear.default(reshape_5, weights["model.layers.0.self_attn.o_proj.weight"])  # model.layers.0.self_attn.o_proj @ transformers/models/qwen2/modeling_qwen2.py:225
    add_3: f32[B, S, 64] = aten.add.Tensor(embedding, linear_3)  # model.layers.0 @ transformers/models/qwen2/modeling_qwen2.py:283
    rms_norm_3: f32[B, S, 64] = slim.rms_norm.default(add_3, weights["model.layers.0.post_attention_layernorm.weight"], eps=1e-06)  # model.layers.0.post_attention_layernorm @ transformers/models/qwen2/modeling_qwen2.py:244
    linear_4: f32[B, S, 96] = aten.linear.default(rms_norm_3, weights["model.layers.0.mlp.gate_proj.weight"])  # model.layers.0.mlp.gate_proj @ transformers/models/qwen2/modeling_qwen2.py:46
    silu: f32[B, S, 96] = aten.silu.default(linear_4)  # model.layers.0.mlp.act_fn @ transformers/activations.py:103
    linear_5: f32[B, S, 96] = aten.linear.default(rms_norm_3, weights["model.layers.0.mlp.up_proj.weight"])  # model.layers.0.mlp.up_proj @ transformers/models/qwen2/modeling_qwen2.py:46
    mul_17: f32[B, S, 96] = aten.mul.Tensor(silu, linear_5)  # model.layers.0.mlp @ transformers/models/qwen2/modeling_qwen2.py:46
    linear_6: f32[B, S, 64] = aten.linear.default(mul_17, weights["model.layers.0.mlp.down_proj.weight"])  # model.layers.0.mlp.down_proj @ transformers/models/qwen2/modeling_qwen2.py:46
    add_5: f32[B, S, 64] = aten.add.Tensor(add_3, linear_6)  # model.layers.0 @ transformers/models/qwen2/modeling_qwen2.py:289
    rms_norm_5: f32[B, S, 64] = slim.rms_norm.default(add_5, weights["model.layers.1.input_layernorm.weight"], eps=1e-06)  # model.layers.1.input_layernorm @ transformers/models/qwen2/modeling_qwen2.py:244
    linear_7: f32[B, S, 64] = aten.linear.default(rms_norm_5, weights["model.layers.1.self_attn.q_proj.weight"], weights["model.layers.1.self_attn.q_proj.bias"])  # model.layers.1.self_attn.q_proj @ transformers/models/qwen2/modeling_qwen2.py:198
    reshape_6: f32[B, S, 4, 16] = aten.reshape.default(linear_7, [size_B, size_S, -1, 16])  # model.layers.1.self_attn @ transformers/models/qwen2/modeling_qwen2.py:198
    transpose_4: f32[B, 4, S, 16] = aten.transpose.int(reshape_6, 1, 2)  # model.layers.1.self_attn @ transformers/models/qwen2/modeling_qwen2.py:198
    linear_8: f32[B, S, 32] = aten.linear.default(rms_norm_5, weights["model.layers.1.self_attn.k_proj.weight"], weights["model.layers.1.self_attn.k_proj.bias"])  # model.layers.1.self_attn.k_proj @ transformers/models/qwen2/modeling_qwen2.py:199
    reshape_7: f32[B, S, 2, 16] = aten.reshape.default(linear_8, [size_B, size_S, -1, 16])  # model.layers.1.self_attn @ transformers/models/qwen2/modeling_qwen2.py:199
    transpose_5: f32[B, 2, S, 16] = aten.transpose.int(reshape_7, 1, 2)  # model.layers.1.self_attn @ transformers/models/qwen2/modeling_qwen2.py:199
    linear_9: f32[B, S, 32] = aten.linear.default(rms_norm_5, weights["model.layers.1.self_attn.v_proj.weight"], weights["model.layers.1.self_attn.v_proj.bias"])  # model.layers.1.self_attn.v_proj @ transformers/models/qwen2/modeling_qwen2.py:200
    reshape_8: f32[B, S, 2, 16] = aten.reshape.default(linear_9, [size_B, size_S, -1, 16])  # model.layers.1.self_attn @ transformers/models/qwen2/modeling_qwen2.py:200
    transpose_6: f32[B, 2, S, 16] = aten.transpose.int(reshape_8, 1, 2)  # model.layers.1.self_attn @ transformers/models/qwen2/modeling_qwen2.py:200
    rope_2: f32[B, 4, S, 16] = slim.rope.default(transpose_4, getitem, getitem_1)  # model.layers.1.self_attn @ transformers/models/qwen2/modeling_qwen2.py:203
    rope_3: f32[B, 2, S, 16] = slim.rope.default(transpose_5, getitem, getitem_1)  # model.layers.1.self_attn @ transformers/models/qwen2/modeling_qwen2.py:203
    attention_3: f32[B, 4, S, 16] = slim.attention.default(rope_2, rope_3, transpose_6, _to_copy, window=8, layer=1, scale=0.25)  # model.layers.1.self_attn @ transformers/models/qwen2/modeling_qwen2.py:212
    transpose_7: f32[B, S, 4, 16] = aten.transpose.int(attention_3, 1, 2)  # model.layers.1.self_attn @ transformers/models/qwen2/modeling_qwen2.py:212
    reshape_9: f32[B, S, 64] = aten.reshape.default(transpose_7, [size_B, size_S, -1])  # model.layers.1.self_attn @ transformers/models/qwen2/modeling_qwen2.py:224
    linear_10: f32[B, S, 64] = aten.linear.default(reshape_9, weights["model.layers.1.self_attn.o_proj.weight"])  # model.layers.1.self_attn.o_proj @ transformers/models/qwen2/modeling_qwen2.py:225
    add_9: f32[B, S, 64] = aten.add.Tensor(add_5, linear_10)  # model.layers.1 @ transformers/models/qwen2/modeling_qwen2.py:283
    rms_norm_7: f32[B, S, 64] = slim.rms_norm.default(add_9, weights["model.layers.1.post_attention_layernorm.weight"], eps=1e-06)  # model.layers.1.post_attention_layernorm @ transformers/models/qwen2/modeling_qwen2.py:244
    linear_11: f32[B, S, 96] = aten.linear.default(rms_norm_7, weights["model.layers.1.mlp.gate_proj.weight"])  # model.layers.1.mlp.gate_proj @ transformers/models/qwen2/modeling_qwen2.py:46
    silu_1: f32[B, S, 96] = aten.silu.default(linear_11)  # model.layers.1.mlp.act_fn @ transformers/activations.py:103
    linear_12: f32[B, S, 96] = aten.linear.default(rms_norm_7, weights["model.layers.1.mlp.up_proj.weight"])  # model.layers.1.mlp.up_proj @ transformers/models/qwen2/modeling_qwen2.py:46
    mul_32: f32[B, S, 96] = aten.mul.Tensor(silu_1, linear_12)  # model.layers.1.mlp @ transformers/models/qwen2/modeling_qwen2.py:46
    linear_13: f32[B, S, 64] = aten.linear.default(mul_32, weights["model.layers.1.mlp.down_proj.weight"])  # model.layers.1.mlp.down_proj @ transformers/models/qwen2/modeling_qwen2.py:46
    add_11: f32[B, S, 64] = aten.add.Tensor(add_9, linear_13)  # model.layers.1 @ transformers/models/qwen2/modeling_qwen2.py:289
    rms_norm_9: f32[B, S, 64] = slim.rms_norm.default(add_11, weights["model.norm.weight"], eps=1e-06)  # model.norm @ transformers/models/qwen2/modeling_qwen2.py:244
    linear_14: f32[B, S, 101] = aten.linear.default(rms_norm_9, weights["lm_head.weight"])  # lm_head @ transformers/models/qwen2/modeling_qwen2.py:456
    return (linear_14,)
