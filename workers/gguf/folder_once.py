"""A folder that is made once: whole or not at all, by one process of several."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def build_once(
    target: Path, files: tuple[str, ...], build: Callable[[Path], None], num_bytes: int = 0
) -> Path:
    """Fill the folder `target` by calling `build(temporary_folder)`, unless it has all of `files`.

    The folder appears in one rename, complete. Processes of one host take turns by a file lock;
    where locks do not reach (two hosts on a network file system), the first rename wins. What a
    killed process of this host left of an attempt is removed.

    Args:
        target: the folder.
        files: what it must hold to be complete.
        build: fills it.
        num_bytes: what it will take of the disk, checked before.

    Raises:
        ValueError: the disk is too full, or the cache cannot be written.
    """
    if _is_complete(target, files):
        return target
    with _clear_errors(target.parent), _lock(target):
        if _is_complete(target, files):
            return target
        attempts = f".{target.name}.{socket.gethostname()}."
        for left in target.parent.glob(f"{glob.escape(attempts)}*"):
            shutil.rmtree(left, ignore_errors=True)
        _check_room(target, num_bytes)
        temporary = Path(tempfile.mkdtemp(prefix=attempts, dir=target.parent))
        try:
            folder = temporary / target.name
            folder.mkdir()
            build(folder)
            assert _is_complete(folder, files), f"build left out some of {files}"
            _publish(folder, target, files)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


@contextlib.contextmanager
def _clear_errors(cache: Path) -> Iterator[None]:
    hint = "set SAQQARA_CACHE to a folder that has room and can be written"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"cache: the disk of {cache} is full; {hint}") from error
        if error.errno in _UNWRITABLE:
            raise ValueError(f"cache: {cache} cannot be written ({error}); {hint}") from error
        raise


def _check_room(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < num_bytes:
        raise ValueError(
            f"cache: {target.name} takes {num_bytes / 1e9:.2f} GB and the disk of {target.parent} "
            f"has {free / 1e9:.2f} GB free; make room, or set SAQQARA_CACHE to another folder"
        )


def _publish(folder: Path, target: Path, files: tuple[str, ...]) -> None:
    if target.exists() and not _is_complete(target, files):
        os.replace(target, folder.with_name("incomplete"))
    try:
        os.replace(folder, target)
    except OSError:  # a folder with files in it is not replaced: another host was first
        if not _is_complete(target, files):
            raise


def _is_complete(folder: Path, files: tuple[str, ...]) -> bool:
    return all((folder / name).is_file() for name in files)


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock
