"""Retentions that stand for what was measured of a model, filled in where the model is known.

`recommended` and `recommended-fast` spread their budgets by the profile of the model, which lies in
the profile store under the fingerprint of its weights (`compression/profiles/`). Who controls an
engine looks it up and sends it along with the retention, so all ranks have the same, whatever lies
on their machines. Where there is none, both are `recommended-adaptive`, and say so.
"""

import json
import logging
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saqqara.compression.profiles.fingerprint import weights_digest
from saqqara.compression.profiles.head_profile import AUTO, HeadProfile
from saqqara.compression.profiles.store import ProfileStore
from saqqara.compression.retention import Retention
from saqqara.workers.models.source import cached_folder, local_folder, whole_folder

if TYPE_CHECKING:  # a plan goes without it
    from saqqara.configs.schema import EngineConfig

logger = logging.getLogger(__name__)

INSTEAD = "recommended-adaptive"
_CALIBRATE = "saqqara eval calibrate"  # to clients without the model, whose path is the server's
_ADAPTIVE = ("recommended", "recommended-fast")
_SHARED = ("window", "sinks", "skip_layers", "kernel_size", "pooling", "decode")
"""The settings that the one takes and the others, too."""


@dataclass(frozen=True, slots=True)
class Found:
    """The profile of a model, or why there is none."""

    profile: HeadProfile | None
    why_not: str = ""


class ModelPresets:
    """Fills in what retentions leave to the profile of one model.

    Args:
        model: folder or hub id.
        load_format: of its weights, as `EngineConfig` has it.
        profile_dir: the profile store; default: that of the cache folder.
        may_fetch: whether a hub id's weights, which its fingerprint is of, may be fetched to here.
    """

    def __init__(
        self,
        model: str,
        load_format: str = "safetensors",
        profile_dir: str | None = None,
        *,
        may_fetch: bool = False,
    ) -> None:
        self._model = model
        self._may_fetch = may_fetch
        self._load_format = load_format
        self._store = ProfileStore(profile_dir)
        self._has_warned = False
        self._known = lru_cache(maxsize=64)(self._resolved)  # one value for like requests

    @classmethod
    def of(cls, config: "EngineConfig") -> "ModelPresets":
        """Those of an engine's model."""
        is_here = config.executor == "local"  # so the weights will be
        return cls(config.model, config.load_format, config.profile_dir, may_fetch=is_here)

    def resolve(self, retention: Retention) -> Retention:
        """The retention with the model's profile; `INSTEAD` where there is none.

        The first time that there is none a warning is logged.

        Raises:
            ValueError: there is none, and the retention cannot do without one; names the command
                that measures it.
        """
        return self._known(retention) if retention.needs_profile else retention

    def _resolved(self, retention: Retention) -> Retention:
        given = retention.profile  # by its path, in place of what is stored
        found = Found(given) if given is not None else self.found
        propagate, profile = retention.propagate, found.profile
        layer = None if profile is None else profile.propagate_layer
        if profile is None:
            return self._without(retention, found.why_not)
        settings = {**retention.to_dict(), "profile": profile}
        if propagate is not None and propagate.layer == AUTO:
            if layer is None:
                why_not = "the profile says no layer that selects what upper layers see"
                return self._without(retention, why_not)
            settings["propagate"] = replace(propagate, layer=layer)
        return Retention.parse(settings)

    @cached_property
    def found(self) -> Found:
        """The profile that the store has of the model."""
        if self._load_format == "dummy":
            return Found(None, "dummy weights have no profile")
        look = whole_folder if self._may_fetch else cached_folder
        try:
            folder = local_folder(self._model) or look(self._model)
        except ValueError:  # who loads it says what is wrong with it
            folder = None
        if folder is None or not any(folder.glob("*.safetensors")):
            return Found(None, "the model's weights, which tell it, are not on this host")
        try:
            profile = self._store.find(weights_digest(folder))
            if profile is not None:
                _check_heads(profile, folder)
        except (ValueError, OSError) as error:
            return Found(None, f"its entry is damaged: {error}")
        why_not = "the profile store has none of this model"
        return Found(profile, "" if profile is not None else why_not)

    def note(self, why_not: str) -> str:
        """What people are told where there is no profile."""
        return (
            f"{why_not}: recommended is {INSTEAD} here, which does worse at equal bytes; measure "
            f"one with `{self.command}`"
        )

    @property
    def command(self) -> str:
        """What measures the profile of the model."""
        return f"{_CALIBRATE} --model {self._model}"

    def _without(self, retention: Retention, why_not: str) -> Retention:
        """What stands in for it, with all that was set by hand."""
        if retention.method not in _ADAPTIVE:
            raise ValueError(
                f"profile: {why_not}; {retention.method} needs one: `{_CALIBRATE}` measures it"
            )
        preset = Retention.parse(retention.method, retention.to_dict()["budget"]).to_dict()
        departs: dict[str, Any] = {
            name: value for name, value in retention.to_dict().items() if preset.get(name) != value
        }
        if unfit := sorted(departs.keys() - {*_SHARED}):
            raise ValueError(
                f"{unfit[0]}: is about {retention.method} with a profile of the model, but "
                f"{why_not}; `{_CALIBRATE}` measures one"
            )
        if not self._has_warned:
            self._has_warned = True
            logger.warning("%s", self.note(why_not))
        return Retention.parse({"method": INSTEAD, "budget": preset["budget"], **departs})


def _check_heads(profile: HeadProfile, folder: Path) -> None:
    """Raise a ValueError unless the profile has the layers and heads of the model's config."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    layers, heads = (config.get(f"num_{name}") for name in ("hidden_layers", "attention_heads"))
    if layers is not None and heads is not None:
        profile.check(layers, heads)


def with_profile(config: "EngineConfig") -> "EngineConfig":
    """The settings of an engine, its own retention resolved; before its ranks start.

    Raises:
        ValueError: see `ModelPresets.resolve`.
    """
    retention = Retention.parse(config.retention, config.budget)
    if not retention.needs_profile:
        return config
    resolved = ModelPresets.of(config).resolve(retention)
    return config.model_copy(update={"retention": resolved.to_dict(), "budget": None})


def calibrated_folder(model: str) -> Path:
    """The folder of a model whose profile is to be stored; a hub id's files are fetched.

    Raises:
        ValueError: it has no weights, or they cannot be fetched.
    """
    folder = whole_folder(model)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"model: there are no weights of {model} to store a profile of")
    return folder
