"""The profile store: what `saqqara eval calibrate` measured of models, by their weights.

A folder with one JSON file a model, called by the fingerprint of its weights. The profiles that are
shipped (`configs/profiles/`) name theirs inside and are looked at last, so that an own measurement
counts.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saqqara.configs.json_text import json_text
from saqqara.configs.paths import cache_dir
from saqqara.configs.yaml_files import CONFIG_DIR

from .head_profile import HeadProfile


class ProfileStore:
    """A folder of measured profiles.

    Args:
        folder: default: `profiles` in the cache folder. It need not exist.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._named = Path(folder).expanduser() if folder else None

    @property
    def folder(self) -> Path:
        """Where entries lie.

        Raises:
            ValueError: none is named, and there is no cache folder (see `cache_dir`).
        """
        return self._named or cache_dir() / "profiles"

    def path(self, fingerprint: str) -> Path:
        """Where the entry of such weights lies, if there is one."""
        return self.folder / f"{fingerprint}.json"

    def find(self, fingerprint: str) -> HeadProfile | None:
        """The profile of the model with such weights, or None.

        Raises:
            ValueError: its entry cannot be read, or is damaged; names the file.
        """
        try:
            own = str(self.path(fingerprint))
        except ValueError:
            own = ""  # without a cache folder nothing was measured here
        # A folder that may not be looked into has no entry, either.
        file = Path(own) if os.path.exists(own) else _shipped().get(fingerprint)
        if file is None:
            return None
        found = HeadProfile.read(file)
        return HeadProfile(found.scores, found.propagate_layer, of_model=True)

    def check_writable(self) -> None:
        """Make the folder; a ValueError says why it cannot be, before minutes are spent."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"profile_dir: {self.folder}: {error.strerror or error}") from None
        if not os.access(self.folder, os.W_OK):
            raise ValueError(f"profile_dir: nothing can be written to {self.folder}")

    def write(self, fingerprint: str, profile: HeadProfile, measured: Mapping[str, Any]) -> Path:
        """Put a profile into the store, whole or not at all; returns its file.

        Args:
            fingerprint: of the model's weights.
            profile: of the model.
            measured: what people may want to know of it; JSON values.

        Raises:
            OSError: it cannot be written.
        """
        file = self.path(fingerprint)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        part.write_text(entry_text(fingerprint, profile, measured), encoding="utf-8")
        part.replace(file)
        return file


def entry_text(fingerprint: str, profile: HeadProfile, measured: Mapping[str, Any]) -> str:
    """An entry as it is stored, one head a line; `HeadProfile.read` reads the profile in it."""
    table = {
        f"{layer}-{head}": [round(score, 6)]
        for layer, heads in enumerate(profile.scores)
        for head, score in enumerate(heads)
    }
    HeadProfile.read(table)  # what is rounded is still one
    lines = [f"{json_text(key)}: {json_text(scores)}" for key, scores in table.items()]
    head = {
        "fingerprint": fingerprint,
        "propagate_layer": profile.propagate_layer,
        "measured": dict(measured),
    }
    beginning = json_text(head, indent=1).removesuffix("\n}")
    return f'{beginning},\n "profile": {{\n' + ",\n".join(lines) + "\n}}\n"


def _shipped() -> dict[str, Path]:
    """The profiles of `configs/profiles/` that name the weights they are of."""
    found = {}
    for file in sorted((CONFIG_DIR / "profiles").glob("*.json")):
        fingerprint = json.loads(file.read_text(encoding="utf-8")).get("fingerprint")
        if fingerprint is not None:
            found[fingerprint] = file
    return found
