"""How the command line helps: flags by panel, mistakes in one line, hints that are right."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from saqqara.configs.names import closest

logger = logging.getLogger("saqqara")

Function = TypeVar("Function", bound=Callable[..., Any])
ARGUMENTS, OWN_PANEL = "Arguments", "Options"
UsageError: Any = typer.BadParameter.__base__  # typer does not export it


class App(typer.Typer):
    """A command with commands of these classes in it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            cls=Group,
            no_args_is_help=True,
            add_completion=False,
            pretty_exceptions_enable=False,
            rich_markup_mode=None,  # its tables cut long flags short
            **settings,
        )

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Function], Function]:
        """Add a command."""
        return super().command(name, cls=Command, **settings)


class Command(TyperCommand):
    """A command whose help groups its flags by panel."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; an error of theirs says what is close to what was written."""
        known = [name for param in self.params for name in (*param.opts, *param.secondary_opts)]
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            _with_right_hint(error, known)
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the flags, those of each panel under its name, the command's own first."""
        panels: dict[str, list[tuple[str, str]]] = {ARGUMENTS: [], OWN_PANEL: []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            argument = param.param_type_name == "argument"
            panel = ARGUMENTS if argument else getattr(param, "rich_help_panel", None)
            panels.setdefault(panel or OWN_PANEL, []).append(record)
        for panel, records in panels.items():
            if records:
                with formatter.section(panel):
                    formatter.write_dl(records)


class Group(TyperGroup):
    """A group of commands that reports mistakes in one line."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command; wrong arguments are one line on stderr and exit code 2."""
        whole_process = extra.get("standalone_mode", True)
        extra["standalone_mode"] = False
        if not whole_process:
            return super().main(*args, **extra)
        try:
            # Here an exit's code is what comes back; a command's own result is None.
            code = super().main(*args, **extra)
        except typer.Abort:
            typer.echo("interrupted", err=True)
            sys.exit(130)
        except UsageError as error:
            self._report(error)
            sys.exit(error.exit_code)
        sys.exit(code or 0)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that is named; an unknown one gets the closest, or the list."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            known = self.list_commands(ctx)
            close = closest(name, known)
            hint = f"did you mean {close!r}?" if close else f"known: {', '.join(known)}"
            raise UsageError(f"there is no command {name!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def _report(self, error: Any) -> None:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            return
        message = " ".join(error.format_message().split()).rstrip(".")
        if error.ctx is not None and isinstance(error.ctx.command, Command):
            message += f" (all flags: {error.ctx.command_path} --help)"
        typer.echo(f"error: {message[:1].lower()}{message[1:]}", err=True)


def root_app() -> App:
    """`saqqara` itself, without a command."""
    app = App(
        name="saqqara",
        help="Inference for large language models on Ray, with pyramid KV retention.",
    )
    app.callback()(_common)
    return app


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn an error into one line on stderr and an exit code; its traceback goes to the debug log.

    Wrong input (`ValueError`) exits with 2, anything that failed (`RuntimeError`, which includes a
    dead engine, `OSError`, and `ImportError` of what is not installed) with 1, an interrupt with
    130.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):  # RuntimeErrors, too
        raise
    except BrokenPipeError:  # `| head` has seen enough: typer ends without a word
        raise
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        logger.debug("traceback", exc_info=True)
        # Some libraries explain in several lines; here it is one.
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


def file_path(text: str) -> Path:
    """What a flag that names a file means."""
    if not text:
        raise typer.BadParameter("the name is empty")
    return Path(text)


def _print_version(wanted: bool) -> None:
    if wanted:
        from saqqara import __version__

        typer.echo(f"saqqara {__version__}")
        raise typer.Exit


def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and end.", callback=_print_version, is_eager=True
        ),
    ] = False,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error; debug also shows tracebacks.")
    ] = "info",
) -> None:
    """Set up logging."""
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise typer.BadParameter(
            f"{log_level!r} is not one of debug, info, warning, error", param_hint="--log-level"
        )
    logging.basicConfig(
        level=logging.WARNING,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logger.setLevel(level)


def _with_right_hint(error: Any, known: Sequence[str]) -> None:
    """Let an unknown flag's error name the closest flag that there is, or none."""
    if type(error).__name__ == "NoSuchOption":
        close = closest(error.option_name, known)
        hint = f"; did you mean {close}?" if close else ""
        error.message = f"there is no flag {error.option_name}{hint}"
        error.possibilities = None
