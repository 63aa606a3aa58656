# slim IR 1: MixtralForCausalLM, 46,432 parameters, 185,744 bytes
from __future__ import annotations

import math
import operator

import torch

aten, slim = torch.ops.aten, torch.ops.slim
inf, nan = math.inf, math.nan


def forward(weights, input_ids: i64[B, S], attention_mask: i64[B, S], position_ids: i64[B, S]):
    size_S: int = aten.sym_size.int(input_ids, 1)
    size_B: int = aten.sym_size.int(input_ids, 0)
    embedding: f32[B, S, 32] = aten.embedding.default(weights["model.embed_tokens.weight"], input_ids, 0)  # model.embed_tokens @ transformers/models/mixtral/modeling_mixtral.py:436
    _to_copy: bool[B, S] = aten._to_copy.default(attention_mask, dtype=torch.bool, device=torch.device("cpu"))  # model @ transformers/models/mixtral/modeling_mixtral.py:444
    rope_table: tuple[f32[B, S, 4], f32[B, S, 4]] = slim.rope_table.default(position_ids, weights["model.rotary_emb.inv_freq"])  # model.rotary_emb @ transformers/models/mixtral/modeling_mixtral.py:194
    getitem_4: f32[B, S, 4] = rope_table[0]  # model.rotary_emb @ transformers/models/mixtral/modeling_mixtral.py:194
    getitem_5: f32[B, S, 4] = rope_table[1]  # model.rotary_emb @ transformers/models/mixtral/modeling_mixtral.py:195
    rms_norm_1: f32[B, S, 32] = slim.rms_norm.default(embedding, weights["model.layers.0.input_layernorm.weight"], eps=1e-05)  # model.layers.0.input_layernorm @ transformers/models/mixtral/modeling_mixtral.py:147
    linear: f32[B, S, 32] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.q_proj.weight"])  # model.layers.0.self_attn.q_proj @ transformers/models/mixtral/modeling_mixtral.py:299
    reshape: f32[B, S, 4, 8] = aten.reshape.default(linear, [size_B, size_S, -1, 8])  # model.layers.0.self_attn @ transformers/models/mixtral/modeling_mixtral.py:299
    transpose: f32[B, 4, S, 8] = aten.transpose.int(reshape, 1, 2)  # model.layers.0.self_attn @ transformers/models/mixtral/modeling_mixtral.py:299
    linear_1: f32[B, S, 16] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.k_proj.weight"])  # model.layers.0.self_attn.k_proj @ transformers/models/mixtral/modeling_mixtral.py:300
    reshape_1: f32[B, S, 2, 8] = aten.reshape.default(linear_1, [size_B, size_S, -1, 8])  # model.layers.0.self_attn @ transformers/models/mixtral/modeling_mixtral.py:300
    transpose_1: f32[B, 2, S, 8] = aten.transpose.int(reshape_1, 1, 2)  # model.layers.0.self_attn @ transformers/models/mixtral/modeling_mixtral.py:300
    linear_2: f32[B, S, 16] = aten.linear.default(rms_norm_1, weights["model.layers.0.self_attn.v_proj.weight"])  # model.layers.0.self_attn.v_proj @ transformers/models/mixtral/modeling_mixtral.py:301
    reshape_2: f32[B, S, 2, 8] = aten.reshape.default(linear_2, [size_B, size_S, -1, 8])  # model.layers.0.self_attn @ transformers/models/mixtral/modeling_mixtral.py:301
    transpose_2: f32[B, 2, S, 8] = aten.transpose.int(reshape_2, 1, 2)  # model.layers.0.self_attn @ transformers/models/mixtral/modeling_mixtral.py:301
    rope: f32[B, 4, S, 8] = slim.rope.default(transpose, getitem_4, getitem_5)  # model.layers.0.self_attn @ transformers/models/mixtral/modeling_mixtral.py:304
    rope_1: f32[B, 2, S, 8] = slim.rope.default(transpose_1, getitem_4, getitem_5)  # model.layers.0.self_attn @ transformers/models/mixtral/modeling_mixtral.py:304
    attention_1: f32[B, 4, S, 8] = slim.attention.default(rope, rope_1, transpose_2, _to_copy, layer=0, scale=0.3535533905932738)  # model.layers.0.self_attn @ transformers/models/mixtral/modeling_mixtral.py:313
    transpose_3: f32[B, S, 4, 8] = aten.transpose.int(attention_1, 1, 2)  # model.layers.0.self_attn @ transformers/models/mixtral/modeling_mixtral.py:313
    reshape_3: f32[B, S, 32] = aten.reshape.default(transpose_3, [size_B, size_S, -1])  # model.layers.0.self_attn @ transformers/models/mixtral/modeling_mixtral.py:325
    linear_3: f32[B, S, 32] = aten.linear.default(reshape_3, weights["model.layers.0.self_attn.o_proj.weight"])  # model.layers.0.self_attn.o_proj @ transformers/models/mixtral/modeling_mixtral.py:326
    add_216: f32[B, S, 32] = aten.add.Tensor(embedding, linear_3)  # model.layers.0 @ transformers/models/mixtral/modeling_mixtral.py:360
    rms_norm_3: f32[B, S, 32] = slim.rms_norm.default(add_216, weights["model.layers.0.post_attention_layernorm.weight"], eps=1e-05)  # model.layers.0.post_attention_layernorm @ transformers/models/mixtral/modeling_mixtral.py:147
    reshape_4: f32[B*S, 32] = aten.reshape.default(rms_norm_3, [-1, 32])  # model.layers.0.mlp @ transformers/models/mixtral/modeling_mixtral.py:125
    linear_4: f32[B*S, 8] = aten.linear.default(reshape_4, weights["model.layers.0.mlp.gate.weight"])  # model.layers.0.mlp.gate @ transformers/models/mixtral/modeling_mixtral.py:105
    softmax: f32[B*S, 8] = aten.softmax.int(linear_4, -1)  # model.layers.0.mlp.gate @ transformers/models/mixtral/modeling_mixtral.py:106
    topk: tuple[f32[B*S, 2], i64[B*S, 2]] = aten.topk.default(softmax, 2)  # model.layers.0.mlp.gate @ transformers/models/mixtral/modeling_mixtral.py:107
    getitem: f32[B*S, 2] = topk[0]  # model.layers.0.mlp.gate @ transformers/models/mixtral/modeling_mixtral.py:107
    getitem_1: i64[B*S, 2] = topk[1]  # model.layers.0.mlp.gate @ transformers/models/mixtral/modeling_mixtral.py:107
    sum_1: f32[B*S, 1] = aten.sum.dim_IntList(getitem, [-1], True)  # model.layers.0.mlp.gate @ transformers/models/mixtral/modeling_mixtral.py:108
    div: f32[B*S, 2] = aten.div.Tensor(getitem, sum_1)  # model.layers.0.mlp.gate @ transformers/models/mixtral/modeling_mixtral.py:108
    reshape_5: i64[2*B*S] = aten.reshape.default(getitem_1, [-1])  # model.layers.0.mlp.experts @ transformers/integrations/moe.py:634
    repeat_interleave: f32[2*B*S, 32] = aten.repeat_interleave.self_int(reshape_4, 2, 0)  # model.layers.0.mlp.experts @ transformers/integrations/moe.py:634
    expert_linear_2: f32[2*B*S, 48] = slim.expert_linear.default(repeat_interleave, weights["model.layers.0.mlp.experts.gate_up_proj_0"], None, reshape_5)  # model.layers.0.mlp.experts @ transformers/integrations/moe.py:634
    expert_linear_3: f32[2*B*S, 48] = slim.expert_linear.default(repeat_interleave, weights["model.layers.0.mlp.experts.gate_up_proj_1"], None, reshape_5)  # model.layers.0.mlp.experts @ transformers/integrations/moe.py:634
    silu: f32[2*B*S, 48] = aten.silu.default(expert_linear_2)  # model.layers.0.mlp.experts.act_fn @ transformers/activations.py:103
    mul_216: f32[2*B*S, 48] = aten.mul.Tensor(silu, expert_linear_3)  # model.layers.0.mlp.experts @ transformers/integrations/moe.py:634
    expert_linear_1: f32[2*B*S, 32] = slim.expert_linear.default(mul_216, weights["model.layers.0.mlp.experts.down_proj"], None, reshape_5)  # model.layers.0.mlp.experts @ transformers/integrations/moe.py:634
    reshape_6: f32[2*B*S, 1] = aten.reshape.default(div, [-1, 1])  # model.layers.0.mlp.experts @ transformers/integrations/moe.py:634
    mul_225: f32[2*B*S, 32] = aten.mul.Tensor(expert_linear_1, reshape_6)  # model.layers.0.mlp.experts @ transformers/integrations/moe.py:634
    reshape_7: f32[B*S, 2, 32] = aten.reshape.default(mul_225, [-1, 2, 32])  # model.layers.0.mlp.experts @ transformers/integrations/moe.py:634
    sum_2: f32[B*S, 32] = aten.sum.dim_IntList(reshape_7, [1])  # model.layers.0.mlp.experts @ transformers/integrations/moe.py:634
    reshape_9: f32[B, S, 32] = aten.reshape.default(sum_2, [size_B, size_S, -1])  # model.layers.0.mlp @ transformers/models/mixtral/modeling_mixtral.py:128
    add_316: f32[B, S, 32] = aten.add.Tensor(add_216, reshape_9)  # model.layers.0 @ transformers/models/mixtral/modeling_mixtral.py:364
    rms_norm_5: f32[B, S, 32] = slim.rms_norm.default(add_316, weights["model.norm.weight"], eps=1e-05)  # model.norm @ transformers/models/mixtral/modeling_mixtral.py:147
    linear_5: f32[B, S, 96] = aten.linear.default(rms_norm_5, weights["lm_head.weight"])  # lm_head @ transformers/models/mixtral/modeling_mixtral.py:616
    return (linear_5,)
