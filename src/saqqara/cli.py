"""The command line: `saqqara {generate,batch,serve,plan,methods,bench,eval,...}`.

Exit codes: 0 done, 1 something failed, 2 the user's input is wrong (one line says what), 3 rows
have errors (`batch --fail-on-errors`), 128 + n ended by signal n (130: Ctrl-C).
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    app: Any

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the `saqqara` script."""
    try:
        _app_for(sys.argv[1:])()
    finally:
        _write_the_rest()


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _whole_app()
    return globals()[name]


def _app_for(arguments: Sequence[str]) -> Any:
    """The command with all of its commands; `plan` and `top` come alone, and so within a second."""
    name = arguments[0] if arguments else None
    if name not in ("plan", "top"):
        return _whole_app()
    from saqqara.cluster.cli.help import root_app

    app = root_app()
    if name == "plan":
        from saqqara.cluster.cli.plan_flags import plan

        app.command()(plan)
    else:
        from saqqara.cluster.cli.top import top

        app.command()(top)
    return app


def _whole_app() -> Any:
    from saqqara.cluster.cli.commands import app
    from saqqara.evaluation.bench_cli import bench
    from saqqara.evaluation.cli import evaluation

    app.add_typer(bench, name="bench")
    app.add_typer(evaluation, name="eval")
    return app


def _write_the_rest() -> None:
    """Flush stdout; where its reader has left (`| head`), drop the rest without a word.

    The stream itself: typer may have put a wrapper in its place, whose flush says nothing, and the
    interpreter's own flush at its end would complain.
    """
    if sys.__stdout__ is None:
        return
    try:
        sys.__stdout__.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())


if __name__ == "__main__":
    main()
