"""Tiny random models of each family, saved as checkpoints that our loader reads."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

VOCAB = 199
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
_ROPE = {"rope_theta": 10000.0, "factor": 4.0}
_YARN = {**_ROPE, "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
_LONGROPE = {  # of 12 of 16 channels
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + n / 9 for n in range(6)],
    "long_factor": [2.0 + n for n in range(6)],
}
_GEMMA = {**_SIZES, "num_hidden_layers": 5, "num_attention_heads": 6, "query_pre_attn_scalar": 24}

CONFIGS: dict[str, Any] = {
    "gemma2": Gemma2Config(
        **_GEMMA, sliding_window=9, attn_logit_softcapping=2.0, final_logit_softcapping=9.0
    ),
    "gemma3": Gemma3TextConfig(
        **{**_GEMMA, "tie_word_embeddings": True, "sliding_window": 12},
        layer_types=[("sliding" if n % 3 else "full") + "_attention" for n in range(5)],
    ),
    "llama-gqa": LlamaConfig(**_SIZES),
    "llama-mha": LlamaConfig(**{**_SIZES, "num_key_value_heads": 6}),
    "llama-mqa": LlamaConfig(**{**_SIZES, "num_key_value_heads": 1}),
    "llama-tied": LlamaConfig(**{**_SIZES, "tie_word_embeddings": True}),
    "llama-bias": LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "llama-rope3": LlamaConfig(**_SIZES, rope_parameters=_LLAMA3),
    "llama-linear": LlamaConfig(**_SIZES, rope_parameters={**_ROPE, "rope_type": "linear"}),
    "llama-dynamic": LlamaConfig(**_SIZES, rope_parameters={**_ROPE, "rope_type": "dynamic"}),
    "llama-yarn": LlamaConfig(**_SIZES, rope_parameters=_YARN),
    "mistral": MistralConfig(**_SIZES, sliding_window=6),
    "mistral-plain": MistralConfig(**_SIZES, sliding_window=None),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=5),
    "phi3": Phi3Config(**_SIZES, pad_token_id=0),
    "phi3-longrope": Phi3Config(
        **{**_SIZES, "hidden_size": 96},
        pad_token_id=0,
        original_max_position_embeddings=128,
        rope_parameters=_LONGROPE,
    ),
    "qwen2-moe": Qwen2MoeConfig(
        **_SIZES, **_EXPERTS, shared_expert_intermediate_size=88, decoder_sparse_step=2
    ),
    "qwen3-moe": Qwen3MoeConfig(**_SIZES, **_EXPERTS, norm_topk_prob=True, mlp_only_layers=[1]),
    "smollm3": SmolLM3Config(**_SIZES, no_rope_layer_interval=2, pad_token_id=0),
    "qwen2": Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": Qwen3Config(**_SIZES),
}


def save_tiny(
    name: str, folder: Path, tokenizer_of: Path | None = None, num_layers: int | None = None
) -> Any:
    """Save a random model of that configuration (fp32); returns the transformers model.

    With `tokenizer_of` it has the tokenizer, and the vocabulary size, of that model.
    """
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    if num_layers is not None:
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    if tokenizer_of is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
        tokenizer.save_pretrained(folder)
        config.vocab_size = len(tokenizer)
    # The others of transformers do not cap scores.
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(config, **settings).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                # Fresh models have ones and zeros here, which would hide a mistake.
                parameter.uniform_(0.5, 1.5)
                if "norm" in parameter_name and "gemma" in config.model_type:
                    parameter -= 1  # which is added to it again
    model.save_pretrained(folder)
    return model
