"""From a GGUF file to a plain safetensors folder, tensor by tensor.

Anything that this does not know is refused by name. Tensors are written while they are dequantised,
so no more than a piece of one lies in memory.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .architectures import Architecture, architecture_of, make_config
from .file import GgufFile, StoredTensor
from .vocabulary import make_tokenizer

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedConfig

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
Progress = Callable[[str], object]
_PIECE_NUMBERS = 8 << 20  # 32 MiB as float32
_SAY_EVERY = 10  # percent
_NAMES = {"float32": "F32", "bfloat16": "BF16"}
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class _Target:
    """One tensor of the folder: where it comes from, and how it changes on the way.

    `pairs` are the heads whose rows are stored for the rotation of neighbours, or 0; `offset` is
    taken from the numbers.
    """

    name: str
    stored: StoredTensor
    dtype: str
    pairs: int
    offset: float

    @property
    def num_bytes(self) -> int:
        return math.prod(self.stored.shape) * (4 if self.dtype == "float32" else 2)


class Conversion:
    """What becomes of a file: checked as a whole before anything is written.

    Matrices become bfloat16, or float32 where all of them are stored as such. Norms that an offset
    was added to (Gemma's +1) lose it again in float32, and are stored as float32 only where
    bfloat16 would not hold what is left.

    Raises:
        ValueError: the file holds another kind of model, tensor or tokenizer.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        architecture = architecture_of(file)
        self.dtype = _matrix_dtype(file)
        try:
            self.config = make_config(file, self.dtype)
            self._targets = [*_targets(file, architecture, self.config, self.dtype)]
            _check_shapes(self._targets, self.config)
            self._tokenizer = make_tokenizer(file)
        except ValueError:
            raise
        except Exception as error:  # whatever transformers or tokenizers stumbles over
            why = " ".join(str(error).split())  # in one line
            raise ValueError(
                f"GGUF: {file.path}: its fields make no model or tokenizer "
                f"({type(error).__name__}: {why:.300})"
            ) from error

    @property
    def num_bytes(self) -> int:
        """About what the folder takes of a disk."""
        vocabulary = 128 * len(self._tokenizer)  # with its merges, as JSON
        return sum(target.num_bytes for target in self._targets) + vocabulary

    def write(self, folder: Path, say: Progress) -> None:
        """Write config, generation config, weights and tokenizer into `folder`."""
        from transformers import GenerationConfig

        self.config.save_pretrained(folder)
        GenerationConfig.from_model_config(self.config).save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        self._write_weights(folder / "model.safetensors", say)

    def _write_weights(self, path: Path, say: Progress) -> None:
        total = sum(target.num_bytes for target in self._targets)
        done, said = 0, 0
        with path.open("wb") as out:
            out.write(_header(self._targets))
            for target in self._targets:
                for piece in _pieces(self._file, target):
                    done += out.write(piece)
                    if (percent := 100 * done // total) >= said + _SAY_EVERY or done == total:
                        said = percent
                        say(f"dequantised {percent}% of {total / 1e6:,.0f} MB")


def convert(path: Path, folder: Path, say: Progress | None = None) -> None:
    """Write the model of a GGUF file into `folder` as a Hugging Face folder.

    Raises:
        ValueError: the file holds another kind of model, tensor or tokenizer.
    """
    Conversion(GgufFile(path)).write(folder, say or (lambda _: None))


def _matrix_dtype(file: GgufFile) -> str:
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return "float32" if kinds == {"F32"} else "bfloat16"


def _targets(
    file: GgufFile, architecture: Architecture, config: "PreTrainedConfig", dtype: str
) -> Iterator[_Target]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for stored in file.tensors.values():
        if stored.name == "rope_freqs.weight":  # in the config
            continue
        name, kind = architecture.weight_name(stored.name)
        _check_readable(file, stored)
        offset = architecture.norm_offset if kind.endswith("norm") else 0.0
        pairs = heads.get(kind, 0) if architecture.pairs_rotated else 0
        precise = offset and not _held_by_bfloat16(_numbers(file.rows(stored), stored) - offset)
        yield _Target(name, stored, "float32" if precise else dtype, pairs, offset)


def _check_readable(file: GgufFile, stored: StoredTensor) -> None:
    try:
        _numbers(file.rows(stored)[:1], stored)
    except NotImplementedError:
        raise ValueError(
            f"GGUF: tensor {stored.name!r} is of type {stored.kind}, which gguf cannot dequantise"
        ) from None


def _check_shapes(targets: list[_Target], config: "PreTrainedConfig") -> None:
    """Every weight of the model must be there, in its shape, and no other."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    found = {target.name: target.stored.shape for target in targets}
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"GGUF: its fields imply {expected.get(name, 'nothing')} as the shape of "
                f"{name!r}; the file has {found.get(name, 'nothing')}"
            )


def _held_by_bfloat16(numbers: "np.ndarray") -> bool:
    """Whether nothing is lost but float32's own rounding where an offset of 1 was added."""
    import numpy as np
    import torch

    rounded = torch.from_numpy(numbers).to(torch.bfloat16).to(torch.float32).numpy()
    ulp = np.spacing(np.maximum(np.abs(numbers), 1.0).astype(np.float32))
    return bool((np.abs(rounded - numbers) <= ulp).all())


def _header(targets: list[_Target]) -> bytes:
    """Of a safetensors file: the length, then JSON that says where each tensor lies."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for target in targets:
        entries[target.name] = {
            "dtype": _NAMES[target.dtype],
            "shape": list(target.stored.shape),
            "data_offsets": [start, start + target.num_bytes],
        }
        start += target.num_bytes
    text = json.dumps(entries, allow_nan=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _pieces(file: GgufFile, target: _Target) -> Iterator[bytes]:
    import torch

    rows = file.rows(target.stored)
    if target.pairs:
        rows = _halves_apart(rows, target)
    step = max(_PIECE_NUMBERS // target.stored.shape[-1], 1)
    for first in range(0, len(rows), step):
        numbers = _numbers(rows[first : first + step], target.stored) - target.offset
        piece = torch.from_numpy(numbers).to(getattr(torch, target.dtype))
        yield _bytes(piece)


def _bytes(tensor: "torch.Tensor") -> bytes:
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _halves_apart(rows: "np.ndarray", target: _Target) -> "np.ndarray":
    """Rows 0, 2, 4, ... of each head before rows 1, 3, 5, ...; of a bias, its numbers."""
    import numpy as np

    if len(target.stored.shape) == 1:
        rows = rows.reshape(target.stored.shape[0], -1)
    pairs = rows.reshape(target.pairs, -1, 2, rows.shape[1]).swapaxes(1, 2)
    apart = np.ascontiguousarray(pairs)
    return apart.reshape(1, -1) if len(target.stored.shape) == 1 else apart.reshape(rows.shape)


def _numbers(rows: "np.ndarray", stored: StoredTensor) -> "np.ndarray":
    """Stored rows as float32 [rows, numbers of a row]."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[stored.kind]
    if stored.kind in ("F32", "F16"):
        rows = rows.view(np.float32 if stored.kind == "F32" else np.float16)
    numbers = dequantize(rows, kind).astype(np.float32)
    return np.ascontiguousarray(numbers.reshape(len(rows), stored.shape[-1]))
