"""The flags of `saqqara top`; what it does stands in the room `top`, imported then."""

import sys
from contextlib import suppress
from typing import Annotated

import typer

from .help import errors_in_one_line

_DEFAULT_URL = "http://127.0.0.1:8000"


def top(
    url: Annotated[
        str, typer.Argument(help="Of a server, or of an engine with --metrics-port.")
    ] = _DEFAULT_URL,
    interval: Annotated[
        float, typer.Option(min=0.2, max=3600, help="Seconds from one look to the next.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one snapshot and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON at every look.")
    ] = False,
) -> None:
    """Watch a running engine: throughput, queue, KV kept, the pyramid by layer, ranks.

    The API key is that of SAQQARA_API_KEY. Without a terminal one snapshot is printed.
    """
    with errors_in_one_line():
        from saqqara.cluster.top.screen import follow, print_lines, print_once
        from saqqara.cluster.top.source import Source

        source = Source.of(url)
        if as_json and not once:
            print_lines(source, interval)
        elif once or not sys.stdout.isatty():
            print_once(source, as_json=as_json)
        else:
            with suppress(KeyboardInterrupt):  # that is how it ends
                follow(source, interval)
