# slim IR 1: BertModel, 85,952 parameters, 345,856 bytes
from __future__ import annotations

import math
import operator

import torch

aten, slim = torch.ops.aten, torch.ops.slim
inf, nan = math.inf, math.nan


def forward(weights, input_ids: i64[B, S], attention_mask: i64[B, S], token_type_ids: i64[B, S]):
    size_S: int = aten.sym_size.int(input_ids, 1)
    size_B: int = aten.sym_size.int(input_ids, 0)
    slice_1: i64[1, S] = aten.slice.Tensor(weights["embeddings.position_ids"], 1, 0, size_S)  # embeddings @ transformers/models/bert/modeling_bert.py:84
    embedding: f32[B, S, 64] = aten.embedding.default(weights["embeddings.word_embeddings.weight"], input_ids, 0)  # embeddings.word_embeddings @ transformers/models/bert/modeling_bert.py:99
    embedding_1: f32[B, S, 64] = aten.embedding.default(weights["embeddings.token_type_embeddings.weight"], token_type_ids)  # embeddings.token_type_embeddings @ transformers/models/bert/modeling_bert.py:100
    add_1: f32[B, S, 64] = aten.add.Tensor(embedding, embedding_1)  # embeddings @ transformers/models/bert/modeling_bert.py:101
    embedding_2: f32[1, S, 64] = aten.embedding.default(weights["embeddings.position_embeddings.weight"], slice_1)  # embeddings.position_embeddings @ transformers/models/bert/modeling_bert.py:103
    add_2: f32[B, S, 64] = aten.add.Tensor(add_1, embedding_2)  # embeddings @ transformers/models/bert/modeling_bert.py:104
    layer_norm_5: f32[B, S, 64] = slim.layer_norm.default(add_2, weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"], eps=1e-12)  # embeddings.LayerNorm @ transformers/models/bert/modeling_bert.py:106
    _to_copy: bool[B, S] = aten._to_copy.default(attention_mask, dtype=torch.bool)  # @ transformers/models/bert/modeling_bert.py:661
    linear: f32[B, S, 64] = aten.linear.default(layer_norm_5, weights["encoder.layer.0.attention.self.query.weight"], weights["encoder.layer.0.attention.self.query.bias"])  # encoder.layer.0.attention.self.query @ transformers/models/bert/modeling_bert.py:175
    reshape_2: f32[B, S, 4, 16] = aten.reshape.default(linear, [size_B, size_S, -1, 16])  # encoder.layer.0.attention.self @ transformers/models/bert/modeling_bert.py:175
    transpose: f32[B, 4, S, 16] = aten.transpose.int(reshape_2, 1, 2)  # encoder.layer.0.attention.self @ transformers/models/bert/modeling_bert.py:175
    linear_1: f32[B, S, 64] = aten.linear.default(layer_norm_5, weights["encoder.layer.0.attention.self.key.weight"], weights["encoder.layer.0.attention.self.key.bias"])  # encoder.layer.0.attention.self.key @ transformers/models/bert/modeling_bert.py:176
    reshape_3: f32[B, S, 4, 16] = aten.reshape.default(linear_1, [size_B, size_S, -1, 16])  # encoder.layer.0.attention.self @ transformers/models/bert/modeling_bert.py:176
    transpose_1: f32[B, 4, S, 16] = aten.transpose.int(reshape_3, 1, 2)  # encoder.layer.0.attention.self @ transformers/models/bert/modeling_bert.py:176
    linear_2: f32[B, S, 64] = aten.linear.default(layer_norm_5, weights["encoder.layer.0.attention.self.value.weight"], weights["encoder.layer.0.attention.self.value.bias"])  # encoder.layer.0.attention.self.value @ transformers/models/bert/modeling_bert.py:177
    reshape_4: f32[B, S, 4, 16] = aten.reshape.default(linear_2, [size_B, size_S, -1, 16])  # encoder.layer.0.attention.self @ transformers/models/bert/modeling_bert.py:177
    transpose_2: f32[B, 4, S, 16] = aten.transpose.int(reshape_4, 1, 2)  # encoder.layer.0.attention.self @ transformers/models/bert/modeling_bert.py:177
    attention_2: f32[B, 4, S, 16] = slim.attention.default(transpose, transpose_1, transpose_2, _to_copy, causal=False, layer=0, scale=0.25)  # encoder.layer.0.attention.self @ transformers/models/bert/modeling_bert.py:192
    transpose_3: f32[B, S, 4, 16] = aten.transpose.int(attention_2, 1, 2)  # encoder.layer.0.attention.self @ transformers/models/bert/modeling_bert.py:192
    reshape_5: f32[B, S, 64] = aten.reshape.default(transpose_3, [size_B, size_S, -1])  # encoder.layer.0.attention.self @ transformers/models/bert/modeling_bert.py:202
    linear_3: f32[B, S, 64] = aten.linear.default(reshape_5, weights["encoder.layer.0.attention.output.dense.weight"], weights["encoder.layer.0.attention.output.dense.bias"])  # encoder.layer.0.attention.output.dense @ transformers/models/bert/modeling_bert.py:290
    add_3: f32[B, S, 64] = aten.add.Tensor(linear_3, layer_norm_5)  # encoder.layer.0.attention.output @ transformers/models/bert/modeling_bert.py:292
    layer_norm_6: f32[B, S, 64] = slim.layer_norm.default(add_3, weights["encoder.layer.0.attention.output.LayerNorm.weight"], weights["encoder.layer.0.attention.output.LayerNorm.bias"], eps=1e-12)  # encoder.layer.0.attention.output.LayerNorm @ transformers/models/bert/modeling_bert.py:292
    linear_4: f32[B, S, 96] = aten.linear.default(layer_norm_6, weights["encoder.layer.0.intermediate.dense.weight"], weights["encoder.layer.0.intermediate.dense.bias"])  # encoder.layer.0.intermediate.dense @ transformers/models/bert/modeling_bert.py:335
    gelu: f32[B, S, 96] = aten.gelu.default(linear_4)  # encoder.layer.0.intermediate.intermediate_act_fn @ transformers/activations.py:89
    linear_5: f32[B, S, 64] = aten.linear.default(gelu, weights["encoder.layer.0.output.dense.weight"], weights["encoder.layer.0.output.dense.bias"])  # encoder.layer.0.output.dense @ transformers/models/bert/modeling_bert.py:348
    add_4: f32[B, S, 64] = aten.add.Tensor(linear_5, layer_norm_6)  # encoder.layer.0.output @ transformers/models/bert/modeling_bert.py:350
    layer_norm_7: f32[B, S, 64] = slim.layer_norm.default(add_4, weights["encoder.layer.0.output.LayerNorm.weight"], weights["encoder.layer.0.output.LayerNorm.bias"], eps=1e-12)  # encoder.layer.0.output.LayerNorm @ transformers/models/bert/modeling_bert.py:350
    linear_6: f32[B, S, 64] = aten.linear.default(layer_norm_7, weights["encoder.layer.1.attention.self.query.weight"], weights["encoder.layer.1.attention.self.query.bias"])  # encoder.layer.1.attention.self.query @ transformers/models/bert/modeling_bert.py:175
    reshape_6: f32[B, S, 4, 16] = aten.reshape.default(linear_6, [size_B, size_S, -1, 16])  # encoder.layer.1.attention.self @ transformers/models/bert/modeling_bert.py:175
    transpose_4: f32[B, 4, S, 16] = aten.transpose.int(reshape_6, 1, 2)  # encoder.layer.1.attention.self @ transformers/models/bert/modeling_bert.py:175
    linear_7: f32[B, S, 64] = aten.linear.default(layer_norm_7, weights["encoder.layer.1.attention.self.key.weight"], weights["encoder.layer.1.attention.self.key.bias"])  # encoder.layer.1.attention.self.key @ transformers/models/bert/modeling_bert.py:176
    reshape_7: f32[B, S, 4, 16] = aten.reshape.default(linear_7, [size_B, size_S, -1, 16])  # encoder.layer.1.attention.self @ transformers/models/bert/modeling_bert.py:176
    transpose_5: f32[B, 4, S, 16] = aten.transpose.int(reshape_7, 1, 2)  # encoder.layer.1.attention.self @ transformers/models/bert/modeling_bert.py:176
    linear_8: f32[B, S, 64] = aten.linear.default(layer_norm_7, weights["encoder.layer.1.attention.self.value.weight"], weights["encoder.layer.1.attention.self.value.bias"])  # encoder.layer.1.attention.self.value @ transformers/models/bert/modeling_bert.py:177
    reshape_8: f32[B, S, 4, 16] = aten.reshape.default(linear_8, [size_B, size_S, -1, 16])  # encoder.layer.1.attention.self @ transformers/models/bert/modeling_bert.py:177
    transpose_6: f32[B, 4, S, 16] = aten.transpose.int(reshape_8, 1, 2)  # encoder.layer.1.attention.self @ transformers/models/bert/modeling_bert.py:177
    attention_3: f32[B, 4, S, 16] = slim.attention.default(transpose_4, transpose_5, transpose_6, _to_copy, causal=False, layer=1, scale=0.25)  # encoder.layer.1.attention.self @ transformers/models/bert/modeling_bert.py:192
    transpose_7: f32[B, S, 4, 16] = aten.transpose.int(attention_3, 1, 2)  # encoder.layer.1.attention.self @ transformers/models/bert/modeling_bert.py:192
    reshape_9: f32[B, S, 64] = aten.reshape.default(transpose_7, [size_B, size_S, -1])  # encoder.layer.1.attention.self @ transformers/models/bert/modeling_bert.py:202
    linear_9: f32[B, S, 64] = aten.linear.default(reshape_9, weights["encoder.layer.1.attention.output.dense.weight"], weights["encoder.layer.1.attention.output.dense.bias"])  # encoder.layer.1.attention.output.dense @ transformers/models/bert/modeling_bert.py:290
    add_5: f32[B, S, 64] = aten.add.Tensor(linear_9, layer_norm_7)  # encoder.layer.1.attention.output @ transformers/models/bert/modeling_bert.py:292
    layer_norm_8: f32[B, S, 64] = slim.layer_norm.default(add_5, weights["encoder.layer.1.attention.output.LayerNorm.weight"], weights["encoder.layer.1.attention.output.LayerNorm.bias"], eps=1e-12)  # encoder.layer.1.attention.output.LayerNorm @ transformers/models/bert/modeling_bert.py:292
    linear_10: f32[B, S, 96] = aten.linear.default(layer_norm_8, weights["encoder.layer.1.intermediate.dense.weight"], weights["encoder.layer.1.intermediate.dense.bias"])  # encoder.layer.1.intermediate.dense @ transformers/models/bert/modeling_bert.py:335
    gelu_1: f32[B, S, 96] = aten.gelu.default(linear_10)  # encoder.layer.1.intermediate.intermediate_act_fn @ transformers/activations.py:89
    linear_11: f32[B, S, 64] = aten.linear.default(gelu_1, weights["encoder.layer.1.output.dense.weight"], weights["encoder.layer.1.output.dense.bias"])  # encoder.layer.1.output.dense @ transformers/models/bert/modeling_bert.py:348
    add_6: f32[B, S, 64] = aten.add.Tensor(linear_11, layer_norm_8)  # encoder.layer.1.output @ transformers/models/bert/modeling_bert.py:350
    layer_norm_9: f32[B, S, 64] = slim.layer_norm.default(add_6, weights["encoder.layer.1.output.LayerNorm.weight"], weights["encoder.layer.1.output.LayerNorm.bias"], eps=1e-12)  # encoder.layer.1.output.LayerNorm @ transformers/models/bert/modeling_bert.py:350
    select: f32[B, 64] = aten.select.int(layer_norm_9, 1, 0)  # pooler @ transformers/models/bert/modeling_bert.py:460
    linear_12: f32[B, 64] = aten.linear.default(select, weights["pooler.dense.weight"], weights["pooler.dense.bias"])  # pooler.dense @ transformers/models/bert/modeling_bert.py:461
    tanh: f32[B, 64] = aten.tanh.default(linear_12)  # pooler.activation @ transformers/models/bert/modeling_bert.py:462
    return (layer_norm_9, tanh)
