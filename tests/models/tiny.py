"""A tiny config of any causal-LM type, made from the type's own config class.

Sizes are set by the names of their fields: a type takes those that its config has. What a type needs beyond that
(special layers, sizes that depend on each other) stands in SPECIAL, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

VOCAB = 61
# Shorter than the longest document: a window that is not honoured shows.
WINDOW = 6
LAYERS = 3

WIDTHS = {
    32: "hidden_size d_model n_embd embed_dim dim_model word_embed_proj_dim embedding_size",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size dim_ff d_ff dff",
    24: "moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size "
    "expert_intermediate_size shared_intermediate_size intermediate_size_mlp prefix_dense_intermediate_size",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers",
    4: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim qk_rope_head_dim linear_num_value_heads "
    "linear_num_heads mamba_num_heads mamba_chunk_size chunk_size",
    2: "num_key_value_heads num_experts_per_tok experts_per_token moe_topk moe_top_k moe_k n_group topk_group "
    "linear_num_key_heads n_groups mamba_n_groups mamba_ngroups",
    1: "n_shared_experts num_shared_experts first_k_dense_replace",
    8: "head_dim v_head_dim qk_nope_head_dim global_head_dim swa_head_dim swa_v_head_dim linear_key_head_dim "
    "linear_head_dim mamba_d_state ssm_state_size state_size",
    12: "qk_head_dim kv_lora_rank linear_value_head_dim",
    16: "q_lora_rank mamba_head_dim",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length original_max_position_embeddings",
    VOCAB: "vocab_size vocab_size_per_layer_input",
    WINDOW: "sliding_window attention_window_size window_size local_attention window",
}
DROPOUTS = (
    "attention_dropout hidden_dropout_prob attention_probs_dropout_prob resid_pdrop embd_pdrop attn_pdrop dropout "
    "activation_dropout hidden_dropout attn_dropout resid_dropout embd_dropout residual_dropout embedding_dropout "
    "layerdrop decoder_layerdrop router_jitter_noise input_jitter_noise token_dropout ffn_dropout classifier_dropout"
)
COMMON: dict[str, Any] = {
    **{name: size for size, names in WIDTHS.items() for name in names.split()},
    **dict.fromkeys(DROPOUTS.split(), 0.0),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    # Large weights: attention that differs between keys, so that a leak is seen.
    "initializer_range": 0.2,
    # As heavy as the loss of the tokens, so that a mistake in the routers' own shows.
    "router_aux_loss_coef": 0.5,
    "aux_loss_coef": 0.5,
}

BOTH_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
# Layers that mix neighbouring tokens, with attention between them.
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 16}

SPECIAL: dict[str, dict[str, Any]] = {
    "apertus1p5_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "bailing_hybrid": {"layer_types": HYBRID},
    "bamba": {"attn_layer_indices": [1], **STATE_SPACE},
    "beam": {"layer_types": BOTH_KINDS},
    "cohere2": {"layer_types": BOTH_KINDS},
    "cohere2_moe": {"layer_types": BOTH_KINDS},
    "cohere_compass_text": {
        "layer_types": BOTH_KINDS,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in BOTH_KINDS[:2]
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 2.0, "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": 24,
            "hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_loss_weight": 0.5,
        },
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "dots3_note": {
        "vision_config": {"adapter_out_dim": 32},
        "audio_config": {"adapter_out_dim": 32},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "exaone4": {"layer_types": BOTH_KINDS},
    "exaone_moe": {"layer_types": BOTH_KINDS},
    "falcon_h1": {"mamba_d_ssm": 64, "ssm_in_multiplier": 0.7, "ssm_out_multiplier": 1.5, **STATE_SPACE},
    "gemma2": {
        "layer_types": BOTH_KINDS,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 6.0,
        "query_pre_attn_scalar": 5,
    },
    "gemma3_text": {"layer_types": BOTH_KINDS, "query_pre_attn_scalar": 5},
    "gemma3n_text": {
        "layer_types": BOTH_KINDS[:2] * 2,
        "num_hidden_layers": 4,
        "intermediate_size": [48] * 4,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_text": {
        "layer_types": BOTH_KINDS[:2] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
    },
    "gemma4_unified_text": {"layer_types": BOTH_KINDS[:2], "num_hidden_layers": 2, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": WINDOW},
    "gpt_oss": {"layer_types": BOTH_KINDS},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 2.0},
    "granitemoehybrid": {"layer_types": HYBRID, **STATE_SPACE},
    "granite_swa": {"layer_types": BOTH_KINDS, "attention_multiplier": 0.3},
    "granitemoe": {"attention_multiplier": 0.3},
    "granitemoe_swa": {"layer_types": BOTH_KINDS, "attention_multiplier": 0.3},
    "granitemoeshared": {"attention_multiplier": 0.3},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {"layer_types": HYBRID},
    "kolibri1": {"layer_types": BOTH_KINDS},
    "laguna": {"layer_types": BOTH_KINDS, "num_attention_heads_per_layer": [4, 2, 4]},
    "lara_mini": {"layer_types": ["linear_attention", "sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "conv_bias": True},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention"]},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 5,
        # Its temperature grows with the position: within these documents.
        "floor_scale": 4,
    },
    "longcat_flash": {"head_dim": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 24},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "mellum": {"layer_types": BOTH_KINDS},
    "mimo_v2_flash": {"layer_types": BOTH_KINDS},
    "minicpm3": {"scale_emb": 2, "dim_model_base": 32},
    "ministral": {"layer_types": BOTH_KINDS},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "llama_4_scaling_beta": 0.5,
            # Its temperature grows with the position: within these documents.
            "original_max_position_embeddings": 4,
        }
    },
    "minimax": {"layer_types": HYBRID, "block_size": 4},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "modernbert-decoder": {"layer_types": BOTH_KINDS},
    "olmo": {"clip_qkv": 1.0},
    "olmo3": {"layer_types": BOTH_KINDS},
    "qwen3_5_moe_text": {"layer_types": HYBRID},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID},
    "qwen4_exp_text": {
        "layer_types": HYBRID,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention", "recurrent"]},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 61},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "vaultgemma": {"layer_types": BOTH_KINDS, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 5},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"]},
}
# The same types with what some of their checkpoints do otherwise: {name: (type, fields)}.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere-qk-norm": ("cohere", {"use_qk_norm": True}),
    "dots1-window": ("dots1", {"layer_types": BOTH_KINDS}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "gemma3_text-softcap": ("gemma3_text", {"attn_logit_softcapping": 5.0}),
    "gpt2-scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode-many-keys": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False}),
    "llama-rope-scaled": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "phi3-no-window": ("phi3", {"sliding_window": None}),
    "phi3-longrope": (
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 30,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.5, 2.0, 2.5],
                "long_factor": [3.0, 4.0, 5.0, 6.0],
                "original_max_position_embeddings": 30,
            },
        },
    ),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "layer_types": BOTH_KINDS}),
    "qwen2_moe-window": ("qwen2_moe", {"use_sliding_window": True, "layer_types": BOTH_KINDS}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "layer_types": BOTH_KINDS}),
    "qwen3_moe-window": ("qwen3_moe", {"use_sliding_window": True}),
    "smollm3-window": ("smollm3", {"use_sliding_window": True, "layer_types": BOTH_KINDS}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
}


def config_of(model_type: str, **changes: Any) -> Any:
    """The tiny config of a type; `changes` win over everything."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _tiny(CONFIG_MAPPING[model_type], {**SPECIAL.get(model_type, {}), **changes})


def _tiny(config_class: Any, special: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    fields = _fields(config_class)
    values = {name: value for name, value in COMMON.items() if name in fields}
    if "kv_lora_rank" in fields:
        # Latent attention makes a key of every query head.
        values["num_key_value_heads"] = COMMON["num_attention_heads"]
    values |= special
    for name, inner in (getattr(config_class, "sub_configs", None) or {}).items():
        if inner is not AutoConfig and any(word in name for word in ("text", "decoder", "llm", "language")):
            values[name] = _tiny(inner, {**SPECIAL.get(inner.model_type, {}), **special.get(name, {})})
    return config_class(**values)


def _fields(config_class: Any) -> set[str]:
    if dataclasses.is_dataclass(config_class):
        return {field.name for field in dataclasses.fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)
