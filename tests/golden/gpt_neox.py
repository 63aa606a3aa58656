# slim IR 1: GPTNeoXForCausalLM, 71,744 parameters, 286,992 bytes
from __future__ import annotations

import math
import operator

import torch

aten, slim = torch.ops.aten, torch.ops.slim
inf, nan = math.inf, math.nan


def forward(weights, input_ids: i64[B, S], attention_mask: i64[B, S], position_ids: i64[B, S]):
    size_S: int = aten.sym_size.int(input_ids, 1)
    size_B: int = aten.sym_size.int(input_ids, 0)
    embedding: f32[B, S, 64] = aten.embedding.default(weights["gpt_neox.embed_in.weight"], input_ids)  # gpt_neox.embed_in @ transformers/models/gpt_neox/modeling_gpt_neox.py:326
    _to_copy: bool[B, S] = aten._to_copy.default(attention_mask, dtype=torch.bool)  # gpt_neox @ transformers/models/gpt_neox/modeling_gpt_neox.py:336
    rope_table: tuple[f32[B, S, 4], f32[B, S, 4]] = slim.rope_table.default(position_ids, weights["gpt_neox.rotary_emb.inv_freq"])  # gpt_neox.rotary_emb @ transformers/models/gpt_neox/modeling_gpt_neox.py:94
    getitem: f32[B, S, 4] = rope_table[0]  # gpt_neox.rotary_emb @ transformers/models/gpt_neox/modeling_gpt_neox.py:94
    getitem_12: f32[B, S, 4] = rope_table[1]  # gpt_neox.rotary_emb @ transformers/models/gpt_neox/modeling_gpt_neox.py:95
    layer_norm_5: f32[B, S, 64] = slim.layer_norm.default(embedding, weights["gpt_neox.layers.0.input_layernorm.weight"], weights["gpt_neox.layers.0.input_layernorm.bias"], eps=1e-05)  # gpt_neox.layers.0.input_layernorm @ transformers/models/gpt_neox/modeling_gpt_neox.py:250
    linear_9: f32[B, S, 64] = aten.linear.default(layer_norm_5, weights["gpt_neox.layers.0.attention.query_key_value.weight_0"], weights["gpt_neox.layers.0.attention.query_key_value.bias_0"])  # gpt_neox.layers.0.attention.query_key_value @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    reshape_6: f32[B, S, 4, 16] = aten.reshape.default(linear_9, [size_B, size_S, -1, 16])  # gpt_neox.layers.0.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    transpose_4: f32[B, 4, S, 16] = aten.transpose.int(reshape_6, 1, 2)  # gpt_neox.layers.0.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    linear_10: f32[B, S, 64] = aten.linear.default(layer_norm_5, weights["gpt_neox.layers.0.attention.query_key_value.weight_1"], weights["gpt_neox.layers.0.attention.query_key_value.bias_1"])  # gpt_neox.layers.0.attention.query_key_value @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    reshape_7: f32[B, S, 4, 16] = aten.reshape.default(linear_10, [size_B, size_S, -1, 16])  # gpt_neox.layers.0.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    transpose_5: f32[B, 4, S, 16] = aten.transpose.int(reshape_7, 1, 2)  # gpt_neox.layers.0.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    linear_11: f32[B, S, 64] = aten.linear.default(layer_norm_5, weights["gpt_neox.layers.0.attention.query_key_value.weight_2"], weights["gpt_neox.layers.0.attention.query_key_value.bias_2"])  # gpt_neox.layers.0.attention.query_key_value @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    reshape_8: f32[B, S, 4, 16] = aten.reshape.default(linear_11, [size_B, size_S, -1, 16])  # gpt_neox.layers.0.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    transpose_6: f32[B, 4, S, 16] = aten.transpose.int(reshape_8, 1, 2)  # gpt_neox.layers.0.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    rope_2: f32[B, 4, S, 16] = slim.rope.default(transpose_4, getitem, getitem_12)  # gpt_neox.layers.0.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:199
    rope_3: f32[B, 4, S, 16] = slim.rope.default(transpose_5, getitem, getitem_12)  # gpt_neox.layers.0.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:199
    attention_2: f32[B, 4, S, 16] = slim.attention.default(rope_2, rope_3, transpose_6, _to_copy, layer=0, scale=0.25)  # gpt_neox.layers.0.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:210
    transpose_1: f32[B, S, 4, 16] = aten.transpose.int(attention_2, 1, 2)  # gpt_neox.layers.0.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:210
    reshape_3: f32[B, S, 64] = aten.reshape.default(transpose_1, [size_B, size_S, -1])  # gpt_neox.layers.0.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:222
    linear_1: f32[B, S, 64] = aten.linear.default(reshape_3, weights["gpt_neox.layers.0.attention.dense.weight"], weights["gpt_neox.layers.0.attention.dense.bias"])  # gpt_neox.layers.0.attention.dense @ transformers/models/gpt_neox/modeling_gpt_neox.py:223
    layer_norm_6: f32[B, S, 64] = slim.layer_norm.default(embedding, weights["gpt_neox.layers.0.post_attention_layernorm.weight"], weights["gpt_neox.layers.0.post_attention_layernorm.bias"], eps=1e-05)  # gpt_neox.layers.0.post_attention_layernorm @ transformers/models/gpt_neox/modeling_gpt_neox.py:261
    linear_2: f32[B, S, 96] = aten.linear.default(layer_norm_6, weights["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"], weights["gpt_neox.layers.0.mlp.dense_h_to_4h.bias"])  # gpt_neox.layers.0.mlp.dense_h_to_4h @ transformers/models/gpt_neox/modeling_gpt_neox.py:45
    gelu: f32[B, S, 96] = aten.gelu.default(linear_2)  # gpt_neox.layers.0.mlp.act @ transformers/activations.py:89
    linear_3: f32[B, S, 64] = aten.linear.default(gelu, weights["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"], weights["gpt_neox.layers.0.mlp.dense_4h_to_h.bias"])  # gpt_neox.layers.0.mlp.dense_4h_to_h @ transformers/models/gpt_neox/modeling_gpt_neox.py:47
    add_2: f32[B, S, 64] = aten.add.Tensor(linear_3, linear_1)  # gpt_neox.layers.0 @ transformers/models/gpt_neox/modeling_gpt_neox.py:263
    add_3: f32[B, S, 64] = aten.add.Tensor(add_2, embedding)  # gpt_neox.layers.0 @ transformers/models/gpt_neox/modeling_gpt_neox.py:263
    layer_norm_7: f32[B, S, 64] = slim.layer_norm.default(add_3, weights["gpt_neox.layers.1.input_layernorm.weight"], weights["gpt_neox.layers.1.input_layernorm.bias"], eps=1e-05)  # gpt_neox.layers.1.input_layernorm @ transformers/models/gpt_neox/modeling_gpt_neox.py:250
    linear_12: f32[B, S, 64] = aten.linear.default(layer_norm_7, weights["gpt_neox.layers.1.attention.query_key_value.weight_0"], weights["gpt_neox.layers.1.attention.query_key_value.bias_0"])  # gpt_neox.layers.1.attention.query_key_value @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    reshape_9: f32[B, S, 4, 16] = aten.reshape.default(linear_12, [size_B, size_S, -1, 16])  # gpt_neox.layers.1.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    transpose_7: f32[B, 4, S, 16] = aten.transpose.int(reshape_9, 1, 2)  # gpt_neox.layers.1.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    linear_13: f32[B, S, 64] = aten.linear.default(layer_norm_7, weights["gpt_neox.layers.1.attention.query_key_value.weight_1"], weights["gpt_neox.layers.1.attention.query_key_value.bias_1"])  # gpt_neox.layers.1.attention.query_key_value @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    reshape_10: f32[B, S, 4, 16] = aten.reshape.default(linear_13, [size_B, size_S, -1, 16])  # gpt_neox.layers.1.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    transpose_8: f32[B, 4, S, 16] = aten.transpose.int(reshape_10, 1, 2)  # gpt_neox.layers.1.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    linear_14: f32[B, S, 64] = aten.linear.default(layer_norm_7, weights["gpt_neox.layers.1.attention.query_key_value.weight_2"], weights["gpt_neox.layers.1.attention.query_key_value.bias_2"])  # gpt_neox.layers.1.attention.query_key_value @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    reshape_11: f32[B, S, 4, 16] = aten.reshape.default(linear_14, [size_B, size_S, -1, 16])  # gpt_neox.layers.1.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    transpose_9: f32[B, 4, S, 16] = aten.transpose.int(reshape_11, 1, 2)  # gpt_neox.layers.1.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:195
    rope_6: f32[B, 4, S, 16] = slim.rope.default(transpose_7, getitem, getitem_12)  # gpt_neox.layers.1.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:199
    rope_7: f32[B, 4, S, 16] = slim.rope.default(transpose_8, getitem, getitem_12)  # gpt_neox.layers.1.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:199
    attention_3: f32[B, 4, S, 16] = slim.attention.default(rope_6, rope_7, transpose_9, _to_copy, layer=1, scale=0.25)  # gpt_neox.layers.1.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:210
    transpose_3: f32[B, S, 4, 16] = aten.transpose.int(attention_3, 1, 2)  # gpt_neox.layers.1.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:210
    reshape_5: f32[B, S, 64] = aten.reshape.default(transpose_3, [size_B, size_S, -1])  # gpt_neox.layers.1.attention @ transformers/models/gpt_neox/modeling_gpt_neox.py:222
    linear_5: f32[B, S, 64] = aten.linear.default(reshape_5, weights["gpt_neox.layers.1.attention.dense.weight"], weights["gpt_neox.layers.1.attention.dense.bias"])  # gpt_neox.layers.1.attention.dense @ transformers/models/gpt_neox/modeling_gpt_neox.py:223
    layer_norm_8: f32[B, S, 64] = slim.layer_norm.default(add_3, weights["gpt_neox.layers.1.post_attention_layernorm.weight"], weights["gpt_neox.layers.1.post_attention_layernorm.bias"], eps=1e-05)  # gpt_neox.layers.1.post_attention_layernorm @ transformers/models/gpt_neox/modeling_gpt_neox.py:261
    linear_6: f32[B, S, 96] = aten.linear.default(layer_norm_8, weights["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"], weights["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"])  # gpt_neox.layers.1.mlp.dense_h_to_4h @ transformers/models/gpt_neox/modeling_gpt_neox.py:45
    gelu_1: f32[B, S, 96] = aten.gelu.default(linear_6)  # gpt_neox.layers.1.mlp.act @ transformers/activations.py:89
    linear_7: f32[B, S, 64] = aten.linear.default(gelu_1, weights["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"], weights["gpt_neox.layers.1.mlp.dense_4h_to_h.bias"])  # gpt_neox.layers.1.mlp.dense_4h_to_h @ transformers/models/gpt_neox/modeling_gpt_neox.py:47
    add_6: f32[B, S, 64] = aten.add.Tensor(linear_7, linear_5)  # gpt_neox.layers.1 @ transformers/models/gpt_neox/modeling_gpt_neox.py:263
    add_7: f32[B, S, 64] = aten.add.Tensor(add_6, add_3)  # gpt_neox.layers.1 @ transformers/models/gpt_neox/modeling_gpt_neox.py:263
    layer_norm_9: f32[B, S, 64] = slim.layer_norm.default(add_7, weights["gpt_neox.final_layer_norm.weight"], weights["gpt_neox.final_layer_norm.bias"], eps=1e-05)  # gpt_neox.final_layer_norm @ transformers/models/gpt_neox/modeling_gpt_neox.py:357
    linear_8: f32[B, S, 101] = aten.linear.default(layer_norm_9, weights["lm_head.weight"])  # lm_head @ transformers/models/gpt_neox/modeling_gpt_neox.py:445
    return (linear_8,)
