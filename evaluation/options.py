"""Options that several evaluation commands share: each group is one value, declared once."""

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from saqqara.cluster.cli.options import with_settings
from saqqara.configs.shown import shown

if TYPE_CHECKING:
    from saqqara.compression.retention import Retention
    from saqqara.evaluation.prompts.haystack import Split

MAX_DIGITS = 18  # of a number: more is a mistake

T = TypeVar("T")

type_hints = functools.partial(get_type_hints, include_extras=True)


@dataclass(frozen=True)
class Compared:
    """The retention settings that are compared."""

    retention: Annotated[
        list[str] | None,
        typer.Option(
            "--retention",
            metavar="NAME@BUDGET|YAML",
            help="A setting, such as snapkv@25% or '{method: pyramidkv, budget: 128}'; repeatable.",
        ),
    ] = None
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Names or YAML mappings, each at every budget. "
            "[default: pyramidkv,snapkv,streaming,knorm,random, unless --retention is given]",
        ),
    ] = None
    budgets: Annotated[
        str | None,
        typer.Option(
            metavar="B,...",
            help="Tokens or shares for --methods. [default: 25%; report: 10%,25%,50%]",
        ),
    ] = None

    def retentions(self, default_budgets: str = "25%") -> list["Retention"]:
        """Those of `--retention`, and the grid where it was asked for or nothing else was."""
        from saqqara.evaluation.grid import DEFAULT_METHODS, parse_grid, parse_setting

        found = [parse_setting(text) for text in self.retention or ()]
        if self.methods is not None or self.budgets is not None or not self.retention:
            methods = DEFAULT_METHODS if self.methods is None else self.methods
            budgets = default_budgets if self.budgets is None else self.budgets
            found += parse_grid(methods, budgets)
        return found


@dataclass(frozen=True)
class SourceText:
    """The text that prompts are made of."""

    haystack: Annotated[
        Path | None,
        typer.Option(
            "--haystack",
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Folder with .txt, .md or .rst files; default: the topics of Python's pydoc.",
        ),
    ] = None
    split: Annotated[
        str, typer.Option(help="Half of the text: tune methods on one, report on the other.")
    ] = "tune"

    @property
    def half(self) -> "Split":
        """The half of the text.

        Raises:
            ValueError: there is no half of this name.
        """
        if self.split == "tune":
            return "tune"
        if self.split == "report":
            return "report"
        raise ValueError(f"split: must be tune or report, not {self.split!r}")


@dataclass(frozen=True)
class OutputFiles:
    """Where the outcomes go, beside the tables that are printed."""

    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write every outcome here.")
    ] = None
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="OUT.png", help="Write a picture here.")
    ] = None

    def check(self) -> None:
        """Raise a ValueError where one of them cannot be written."""
        from saqqara.evaluation.figures.plots import check_plot_file

        if self.json_file is not None:
            check_output_file(self.json_file, "json")
        if self.plot is not None:
            check_plot_file(self.plot)
            check_output_file(self.plot, "plot")


def eval_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the engine's settings, and a flag per field of its groups of options."""
    shared = with_settings(sampling=False, without=("retention", "budget"), watched=True)
    return shared(with_groups(command))


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter that is a dataclass of options by its fields.

    A default of the parameter, an instance, gives the fields their defaults.
    """
    own = inspect.signature(command).parameters
    groups = {n: p for n, p in own.items() if is_dataclass(p.annotation) and n != "settings"}

    @functools.wraps(command)
    def grouped(**given: Any) -> None:
        values = {
            name: p.annotation(**{f.name: given.pop(f.name) for f in fields(p.annotation)})
            for name, p in groups.items()
        }
        command(**given, **values)

    flags = [
        flag.replace(kind=flag.KEYWORD_ONLY)
        for name, p in own.items()
        for flag in (_flags(p) if name in groups else [p])
    ]
    grouped.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
    return grouped


def _flags(group: inspect.Parameter) -> list[inspect.Parameter]:
    """A parameter for each field of a group."""
    hints = type_hints(group.annotation)
    found = []
    for field in fields(group.annotation):
        given = group.default is not inspect.Parameter.empty
        default = getattr(group.default, field.name) if given else field.default
        assert default is not MISSING, f"{field.name}: shared options have defaults"
        kind = inspect.Parameter.KEYWORD_ONLY
        found.append(
            inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name])
        )
    return found


def names(text: str, field: str) -> tuple[str, ...]:
    """The names of a list with commas.

    Raises:
        ValueError: one is empty.
    """
    found = tuple(name.strip() for name in text.split(","))
    if not all(found):
        raise ValueError(f"{field}: must be names with commas between them, not {shown(text)}")
    return _each_once(found, field)


def lengths_in_tokens(text: str, field: str) -> tuple[int, ...]:
    """Numbers of tokens from a list with commas.

    Raises:
        ValueError: something is no number over 0, or there is none.
    """
    numbers = _integers(text, field)
    if not all(numbers):
        raise ValueError(f"{field}: must be numbers over 0 such as 1024,2048, not {shown(text)}")
    return numbers


def layer_numbers(text: str) -> tuple[int, ...]:
    """Numbers of layers from a list with commas.

    Raises:
        ValueError: something is no number.
    """
    return _integers(text, "layers")


def shares(text: str, field: str) -> tuple[float, ...]:
    """Numbers from a list with commas.

    Raises:
        ValueError: something is no number, or there is none.
    """
    entries = names(text, field)
    try:
        found = tuple(map(float, entries))
    except ValueError:
        raise ValueError(f"{field}: must be numbers such as 0,0.5,1, not {shown(text)}") from None
    return _each_once(found, field)


def _integers(text: str, field: str) -> tuple[int, ...]:
    entries = names(text, field)
    if not all(entry.isdecimal() and len(entry) <= MAX_DIGITS for entry in entries):
        raise ValueError(f"{field}: must be numbers such as 1024,2048, not {shown(text)}")
    return _each_once(tuple(map(int, entries)), field)


def _each_once(values: tuple[T, ...], field: str) -> tuple[T, ...]:
    """The values; ValueError where one comes twice, whose work would be done twice."""
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{field}: {shown(value)} is there twice")
    return values


def check_output_file(path: Path, field: str) -> None:
    """Raise a ValueError unless a file can be written there: known before hours of work."""
    if path.is_dir():
        raise ValueError(f"{field}: {str(path)!r} is a folder, and must be a file")
    _check_folder(path.absolute().parent, path, field)


def check_output_folder(path: Path, field: str) -> None:
    """Raise a ValueError unless files can be written into such a folder."""
    _check_folder(path.absolute(), path, field)


def _check_folder(folder: Path, path: Path, field: str) -> None:
    """A ValueError about `path` unless `folder` is there for us to write, or can be made."""
    there = next(one for one in (folder, *folder.parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"{field}: {str(path)!r} cannot be written: {there} is no folder of yours")
