"""Tries grammars out for `trial.py`, in a process that may come to its end over one.

A native compiler runs out of stack on what is nested too deep, and out of time on what is too
costly, and takes its process along. It imports nothing of ours, so that it starts at once.

Input: a line with the CPU seconds that one may take and llguidance's limits, then a line for each
grammar; output: a line for each, the error or null. All of them are JSON.
"""

import json
import math
import resource
import sys
import threading
from typing import Any

STACK_BYTES = 1 << 20  # half of the least that any thread has which compiles a grammar later
MEMORY_BYTES = 4 << 30
NUM_STEPS = 4  # tokens that are written


def main() -> None:
    """Answer until the input ends."""
    _bound(resource.RLIMIT_AS, MEMORY_BYTES)
    _bound(resource.RLIMIT_CORE, 0)
    settings = json.loads(sys.stdin.readline())
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve, args=tuple(settings))
    thread.start()
    thread.join()


def _serve(cpu_seconds: int, limits: dict[str, Any]) -> None:
    from llguidance import LLParserLimits, LLTokenizer

    given = LLParserLimits(**limits)
    tokens = LLTokenizer("byte")
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _bound(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + cpu_seconds)
        error = error_of(json.loads(line), tokens, given)
        sys.stdout.write(json.dumps(error, allow_nan=False) + "\n")
        sys.stdout.flush()


def error_of(text: str, tokens: Any, limits: Any) -> str | None:
    """What is wrong with a grammar: to read, to compile for tokens, or to write some of them by."""
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(text, limits=limits)
    if is_error:
        return messages[0]
    matcher = LLMatcher(tokens, text, log_level=0, limits=limits)
    for _ in range(NUM_STEPS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = matcher.compute_bitmask()
        allowed = [8 * place + bit for place in range(len(mask)) for bit in range(8)]
        allowed = [token for token in allowed if mask[token // 8] >> (token % 8) & 1]
        if not allowed or not matcher.consume_token(allowed[-1]):
            break
    return matcher.get_error() if matcher.is_error() else None


def _bound(what: int, soft: int) -> None:
    hard = resource.getrlimit(what)[1]
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(what, (soft, hard))


if __name__ == "__main__":
    main()
