"""A zoo of tiny random transformers models: one entry per architecture (or per interesting variant).

`build("llama")` gives a seeded two-layer causal LM, `build_encoder("bert")` a text encoder. The
configurations are small but not bland: sliding windows are shorter than the test sequences, soft caps
bite, norm gains and biases are random, and the sizes (vocabulary, hidden, heads, MLP) all differ, so that
an exchanged dimension or a dropped term changes the result.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 101
MAX_POSITIONS = 256
WINDOW = 8
"""Sliding window of every architecture that has one: below the shortest interesting test length."""


@dataclass(frozen=True)
class Entry:
    """One zoo model: an `AutoConfig` model type, and what to override in its default configuration."""

    name: str
    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def _without(overrides: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in overrides.items() if key not in keys}


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = dict(
    _TOKENS,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=MAX_POSITIONS,
    attention_dropout=0.0,
)
_NO_GQA = _without(_BASE, "num_key_value_heads")
_GPT = dict(
    _TOKENS,
    n_positions=MAX_POSITIONS,
    n_embd=64,
    n_layer=2,
    n_head=4,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
)
_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SLIDING_FIRST = ["sliding_attention", "full_attention"]
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MOE_MANY = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
_GROUPED = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
_GEMMA = dict(_BASE, head_dim=24, query_pre_attn_scalar=20)
_MUP = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.8,
    "attention_multiplier": 0.2,
    "logits_scaling": 0.5,
}


_PLAIN = (
    Entry("llama", "llama", _BASE),
    Entry("llama-mha", "llama", dict(_BASE, num_key_value_heads=4, tie_word_embeddings=True)),
    Entry("llama-biases", "llama", dict(_BASE, attention_bias=True, mlp_bias=True, head_dim=24)),
    Entry(
        "llama-llama3rope",
        "llama",
        dict(
            _BASE,
            **_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        ),
    ),
    Entry("llama-yarn", "llama", dict(_BASE, **_rope("yarn", factor=8.0, original_max_position_embeddings=32))),
    Entry("llama-linear", "llama", dict(_BASE, **_rope("linear", factor=4.0))),
    Entry(
        "llama-dynamic",
        "llama",
        dict(_BASE, **_rope("dynamic", factor=4.0, original_max_position_embeddings=MAX_POSITIONS)),
        note="frequencies depend on the largest position, here only beyond max_position_embeddings",
    ),
    Entry("mistral", "mistral", dict(_BASE, head_dim=24, sliding_window=WINDOW)),
    Entry("ministral", "ministral", dict(_BASE, head_dim=24, sliding_window=WINDOW, layer_types=_SLIDING_FIRST)),
    Entry(
        "ministral3",
        "ministral3",
        dict(
            _BASE,
            head_dim=24,
            **_rope(
                "yarn",
                factor=8.0,
                original_max_position_embeddings=16,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.1,
            ),
        ),
    ),
    Entry("qwen2", "qwen2", dict(_BASE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)),
    Entry("qwen3", "qwen3", dict(_BASE, head_dim=24, attention_bias=True)),
    Entry("gemma", "gemma", dict(_BASE, head_dim=24)),
    Entry(
        "gemma2",
        "gemma2",
        dict(_GEMMA, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        note="eager attention only (soft cap)",
    ),
    Entry(
        "gemma3",
        "gemma3_text",
        dict(_GEMMA, sliding_window=WINDOW, layer_types=_SLIDING_FIRST, final_logit_softcapping=3.0),
    ),
    Entry(
        "gemma3n",
        "gemma3n_text",
        dict(
            _BASE,
            head_dim=24,
            num_hidden_layers=4,
            layer_types=_SLIDING_FIRST * 2,
            num_kv_shared_layers=2,
            sliding_window=WINDOW,
            hidden_size_per_layer_input=12,
            vocab_size_per_layer_input=VOCAB,
            laurel_rank=10,
            activation_sparsity_pattern=[0.8, 0.0, 0.0, 0.0],
            final_logit_softcapping=3.0,
        ),
        note="four layers: the last two reuse the key/value states of the first two",
    ),
    Entry(
        "vaultgemma",
        "vaultgemma",
        dict(
            _GEMMA,
            sliding_window=WINDOW,
            layer_types=_SLIDING_FIRST,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
        note="eager attention only (soft cap)",
    ),
    Entry("phi", "phi", dict(_BASE, partial_rotary_factor=0.5, qk_layernorm=True)),
    Entry("phi3", "phi3", dict(_BASE, sliding_window=WINDOW, partial_rotary_factor=0.5)),
    Entry(
        "phi3-longrope",
        "phi3",
        dict(
            _BASE,
            original_max_position_embeddings=64,
            **_rope(
                "longrope",
                short_factor=[1.0, 1.1, 1.2, 1.4, 1.5, 1.7, 1.9, 2.0],
                long_factor=[1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0],
                original_max_position_embeddings=64,
            ),
        ),
        note="the frequencies depend on the input: short factors up to 64 positions, long ones beyond",
    ),
    Entry("olmo", "olmo", dict(_BASE, clip_qkv=1.0)),
    Entry("olmo2", "olmo2", _BASE),
    Entry("olmo3", "olmo3", dict(_BASE, sliding_window=WINDOW, layer_types=_SLIDING_FIRST)),
    Entry("granite", "granite", dict(_BASE, **_MUP, attention_bias=True)),
    Entry(
        "granite_swa",
        "granite_swa",
        dict(_BASE, **_MUP, sliding_window=WINDOW, layer_types=_SLIDING_FIRST),
        note="eager attention only (sinks)",
    ),
    Entry("cohere", "cohere", dict(_BASE, logit_scale=0.25, use_qk_norm=True)),
    Entry("cohere2", "cohere2", dict(_BASE, logit_scale=0.25, sliding_window=WINDOW, layer_types=_SLIDING_FIRST)),
    Entry(
        "stablelm",
        "stablelm",
        dict(
            _BASE,
            partial_rotary_factor=0.25,
            use_qkv_bias=True,
            qk_layernorm=True,
            use_parallel_residual=True,
            hidden_dropout=0.0,
        ),
    ),
    Entry(
        "starcoder2",
        "starcoder2",
        dict(_BASE, sliding_window=WINDOW, residual_dropout=0.0, embedding_dropout=0.0),
    ),
    Entry("glm", "glm", dict(_BASE, head_dim=16)),
    Entry("glm4", "glm4", dict(_BASE, head_dim=16)),
    Entry("ernie4_5", "ernie4_5", dict(_BASE, head_dim=24, use_bias=True)),
    Entry("exaone4", "exaone4", dict(_BASE, sliding_window=WINDOW, layer_types=_SLIDING_FIRST)),
    Entry(
        "smollm3",
        "smollm3",
        dict(
            _BASE,
            use_sliding_window=True,
            sliding_window=WINDOW,
            no_rope_layers=[1, 0],
            layer_types=["full_attention", "sliding_attention"],
        ),
    ),
    Entry("nemotron", "nemotron", dict(_BASE, partial_rotary_factor=0.5, mlp_bias=True)),
    Entry("helium", "helium", dict(_BASE, head_dim=16)),
    Entry("hunyuan_v1_dense", "hunyuan_v1_dense", dict(_BASE, head_dim=24)),
    Entry("arcee", "arcee", dict(_BASE, mlp_bias=True)),
    Entry("apertus", "apertus", _BASE),
    Entry("seed_oss", "seed_oss", dict(_BASE, head_dim=24, residual_dropout=0.0, attention_out_bias=True)),
    Entry("bitnet", "bitnet", _BASE),
    Entry("diffllama", "diffllama", _BASE),
    Entry("persimmon", "persimmon", dict(_NO_GQA, hidden_dropout=0.0)),
    Entry("nanochat", "nanochat", dict(_BASE, final_logit_softcapping=3.0)),
    Entry("cwm", "cwm", dict(_BASE, head_dim=24, sliding_window=WINDOW, layer_types=_SLIDING_FIRST)),
    Entry("jais2", "jais2", dict(_BASE, head_dim=24)),
    Entry(
        "doge",
        "doge",
        dict(_BASE, hidden_dropout=0.0, keep_window_size=MAX_POSITIONS),
        note="its top-k choice of keys, off here, is ill-defined: a repeated token is an exact tie",
    ),
    Entry("minicpm3", "minicpm3", dict(_BASE, **_MLA, dim_model_base=32, scale_emb=2)),
    Entry("youtu", "youtu", dict(_BASE, **_MLA)),
    Entry(
        "modernbert-decoder",
        "modernbert-decoder",
        dict(
            _NO_GQA,
            local_attention=2 * WINDOW,
            layer_types=_SLIDING_FIRST,
            attention_bias=True,
            norm_bias=True,
        ),
    ),
)

_OLDER = (
    Entry("gpt2", "gpt2", dict(_GPT, scale_attn_by_inverse_layer_idx=True)),
    Entry("gpt_bigcode", "gpt_bigcode", dict(_GPT, multi_query=True)),
    Entry("gpt_bigcode-mha", "gpt_bigcode", dict(_GPT, multi_query=False)),
    Entry("gptj", "gptj", dict(_GPT, rotary_dim=8)),
    Entry("codegen", "codegen", dict(_GPT, n_ctx=MAX_POSITIONS, rotary_dim=8)),
    Entry("openai-gpt", "openai-gpt", _GPT, note="no key/value cache in this architecture"),
    Entry("ctrl", "ctrl", dict(_GPT, dff=96)),
    Entry(
        "gpt_neo",
        "gpt_neo",
        dict(
            _TOKENS,
            hidden_size=64,
            intermediate_size=96,
            num_layers=2,
            num_heads=4,
            attention_types=[[["local", "global"], 1]],
            window_size=WINDOW,
            max_position_embeddings=MAX_POSITIONS,
        ),
    ),
    Entry(
        "gpt_neox",
        "gpt_neox",
        dict(_NO_GQA, hidden_dropout=0.0, **_rope("default", partial_rotary_factor=0.5)),
    ),
    Entry("gpt_neox-sequential", "gpt_neox", dict(_NO_GQA, hidden_dropout=0.0, use_parallel_residual=False)),
    Entry(
        "gpt_neox_japanese",
        "gpt_neox_japanese",
        dict(_without(_NO_GQA, "intermediate_size"), intermediate_multiple_size=2, hidden_dropout=0.0),
    ),
    Entry(
        "opt",
        "opt",
        dict(_NO_GQA, ffn_dim=96, word_embed_proj_dim=48, dropout=0.0),
        note="embedding narrower than the hidden size, projected in and out",
    ),
    Entry(
        "opt-postnorm",
        "opt",
        dict(_NO_GQA, ffn_dim=96, word_embed_proj_dim=64, dropout=0.0, do_layer_norm_before=False),
    ),
    Entry("bloom", "bloom", dict(_TOKENS, hidden_size=64, n_layer=2, n_head=4)),
    Entry(
        "mpt",
        "mpt",
        dict(
            _TOKENS,
            d_model=64,
            n_heads=4,
            n_layers=2,
            expansion_ratio=2,
            max_seq_len=MAX_POSITIONS,
            use_cache=True,
        ),
    ),
    Entry(
        "falcon",
        "falcon",
        dict(_NO_GQA, ffn_hidden_size=96, multi_query=True, new_decoder_architecture=False, bias=True),
        note="multi-query, parallel attention and MLP, rotary",
    ),
    Entry(
        "falcon-newdecoder",
        "falcon",
        dict(_NO_GQA, ffn_hidden_size=96, num_kv_heads=2, new_decoder_architecture=True),
    ),
    Entry(
        "falcon-alibi",
        "falcon",
        dict(_NO_GQA, ffn_hidden_size=96, alibi=True, multi_query=False, parallel_attn=False, bias=True),
        note="sequential residual, multi-head, alibi",
    ),
    Entry("biogpt", "biogpt", dict(_NO_GQA, **_DROPOUT)),
    Entry(
        "xglm",
        "xglm",
        dict(
            _TOKENS,
            d_model=64,
            ffn_dim=96,
            num_layers=2,
            attention_heads=4,
            max_position_embeddings=MAX_POSITIONS,
            dropout=0.0,
            attention_dropout=0.0,
        ),
    ),
)

_EXPERTS = (
    Entry("mixtral", "mixtral", dict(_BASE, **_MOE, head_dim=24, sliding_window=WINDOW)),
    Entry(
        "qwen2_moe",
        "qwen2_moe",
        dict(_BASE, **_MOE_MANY, shared_expert_intermediate_size=40, norm_topk_prob=True),
    ),
    Entry(
        "qwen3_moe",
        "qwen3_moe",
        dict(_BASE, **_MOE_MANY, head_dim=24, norm_topk_prob=True, mlp_only_layers=[0]),
        note="first layer dense, second sparse",
    ),
    Entry(
        "gpt_oss",
        "gpt_oss",
        dict(
            _BASE,
            **_MOE,
            head_dim=24,
            sliding_window=WINDOW,
            **_rope("yarn", factor=8.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=32),
        ),
        note="eager attention only (sinks)",
    ),
    Entry("granitemoe", "granitemoe", dict(_BASE, **_MUP, **_MOE)),
    Entry("granitemoeshared", "granitemoeshared", dict(_BASE, **_MUP, **_MOE, shared_intermediate_size=40)),
    Entry(
        "deepseek_v2",
        "deepseek_v2",
        dict(_BASE, **_MLA, **{**_GROUPED, "norm_topk_prob": False}, topk_method="group_limited_greedy"),
    ),
    Entry("deepseek_v3", "deepseek_v3", dict(_BASE, **_MLA, **_GROUPED)),
    Entry(
        "dbrx",
        "dbrx",
        dict(
            _TOKENS,
            d_model=64,
            n_heads=4,
            n_layers=2,
            max_seq_len=MAX_POSITIONS,
            attn_config={"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 10000.0},
            ffn_config={"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        ),
    ),
    Entry(
        "phimoe",
        "phimoe",
        dict(
            _BASE,
            **_MOE,
            sliding_window=WINDOW,
            attention_bias=True,
            lm_head_bias=True,
            router_jitter_noise=0.01,
        ),
    ),
    Entry("olmoe", "olmoe", dict(_BASE, num_experts=6, num_experts_per_tok=2, clip_qkv=1.0)),
    Entry("flex_olmo", "flex_olmo", dict(_BASE, num_experts=6, num_experts_per_tok=2)),
    Entry(
        "jetmoe",
        "jetmoe",
        dict(
            _TOKENS,
            **_MOE,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=16,
            max_position_embeddings=MAX_POSITIONS,
        ),
        note="mixture of attention heads as well as of MLPs",
    ),
    Entry("minimax", "minimax", dict(_BASE, **_MOE, block_size=8), note="one linear-attention layer"),
    Entry("minimax_m2", "minimax_m2", dict(_BASE, **_MOE, head_dim=24)),
    Entry(
        "ernie4_5_moe",
        "ernie4_5_moe",
        dict(_BASE, moe_intermediate_size=48, moe_k=2, moe_num_experts=6, moe_num_shared_experts=1),
    ),
    Entry("hunyuan_v1_moe", "hunyuan_v1_moe", dict(_BASE, head_dim=24, num_experts=6, moe_topk=2)),
    Entry("glm4_moe", "glm4_moe", dict(_BASE, **_GROUPED, head_dim=16, use_qk_norm=True)),
    Entry("dots1", "dots1", dict(_BASE, **_GROUPED, head_dim=24, sliding_window=WINDOW, max_window_layers=1)),
    Entry(
        "afmoe",
        "afmoe",
        dict(
            _BASE,
            **_MOE_MANY,
            head_dim=24,
            num_shared_experts=1,
            sliding_window=WINDOW,
            layer_types=_SLIDING_FIRST,
            mup_enabled=True,
        ),
    ),
    Entry(
        "mimo_v2_flash",
        "mimo_v2_flash",
        dict(
            _BASE,
            head_dim=24,
            v_head_dim=16,
            sliding_window=WINDOW,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
        ),
        note="eager attention only (sinks); values narrower than keys",
    ),
    Entry(
        "llama4",
        "llama4_text",
        dict(
            _BASE,
            head_dim=16,
            intermediate_size_mlp=80,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            no_rope_layers=[1, 0],
            attention_chunk_size=WINDOW,
            floor_scale=8,
        ),
        note="chunked attention, complex rotary; the attention temperature counts padding as positions",
    ),
    Entry(
        "longcat_flash",
        "longcat_flash",
        dict(
            _without(_BASE, "intermediate_size", "num_hidden_layers"),
            **_MLA,
            num_layers=2,
            head_dim=8,
            ffn_hidden_size=96,
            expert_ffn_hidden_size=48,
            n_routed_experts=6,
            zero_expert_num=2,
            moe_topk=2,
            routed_scaling_factor=1.5,
        ),
    ),
)

_RECURRENT = (
    Entry(
        "lfm2",
        "lfm2",
        dict(_without(_BASE, "attention_dropout"), layer_types=["conv", "full_attention"], block_multiple_of=8),
        note="short convolution with its own cache",
    ),
    Entry(
        "mamba",
        "mamba",
        dict(_TOKENS, hidden_size=64, num_hidden_layers=2, state_size=8),
        note="no attention: selective state space",
    ),
    Entry(
        "mamba2",
        "mamba2",
        dict(
            _TOKENS,
            hidden_size=64,
            num_hidden_layers=2,
            num_heads=8,
            head_dim=16,
            state_size=8,
            n_groups=2,
            chunk_size=8,
        ),
        note="no attention: selective state space",
    ),
    Entry(
        "rwkv",
        "rwkv",
        dict(
            _TOKENS,
            hidden_size=64,
            num_hidden_layers=2,
            attention_hidden_size=64,
            intermediate_size=96,
            context_length=MAX_POSITIONS,
        ),
        note="no attention; transformers ignores the mask, and its cached decoding fails for batches over one",
    ),
    Entry(
        "recurrent_gemma",
        "recurrent_gemma",
        dict(
            _without(_BASE, "max_position_embeddings"),
            num_hidden_layers=3,
            attention_window_size=WINDOW,
            logits_soft_cap=3.0,
        ),
        note="two linear recurrences to one local attention layer; transformers lets padding into the state",
    ),
    Entry(
        "qwen3_next",
        "qwen3_next",
        dict(
            _BASE,
            **_MOE_MANY,
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            shared_expert_intermediate_size=40,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
        ),
        note="one gated delta rule layer",
    ),
)

_BERT = dict(_NO_GQA, **_DROPOUT, type_vocab_size=2)
_ROBERTA = dict(_BERT, pad_token_id=1, bos_token_id=0)

_ENCODERS = (
    Entry("bert", "bert", _BERT),
    Entry("roberta", "roberta", _ROBERTA, note="positions are counted from the pad id over the pad mask"),
    Entry("camembert", "camembert", dict(_ROBERTA, type_vocab_size=1)),
    Entry("xlm_roberta", "xlm-roberta", dict(_ROBERTA, type_vocab_size=1)),
    Entry(
        "distilbert",
        "distilbert",
        dict(
            _TOKENS,
            dim=64,
            hidden_dim=96,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=MAX_POSITIONS,
            dropout=0.0,
            attention_dropout=0.0,
        ),
    ),
    Entry("electra", "electra", dict(_BERT, embedding_size=40)),
    Entry("albert", "albert", dict(_BERT, embedding_size=40), note="both layers share their weights"),
    Entry("mpnet", "mpnet", dict(_NO_GQA, **_DROPOUT, pad_token_id=1, bos_token_id=0)),
    Entry(
        "modernbert",
        "modernbert",
        dict(_NO_GQA, local_attention=WINDOW, layer_types=["full_attention", "sliding_attention"]),
    ),
    Entry(
        "deberta_v2",
        "deberta-v2",
        dict(
            _BERT,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=16,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            position_biased_input=False,
            type_vocab_size=0,
        ),
    ),
    Entry("nomic_bert", "nomic_bert", _BERT),
    Entry("eurobert", "eurobert", dict(_BASE, mask_token_id=3)),
    Entry("jina_embeddings_v3", "jina_embeddings_v3", dict(_ROBERTA, type_vocab_size=1)),
    Entry("roformer", "roformer", dict(_BERT, embedding_size=40)),
)

ZOO: dict[str, Entry] = {entry.name: entry for entry in _PLAIN + _OLDER + _EXPERTS + _RECURRENT}
ENCODERS: dict[str, Entry] = {entry.name: entry for entry in _ENCODERS}

_DECAYS = ("A_log", "dt_bias", "time_decay", "time_first", "recurrent_param")
"""Parameters a recurrence exponentiates: their initial values keep it stable, noise may not."""


def names() -> list[str]:
    """The causal LMs of the zoo."""
    return list(ZOO)


def encoder_names() -> list[str]:
    """The encoders of the zoo."""
    return list(ENCODERS)


def config(entry: Entry) -> PreTrainedConfig:
    """The entry's configuration."""
    # A configuration completes nested dictionaries (the rotary parameters) in place: give it its own.
    return AutoConfig.for_model(entry.model_type, **copy.deepcopy(dict(entry.overrides)))


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The causal LM `name` with seeded random weights; its `generate` never stops at an end token."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(ZOO[name]), dtype=torch.float32).eval()
    _enliven(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def build_encoder(name: str, seed: int = 0) -> PreTrainedModel:
    """The encoder `name` with seeded random weights."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(config(ENCODERS[name]), dtype=torch.float32).eval()
    _enliven(model, seed)
    return model


@torch.no_grad()
def _enliven(model: PreTrainedModel, seed: int) -> None:
    """Re-draw the weights so that activations are O(1), gains differ from one and biases from zero: with the
    usual std of 0.02 greedy decoding is all near-ties, and a dropped gain or bias goes unnoticed."""
    generator = torch.Generator().manual_seed(seed + 1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        _redraw(name.rpartition(".")[2], tensor, generator)


def _redraw(leaf: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(tensor.shape, generator=generator)
    if leaf.endswith("correction_bias"):  # router scores are below one: more would fix the choice of experts
        tensor.add_(noise, alpha=0.05)
    elif not isinstance(tensor, torch.nn.Parameter) or leaf in _DECAYS:
        return
    elif leaf == "sinks":
        tensor.copy_(noise)
    elif tensor.ndim < 2 or leaf.startswith("time_mix"):
        offset = 0 if tensor.any() else 1  # a norm that starts at zero scales by 1 + weight
        tensor.add_(noise, alpha=0.1)
        if leaf == "weight":
            # Gains of either sign: with positive ones and a tied embedding every token predicts itself.
            flip = torch.rand(tensor.shape, generator=generator) < 0.5
            tensor.copy_(torch.where(flip, -tensor - 2 * offset, tensor))
    else:
        tensor.copy_(noise / math.sqrt(tensor.shape[-1]))
