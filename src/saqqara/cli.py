"""The command line: `saqqara {generate,batch,serve,plan,methods,bench,eval,...}`.

Exit codes: 0 done, 1 something failed, 2 the user's input is wrong (one line says what), 3 rows
have errors (`batch --fail-on-errors`), 128 + n ended by signal n (130: Ctrl-C).
"""

from saqqara.cluster.cli.commands import app
from saqqara.evaluation.bench_cli import bench
from saqqara.evaluation.cli import evaluation

__all__ = ["app", "main"]

app.add_typer(bench, name="bench")
app.add_typer(evaluation, name="eval")


def main() -> None:
    """Entry point of the `saqqara` script."""
    app()


if __name__ == "__main__":
    main()
