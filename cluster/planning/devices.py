"""What a GPU can hold and do, by the makers' data sheets; and machines of one's own, from YAML."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from saqqara.configs.names import did_you_mean
from saqqara.configs.yaml_files import load_yaml

GIB = 1024**3
# From and to, both included; rates and bandwidths in numbers or bytes a second.
_RATES, _SECONDS = (1e6, 1e21), (0.0, 60.0)
_BOUNDS = {
    "memory_gib": (0.01, 1e6),
    "bandwidth": _RATES,
    "flops": _RATES,
    "link_bandwidth": _RATES,
    "link_seconds": _SECONDS,
    "node_bandwidth": _RATES,
    "node_seconds": _SECONDS,
    "product_bandwidth": _RATES,
    "together": (0.01, 100.0),
    "gpus_per_node": (1, 1024),
    "hour_price": (0.0, 1e6),
}
_MAY_BE_NONE = ("product_bandwidth", "hour_price")


_100G, _200G, _400G = 12.5e9, 25e9, 50e9  # a network card of its own for each GPU


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or, of `kind` "cpu", a machine whose ranks share all that it has.

    Attributes:
        memory_gib: as the driver reports it, in GiB.
        bandwidth: of its memory, bytes a second.
        flops: dense products in bfloat16 or float16 a second, sum and product counted each.
        link_bandwidth: bytes a second that it can send to the others of its node.
        link_seconds: before a message to one of them is under way.
        node_bandwidth: bytes a second that it can send to another node.
        node_seconds: before a message to another node is under way.
        product_bandwidth: bytes of weights a second that a product of several rows takes in, where
            it first copies them and then multiplies, one after the other (BLAS on a CPU); None: it
            reads at `bandwidth` while it multiplies.
        together: of kind "cpu", what ranks reach together, each on its part of the cores, beside
            one that has all; above 1 where the threads of one wait for each other.
        gpus_per_node: how many share a node, if nobody says otherwise.
        hour_price: of one GPU, in dollars; None: not known.
    """

    name: str
    memory_gib: float
    bandwidth: float
    flops: float
    link_bandwidth: float
    kind: str = "cuda"
    link_seconds: float = 8e-6
    node_bandwidth: float = _400G
    node_seconds: float = 25e-6
    product_bandwidth: float | None = None
    together: float = 1.0
    gpus_per_node: int = 8
    hour_price: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("cuda", "cpu"):
            raise ValueError(f"kind: must be 'cuda' or 'cpu', not {self.kind!r}")
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name: must be a text, not {self.name!r}")
        for name, (least, most) in _BOUNDS.items():
            value, is_whole = getattr(self, name), name == "gpus_per_node"
            if value is None and name in _MAY_BE_NONE:
                continue
            is_number = isinstance(value, int if is_whole else int | float)
            if isinstance(value, bool) or not is_number or not least <= value <= most:
                number = "a whole number" if is_whole else "a number"
                raise ValueError(
                    f"{name}: must be {number} from {least:g} to {most:g}, not {value!r:.80}"
                )

    @property
    def memory_bytes(self) -> int:
        """All of its memory."""
        return int(self.memory_gib * GIB)

    def share_of(self, num_ranks: int) -> float:
        """The part of its speed that one of so many ranks of a node has."""
        if self.kind != "cpu" or num_ranks == 1:
            return 1.0
        return self.together / num_ranks

    def product_seconds(self, products: float, num_bytes: float, rows: float) -> float:
        """At its limits, for so many products and sums of `rows` with weights of so many bytes."""
        computing, reading = products / self.flops, num_bytes / self.bandwidth
        if self.product_bandwidth is None or rows <= 1:
            return max(computing, reading)
        return computing + num_bytes / self.product_bandwidth


_NVLINK_A100, _NVLINK_H100 = 300e9, 450e9  # one way, all links of a GPU together
_PCIE4, _PCIE5 = 25e9, 50e9  # one way, as measured on x16

DEVICES = {
    device.name: device
    for device in (
        Device("h100-80gb", 79.1, 3.35e12, 989e12, _NVLINK_H100),
        Device("h100-pcie-80gb", 79.1, 2.0e12, 756e12, _PCIE5, link_seconds=15e-6),
        Device("h100-nvl-94gb", 93.1, 3.9e12, 835e12, _PCIE5, link_seconds=15e-6),
        Device("h200-141gb", 139.8, 4.8e12, 989e12, _NVLINK_H100),
        Device("a100-80gb", 79.1, 2.039e12, 312e12, _NVLINK_A100, node_bandwidth=_200G),
        Device("a100-40gb", 39.4, 1.555e12, 312e12, _NVLINK_A100, node_bandwidth=_200G),
        Device(
            "a100-pcie-80gb",
            79.1,
            1.935e12,
            312e12,
            _PCIE4,
            link_seconds=15e-6,
            node_bandwidth=_200G,
        ),
        Device("l40s-48gb", 44.4, 864e9, 362e12, _PCIE4, link_seconds=15e-6, node_bandwidth=_100G),
        Device("l4-24gb", 22.0, 300e9, 121e12, _PCIE4, link_seconds=15e-6, node_bandwidth=_100G),
        Device(
            "a10g-24gb",
            22.0,
            600e9,
            70e12,
            _PCIE4,
            link_seconds=15e-6,
            node_bandwidth=_100G,
            gpus_per_node=4,
        ),
        Device(
            "rtx-4090-24gb", 23.6, 1008e9, 165e12, _PCIE4, link_seconds=15e-6, node_bandwidth=_100G
        ),
        Device("b200-180gb", 178.4, 7.7e12, 2250e12, 900e9),
    )
}


def device_of(name: str) -> Device:
    """A known GPU, or the one that a YAML file describes (the fields of `Device`).

    Raises:
        ValueError: no such GPU or file, or a field of it is wrong.
    """
    if name in DEVICES:
        return DEVICES[name]
    if not name.endswith((".yaml", ".yml")):
        raise ValueError(
            f"gpu: {name!r} is not known; {did_you_mean(name, DEVICES)}; or give a YAML file"
        )
    return _from_yaml(Path(name).stem, load_yaml(name, "gpu"), name)


def _from_yaml(stem: str, values: dict[str, Any], file: str) -> Device:
    known = [field.name for field in fields(Device)]
    for key in values:
        if key not in known:
            raise ValueError(f"gpu: {file}: unknown key {key!r}; {did_you_mean(str(key), known)}")
    required = ("memory_gib", "bandwidth", "flops", "link_bandwidth")
    if missing := [key for key in required if key not in values]:
        raise ValueError(f"gpu: {file} lacks {', '.join(missing)}")
    read = {key: _number(value) if key in _BOUNDS else value for key, value in values.items()}
    try:
        return Device(**{"name": stem, **read})
    except ValueError as error:
        raise ValueError(f"gpu: {file}: {error}") from None


def _number(value: Any) -> Any:
    """What YAML takes for a text because it has no point, such as 5e10, as the number it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
