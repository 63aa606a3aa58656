# slim IR 1: GemmaForCausalLM, 80,512 parameters, 322,100 bytes
from __future__ import annotations

import math
import operator

import torch

aten, slim = torch.ops.aten, torch.ops.slim
inf, nan = math.inf, math.nan


def forward(weights, input_ids: i64[B, S], attention_mask: i64[B, S], position_ids: i64[B, S]):
    size_S: int = aten.sym_size.int(input_ids, 1)
    size_B: int = aten.sym_size.int(input_ids, 0)
    embedding: f32[B, S, 64] = aten.embedding.default(weights["model.embed_tokens.weight"], input_ids, 0)  # model.embed_tokens @ transformers/models/gemma/modeling_gemma.py:60
    mul: f32[B, S, 64] = aten.mul.Tensor(embedding, weights["model.embed_tokens.embed_scale"])  # model.embed_tokens @ transformers/models/gemma/modeling_gemma.py:60
    _to_copy: bool[B, S] = aten._to_copy.default(attention_mask, dtype=torch.bool)  # model @ transformers/models/gemma/modeling_gemma.py:402
    rope_table: tuple[f32[B, S, 12], f32[B, S, 12]] = slim.rope_table.default(position_ids, weights["model.rotary_emb.inv_freq"])  # model.rotary_emb @ transformers/models/gemma/modeling_gemma.py:140
    getitem: f32[B, S, 12] = rope_table[0]  # model.rotary_emb @ transformers/models/gemma/modeling_gemma.py:140
    getitem_1: f32[B, S, 12] = rope_table[1]  # model.rotary_emb @ transformers/models/gemma/modeling_gemma.py:141
    rms_norm_1: f32[B, S, 64] = slim.rms_norm.default(mul, weights["model.layers.0.input_layernorm.weight"], eps=1e-06, offset=1.0)  # model.layers.0.input_layernorm @ transformers/models/gemma/modeling_gemma.py:76
    linear: f32[B, S, 96] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.q_proj.weight"])  # model.layers.0.self_attn.q_proj @ transformers/models/gemma/modeling_gemma.py:254
    reshape_2: f32[B, S, 4, 24] = aten.reshape.default(linear, [size_B, size_S, -1, 24])  # model.layers.0.self_attn @ transformers/models/gemma/modeling_gemma.py:254
    transpose: f32[B, 4, S, 24] = aten.transpose.int(reshape_2, 1, 2)  # model.layers.0.self_attn @ transformers/models/gemma/modeling_gemma.py:254
    linear_1: f32[B, S, 48] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.k_proj.weight"])  # model.layers.0.self_attn.k_proj @ transformers/models/gemma/modeling_gemma.py:255
    reshape_3: f32[B, S, 2, 24] = aten.reshape.default(linear_1, [size_B, size_S, -1, 24])  # model.layers.0.self_attn @ transformers/models/gemma/modeling_gemma.py:255
    transpose_1: f32[B, 2, S, 24] = aten.transpose.int(reshape_3, 1, 2)  # model.layers.0.self_attn @ transformers/models/gemma/modeling_gemma.py:255
    linear_2: f32[B, S, 48] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.v_proj.weight"])  # model.layers.0.self_attn.v_proj @ transformers/models/gemma/modeling_gemma.py:256
    reshape_4: f32[B, S, 2, 24] = aten.reshape.default(linear_2, [size_B, size_S, -1, 24])  # model.layers.0.self_attn @ transformers/models/gemma/modeling_gemma.py:256
    transpose_2: f32[B, 2, S, 24] = aten.transpose.int(reshape_4, 1, 2)  # model.layers.0.self_attn @ transformers/models/gemma/modeling_gemma.py:256
    rope: f32[B, 4, S, 24] = slim.rope.default(transpose, getitem, getitem_1)  # model.layers.0.self_attn @ transformers/models/gemma/modeling_gemma.py:259
    rope_1: f32[B, 2, S, 24] = slim.rope.default(transpose_1, getitem, getitem_1)  # model.layers.0.self_attn @ transformers/models/gemma/modeling_gemma.py:259
    attention_2: f32[B, 4, S, 24] = slim.attention.default(rope, rope_1, transpose_2, _to_copy, layer=0, scale=0.2041241452319315)  # model.layers.0.self_attn @ transformers/models/gemma/modeling_gemma.py:268
    transpose_3: f32[B, S, 4, 24] = aten.transpose.int(attention_2, 1, 2)  # model.layers.0.self_attn @ transformers/models/gemma/modeling_gemma.py:268
    reshape_5: f32[B, S, 96] = aten.reshape.default(transpose_3, [size_B, size_S, -1])  # model.layers.0.self_attn @ transformers/models/gemma/modeling_gemma.py:279
    linear_3: f32[B, S, 64] = aten.linear.default(reshape_5, weights["model.layers.0.self_attn.o_proj.weight"])  # model.layers.0.self_attn.o_proj @ transformers/models/gemma/modeling_gemma.py:280
    add_4: f32[B, S, 64] = aten.add.Tensor(mul, linear_3)  # model.layers.0 @ transformers/models/gemma/modeling_gemma.py:317
    rms_norm_3: f32[B, S, 64] = slim.rms_norm.default(add_4, weights["model.layers.0.post_attention_layernorm.weight"], eps=1e-06, offset=1.0)  # model.layers.0.post_attention_layernorm @ transformers/models/gemma/modeling_gemma.py:76
    linear_4: f32[B, S, 96] = aten.linear.default(rms_norm_3, weights["model.layers.0.mlp.gate_proj.weight"])  # model.layers.0.mlp.gate_proj @ transformers/models/gemma/modeling_gemma.py:95
    gelu: f32[B, S, 96] = aten.gelu.default(linear_4, approximate='tanh')  # model.layers.0.mlp.act_fn @ transformers/activations.py:51
    linear_5: f32[B, S, 96] = aten.linear.default(rms_norm_3, weights["model.layers.0.mlp.up_proj.weight"])  # model.layers.0.mlp.up_proj @ transformers/models/gemma/modeling_gemma.py:95
    mul_18: f32[B, S, 96] = aten.mul.Tensor(gelu, linear_5)  # model.layers.0.mlp @ transformers/models/gemma/modeling_gemma.py:95
    linear_6: f32[B, S, 64] = aten.linear.default(mul_18, weights["model.layers.0.mlp.down_proj.weight"])  # model.layers.0.mlp.down_proj @ transformers/models/gemma/modeling_gemma.py:95
    add_7: f32[B, S, 64] = aten.add.Tensor(add_4, linear_6)  # model.layers.0 @ transformers/models/gemma/modeling_gemma.py:323
    rms_norm_5: f32[B, S, 64] = slim.rms_norm.default(add_7, weights["model.layers.1.input_layernorm.weight"], eps=1e-06, offset=1.0)  # model.layers.1.input_layernorm @ transformers/models/gemma/modeling_gemma.py:76
    linear_7: f32[B, S, 96] = aten.linear.default(rms_norm_5, weights["model.layers.1.self_attn.q_proj.weight"])  # model.layers.1.self_attn.q_proj @ transformers/models/gemma/modeling_gemma.py:254
    reshape_6: f32[B, S, 4, 24] = aten.reshape.default(linear_7, [size_B, size_S, -1, 24])  # model.layers.1.self_attn @ transformers/models/gemma/modeling_gemma.py:254
    transpose_4: f32[B, 4, S, 24] = aten.transpose.int(reshape_6, 1, 2)  # model.layers.1.self_attn @ transformers/models/gemma/modeling_gemma.py:254
    linear_8: f32[B, S, 48] = aten.linear.default(rms_norm_5, weights["model.layers.1.self_attn.k_proj.weight"])  # model.layers.1.self_attn.k_proj @ transformers/models/gemma/modeling_gemma.py:255
    reshape_7: f32[B, S, 2, 24] = aten.reshape.default(linear_8, [size_B, size_S, -1, 24])  # model.layers.1.self_attn @ transformers/models/gemma/modeling_gemma.py:255
    transpose_5: f32[B, 2, S, 24] = aten.transpose.int(reshape_7, 1, 2)  # model.layers.1.self_attn @ transformers/models/gemma/modeling_gemma.py:255
    linear_9: f32[B, S, 48] = aten.linear.default(rms_norm_5, weights["model.layers.1.self_attn.v_proj.weight"])  # model.layers.1.self_attn.v_proj @ transformers/models/gemma/modeling_gemma.py:256
    reshape_8: f32[B, S, 2, 24] = aten.reshape.default(linear_9, [size_B, size_S, -1, 24])  # model.layers.1.self_attn @ transformers/models/gemma/modeling_gemma.py:256
    transpose_6: f32[B, 2, S, 24] = aten.transpose.int(reshape_8, 1, 2)  # model.layers.1.self_attn @ transformers/models/gemma/modeling_gemma.py:256
    rope_2: f32[B, 4, S, 24] = slim.rope.default(transpose_4, getitem, getitem_1)  # model.layers.1.self_attn @ transformers/models/gemma/modeling_gemma.py:259
    rope_3: f32[B, 2, S, 24] = slim.rope.default(transpose_5, getitem, getitem_1)  # model.layers.1.self_attn @ transformers/models/gemma/modeling_gemma.py:259
    attention_3: f32[B, 4, S, 24] = slim.attention.default(rope_2, rope_3, transpose_6, _to_copy, layer=1, scale=0.2041241452319315)  # model.layers.1.self_attn @ transformers/models/gemma/modeling_gemma.py:268
    transpose_7: f32[B, S, 4, 24] = aten.transpose.int(attention_3, 1, 2)  # model.layers.1.self_attn @ transformers/models/gemma/modeling_gemma.py:268
    reshape_9: f32[B, S, 96] = aten.reshape.default(transpose_7, [size_B, size_S, -1])  # model.layers.1.self_attn @ transformers/models/gemma/modeling_gemma.py:279
    linear_10: f32[B, S, 64] = aten.linear.default(reshape_9, weights["model.layers.1.self_attn.o_proj.weight"])  # model.layers.1.self_attn.o_proj @ transformers/models/gemma/modeling_gemma.py:280
    add_12: f32[B, S, 64] = aten.add.Tensor(add_7, linear_10)  # model.layers.1 @ transformers/models/gemma/modeling_gemma.py:317
    rms_norm_7: f32[B, S, 64] = slim.rms_norm.default(add_12, weights["model.layers.1.post_attention_layernorm.weight"], eps=1e-06, offset=1.0)  # model.layers.1.post_attention_layernorm @ transformers/models/gemma/modeling_gemma.py:76
    linear_11: f32[B, S, 96] = aten.linear.default(rms_norm_7, weights["model.layers.1.mlp.gate_proj.weight"])  # model.layers.1.mlp.gate_proj @ transformers/models/gemma/modeling_gemma.py:95
    gelu_1: f32[B, S, 96] = aten.gelu.default(linear_11, approximate='tanh')  # model.layers.1.mlp.act_fn @ transformers/activations.py:51
    linear_12: f32[B, S, 96] = aten.linear.default(rms_norm_7, weights["model.layers.1.mlp.up_proj.weight"])  # model.layers.1.mlp.up_proj @ transformers/models/gemma/modeling_gemma.py:95
    mul_33: f32[B, S, 96] = aten.mul.Tensor(gelu_1, linear_12)  # model.layers.1.mlp @ transformers/models/gemma/modeling_gemma.py:95
    linear_13: f32[B, S, 64] = aten.linear.default(mul_33, weights["model.layers.1.mlp.down_proj.weight"])  # model.layers.1.mlp.down_proj @ transformers/models/gemma/modeling_gemma.py:95
    add_15: f32[B, S, 64] = aten.add.Tensor(add_12, linear_13)  # model.layers.1 @ transformers/models/gemma/modeling_gemma.py:323
    rms_norm_9: f32[B, S, 64] = slim.rms_norm.default(add_15, weights["model.norm.weight"], eps=1e-06, offset=1.0)  # model.norm @ transformers/models/gemma/modeling_gemma.py:76
    linear_14: f32[B, S, 101] = aten.linear.default(rms_norm_9, weights["model.embed_tokens.weight"])  # lm_head @ transformers/models/gemma/modeling_gemma.py:490
    return (linear_14,)
