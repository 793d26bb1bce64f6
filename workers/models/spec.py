"""ModelSpec: the shape of a model, read from its Hugging Face config."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from saqqara.compression.layers import Layers

from .reading import fields
from .reading.experts import ExpertSpec as ExpertSpec
from .reading.experts import read_experts
from .reading.families import FAMILIES, Family, get_family
from .reading.fields import Activation
from .reading.rope_spec import UNROTATED, RopeSpec, read_ropes, unrotated_layers
from .reading.windows import read_windows
from .source import described_folder

if TYPE_CHECKING:
    import torch


_DTYPES = ("float32", "bfloat16", "float16", "float64")  # of weights; they are cast when read
_ATTENTION_CAP, _LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"


class ItemSize(Protocol):
    """A dtype, of torch or of another library, as far as bytes go."""

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        ...


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and flags of one decoder-only model; plain values, so it can be sent and hashed.

    Attributes:
        activation: of the gate: `silu`, or `gelu_tanh` (GELU's approximation by tanh).
        norm_offset: what is added to the weights of every RMS norm (1 in Gemma checkpoints).
        post_norms: whether attention's and the MLP's results are normalised before they are added.
        embedding_scale: factor of token embeddings, rounded to the dtype.
        query_scale: factor of attention scores; None: `head_dim ** -0.5`.
        attention_softcap: attention scores s become `cap * tanh(s / cap)`; 0: they do not.
        logit_softcap: the same of logits.
        windows: by layer, the window of sliding-window attention, 0: none; () if no layer has one.
        local_rope: rotary settings of the layers with a window; None: those of the others.
        unrotated_layers: numbers of the layers without rotary embedding.
        experts: mixture of experts; None: every layer has a plain MLP.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeSpec
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    activation: Activation = "silu"
    norm_offset: float = 0.0
    post_norms: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    windows: tuple[int, ...] = ()
    local_rope: RopeSpec | None = None
    unrotated_layers: tuple[int, ...] = ()
    experts: ExpertSpec | None = None

    @classmethod
    def from_hf(cls, config: Any, eos_token_ids: tuple[int, ...] | None = None) -> Self:
        """The spec of a `transformers` config object.

        `eos_token_ids` takes the place of the config's own (see `load_spec`). `dtype` is the
        checkpoint's (`torch_dtype`), float32 where the config does not say.

        Raises:
            ValueError: the model needs something that is not supported; names the config field.
        """
        family = get_family(config.model_type)
        _check_supported(config, family)
        fields.check_sizes(config)
        num_query_heads = config.num_attention_heads
        num_kv_heads = getattr(config, "num_key_value_heads", None) or num_query_heads
        if num_query_heads % num_kv_heads:
            raise ValueError(
                f"config.num_key_value_heads={num_kv_heads} must divide "
                f"num_attention_heads={num_query_heads}"
            )
        if eos_token_ids is None:
            eos_token_ids = _token_ids(getattr(config, "eos_token_id", None))
        rope, local_rope = read_ropes(config, two=family.two_ropes, partial=family.partial_rotary)
        return cls(
            family=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_query_heads,
            max_position=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope=rope,
            qkv_bias=_flag(family.qkv_bias, config),
            output_bias=_flag(family.output_bias, config),
            mlp_bias=_flag(family.mlp_bias, config),
            qk_norm=family.qk_norm,
            tie_embeddings=bool(config.tie_word_embeddings),
            eos_token_ids=eos_token_ids,
            dtype=_dtype_name(getattr(config, "dtype", None)),
            activation=fields.read_activation(config, family.activation),
            norm_offset=family.norm_offset,
            post_norms=family.post_norms,
            embedding_scale=config.hidden_size**0.5 if family.scaled_embeddings else 1.0,
            query_scale=_query_scale(config, family),
            attention_softcap=fields.positive(config, _ATTENTION_CAP, 0.0),
            logit_softcap=fields.positive(config, _LOGIT_CAP, 0.0),
            windows=read_windows(
                config,
                family.local,
                has_layer_types=family.has_layer_types,
                keeps_long=family.two_ropes,
            ),
            local_rope=local_rope,
            experts=read_experts(config, family.experts),
            unrotated_layers=unrotated_layers(config) if family.has_unrotated_layers else (),
        )

    @property
    def family_flags(self) -> Family:
        """The entry of `FAMILIES` that this model belongs to."""
        return get_family(self.family)

    @property
    def longest(self) -> int:
        """Tokens of the longest text: `max_position`, unless rotary settings stretch that.

        Configs with `linear` or `dynamic` scaling hold the length without it, those with `yarn`
        either.
        """
        if self.rope.kind in ("linear", "dynamic"):
            return int(self.max_position * self.rope.factor)
        if self.rope.kind == "yarn":
            return max(self.max_position, int(self.rope.original_max_position * self.rope.factor))
        return self.max_position

    @property
    def layers(self) -> Layers:
        """The layers as retention sees them."""
        return Layers(self.windows or (0,) * self.num_layers)

    def rope_of(self, layer: int) -> RopeSpec:
        """Rotary settings of a layer."""
        if layer in self.unrotated_layers:
            return UNROTATED
        is_local = bool(self.windows) and self.windows[layer] > 0
        return self.local_rope if is_local and self.local_rope is not None else self.rope

    @property
    def attention_scale(self) -> float:
        """Factor of attention scores."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def group_size(self) -> int:
        """Query heads per kv head of the whole model."""
        return self.num_query_heads // self.num_kv_heads

    def has_experts(self, layer: int) -> bool:
        """Whether a mixture of experts stands in place of the layer's MLP."""
        return self.experts is not None and layer in self.experts.layers

    def parameters_of(self, layer: int, *, used: bool = False) -> int:
        """Weights of one decoder layer (biases and norms left out).

        `used`: those that one token goes through.
        """
        attention = (
            2  # q and o
            * self.num_query_heads
            * self.head_dim
            * self.hidden_size
        ) + (
            2  # k and v
            * self.num_kv_heads
            * self.head_dim
            * self.hidden_size
        )
        channels, others = self.intermediate_size, 0
        if self.experts is not None and layer in self.experts.layers:
            experts = self.experts
            count = experts.per_token if used else experts.num_experts
            channels = count * experts.intermediate_size + experts.shared_intermediate_size
            others = experts.num_experts + (experts.shared_intermediate_size > 0)  # what weighs
        return attention + (3 * channels + others) * self.hidden_size  # gate, up, down

    @property
    def layer_parameters(self) -> int:
        """Weights of a layer that a token goes through, the mean of all layers."""
        layers = range(self.num_layers)
        return sum(self.parameters_of(layer, used=True) for layer in layers) // self.num_layers

    @property
    def head_parameters(self) -> int:
        """Weights of the LM head."""
        return self.vocab_size * self.hidden_size

    @property
    def head_layers(self) -> float:
        """What the LM head costs per token, counted in decoder layers."""
        return self.head_parameters / self.layer_parameters

    @property
    def num_parameters(self) -> int:
        """Weights of the model (biases and norms left out)."""
        embeddings = 1 if self.tie_embeddings else 2
        layers = sum(map(self.parameters_of, range(self.num_layers)))
        return layers + embeddings * self.head_parameters

    def kv_bytes_per_row_token(self, dtype: ItemSize) -> int:
        """Bytes of one kept token in one row (one layer, one kv head)."""
        return (
            2  # key + value
            * self.head_dim
            * dtype.itemsize
        )

    def kv_bytes_per_token(self, dtype: ItemSize) -> int:
        """Bytes of one token's keys and values in all layers and heads of the model."""
        return self.num_layers * self.num_kv_heads * self.kv_bytes_per_row_token(dtype)

    def weight_bytes(self, dtype: ItemSize) -> int:
        """Bytes of the whole model's weights (biases and norms left out)."""
        return self.num_parameters * dtype.itemsize


def load_spec(model: str | Path) -> ModelSpec:
    """The spec of a local folder or hub id; fetches no weights.

    End-of-sequence ids are those of `generation_config.json` where it has them (instruct models
    list several there), else the config's.

    Raises:
        ValueError: no such model, no `config.json`, code from the hub needed, or unsupported.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder = described_folder(model)
    _check_family(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # whatever transformers stumbles over in a damaged config
        kind = (
            ""
            if isinstance(error, ValueError | OSError | StrictDataclassError)
            else f"{type(error).__name__}: "
        )
        why = kind + " ".join(str(error).split())  # in one line
        raise ValueError(f"model: cannot read the config of {str(model)!r}: {why:.500}") from error
    return ModelSpec.from_hf(config, _generation_eos(folder))


def _check_family(folder: Path) -> None:
    """Say what is supported before transformers says what it does not know.

    Raises:
        ValueError: no `config.json` that can be read, a model of no supported family, or a size
            that is none.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(
            f"model: {folder} has no config.json; it needs a Hugging Face model folder"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: cannot read the config in {file}: {error}") from None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type is None:
        raise ValueError(
            f"model: {file} has no model_type; supported: {', '.join(sorted(FAMILIES))}"
        )
    try:
        get_family(model_type)
        fields.check_stated(config)
    except ValueError as error:
        raise ValueError(f"model: {folder}: {error}") from None


def _generation_eos(folder: Path) -> tuple[int, ...] | None:
    """End-of-sequence ids of `generation_config.json`; None where it has none."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        return _token_ids(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")) or None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"model: cannot read {file}: {error}") from None


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _flag(flag: bool | str, config: Any) -> bool:
    return flag if isinstance(flag, bool) else bool(getattr(config, flag, False))


def _dtype_name(dtype: "torch.dtype | str | None") -> str:
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"config.dtype={name!r:.80} is not supported; one of {', '.join(_DTYPES)}")
    return name


def _query_scale(config: Any, family: Family) -> float | None:
    if not family.query_scalar:
        return None
    return 1 / math.sqrt(fields.positive(config, family.query_scalar, 256.0))


def _check_supported(config: Any, family: Family) -> None:
    """Raise for what would otherwise be computed wrongly without a word."""
    fields.check_unquantized(config)
    fields.check_fixed(config, family.fixed)
    for name in {_ATTENTION_CAP, _LOGIT_CAP} - family.softcaps:
        fields.check_fixed(config, {name: None})
