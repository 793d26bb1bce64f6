"""The rules of the house, as functions of a source tree, so that each can be shown to fail.

A rule takes the tree and gives the lines that break it: none where it is kept.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

MAX_LINES = 400
MAX_FILES = 13  # of a room, `__init__.py` not counted: about a dozen
PACKAGE = "src/saqqara"  # the import root: its own files, and links to the folders


@dataclass(frozen=True)
class House:
    """The source files below `root`, in these top folders.

    Args:
        root: the folder above them.
        folders: their names; `saqqara.<folder>` is how they are imported.
    """

    root: Path
    folders: tuple[str, ...]

    @cached_property
    def files(self) -> list[str]:
        """Python files as paths below `root`, sorted."""
        return sorted(
            file.relative_to(self.root).as_posix()
            for pattern in (f"{PACKAGE}/*.py", *(f"{folder}/**/*.py" for folder in self.folders))
            for file in self.root.glob(pattern)
        )

    @cached_property
    def modules(self) -> dict[str, str]:
        """The file of each module's full name."""
        return {
            ".".join((*_package(f), Path(f).stem)).removesuffix(".__init__"): f for f in self.files
        }

    def imports(self, file: str) -> Iterator[str]:
        """Full names of what a file imports, wherever in it, relative names resolved.

        Imports for type checkers count: a circle of types is a circle for the reader. So do names
        of modules as text, for `importlib`.
        """
        package = _package(file)
        for node in ast.walk(ast.parse((self.root / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else ()
                module = ".".join([*base, *([node.module] if node.module else [])])
                yield from (f"{module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Constant) and node.value in self.modules.keys() - {"saqqara"}:
                yield str(node.value)

    def file_of(self, name: str) -> str | None:
        """The file that an imported name is in; None where there is none."""
        return self.modules.get(name) or self.modules.get(name.rpartition(".")[0])

    @cached_property
    def needs(self) -> dict[str, set[str]]:
        """The files of this house that each file imports.

        The version is a constant of the package, and no way to what its doors import.
        """
        return {
            file: {
                found
                for name in self.imports(file)
                if name != "saqqara.__version__" and (found := self.file_of(name)) is not None
            }
            - {file}
            for file in self.files
        }


def _package(file: str) -> tuple[str, ...]:
    """The package that a file is in."""
    folder = Path(file).parent.as_posix()
    return ("saqqara",) if folder == PACKAGE else ("saqqara", *Path(folder).parts)


def unknown_imports(house: House) -> list[str]:
    """Imports of the package that lead to no file, so that no other rule could see them."""
    return [
        f"{file} imports {name}"
        for file in house.files
        for name in house.imports(file)
        if name.partition(".")[0] == "saqqara" and house.file_of(name) is None
    ]


def upward_imports(house: House, rooms: Mapping[str, frozenset[str]]) -> list[str]:
    """Imports of a room that the file's own room may not import.

    Args:
        house: the tree.
        rooms: what each room may import, by the path of a folder or of a single file; a file
            belongs to the longest path that it lies under.
    """
    return [
        f"{file} imports {other}: {room_of(file, rooms)} may not import {room_of(other, rooms)}"
        for file, others in house.needs.items()
        for other in sorted(others)
        if room_of(other, rooms) not in rooms[room_of(file, rooms)] | {room_of(file, rooms)}
    ]


def room_of(file: str, rooms: Iterable[str]) -> str:
    """The room that a file belongs to.

    Raises:
        ValueError: no room of the table has it.
    """
    found = [room for room in rooms if file == room or file.startswith(f"{room}/")]
    if not found:
        raise ValueError(f"{file} is in no room; the table needs a line for its folder")
    return max(found, key=len)


def circles(house: House) -> list[str]:
    """Files that import each other in a circle: the first one found, as a line."""
    try:
        TopologicalSorter(house.needs).prepare()
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def importers(house: House, package: str) -> list[str]:
    """Files that import a package of others, such as `ray`, anywhere in them."""
    return [
        file
        for file in house.files
        if package in {name.partition(".")[0] for name in house.imports(file)}
    ]


def bare_imports(house: House) -> list[str]:
    """Imports of a top folder by its bare name, which works in a checkout alone."""
    return [
        f"{file} imports {name}"
        for file in house.files
        for name in house.imports(file)
        if name.partition(".")[0] in house.folders
    ]


def long_files(house: House) -> list[str]:
    """Source files, kernels in C++ among them, of more than `MAX_LINES` lines."""
    files = [*house.files]
    for folder in house.folders:
        files += [
            f.relative_to(house.root).as_posix()
            for ending in ("cpp", "h")
            for f in house.root.glob(f"{folder}/**/*.{ending}")
        ]
    counts = {f: len((house.root / f).read_text(encoding="utf-8").splitlines()) for f in files}
    return [f"{f} has {lines} lines" for f, lines in counts.items() if lines > MAX_LINES]


def full_rooms(house: House) -> list[str]:
    """Folders with more than `MAX_FILES` Python files of their own, `__init__.py` not counted."""
    parents = [Path(f).parent.as_posix() for f in house.files if not f.endswith("__init__.py")]
    counts = {folder: parents.count(folder) for folder in sorted(set(parents))}
    return [f"{folder} has {count} files" for folder, count in counts.items() if count > MAX_FILES]


def silent_rooms(house: House, openings: Mapping[str, str]) -> list[str]:
    """Folders whose first file does not say what they are for and what they import.

    Args:
        house: the tree.
        openings: the first file of folders that have no `__init__.py`.
    """
    found = []
    for folder in sorted({Path(file).parent.as_posix() for file in house.files} - {PACKAGE}):
        first = openings.get(folder, f"{folder}/__init__.py")
        source = house.root / first
        text = source.read_text(encoding="utf-8") if source.exists() else ""
        said = ast.get_docstring(ast.parse(text)) or ""
        if not re.search(r"\b[Ii]mport(s|ed)?\b", said):
            found.append(first)
    return found
