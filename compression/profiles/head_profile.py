"""How much each head of a model matters, measured beforehand: what the `profile` shape reads."""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, Self

from saqqara.compression.bounds import MAX_SCORE, Bound
from saqqara.configs.json_text import StrictJsonError, parse_json
from saqqara.configs.shown import shown
from saqqara.configs.yaml_files import CONFIG_DIR

SCORE = Bound(0, MAX_SCORE)
KEY = re.compile(r"(0|[1-9][0-9]{0,4})-(0|[1-9][0-9]{0,4})")
MAX_FILE_BYTES = 64 * 2**20
AUTO = "auto"  # in place of what was measured of a model: an engine looks it up


@dataclass(frozen=True)
class HeadProfile:
    """The importance of every query head of one model.

    A value: hashable and picklable, with the numbers inside, so it travels without its file.

    Attributes:
        scores: [layers][query heads], from 0 to `bounds.MAX_SCORE`, not all 0. They need not sum to
            one.
        propagate_layer: the layer whose last queries look facts up, where a `propagate` stage of
            kind `once` selects; None: not measured.
        of_model: whether it was found in the profile store, by the model's weights.
        digest: short name of these scores, for labels.

    Raises:
        ValueError: the scores are none of that; names `profile`.
    """

    scores: tuple[tuple[float, ...], ...]
    propagate_layer: int | None = None
    of_model: bool = field(default=False, compare=False)
    digest: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            numbers = [score for layer in self.scores for score in layer]
        except TypeError:
            raise ValueError("profile: needs scores [layers][query heads]") from None
        if len({len(layer) for layer in self.scores}) != 1 or not numbers:
            raise ValueError("profile: every layer must have scores of the same number of heads")
        if not all(map(SCORE.accepts, numbers)) or not any(numbers):
            raise ValueError(
                f"profile: the scores must be finite, from 0 up to {SCORE.most:g}, and not all 0"
            )
        digest = hashlib.blake2b(repr(self.scores).encode(), digest_size=4).hexdigest()
        object.__setattr__(self, "digest", digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    @classmethod
    def read(cls, source: object) -> Self:
        """Read a profile as users give it.

        Args:
            source: name of a profile in `configs/profiles/`; path of a JSON file; or its content:
                {"layer-head": [scores]} with layers and query heads counted from 0, every head of
                every layer present. A head's scores (say, one per measured prompt) are averaged.
                Or a mapping that holds this as `profile`, with what else was measured beside it:
                an entry of the profile store.

        Raises:
            ValueError: not that; names the file and the key.
        """
        if isinstance(source, Mapping):
            return cls._of("profile", source)
        if not isinstance(source, str | PathLike):
            raise ValueError(
                "profile: must be the path of a JSON file {'layer-head': [scores]}, not "
                f"{type(source).__name__} {shown(source)}"
            )
        name = f"profile: {source!s:.200}"
        try:
            text = _file_text(source)
        except OSError as error:
            raise ValueError(f"{name}: cannot be read ({error.strerror or error})") from error
        except (RuntimeError, ValueError) as error:  # no such home, or no file's name, or no text
            raise ValueError(f"{name}: cannot be read ({error})") from error
        try:
            content = parse_json(text)
        except StrictJsonError as error:
            raise ValueError(f"{name}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{name}: is not JSON ({error})") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{name}: must hold an object {{'layer-head': [scores]}}")
        return replace(cls._of(name, content), of_model=False)

    @classmethod
    def _of(cls, name: str, content: Mapping[Any, Any]) -> Self:
        if "profile" not in content:
            return cls(_table(name, content))
        if not isinstance(content["profile"], Mapping):
            raise ValueError(f"{name}: 'profile' must be an object {{'layer-head': [scores]}}")
        layer, of_model = content.get("propagate_layer"), content.get("of_model", False)
        scores = _table(name, content["profile"])
        if layer is not None and (type(layer) is not int or not 0 <= layer < len(scores)):
            raise ValueError(
                f"{name}: propagate_layer must be one of its {len(scores)} layers, counted from 0, "
                f"not {shown(layer)}"
            )
        return cls(scores, layer, of_model is True)

    def to_dict(self) -> dict[str, Any]:
        """The content of a file that reads back as this profile."""
        table = {
            f"{layer}-{head}": [score]
            for layer, heads in enumerate(self.scores)
            for head, score in enumerate(heads)
        }
        if self.propagate_layer is None and not self.of_model:
            return table
        return {
            "propagate_layer": self.propagate_layer,
            "of_model": self.of_model,
            "profile": table,
        }

    def check(self, num_layers: int, num_query_heads: int) -> None:
        """Raise a ValueError unless it is a profile of such a model."""
        layers, heads = len(self.scores), len(self.scores[0])
        if (layers, heads) != (num_layers, num_query_heads):
            raise ValueError(
                f"profile: has {layers} layers of {heads} query heads; this model has "
                f"{num_layers} of {num_query_heads} (`saqqara eval calibrate` measures one)"
            )

    def weights(self, num_layers: int, num_heads: int) -> tuple[tuple[Fraction, ...], ...]:
        """Scores [num_layers][num_heads] of the kv heads: each the sum over its query heads.

        Raises:
            ValueError: the profile is of another model.
        """
        return _weights(self, num_layers, num_heads)


@lru_cache(maxsize=16)
def _weights(
    profile: HeadProfile, num_layers: int, num_heads: int
) -> tuple[tuple[Fraction, ...], ...]:
    layers, query_heads = len(profile.scores), len(profile.scores[0])
    if layers != num_layers or query_heads % num_heads:
        raise ValueError(
            f"profile: has {layers} layers of {query_heads} query heads, which is no profile of "
            f"this model of {num_layers} layers with {num_heads} kv heads (`saqqara eval "
            "calibrate` measures one)"
        )
    group = query_heads // num_heads
    return tuple(
        tuple(
            sum(map(Fraction, scores[i : i + group]), Fraction(0))
            for i in range(0, len(scores), group)
        )
        for scores in profile.scores
    )


def _file_text(source: str | PathLike[str]) -> str:
    """What is in the file of that path, or in the shipped profile of that name."""
    file = Path(source).expanduser()
    shipped = CONFIG_DIR / "profiles" / f"{source}.json"
    if not file.exists() and shipped.exists():
        file = shipped
    if file.exists() and not file.is_file():  # a pipe or a device may never end
        raise OSError("not a file")
    if file.exists() and file.stat().st_size > MAX_FILE_BYTES:
        raise OSError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return file.read_text(encoding="utf-8")


def _table(name: str, content: Mapping[Any, Any]) -> tuple[tuple[float, ...], ...]:
    """Mean scores [layers][query heads] of the content of a profile."""
    means: dict[tuple[int, int], float] = {}
    for key, scores in content.items():
        match = KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            raise ValueError(f"{name}: key {shown(key)} must be '<layer>-<head>', such as '0-2'")
        means[int(match[1]), int(match[2])] = _mean(f"{name}: key {key!r}", scores)
    if not means:
        raise ValueError(f"{name}: holds no head; it needs a key '<layer>-<head>' for each")
    layers, heads = (1 + max(numbers) for numbers in zip(*means, strict=True))
    for layer, head in _pairs(layers, heads):
        if (layer, head) not in means:
            raise ValueError(
                f"{name}: key '{layer}-{head}' is missing; with {layers} layers and {heads} heads "
                "every one needs its scores"
            )
    if not any(means.values()):
        raise ValueError(f"{name}: all scores are 0")
    return tuple(tuple(means[layer, head] for head in range(heads)) for layer in range(layers))


def _mean(name: str, scores: object) -> float:
    if not isinstance(scores, list | tuple) or not scores:
        raise ValueError(f"{name}: must be a list of scores, not {shown(scores)}")
    for score in scores:
        if not SCORE.accepts(score):
            raise ValueError(
                f"{name}: scores must be finite numbers from 0 up to {SCORE.most:g}, not "
                f"{shown(score)}"
            )
    return math.fsum(scores) / len(scores)


def _pairs(layers: int, heads: int) -> Iterable[tuple[int, int]]:
    return ((layer, head) for layer in range(layers) for head in range(heads))
