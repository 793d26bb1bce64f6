"""Where Saqqara keeps what it can make again: the demo model and log files."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: `$SAQQARA_CACHE`, or `saqqara` under `$XDG_CACHE_HOME` or `~/.cache`.

    The folder is not made here.

    Raises:
        ValueError: none is named, and the user has no home: a container's, of a random number.
    """
    if own := os.environ.get("SAQQARA_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    if shared:
        return Path(shared) / "saqqara"
    try:
        return Path.home() / ".cache" / "saqqara"
    except RuntimeError as error:
        raise ValueError(
            "SAQQARA_CACHE: this user has no home folder; set it to a folder that can be written"
        ) from error
