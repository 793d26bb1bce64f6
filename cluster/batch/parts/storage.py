"""Files by path or URL, on this machine or in a cloud: whatever fsspec reads."""

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

from fsspec.core import url_to_fs

from saqqara.cluster.batch.text import naming

# In this order, what a storage says of a file that is another one when its content is.
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "mtime", "LastModified")


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the input.

    Attributes:
        url: where it is.
        label: its path below the folder that all input files share; with a line number it names a
            row, wherever the folder lies.
        num_bytes: its size.
        version: what its storage says of its state, besides the size.
    """

    url: str
    label: str
    num_bytes: int
    version: str


def filesystem(url: str) -> tuple[Any, str]:
    """The file system that a path or URL is on, and the path there.

    Raises:
        ValueError: nothing serves such URLs.
        ImportError: a package is missing; the message says which.
    """
    found: tuple[Any, str] = url_to_fs(url)
    return found


def is_local(fs: Any) -> bool:
    """Whether files are on this machine."""
    protocol = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return "file" in protocol


def whole_url(url: str) -> str:
    """A path that means the same in every process of this machine, or the URL."""
    return _url(*filesystem(url))


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """The files that paths, URLs and glob patterns name, each once, in the order of the patterns.

    Raises:
        ValueError: a pattern matches nothing, a file cannot be read, or a folder is named.
    """
    urls = list(dict.fromkeys(url for pattern in patterns for url in _matching(pattern)))
    if not urls:
        raise ValueError("input: name at least one file")
    above = _folder_above(urls)
    return [_described(url, url[len(above) :].lstrip("/")) for url in urls]


def open_input(file_url: str) -> IO[bytes]:
    """A file's bytes.

    Raises:
        ValueError: it cannot be read.
    """
    fs, path = filesystem(file_url)
    with naming(file_url):
        return cast(IO[bytes], fs.open(path, "rb"))


def check_unchanged(url: str, num_bytes: int, version: str) -> None:
    """Make sure that a file is still the one that was cut into parts.

    Raises:
        ValueError: it was changed, or is gone.
    """
    now = _described(url, "")
    if (now.num_bytes, now.version) != (num_bytes, version):
        raise ValueError(
            f"input: {url} was changed while the job ran; results so far are those of the file as "
            "it was. Start anew with --overwrite once nothing writes to it"
        )


def _matching(pattern: str) -> list[str]:
    fs, path = filesystem(pattern)
    with naming(pattern):
        if not any(sign in path for sign in "*?[") or fs.exists(path):
            if fs.isdir(path):
                raise ValueError(
                    f"input: {pattern} is a folder; name its files, such as "
                    f"'{pattern.rstrip('/')}/*.jsonl'"
                )
            return [_url(fs, path)]
        found = sorted(name for name in fs.glob(path) if fs.isfile(name))
    if not found:
        raise ValueError(f"input: no file matches {pattern!r}")
    return [_url(fs, name) for name in found]


def _url(fs: Any, path: str) -> str:
    return path if is_local(fs) else str(fs.unstrip_protocol(path))


def _folder_above(urls: Sequence[str]) -> str:
    """The folder that all files lie in; the storage's name is a folder, too."""
    folders = [posixpath.dirname(url) for url in urls]
    try:
        return os.path.commonpath(folders)
    except ValueError:  # some on this machine, some elsewhere
        return ""


def _described(url: str, label: str) -> InputFile:
    fs, path = filesystem(url)
    with naming(url):
        fs.invalidate_cache()
        info = fs.info(path)
    version = next((str(info[name]) for name in _VERSIONS if info.get(name) is not None), "")
    return InputFile(url, label, int(info["size"]), version)
