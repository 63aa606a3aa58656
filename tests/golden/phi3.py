# slim IR 1: Phi3ForCausalLM, 74,688 parameters, 298,768 bytes
from __future__ import annotations

import math
import operator

import torch

aten, slim = torch.ops.aten, torch.ops.slim
inf, nan = math.inf, math.nan


def forward(weights, input_ids: i64[B, S], attention_mask: i64[B, S], position_ids: i64[B, S]):
    size_S: int = aten.sym_size.int(input_ids, 1)
    size_B: int = aten.sym_size.int(input_ids, 0)
    embedding: f32[B, S, 64] = aten.embedding.default(weights["model.embed_tokens.weight"], input_ids, 0)  # model.embed_tokens @ transformers/models/phi3/modeling_phi3.py:374
    _to_copy: bool[B, S] = aten._to_copy.default(attention_mask, dtype=torch.bool)  # model @ transformers/models/phi3/modeling_phi3.py:385
    rope_table: tuple[f32[B, S, 4], f32[B, S, 4]] = slim.rope_table.default(position_ids, weights["model.rotary_emb.inv_freq"])  # model.rotary_emb @ transformers/models/phi3/modeling_phi3.py:109
    getitem: f32[B, S, 4] = rope_table[0]  # model.rotary_emb @ transformers/models/phi3/modeling_phi3.py:109
    getitem_10: f32[B, S, 4] = rope_table[1]  # model.rotary_emb @ transformers/models/phi3/modeling_phi3.py:110
    rms_norm_1: f32[B, S, 64] = slim.rms_norm.default(embedding, weights["model.layers.0.input_layernorm.weight"], eps=1e-05)  # model.layers.0.input_layernorm @ transformers/models/phi3/modeling_phi3.py:270
    linear_9: f32[B, S, 64] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.qkv_proj.weight_0"])  # model.layers.0.self_attn.qkv_proj @ transformers/models/phi3/modeling_phi3.py:218
    linear_10: f32[B, S, 32] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.qkv_proj.weight_1"])  # model.layers.0.self_attn.qkv_proj @ transformers/models/phi3/modeling_phi3.py:218
    linear_11: f32[B, S, 32] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.qkv_proj.weight_2"])  # model.layers.0.self_attn.qkv_proj @ transformers/models/phi3/modeling_phi3.py:218
    reshape_2: f32[B, S, 4, 16] = aten.reshape.default(linear_9, [size_B, size_S, -1, 16])  # model.layers.0.self_attn @ transformers/models/phi3/modeling_phi3.py:224
    transpose: f32[B, 4, S, 16] = aten.transpose.int(reshape_2, 1, 2)  # model.layers.0.self_attn @ transformers/models/phi3/modeling_phi3.py:224
    reshape_3: f32[B, S, 2, 16] = aten.reshape.default(linear_10, [size_B, size_S, -1, 16])  # model.layers.0.self_attn @ transformers/models/phi3/modeling_phi3.py:225
    transpose_1: f32[B, 2, S, 16] = aten.transpose.int(reshape_3, 1, 2)  # model.layers.0.self_attn @ transformers/models/phi3/modeling_phi3.py:225
    reshape_4: f32[B, S, 2, 16] = aten.reshape.default(linear_11, [size_B, size_S, -1, 16])  # model.layers.0.self_attn @ transformers/models/phi3/modeling_phi3.py:226
    transpose_2: f32[B, 2, S, 16] = aten.transpose.int(reshape_4, 1, 2)  # model.layers.0.self_attn @ transformers/models/phi3/modeling_phi3.py:226
    rope_1: f32[B, 4, S, 16] = slim.rope.default(transpose, getitem, getitem_10)  # model.layers.0.self_attn @ transformers/models/phi3/modeling_phi3.py:229
    rope_3: f32[B, 2, S, 16] = slim.rope.default(transpose_1, getitem, getitem_10)  # model.layers.0.self_attn @ transformers/models/phi3/modeling_phi3.py:229
    attention_2: f32[B, 4, S, 16] = slim.attention.default(rope_1, rope_3, transpose_2, _to_copy, window=8, layer=0, scale=0.25)  # model.layers.0.self_attn @ transformers/models/phi3/modeling_phi3.py:238
    transpose_3: f32[B, S, 4, 16] = aten.transpose.int(attention_2, 1, 2)  # model.layers.0.self_attn @ transformers/models/phi3/modeling_phi3.py:238
    reshape_5: f32[B, S, 64] = aten.reshape.default(transpose_3, [size_B, size_S, -1])  # model.layers.0.self_attn @ transformers/models/phi3/modeling_phi3.py:250
    linear_1: f32[B, S, 64] = aten.linear.default(reshape_5, weights["model.layers.0.self_attn.o_proj.weight"])  # model.layers.0.self_attn.o_proj @ transformers/models/phi3/modeling_phi3.py:251
    add_3: f32[B, S, 64] = aten.add.Tensor(embedding, linear_1)  # model.layers.0 @ transformers/models/phi3/modeling_phi3.py:310
    rms_norm_3: f32[B, S, 64] = slim.rms_norm.default(add_3, weights["model.layers.0.post_attention_layernorm.weight"], eps=1e-05)  # model.layers.0.post_attention_layernorm @ transformers/models/phi3/modeling_phi3.py:270
    linear_12: f32[B, S, 96] = aten.linear.default(rms_norm_3, weights["model.layers.0.mlp.gate_up_proj.weight_0"])  # model.layers.0.mlp.gate_up_proj @ transformers/models/phi3/modeling_phi3.py:58
    linear_13: f32[B, S, 96] = aten.linear.default(rms_norm_3, weights["model.layers.0.mlp.gate_up_proj.weight_1"])  # model.layers.0.mlp.gate_up_proj @ transformers/models/phi3/modeling_phi3.py:58
    silu: f32[B, S, 96] = aten.silu.default(linear_12)  # model.layers.0.mlp.activation_fn @ transformers/activations.py:103
    mul_17: f32[B, S, 96] = aten.mul.Tensor(linear_13, silu)  # model.layers.0.mlp @ transformers/models/phi3/modeling_phi3.py:61
    linear_3: f32[B, S, 64] = aten.linear.default(mul_17, weights["model.layers.0.mlp.down_proj.weight"])  # model.layers.0.mlp.down_proj @ transformers/models/phi3/modeling_phi3.py:63
    add_5: f32[B, S, 64] = aten.add.Tensor(add_3, linear_3)  # model.layers.0 @ transformers/models/phi3/modeling_phi3.py:315
    rms_norm_5: f32[B, S, 64] = slim.rms_norm.default(add_5, weights["model.layers.1.input_layernorm.weight"], eps=1e-05)  # model.layers.1.input_layernorm @ transformers/models/phi3/modeling_phi3.py:270
    linear_14: f32[B, S, 64] = aten.linear.default(rms_norm_5, weights["model.layers.1.self_attn.qkv_proj.weight_0"])  # model.layers.1.self_attn.qkv_proj @ transformers/models/phi3/modeling_phi3.py:218
    linear_15: f32[B, S, 32] = aten.linear.default(rms_norm_5, weights["model.layers.1.self_attn.qkv_proj.weight_1"])  # model.layers.1.self_attn.qkv_proj @ transformers/models/phi3/modeling_phi3.py:218
    linear_16: f32[B, S, 32] = aten.linear.default(rms_norm_5, weights["model.layers.1.self_attn.qkv_proj.weight_2"])  # model.layers.1.self_attn.qkv_proj @ transformers/models/phi3/modeling_phi3.py:218
    reshape_6: f32[B, S, 4, 16] = aten.reshape.default(linear_14, [size_B, size_S, -1, 16])  # model.layers.1.self_attn @ transformers/models/phi3/modeling_phi3.py:224
    transpose_4: f32[B, 4, S, 16] = aten.transpose.int(reshape_6, 1, 2)  # model.layers.1.self_attn @ transformers/models/phi3/modeling_phi3.py:224
    reshape_7: f32[B, S, 2, 16] = aten.reshape.default(linear_15, [size_B, size_S, -1, 16])  # model.layers.1.self_attn @ transformers/models/phi3/modeling_phi3.py:225
    transpose_5: f32[B, 2, S, 16] = aten.transpose.int(reshape_7, 1, 2)  # model.layers.1.self_attn @ transformers/models/phi3/modeling_phi3.py:225
    reshape_8: f32[B, S, 2, 16] = aten.reshape.default(linear_16, [size_B, size_S, -1, 16])  # model.layers.1.self_attn @ transformers/models/phi3/modeling_phi3.py:226
    transpose_6: f32[B, 2, S, 16] = aten.transpose.int(reshape_8, 1, 2)  # model.layers.1.self_attn @ transformers/models/phi3/modeling_phi3.py:226
    rope_5: f32[B, 4, S, 16] = slim.rope.default(transpose_4, getitem, getitem_10)  # model.layers.1.self_attn @ transformers/models/phi3/modeling_phi3.py:229
    rope_7: f32[B, 2, S, 16] = slim.rope.default(transpose_5, getitem, getitem_10)  # model.layers.1.self_attn @ transformers/models/phi3/modeling_phi3.py:229
    attention_3: f32[B, 4, S, 16] = slim.attention.default(rope_5, rope_7, transpose_6, _to_copy, window=8, layer=1, scale=0.25)  # model.layers.1.self_attn @ transformers/models/phi3/modeling_phi3.py:238
    transpose_7: f32[B, S, 4, 16] = aten.transpose.int(attention_3, 1, 2)  # model.layers.1.self_attn @ transformers/models/phi3/modeling_phi3.py:238
    reshape_9: f32[B, S, 64] = aten.reshape.default(transpose_7, [size_B, size_S, -1])  # model.layers.1.self_attn @ transformers/models/phi3/modeling_phi3.py:250
    linear_5: f32[B, S, 64] = aten.linear.default(reshape_9, weights["model.layers.1.self_attn.o_proj.weight"])  # model.layers.1.self_attn.o_proj @ transformers/models/phi3/modeling_phi3.py:251
    add_9: f32[B, S, 64] = aten.add.Tensor(add_5, linear_5)  # model.layers.1 @ transformers/models/phi3/modeling_phi3.py:310
    rms_norm_7: f32[B, S, 64] = slim.rms_norm.default(add_9, weights["model.layers.1.post_attention_layernorm.weight"], eps=1e-05)  # model.layers.1.post_attention_layernorm @ transformers/models/phi3/modeling_phi3.py:270
    linear_17: f32[B, S, 96] = aten.linear.default(rms_norm_7, weights["model.layers.1.mlp.gate_up_proj.weight_0"])  # model.layers.1.mlp.gate_up_proj @ transformers/models/phi3/modeling_phi3.py:58
    linear_18: f32[B, S, 96] = aten.linear.default(rms_norm_7, weights["model.layers.1.mlp.gate_up_proj.weight_1"])  # model.layers.1.mlp.gate_up_proj @ transformers/models/phi3/modeling_phi3.py:58
    silu_1: f32[B, S, 96] = aten.silu.default(linear_17)  # model.layers.1.mlp.activation_fn @ transformers/activations.py:103
    mul_32: f32[B, S, 96] = aten.mul.Tensor(linear_18, silu_1)  # model.layers.1.mlp @ transformers/models/phi3/modeling_phi3.py:61
    linear_7: f32[B, S, 64] = aten.linear.default(mul_32, weights["model.layers.1.mlp.down_proj.weight"])  # model.layers.1.mlp.down_proj @ transformers/models/phi3/modeling_phi3.py:63
    add_11: f32[B, S, 64] = aten.add.Tensor(add_9, linear_7)  # model.layers.1 @ transformers/models/phi3/modeling_phi3.py:315
    rms_norm_9: f32[B, S, 64] = slim.rms_norm.default(add_11, weights["model.norm.weight"], eps=1e-05)  # model.norm @ transformers/models/phi3/modeling_phi3.py:270
    linear_8: f32[B, S, 101] = aten.linear.default(rms_norm_9, weights["lm_head.weight"])  # lm_head @ transformers/models/phi3/modeling_phi3.py:472
    return (linear_8,)
