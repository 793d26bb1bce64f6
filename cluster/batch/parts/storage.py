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
    fs, path = filesystem(url)
    return os.path.realpath(path) if is_local(fs) else _url(fs, path)


def find_inputs(patterns: Sequence[str]) -> list[InputFile]:
    """The files that paths, URLs and glob patterns name, each once, in the order of their labels.

    However they are named, the same files come in the same order: parts are numbered by it.

    Raises:
        ValueError: a pattern matches nothing, a file cannot be read, or a folder is named; or two
            URLs may be one file.
    """
    urls = _each_once({url for pattern in patterns for url in _matching(pattern)})
    if not urls:
        raise ValueError("input: name at least one file")
    labels = labels_of(urls)
    return [_described(url, labels[url]) for url in sorted(urls, key=labels.__getitem__)]


def labels_of(urls: Sequence[str]) -> dict[str, str]:
    """Each URL's path below the folder that all lie in; the storage's name is a folder, too."""
    paths = [url.split("/") for url in urls]
    folders = [path[:-1] for path in paths]
    first, last = min(folders), max(folders)  # what these two share, those between them do
    num_shared = len(first)
    while first[:num_shared] != last[:num_shared]:
        num_shared -= 1
    return {url: "/".join(path[num_shared:]) for url, path in zip(urls, paths, strict=True)}


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
    """A URL; of a file on this machine, its path with its folder's links followed."""
    if not is_local(fs):
        return str(fs.unstrip_protocol(path))
    folder, name = os.path.split(path)
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(folder), name)


def _each_once(urls: set[str]) -> list[str]:
    """One URL of each file, whatever the others are; a link keeps its own name.

    Raises:
        ValueError: on another machine, where only the storage knows whether they are one.
    """
    found: dict[str, str] = {}
    for url in sorted(urls):
        is_remote = "://" in url
        same = posixpath.normpath(url) if is_remote else os.path.realpath(url)
        if is_remote and same in found:
            raise ValueError(
                f"input: {found[same]} and {url} may be one file; name each in one spelling"
            )
        found.setdefault(same, url)
    return list(found.values())


def _described(url: str, label: str) -> InputFile:
    fs, path = filesystem(url)
    with naming(url):
        fs.invalidate_cache()
        info = fs.info(path)
    version = next((str(info[name]) for name in _VERSIONS if info.get(name) is not None), "")
    return InputFile(url, label, int(info["size"]), version)
