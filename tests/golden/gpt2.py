# slim IR 1: GPT2LMHeadModel, 17,888 parameters, 71,552 bytes
from __future__ import annotations

import math
import operator

import torch

aten, slim = torch.ops.aten, torch.ops.slim
inf, nan = math.inf, math.nan


def forward(weights, input_ids: i64[B, S], attention_mask: i64[B, S], position_ids: i64[B, S]):
    size_S: int = aten.sym_size.int(input_ids, 1)
    size_B: int = aten.sym_size.int(input_ids, 0)
    embedding: f32[B, S, 32] = aten.embedding.default(weights["transformer.wte.weight"], input_ids)  # transformer.wte @ transformers/models/gpt2/modeling_gpt2.py:567
    embedding_1: f32[B, S, 32] = aten.embedding.default(weights["transformer.wpe.weight"], position_ids)  # transformer.wpe @ transformers/models/gpt2/modeling_gpt2.py:574
    add: f32[B, S, 32] = aten.add.Tensor(embedding, embedding_1)  # transformer @ transformers/models/gpt2/modeling_gpt2.py:575
    _to_copy: bool[B, S] = aten._to_copy.default(attention_mask, dtype=torch.bool)  # transformer @ transformers/models/gpt2/modeling_gpt2.py:581
    layer_norm_3: f32[B, S, 32] = slim.layer_norm.default(add, weights["transformer.h.0.ln_1.weight"], weights["transformer.h.0.ln_1.bias"], eps=1e-05)  # transformer.h.0.ln_1 @ transformers/models/gpt2/modeling_gpt2.py:273
    linear_8: f32[B, S, 32] = aten.linear.default(layer_norm_3, weights["transformer.h.0.attn.c_attn.weight_0"], weights["transformer.h.0.attn.c_attn.bias_0"])  # transformer.h.0.attn.c_attn @ transformers/pytorch_utils.py:120
    linear_9: f32[B, S, 32] = aten.linear.default(layer_norm_3, weights["transformer.h.0.attn.c_attn.weight_1"], weights["transformer.h.0.attn.c_attn.bias_1"])  # transformer.h.0.attn.c_attn @ transformers/pytorch_utils.py:120
    linear_10: f32[B, S, 32] = aten.linear.default(layer_norm_3, weights["transformer.h.0.attn.c_attn.weight_2"], weights["transformer.h.0.attn.c_attn.bias_2"])  # transformer.h.0.attn.c_attn @ transformers/pytorch_utils.py:120
    reshape_3: f32[B, S, 4, 8] = aten.reshape.default(linear_9, [size_B, size_S, -1, 8])  # transformer.h.0.attn @ transformers/models/gpt2/modeling_gpt2.py:187
    transpose: f32[B, 4, S, 8] = aten.transpose.int(reshape_3, 1, 2)  # transformer.h.0.attn @ transformers/models/gpt2/modeling_gpt2.py:187
    reshape_4: f32[B, S, 4, 8] = aten.reshape.default(linear_10, [size_B, size_S, -1, 8])  # transformer.h.0.attn @ transformers/models/gpt2/modeling_gpt2.py:188
    transpose_1: f32[B, 4, S, 8] = aten.transpose.int(reshape_4, 1, 2)  # transformer.h.0.attn @ transformers/models/gpt2/modeling_gpt2.py:188
    reshape_5: f32[B, S, 4, 8] = aten.reshape.default(linear_8, [size_B, size_S, -1, 8])  # transformer.h.0.attn @ transformers/models/gpt2/modeling_gpt2.py:191
    transpose_2: f32[B, 4, S, 8] = aten.transpose.int(reshape_5, 1, 2)  # transformer.h.0.attn @ transformers/models/gpt2/modeling_gpt2.py:191
    attention_1: f32[B, 4, S, 8] = slim.attention.default(transpose_2, transpose, transpose_1, _to_copy, layer=0, scale=0.3535533905932738)  # transformer.h.0.attn @ transformers/models/gpt2/modeling_gpt2.py:211
    transpose_3: f32[B, S, 4, 8] = aten.transpose.int(attention_1, 1, 2)  # transformer.h.0.attn @ transformers/models/gpt2/modeling_gpt2.py:211
    reshape_14: f32[B*S, 32] = aten.reshape.default(transpose_3, [-1, 32])  # transformer.h.0.attn.c_proj @ transformers/pytorch_utils.py:119
    linear_3: f32[B*S, 32] = aten.linear.default(reshape_14, weights["transformer.h.0.attn.c_proj.weight_t"], weights["transformer.h.0.attn.c_proj.bias"])  # transformer.h.0.attn.c_proj @ transformers/pytorch_utils.py:119
    reshape_15: f32[B, S, 32] = aten.reshape.default(linear_3, [size_B, size_S, -1])  # transformer.h.0.attn.c_proj @ transformers/pytorch_utils.py:120
    add_1: f32[B, S, 32] = aten.add.Tensor(reshape_15, add)  # transformer.h.0 @ transformers/models/gpt2/modeling_gpt2.py:282
    layer_norm_4: f32[B, S, 32] = slim.layer_norm.default(add_1, weights["transformer.h.0.ln_2.weight"], weights["transformer.h.0.ln_2.bias"], eps=1e-05)  # transformer.h.0.ln_2 @ transformers/models/gpt2/modeling_gpt2.py:304
    linear_5: f32[B, S, 128] = aten.linear.default(layer_norm_4, weights["transformer.h.0.mlp.c_fc.weight_t"], weights["transformer.h.0.mlp.c_fc.bias"])  # transformer.h.0.mlp.c_fc @ transformers/pytorch_utils.py:120
    gelu: f32[B, S, 128] = aten.gelu.default(linear_5, approximate='tanh')  # transformer.h.0.mlp.act @ transformers/activations.py:66
    linear_7: f32[B, S, 32] = aten.linear.default(gelu, weights["transformer.h.0.mlp.c_proj.weight_t"], weights["transformer.h.0.mlp.c_proj.bias"])  # transformer.h.0.mlp.c_proj @ transformers/pytorch_utils.py:120
    add_4: f32[B, S, 32] = aten.add.Tensor(add_1, linear_7)  # transformer.h.0 @ transformers/models/gpt2/modeling_gpt2.py:307
    layer_norm_5: f32[B, S, 32] = slim.layer_norm.default(add_4, weights["transformer.ln_f.weight"], weights["transformer.ln_f.bias"], eps=1e-05)  # transformer.ln_f @ transformers/models/gpt2/modeling_gpt2.py:617
    linear: f32[B, S, 96] = aten.linear.default(layer_norm_5, weights["transformer.wte.weight"])  # lm_head @ transformers/models/gpt2/modeling_gpt2.py:695
    return (linear,)
