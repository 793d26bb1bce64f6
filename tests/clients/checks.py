"""Runs a client's checks and prints a line for each; runs in the client's environment."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

BASE_URL = os.environ.get("SAQQARA_CLIENT_URL", "")  # of the server, without /v1
API_KEY = os.environ.get("SAQQARA_CLIENT_KEY", "")
MODEL = os.environ.get("SAQQARA_CLIENT_MODEL", "")


def expect(kind: type[Exception], action: Callable[[], Any]) -> None:
    """Fail unless an action raises an error of a kind."""
    try:
        action()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


def run(*checks: Callable[[], None]) -> None:
    """Run checks, go on where one fails, and end with 1 if one has."""
    failed = 0
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            check()
        except Exception as error:
            failed += 1
            traceback.print_exc()
            print(f"FAIL {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        else:
            print(f"ok {name}", flush=True)
    sys.exit(1 if failed else 0)
