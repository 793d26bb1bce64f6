"""Builds the overlays of deploy/kustomize without kubectl, for checks; knows what they use.

That is `resources`, `images` (`newTag`, `newName`) and `patches` of JSON operations (RFC 6902: add,
replace) with a `target`. Anything else in a kustomization is an error, so that what is checked is
what `kubectl kustomize` makes; a test compares the two where kubectl is installed.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent / "kustomize" / "overlays"
FILE = "kustomization.yaml"
_KNOWN = {"apiVersion", "kind", "resources", "images", "patches"}

Json = dict[str, Any]


def overlays() -> list[Path]:
    """The folders of the overlays."""
    return sorted(file.parent for file in FOLDER.glob(f"*/{FILE}"))


def build(folder: Path) -> list[Json]:
    """The manifests of a kustomization.

    Raises:
        ValueError: it uses what is not known here, or a patch does not fit.
    """
    given = yaml.safe_load((folder / FILE).read_text(encoding="utf-8"))
    if unknown := set(given) - _KNOWN:
        raise ValueError(f"{folder / FILE}: {sorted(unknown)} is not known here")
    documents: list[Json] = []
    for name in given.get("resources", ()):
        path = folder / name
        documents += build(path) if path.is_dir() else yaml.safe_load_all(path.read_text("utf-8"))
    for patch in given.get("patches", ()):
        text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text("utf-8")
        [target] = [d for d in documents if _is_target(d, patch["target"])]
        for operation in yaml.safe_load(text):
            apply(target, operation)
    for image in given.get("images", ()):
        for container in _containers(documents):
            _rename(container, image)
    return documents


def apply(document: Any, operation: Mapping[str, Any]) -> None:
    """Carry out one operation of a JSON patch.

    Raises:
        ValueError: the operation is not known, or its path does not exist.
    """
    parts = [p.replace("~1", "/").replace("~0", "~") for p in operation["path"].split("/")[1:]]
    value = copy.deepcopy(operation["value"])
    try:
        for part in parts[:-1]:
            document = document[int(part) if isinstance(document, list) else part]
        last: Any = parts[-1]
        if operation["op"] == "add" and isinstance(document, list):
            document.insert(len(document) if last == "-" else int(last), value)
        elif operation["op"] in ("add", "replace"):
            last = int(last) if isinstance(document, list) else last
            if operation["op"] == "replace":
                document[last]  # it must be there
            document[last] = value
        else:
            raise ValueError(f"the operation {operation['op']!r} is not known here")
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{operation['path']} does not exist: {error!r}") from None


def _is_target(document: Json, target: Mapping[str, str]) -> bool:
    assert set(target) == {"kind", "name"}, "what the overlays use"
    return (document["kind"], document["metadata"]["name"]) == (target["kind"], target["name"])


def _containers(node: Any) -> Iterator[Json]:
    """Everything in a list `containers` or `initContainers`, however deep."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                yield from value
            else:
                yield from _containers(value)
    elif isinstance(node, list):
        for item in node:
            yield from _containers(item)


def _rename(container: Json, image: Mapping[str, str]) -> None:
    name, _, tag = container["image"].rpartition(":")
    if name == image["name"]:
        container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
