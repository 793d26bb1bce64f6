"""Where the commands print their tables."""

import shutil
import sys

from rich.console import Console


def console() -> Console:
    """Standard output for tables, wide enough for them where no terminal says how wide it is."""
    width = None if sys.stdout.isatty() else max(100, shutil.get_terminal_size().columns)
    return Console(width=width)
