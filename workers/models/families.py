"""The model families: per family a few flags and the names of its weights, nothing else.

A new Llama-class family is one entry in `FAMILIES` (and its row in the parity tests).
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Names of the tensors in a checkpoint; projections are given without `.weight` / `.bias`."""

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{layer}."
    attention_norm: str = "input_layernorm.weight"
    mlp_norm: str = "post_attention_layernorm.weight"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm.weight"
    key_norm: str = "self_attn.k_norm.weight"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    def of_layer(self, layer: int, part: str) -> str:
        """The full name of `part` (one of the names above) in layer `layer`."""
        return self.layer.format(layer=layer) + part


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one family apart. A flag is fixed (a bool) or the name of a config field."""

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    names: WeightNames = field(default_factory=WeightNames)


FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True),
}


def get_family(model_type: str) -> Family:
    """The family of a Hugging Face `model_type`.

    Raises:
        ValueError: the family is not supported.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise ValueError(
            f"config.model_type={model_type!r} is not supported; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    return family
