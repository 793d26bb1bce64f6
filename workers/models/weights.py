"""Weights, read slice by slice: each rank takes only what is its own.

A `WeightSource` is a checkpoint in safetensors format (one file, or shards with an index) or
`DummyWeights`, random numbers that are the same model however it is cut.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch

from saqqara.workers.safetensors_file import LoadProgress, SafetensorsFile, piece_buffer

from .source import whole_folder
from .spec import ModelSpec

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

# Held by checkpoints, read by nobody: `lm_head.weight` where embeddings are tied (else it is read).
_HARMLESS_ENDINGS = ("rotary_emb.inv_freq", "lm_head.weight")
_NUM_LISTED = 5

_DUMMY_STD = 0.02
_DUMMY_BLOCK_ELEMENTS = 1 << 22


class Rows(NamedTuple):
    """Output rows of a projection: those from `first` on of a tensor, which may hold several."""

    name: str
    first: int
    size: int

    def of(self, rows: range) -> tuple[str, range]:
        """The tensor, and the rows in it of some of the projection's."""
        return self.name, range(self.first + rows.start, self.first + rows.stop)


def attention_rows(spec: ModelSpec) -> tuple[Rows, ...]:
    """Queries, keys and values of a layer."""
    names, D = spec.family_flags.names, spec.head_dim
    q_size, kv_size = spec.num_query_heads * D, spec.num_kv_heads * D
    return _rows((names.query, names.key, names.value), (q_size, kv_size, kv_size), names.qkv)


def mlp_rows(spec: ModelSpec) -> tuple[Rows, ...]:
    """Gate and up of a plain MLP."""
    names, size = spec.family_flags.names, spec.intermediate_size
    return _rows((names.gate, names.up), (size, size), names.gate_up)


def _rows(names: Sequence[str], sizes: Sequence[int], joined: str) -> tuple[Rows, ...]:
    """Projections by themselves, or one below the other in the tensor `joined`."""
    if not joined:
        return tuple(Rows(name, 0, size) for name, size in zip(names, sizes, strict=True))
    firsts = (0, *accumulate(sizes))
    return tuple(Rows(joined, first, size) for first, size in zip(firsts, sizes, strict=False))


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of `spec` must hold."""
    names = spec.family_flags.names
    shapes: dict[str, tuple[int, ...]] = {names.embedding: (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.num_layers):
        for part, shape in _layer_shapes(spec, layer):
            shapes[names.of_layer(layer, part)] = shape
    shapes[names.final_norm] = (spec.hidden_size,)
    if not spec.tie_embeddings:
        shapes[names.head] = (spec.vocab_size, spec.hidden_size)
    return shapes


def _layer_shapes(spec: ModelSpec, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name, within its layer, and shape of every tensor of a layer."""
    names, E, D = spec.family_flags.names, spec.hidden_size, spec.head_dim
    columns: dict[str, tuple[int, bool]] = {}
    for rows in attention_rows(spec):
        columns[rows.name] = (rows.first + rows.size, spec.qkv_bias)
    if not spec.has_experts(layer):
        for rows in mlp_rows(spec):
            columns[rows.name] = (rows.first + rows.size, spec.mlp_bias)
        yield from _linear_shapes(names.down, E, spec.intermediate_size, spec.mlp_bias)
    for name, (count, has_bias) in columns.items():
        yield from _linear_shapes(name, count, E, has_bias)
    yield from _linear_shapes(names.output, E, spec.num_query_heads * D, spec.output_bias)
    norms = [names.attention_norm, names.mlp_norm]
    if spec.post_norms:
        norms += [names.attention_post_norm, names.mlp_post_norm]
    yield from ((norm, (E,)) for norm in norms)
    if spec.qk_norm:
        yield from ((norm, (D,)) for norm in (names.query_norm, names.key_norm))
    if spec.has_experts(layer):
        yield from _expert_shapes(spec)


def _expert_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    names, experts, E = spec.family_flags.names, spec.experts, spec.hidden_size
    assert experts is not None
    yield from _linear_shapes(names.router, experts.num_experts, E, has_bias=False)
    mlps = [
        [
            names.of_expert(n, part)
            for part in (names.expert_gate, names.expert_up, names.expert_down)
        ]
        for n in range(experts.num_experts)
    ]
    sizes = [experts.intermediate_size] * len(mlps)
    if shared := experts.shared_intermediate_size:
        mlps.append([names.shared_gate, names.shared_up, names.shared_down])
        sizes.append(shared)
        yield from _linear_shapes(names.shared_share, 1, E, has_bias=False)
    for (gate, up, down), size in zip(mlps, sizes, strict=True):
        for part in (gate, up):
            yield from _linear_shapes(part, size, E, has_bias=False)
        yield from _linear_shapes(down, E, size, has_bias=False)


def _linear_shapes(
    name: str, rows: int, columns: int, has_bias: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    if has_bias:
        yield f"{name}.bias", (rows,)


def open_weights(
    model: str | Path,
    spec: ModelSpec,
    load_format: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    total_bytes: int | None = None,
) -> "WeightSource":
    """Open the weights of a local folder or hub id (downloads it), or random ones for `dummy`.

    Use it as a context manager: leaving it closes the files. `seed` is for `dummy`;
    `total_bytes`, of all that this rank will read, is for the bar in the log.

    Raises:
        ValueError: no such model, no safetensors in it, or an unknown `load_format`.
    """
    if load_format == "dummy":
        norm = 1 - spec.norm_offset
        return DummyWeights(weight_shapes(spec), dtype, device, seed, total_bytes, norm)
    if load_format != "safetensors":
        raise ValueError(f"load_format={load_format!r} is unknown; it is 'safetensors' or 'dummy'")
    return SafetensorsWeights(whole_folder(model), weight_shapes(spec), dtype, device, total_bytes)


class WeightSource(ABC):
    """Reads slices of named tensors, cast to `dtype` on `device`."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device | str,
        total_bytes: int | None = None,
    ) -> None:
        self.shapes = shapes
        self.dtype = dtype
        self.device = torch.device(device)
        self._progress = LoadProgress(total_bytes)

    def read(
        self,
        name: str,
        rows: range | None = None,
        cols: range | None = None,
        pad_rows_to: int | None = None,
    ) -> torch.Tensor:
        """Read a tensor, or the rows and columns of it that are asked for, as a new tensor.

        `pad_rows_to` appends rows of zeros up to that number (the padded vocabulary).

        Raises:
            ValueError: the tensor is missing or its shape is not what the config implies.
        """
        shape = self.shapes[name]
        num_rows = shape[0] if rows is None else len(rows)
        widths = shape[1:] if cols is None else (len(cols),)
        size = (num_rows if pad_rows_to is None else pad_rows_to, *widths)
        out = torch.empty(size, dtype=self.dtype, device=self.device)
        out[num_rows:].zero_()
        self._copy(out[:num_rows], name, rows, cols)
        return out

    def read_joined(self, parts: Sequence[tuple[str, range]]) -> torch.Tensor:
        """Read rows of several tensors, one below the other, as one new tensor.

        Each is copied to its place, so that none lies in memory besides.

        Raises:
            ValueError: as `read`.
        """
        shape = self.shapes[parts[0][0]]
        size = (sum(len(rows) for _, rows in parts), *shape[1:])
        out = torch.empty(size, dtype=self.dtype, device=self.device)
        first = 0
        for name, rows in parts:
            self._copy(out[first : first + len(rows)], name, rows, None)
            first += len(rows)
        return out

    def read_stacked(self, names: Sequence[str], cols: range) -> torch.Tensor:
        """Read columns of several tensors of one shape into one new tensor [names, rows, cols].

        Raises:
            ValueError: as `read`.
        """
        size = (len(names), self.shapes[names[0]][0], len(cols))
        out = torch.empty(size, dtype=self.dtype, device=self.device)
        for place, name in zip(out, names, strict=True):
            self._copy(place, name, None, cols)
        return out

    def _copy(self, out: torch.Tensor, name: str, rows: range | None, cols: range | None) -> None:
        """Copy a tensor, or the rows and columns of it that are asked for, to `out`."""
        shape = self.shapes[name]
        assert cols is None or len(shape) == 2, f"{name} has one dimension"
        rows = range(shape[0]) if rows is None else rows
        cols = range(shape[-1]) if cols is None else cols
        assert 0 <= rows.start <= rows.stop <= shape[0], f"{name}: rows {rows} of {shape}"
        assert 0 <= cols.start <= cols.stop <= shape[-1], f"{name}: columns {cols} of {shape}"
        self._copy_slice(out, name, shape, rows, cols)
        self._progress.note(out)

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; nothing can be read afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _copy_slice(
        self, out: torch.Tensor, name: str, shape: tuple[int, ...], rows: range, cols: range
    ) -> None:
        """Copy the slice to `out`, which has its shape, and any dtype and device."""


class SafetensorsWeights(WeightSource):
    """A folder with `model.safetensors`, or shards and `model.safetensors.index.json`."""

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        total_bytes: int | None = None,
    ) -> None:
        super().__init__(shapes, dtype, device, total_bytes)
        self.folder = folder
        self._files: dict[str, SafetensorsFile] = {}
        self._buffer = piece_buffer(shapes.values())
        self._index = self._read_index()
        try:
            self._check_names()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _read_index(self) -> dict[str, str] | None:
        """File name per tensor; None for a single file."""
        index = self.folder / _INDEX
        if not index.is_file():
            if not (self.folder / _SINGLE).is_file():
                raise ValueError(
                    f"model: {self.folder} has neither {_SINGLE} nor {_INDEX}; "
                    "only safetensors are read"
                )
            return None
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"model: {index} is not an index of safetensors: {error!r}") from error
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file or not (self.folder / file).is_file():
                raise ValueError(f"model: {index} names {file}, which is not in the folder")
        return weight_map

    def _check_names(self) -> None:
        """Raise unless the checkpoint holds what the config implies, and nothing else.

        A tensor that nobody reads means that another model would run than was saved. Harmless are
        the rotary frequencies that old checkpoints hold, and the head of a model that ties it.
        """
        if self._index is None:
            where, held = self.folder / _SINGLE, self._file(_SINGLE).names
        else:
            where, held = self.folder / _INDEX, set(self._index)
        if missing := sorted(self.shapes.keys() - held):
            raise ValueError(f"model: {where} lacks {_listed(missing)}, which the config implies")
        unread = sorted(
            name for name in held - self.shapes.keys() if not name.endswith(_HARMLESS_ENDINGS)
        )
        if unread:
            raise ValueError(
                f"model: {where} holds {_listed(unread)}, which the config has no place for; do "
                "config.json and the weights belong together?"
            )

    def _file(self, file: str) -> SafetensorsFile:
        """A file of the folder, opened once."""
        if file not in self._files:
            self._files[file] = SafetensorsFile(self.folder / file, self._buffer)
        return self._files[file]

    def _copy_slice(
        self, out: torch.Tensor, name: str, shape: tuple[int, ...], rows: range, cols: range
    ) -> None:
        file = _SINGLE if self._index is None else self._index[name]
        self._file(file).copy(out, name, shape, rows, cols)


class DummyWeights(WeightSource):
    """Random weights: normal with standard deviation 0.02, norms `norm`.

    Numbers depend on (seed, tensor name, place in the full tensor) and on the kind of device, not
    on the slice: every sharding sees the same model.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        total_bytes: int | None = None,
        norm: float = 1.0,
    ) -> None:
        super().__init__(shapes, dtype, device, total_bytes)
        self.seed = seed
        self.norm = norm

    def close(self) -> None:
        """Nothing to let go of."""

    def _copy_slice(
        self, out: torch.Tensor, name: str, shape: tuple[int, ...], rows: range, cols: range
    ) -> None:
        if name.endswith("norm.weight"):
            out.fill_(self.norm)
            return
        block = max(1, _DUMMY_BLOCK_ELEMENTS // math.prod(shape[1:]))
        for start in range(rows.start - rows.start % block, rows.stop, block):
            stop = min(start + block, shape[0])
            full = self._block(f"{self.seed}/{name}/{start}", (stop - start, *shape[1:]))
            first, last = max(start, rows.start), min(stop, rows.stop)
            part = full[first - start : last - start]
            if len(shape) == 2:
                part = part[:, cols.start : cols.stop]
            out[first - rows.start : last - rows.start].copy_(part)

    def _block(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        generator = torch.Generator(self.device)
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(shape, generator=generator, device=self.device) * _DUMMY_STD


def _listed(names: Sequence[str]) -> str:
    """A few names, and how many there are."""
    more = f" and {len(names) - _NUM_LISTED} more" if len(names) > _NUM_LISTED else ""
    noun = "tensor" if len(names) == 1 else "tensors"
    return f"{noun} {', '.join(map(repr, names[:_NUM_LISTED]))}{more}"
