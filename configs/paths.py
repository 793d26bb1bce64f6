"""Where Saqqara keeps what it can make again: the demo model and log files."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: `$SAQQARA_CACHE`, or `saqqara` under `$XDG_CACHE_HOME` or `~/.cache`.

    The folder is not made here.
    """
    if own := os.environ.get("SAQQARA_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "saqqara"
