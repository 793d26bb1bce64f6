"""Mixture of experts, as a config says it."""

from dataclasses import dataclass
from typing import Any

from .fields import check_whole

_MOST_EXPERTS = 10_000
_MOST_CHANNELS = 10_000_000


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """Mixture of experts in place of the MLP of some layers.

    Attributes:
        num_experts: routed experts.
        per_token: of them, how many each token goes through.
        intermediate_size: of one routed expert.
        shared_intermediate_size: of the shared expert, which all tokens go through and a sigmoid
            of the hidden state weighs; 0: there is none.
        normalised: whether the weights of a token's experts are made to sum to 1.
        layers: numbers of the layers with experts, rising; the others have a plain MLP.
    """

    num_experts: int
    per_token: int
    intermediate_size: int
    shared_intermediate_size: int
    normalised: bool
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExpertFields:
    """Where a family's config says how its experts are.

    Attributes:
        intermediate_size: the field with the size of an expert.
        shared_intermediate_size: of the shared expert; "": there is none.
        normalised: the flag; True: always.
        has_plain_layers: whether `mlp_only_layers` and `decoder_sparse_step` leave layers without.
    """

    intermediate_size: str
    shared_intermediate_size: str = ""
    normalised: str | bool = True
    has_plain_layers: bool = False


def read_experts(config: Any, fields: ExpertFields | None) -> ExpertSpec | None:
    """The experts of a model; None: all layers have a plain MLP.

    Raises:
        ValueError: a number is out of bounds, or there are experts in a family without.
    """
    name, num_experts = _number_of_experts(config)
    if fields is None:
        if num_experts:
            raise ValueError(
                f"config.{name}={num_experts!r:.80}: models of type {config.model_type!r} have no "
                "experts"
            )
        return None
    check_whole(name, num_experts, _MOST_EXPERTS)
    layers = tuple(n for n in range(config.num_hidden_layers) if _has_experts(config, fields, n))
    shared = 0
    if fields.shared_intermediate_size:
        shared = _size(config, fields.shared_intermediate_size, _MOST_CHANNELS)
    flag = fields.normalised
    experts = ExpertSpec(
        num_experts=num_experts,
        per_token=_size(config, "num_experts_per_tok", num_experts),
        intermediate_size=_size(config, fields.intermediate_size, _MOST_CHANNELS),
        shared_intermediate_size=shared,
        normalised=flag if isinstance(flag, bool) else bool(getattr(config, flag, False)),
        layers=layers,
    )
    return experts if layers else None


def _number_of_experts(config: Any) -> tuple[str, Any]:
    """The field, and what it says; it has had several names."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (value := getattr(config, name, None)) is not None:
            return name, value
    return "num_local_experts", None


def _size(config: Any, name: str, most: int) -> int:
    value = getattr(config, name, None)
    check_whole(name, value, most)
    return int(value)  # type: ignore[arg-type]


def _has_experts(config: Any, fields: ExpertFields, layer: int) -> bool:
    if not fields.has_plain_layers:
        return True
    plain, step = getattr(config, "mlp_only_layers", None), "decoder_sparse_step"
    every = 1 if getattr(config, step, None) is None else _size(config, step, _MOST_EXPERTS)
    return layer not in (plain or ()) and (layer + 1) % every == 0
