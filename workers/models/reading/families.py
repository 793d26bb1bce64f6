"""The model families: per family a few flags and the names of its weights, nothing else.

A new family is one entry in `FAMILIES` (and its row in the parity tests).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .experts import ExpertFields
from .windows import (
    Local,
    between_global_layers,
    even_below_max_window_layers,
    even_layers,
    every_layer,
    past_max_window_layers,
    unrotated_with_window,
    uses_window,
)


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Names of the tensors in a checkpoint; projections are given without `.weight` / `.bias`."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."
    attention_norm: str = "input_layernorm.weight"
    attention_post_norm: str = ""
    mlp_norm: str = "post_attention_layernorm.weight"
    mlp_post_norm: str = ""
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm.weight"
    key_norm: str = "self_attn.k_norm.weight"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    qkv: str = ""  # in place of query, key and value, which lie in it one below the other
    gate_up: str = ""  # in place of gate and up
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{expert}."
    expert_gate: str = "gate_proj"
    expert_up: str = "up_proj"
    expert_down: str = "down_proj"
    shared_gate: str = "mlp.shared_expert.gate_proj"
    shared_up: str = "mlp.shared_expert.up_proj"
    shared_down: str = "mlp.shared_expert.down_proj"
    shared_share: str = "mlp.shared_expert_gate"

    def of_layer(self, layer: int, part: str) -> str:
        """The full name of `part` (one of the names above) in layer `layer`."""
        return self.layer.format(layer=layer) + part

    def of_expert(self, expert: int, part: str) -> str:
        """The name, within its layer, of `part` of a routed expert."""
        return self.expert.format(expert=expert) + part


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one family apart. A flag is fixed (a bool) or the name of a config field.

    Attributes:
        qkv_bias: of q, k and v.
        output_bias: of attention's output.
        mlp_bias: of gate, up and down.
        qk_norm: whether queries and keys are normalised, head by head.
        names: of the weights.
        activation: the field that names the gate's.
        norm_offset: what is added to the weights of norms.
        post_norms: whether results are normalised before they are added.
        scaled_embeddings: whether embeddings are multiplied by the root of the hidden size.
        softcaps: whether fields set caps of attention's scores and of logits.
        query_scalar: the field that scores are divided by the root of; "": `head_dim`.
        local: which layers have the window of `sliding_window`; None: none can.
        has_layer_types: whether `layer_types` says which layers have it.
        two_ropes: whether layers with the window have rotary settings of their own.
        partial_rotary: whether a share of a head's channels may be rotated.
        has_unrotated_layers: whether some layers rotate nothing.
        experts: where the config says how they are; None: there are none.
        fixed: fields that may have one value only, besides null.
        defaults: of fields that a config file may leave out, where ours are others.
    """

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    names: WeightNames = field(default_factory=WeightNames)
    activation: str = "hidden_act"
    norm_offset: float = 0.0
    post_norms: bool = False
    scaled_embeddings: bool = False
    softcaps: frozenset[str] = frozenset()
    query_scalar: str = ""
    local: Local | None = None
    has_layer_types: bool = False
    two_ropes: bool = False
    partial_rotary: bool = False
    has_unrotated_layers: bool = False
    experts: ExpertFields | None = None
    fixed: Mapping[str, object] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)


_GEMMA2 = Family(
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    names=WeightNames(
        attention_post_norm="post_attention_layernorm.weight",
        mlp_norm="pre_feedforward_layernorm.weight",
        mlp_post_norm="post_feedforward_layernorm.weight",
    ),
    activation="hidden_activation",
    norm_offset=1.0,
    post_norms=True,
    scaled_embeddings=True,
    softcaps=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
    query_scalar="query_pre_attn_scalar",
    local=even_layers,
    has_layer_types=True,
    fixed={"use_bidirectional_attention": False},
    defaults={
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
)
_GEMMA3 = replace(
    _GEMMA2,
    qk_norm=True,
    softcaps=frozenset({"final_logit_softcapping"}),
    local=between_global_layers,
    two_ropes=True,
    defaults={
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
)
FAMILIES: dict[str, Family] = {
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "llama": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(local=every_layer, defaults={"sliding_window": 4096}),
    "mixtral": Family(
        names=WeightNames(
            router="block_sparse_moe.gate",
            expert="block_sparse_moe.experts.{expert}.",
            expert_gate="w1",
            expert_up="w3",
            expert_down="w2",
        ),
        local=every_layer,
        experts=ExpertFields("intermediate_size"),
        defaults={"rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "phi3": Family(
        names=WeightNames(qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj"),
        local=every_layer,
        partial_rotary=True,
        defaults={"original_max_position_embeddings": 4096},
    ),
    "qwen2": Family(
        qkv_bias=True,
        local=past_max_window_layers,
        has_layer_types=True,
        defaults={"sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Family(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        local=past_max_window_layers,
        has_layer_types=True,
        defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen2_moe": Family(
        qkv_bias="qkv_bias",
        local=even_below_max_window_layers,
        has_layer_types=True,
        experts=ExpertFields(
            "moe_intermediate_size",
            shared_intermediate_size="shared_expert_intermediate_size",
            normalised="norm_topk_prob",
            has_plain_layers=True,
        ),
        defaults={
            "qkv_bias": True,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    ),
    "qwen3_moe": Family(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        local=uses_window,
        experts=ExpertFields(
            "moe_intermediate_size", normalised="norm_topk_prob", has_plain_layers=True
        ),
        defaults={
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
    "smollm3": Family(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        local=unrotated_with_window,
        has_layer_types=True,
        has_unrotated_layers=True,
        defaults={"tie_word_embeddings": True, "rope_theta": 2e6},
    ),
}
_CLOSE = {"gemma3": "with images; only its text model, gemma3_text, is"}


def get_family(model_type: str) -> Family:
    """The family of a Hugging Face `model_type`.

    Raises:
        ValueError: the family is not supported.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        note = f" ({close})" if (close := _CLOSE.get(str(model_type))) else ""
        raise ValueError(
            f"config.model_type={model_type!r:.80} is not supported{note}; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    return family
