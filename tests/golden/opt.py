# slim IR 1: OPTForCausalLM, 86,320 parameters, 345,280 bytes
from __future__ import annotations

import math
import operator

import torch

aten, slim = torch.ops.aten, torch.ops.slim
inf, nan = math.inf, math.nan


def forward(weights, input_ids: i64[B, S], attention_mask: i64[B, S], position_ids: i64[B, S]):
    size_S: int = aten.sym_size.int(input_ids, 1)
    size_B: int = aten.sym_size.int(input_ids, 0)
    embedding: f32[B, S, 48] = aten.embedding.default(weights["model.decoder.embed_tokens.weight"], input_ids, 0)  # model.decoder.embed_tokens @ transformers/models/opt/modeling_opt.py:338
    _to_copy: bool[B, S] = aten._to_copy.default(attention_mask, dtype=torch.bool, device=torch.device("cpu"))  # model.decoder @ transformers/models/opt/modeling_opt.py:359
    add_15: i64[B, S] = aten.add.Tensor(position_ids, 2)  # model.decoder.embed_positions @ transformers/models/opt/modeling_opt.py:70
    embedding_1: f32[B, S, 64] = aten.embedding.default(weights["model.decoder.embed_positions.weight"], add_15)  # model.decoder.embed_positions @ transformers/models/opt/modeling_opt.py:70
    linear: f32[B, S, 64] = aten.linear.default(embedding, weights["model.decoder.project_in.weight"])  # model.decoder.project_in @ transformers/models/opt/modeling_opt.py:369
    add_27: f32[B, S, 64] = aten.add.Tensor(linear, embedding_1)  # model.decoder @ transformers/models/opt/modeling_opt.py:371
    layer_norm_5: f32[B, S, 64] = slim.layer_norm.default(add_27, weights["model.decoder.layers.0.self_attn_layer_norm.weight"], weights["model.decoder.layers.0.self_attn_layer_norm.bias"], eps=1e-05)  # model.decoder.layers.0.self_attn_layer_norm @ transformers/models/opt/modeling_opt.py:215
    linear_1: f32[B, S, 64] = aten.linear.default(layer_norm_5, weights["model.decoder.layers.0.self_attn.q_proj.weight"], weights["model.decoder.layers.0.self_attn.q_proj.bias"])  # model.decoder.layers.0.self_attn.q_proj @ transformers/models/opt/modeling_opt.py:151
    mul_26: f32[B, S, 64] = aten.mul.Tensor(linear_1, 0.25)  # model.decoder.layers.0.self_attn @ transformers/models/opt/modeling_opt.py:151
    reshape: f32[B, S, 4, 16] = aten.reshape.default(mul_26, [size_B, -1, 4, 16])  # model.decoder.layers.0.self_attn @ transformers/models/opt/modeling_opt.py:152
    transpose: f32[B, 4, S, 16] = aten.transpose.int(reshape, 1, 2)  # model.decoder.layers.0.self_attn @ transformers/models/opt/modeling_opt.py:152
    linear_2: f32[B, S, 64] = aten.linear.default(layer_norm_5, weights["model.decoder.layers.0.self_attn.k_proj.weight"], weights["model.decoder.layers.0.self_attn.k_proj.bias"])  # model.decoder.layers.0.self_attn.k_proj @ transformers/models/opt/modeling_opt.py:154
    linear_3: f32[B, S, 64] = aten.linear.default(layer_norm_5, weights["model.decoder.layers.0.self_attn.v_proj.weight"], weights["model.decoder.layers.0.self_attn.v_proj.bias"])  # model.decoder.layers.0.self_attn.v_proj @ transformers/models/opt/modeling_opt.py:155
    reshape_1: f32[B, S, 4, 16] = aten.reshape.default(linear_2, [size_B, -1, 4, 16])  # model.decoder.layers.0.self_attn @ transformers/models/opt/modeling_opt.py:156
    transpose_1: f32[B, 4, S, 16] = aten.transpose.int(reshape_1, 1, 2)  # model.decoder.layers.0.self_attn @ transformers/models/opt/modeling_opt.py:156
    reshape_2: f32[B, S, 4, 16] = aten.reshape.default(linear_3, [size_B, -1, 4, 16])  # model.decoder.layers.0.self_attn @ transformers/models/opt/modeling_opt.py:157
    transpose_2: f32[B, 4, S, 16] = aten.transpose.int(reshape_2, 1, 2)  # model.decoder.layers.0.self_attn @ transformers/models/opt/modeling_opt.py:157
    attention_2: f32[B, 4, S, 16] = slim.attention.default(transpose, transpose_1, transpose_2, _to_copy, layer=0, scale=1.0)  # model.decoder.layers.0.self_attn @ transformers/models/opt/modeling_opt.py:167
    transpose_3: f32[B, S, 4, 16] = aten.transpose.int(attention_2, 1, 2)  # model.decoder.layers.0.self_attn @ transformers/models/opt/modeling_opt.py:167
    reshape_3: f32[B, S, 64] = aten.reshape.default(transpose_3, [size_B, size_S, -1])  # model.decoder.layers.0.self_attn @ transformers/models/opt/modeling_opt.py:178
    linear_4: f32[B, S, 64] = aten.linear.default(reshape_3, weights["model.decoder.layers.0.self_attn.out_proj.weight"], weights["model.decoder.layers.0.self_attn.out_proj.bias"])  # model.decoder.layers.0.self_attn.out_proj @ transformers/models/opt/modeling_opt.py:179
    add_109: f32[B, S, 64] = aten.add.Tensor(add_27, linear_4)  # model.decoder.layers.0 @ transformers/models/opt/modeling_opt.py:226
    reshape_4: f32[B*S, 64] = aten.reshape.default(add_109, [-1, 64])  # model.decoder.layers.0 @ transformers/models/opt/modeling_opt.py:234
    layer_norm_6: f32[B*S, 64] = slim.layer_norm.default(reshape_4, weights["model.decoder.layers.0.final_layer_norm.weight"], weights["model.decoder.layers.0.final_layer_norm.bias"], eps=1e-05)  # model.decoder.layers.0.final_layer_norm @ transformers/models/opt/modeling_opt.py:239
    linear_5: f32[B*S, 96] = aten.linear.default(layer_norm_6, weights["model.decoder.layers.0.fc1.weight"], weights["model.decoder.layers.0.fc1.bias"])  # model.decoder.layers.0.fc1 @ transformers/models/opt/modeling_opt.py:241
    relu: f32[B*S, 96] = aten.relu.default(linear_5)  # model.decoder.layers.0.activation_fn @ transformers/models/opt/modeling_opt.py:242
    linear_6: f32[B*S, 64] = aten.linear.default(relu, weights["model.decoder.layers.0.fc2.weight"], weights["model.decoder.layers.0.fc2.bias"])  # model.decoder.layers.0.fc2 @ transformers/models/opt/modeling_opt.py:244
    add_132: f32[B*S, 64] = aten.add.Tensor(reshape_4, linear_6)  # model.decoder.layers.0 @ transformers/models/opt/modeling_opt.py:247
    reshape_12: f32[B, S, 64] = aten.reshape.default(add_132, [size_B, size_S, -1])  # model.decoder.layers.0 @ transformers/models/opt/modeling_opt.py:247
    layer_norm_7: f32[B, S, 64] = slim.layer_norm.default(reshape_12, weights["model.decoder.layers.1.self_attn_layer_norm.weight"], weights["model.decoder.layers.1.self_attn_layer_norm.bias"], eps=1e-05)  # model.decoder.layers.1.self_attn_layer_norm @ transformers/models/opt/modeling_opt.py:215
    linear_7: f32[B, S, 64] = aten.linear.default(layer_norm_7, weights["model.decoder.layers.1.self_attn.q_proj.weight"], weights["model.decoder.layers.1.self_attn.q_proj.bias"])  # model.decoder.layers.1.self_attn.q_proj @ transformers/models/opt/modeling_opt.py:151
    mul_118: f32[B, S, 64] = aten.mul.Tensor(linear_7, 0.25)  # model.decoder.layers.1.self_attn @ transformers/models/opt/modeling_opt.py:151
    reshape_6: f32[B, S, 4, 16] = aten.reshape.default(mul_118, [size_B, -1, 4, 16])  # model.decoder.layers.1.self_attn @ transformers/models/opt/modeling_opt.py:152
    transpose_4: f32[B, 4, S, 16] = aten.transpose.int(reshape_6, 1, 2)  # model.decoder.layers.1.self_attn @ transformers/models/opt/modeling_opt.py:152
    linear_8: f32[B, S, 64] = aten.linear.default(layer_norm_7, weights["model.decoder.layers.1.self_attn.k_proj.weight"], weights["model.decoder.layers.1.self_attn.k_proj.bias"])  # model.decoder.layers.1.self_attn.k_proj @ transformers/models/opt/modeling_opt.py:154
    linear_9: f32[B, S, 64] = aten.linear.default(layer_norm_7, weights["model.decoder.layers.1.self_attn.v_proj.weight"], weights["model.decoder.layers.1.self_attn.v_proj.bias"])  # model.decoder.layers.1.self_attn.v_proj @ transformers/models/opt/modeling_opt.py:155
    reshape_7: f32[B, S, 4, 16] = aten.reshape.default(linear_8, [size_B, -1, 4, 16])  # model.decoder.layers.1.self_attn @ transformers/models/opt/modeling_opt.py:156
    transpose_5: f32[B, 4, S, 16] = aten.transpose.int(reshape_7, 1, 2)  # model.decoder.layers.1.self_attn @ transformers/models/opt/modeling_opt.py:156
    reshape_8: f32[B, S, 4, 16] = aten.reshape.default(linear_9, [size_B, -1, 4, 16])  # model.decoder.layers.1.self_attn @ transformers/models/opt/modeling_opt.py:157
    transpose_6: f32[B, 4, S, 16] = aten.transpose.int(reshape_8, 1, 2)  # model.decoder.layers.1.self_attn @ transformers/models/opt/modeling_opt.py:157
    attention_3: f32[B, 4, S, 16] = slim.attention.default(transpose_4, transpose_5, transpose_6, _to_copy, layer=1, scale=1.0)  # model.decoder.layers.1.self_attn @ transformers/models/opt/modeling_opt.py:167
    transpose_7: f32[B, S, 4, 16] = aten.transpose.int(attention_3, 1, 2)  # model.decoder.layers.1.self_attn @ transformers/models/opt/modeling_opt.py:167
    reshape_9: f32[B, S, 64] = aten.reshape.default(transpose_7, [size_B, size_S, -1])  # model.decoder.layers.1.self_attn @ transformers/models/opt/modeling_opt.py:178
    linear_10: f32[B, S, 64] = aten.linear.default(reshape_9, weights["model.decoder.layers.1.self_attn.out_proj.weight"], weights["model.decoder.layers.1.self_attn.out_proj.bias"])  # model.decoder.layers.1.self_attn.out_proj @ transformers/models/opt/modeling_opt.py:179
    add_217: f32[B, S, 64] = aten.add.Tensor(reshape_12, linear_10)  # model.decoder.layers.1 @ transformers/models/opt/modeling_opt.py:226
    reshape_10: f32[B*S, 64] = aten.reshape.default(add_217, [-1, 64])  # model.decoder.layers.1 @ transformers/models/opt/modeling_opt.py:234
    layer_norm_8: f32[B*S, 64] = slim.layer_norm.default(reshape_10, weights["model.decoder.layers.1.final_layer_norm.weight"], weights["model.decoder.layers.1.final_layer_norm.bias"], eps=1e-05)  # model.decoder.layers.1.final_layer_norm @ transformers/models/opt/modeling_opt.py:239
    linear_11: f32[B*S, 96] = aten.linear.default(layer_norm_8, weights["model.decoder.layers.1.fc1.weight"], weights["model.decoder.layers.1.fc1.bias"])  # model.decoder.layers.1.fc1 @ transformers/models/opt/modeling_opt.py:241
    relu_1: f32[B*S, 96] = aten.relu.default(linear_11)  # model.decoder.layers.1.activation_fn @ transformers/models/opt/modeling_opt.py:242
    linear_12: f32[B*S, 64] = aten.linear.default(relu_1, weights["model.decoder.layers.1.fc2.weight"], weights["model.decoder.layers.1.fc2.bias"])  # model.decoder.layers.1.fc2 @ transformers/models/opt/modeling_opt.py:244
    add_240: f32[B*S, 64] = aten.add.Tensor(reshape_10, linear_12)  # model.decoder.layers.1 @ transformers/models/opt/modeling_opt.py:247
    reshape_13: f32[B, S, 64] = aten.reshape.default(add_240, [size_B, size_S, -1])  # model.decoder.layers.1 @ transformers/models/opt/modeling_opt.py:247
    layer_norm_9: f32[B, S, 64] = slim.layer_norm.default(reshape_13, weights["model.decoder.final_layer_norm.weight"], weights["model.decoder.final_layer_norm.bias"], eps=1e-05)  # model.decoder.final_layer_norm @ transformers/models/opt/modeling_opt.py:391
    linear_13: f32[B, S, 48] = aten.linear.default(layer_norm_9, weights["model.decoder.project_out.weight"])  # model.decoder.project_out @ transformers/models/opt/modeling_opt.py:394
    linear_14: f32[B, S, 101] = aten.linear.default(linear_13, weights["model.decoder.embed_tokens.weight"])  # lm_head @ transformers/models/opt/modeling_opt.py:509
    return (linear_14,)
