"""Where a model is: a local folder, a GGUF file, or a hub id.

A GGUF file stands for the folder that is made of it once, in this machine's cache. Files of a hub
id are fetched into the hub's cache; it is `ORG/NAME`, or `ORG/NAME@REVISION` for a branch, tag or
commit.
"""

import os
import re
from functools import lru_cache
from pathlib import Path

from saqqara.workers.gguf.cached import converted_folder, is_gguf

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
_SMALL = ("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
_ALL = (*_SMALL, "*.safetensors")


def local_folder(model: str | Path, what: str = "model") -> Path | None:
    """The folder that `model` names, or None for a hub id; `what` it is, for errors.

    Of a GGUF file it is the folder in the cache, which the first call on a machine makes.

    Raises:
        ValueError: neither an existing folder, nor a GGUF file that is read, nor something that
            looks like a hub id.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        return _folder_of_file(folder, what)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        hint = " (a revision is for hub ids only)" if "@" in str(model) else ""
        raise ValueError(
            f"{what}: there is no folder {str(model)!r}, and it is no hub id (ORG/NAME){hint}"
        )
    return None


def _folder_of_file(file: Path, what: str) -> Path:
    if not is_gguf(file):
        raise ValueError(
            f"{what}: {file} is a file, and not a GGUF file; it needs one, or the folder that "
            "holds config.json"
        )
    try:
        return converted_folder(file)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def hub_parts(model: str) -> tuple[str, str | None]:
    """The repository and the revision that a hub id names."""
    repository, _, revision = model.partition("@")
    return repository, revision or None


def described_folder(model: str | Path, what: str = "model") -> Path:
    """The folder of a model's small files: config, tokenizer, templates; a hub id's are fetched.

    Raises:
        ValueError: no such folder, or the hub or the repository cannot be reached.
    """
    return local_folder(model, what) or _fetched(str(model), _SMALL, what)


def whole_folder(model: str | Path, what: str = "model") -> Path:
    """The folder of a model with its weights; a hub id's are fetched.

    Raises:
        ValueError: no such folder, or the hub or the repository cannot be reached.
    """
    return local_folder(model, what) or _fetched(str(model), _ALL, what)


def cached_folder(model: str) -> Path | None:
    """The folder of a hub id's files in the hub's cache, or None; nothing is fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, revision = hub_parts(model)
    try:
        found = snapshot_download(repository, revision=revision, local_files_only=True)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return None
    return Path(found)


@lru_cache(maxsize=16)  # one look at the hub, however often a process asks
def _fetched(model: str, patterns: tuple[str, ...], what: str) -> Path:
    """The files of a hub id in the cache; what is there is enough where the hub is not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, revision = hub_parts(model)
    nothing = f"{what}: there is no folder {model!r}, and"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*patterns]))
    except GatedRepoError:
        raise ValueError(
            f"{nothing} the hub gives {repository} only to those who asked for access there: do, "
            "and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{nothing} the hub has no {repository}, or only for a token: set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{what}: {repository} has no revision {revision!r} on the hub") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else _first_line(error)
        raise ValueError(
            f"{nothing} it cannot be fetched from the hub ({why}); where the hub can be reached, "
            f"run `hf download {repository} --local-dir FOLDER`, and give that folder"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
