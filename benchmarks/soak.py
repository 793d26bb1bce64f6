"""A server at twice its capacity, whose clients vanish, read slowly and write nonsense.

Its engine has a process of its own, which is killed again and again. What must hold in the end: no
answer of 5xx but 503; every answer that was begun and waited for is whole, streamed or not, through
all kills; memory flat; every page free again, as many as at the start; page ownership proved after
every step (`check_integrity`, which would have ended the engine). Prints a table, writes JSON and a
plot of memory over time.

    make soak                                            (30 minutes, a kill every 5)
    python benchmarks/soak.py --minutes 2 --kill-minutes 0.5 --out results/soak
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from harness.local_server import LocalServer, local_server
from rich.table import Table

from saqqara.cluster.cli.tables import print_table
from saqqara.configs.json_text import json_text
from saqqara.workers.gguf.demo import fetch_demo_model

mpl.use("agg")
import matplotlib.pyplot as plt

NAME = "soak"
MIB = 2**20
MAX_BODY_BYTES = 200_000
MAX_GROWTH = 0.05  # of resident memory, from the second quarter of the time to the last
MAX_GROWTH_BYTES = 32 * MIB  # what an allocator may do without a leak
SETTLE_SECONDS = 30.0
QUIET_SECONDS = 30.0  # at the end, in which no rank is killed
SLOW_SECONDS = 0.3  # that a slow reader waits after each piece
SAMPLE_SECONDS = 1.0
ERROR_EVENT = b'data: {"error":'
RETENTIONS: Sequence[Any] = (
    None,
    "full",
    {"method": "streaming", "budget": 64},
    {"method": "pyramidkv", "budget": "50%"},
)
NONSENSE: Sequence[bytes] = (
    b"",
    b"{",
    b"[1, 2]",
    b"\xff\xfe\x00",
    b'{"model": "soak"}',
    b'{"model": "other", "prompt": "x"}',
    b'{"model": "soak", "prompt": "x", "max_tokens": -1}',
    b'{"model": "soak", "prompt": "x", "temperature": "hot"}',
    b'{"model": "soak", "prompt": [[], [1]]}',
    b'{"model": "soak", "prompt": [99999999]}',
    b'{"model": "soak", "prompt": "x", "retention": {"method": "none"}}',
    b'{"model": "soak", "prompt": "x", "logit_bias": {"-1": 3}}',
    b'{"model": "soak", "prompt": "' + b"x" * MAX_BODY_BYTES + b'"}',
)


def main() -> int:
    """Soak, print and write; 1 if something that must hold does not."""
    arguments = parse_arguments()
    model = arguments.model or str(fetch_demo_model())
    flags = ["--model", model, "--served-model-name", NAME, "--check-integrity"]
    flags.append("--no-prefix-caching")  # so that free pages are those of the start again
    flags += ["--max-num-seqs", str(arguments.slots), "--max-queue", str(arguments.queue)]
    flags += ["--max-body-bytes", str(MAX_BODY_BYTES), "--kv-memory-gib", "0.5"]
    flags += ["--executor", "ray", "--dtype", arguments.dtype]  # a rank that can be killed
    with local_server(*flags) as server:
        result = asyncio.run(soak(server, arguments))
    result["checks"] = checks(result)
    report(result, arguments.out)
    return 0 if all(result["checks"].values()) else 1


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--kill-minutes", type=float, default=5.0, help="between kills of a rank")
    parser.add_argument("--dtype", default="auto", help="of the engine")
    parser.add_argument("--model", help="folder; default: the demo model")
    parser.add_argument("--slots", type=int, default=8, help="sequences that run at once")
    parser.add_argument("--queue", type=int, default=8, help="sequences that may wait")
    parser.add_argument("--out", type=Path, default=Path("results/soak"))
    return parser.parse_args()


async def soak(server: LocalServer, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the server for the time that was asked for, then see what it still holds."""
    statuses: Counter[str] = Counter()
    samples: list[dict[str, float]] = []
    started = time.monotonic()
    end = started + 60 * arguments.minutes
    pages_free = server.metric("saqqara:pages_free")
    num_clients = 2 * (arguments.slots + arguments.queue)
    clients = [client(server, random.Random(i), end, statuses) for i in range(num_clients)]
    kills: list[float] = []
    killer = kill_ranks(server, started, end, 60 * arguments.kill_minutes, kills)
    await asyncio.gather(*clients, killer, sample(server, started, end, samples))
    left = await settle(server, pages_free)
    return {
        "minutes": arguments.minutes,
        "num_clients": num_clients,
        "statuses": dict(sorted(statuses.items())),
        "kill_seconds": kills,
        "recoveries": server.metric("saqqara:recoveries_total"),
        "samples": samples,
        "pages_free_before": pages_free,
        "pages_free_after": server.metric("saqqara:pages_free"),
        "sequences_left": left,
        "is_healthy": "ok" in server.get("/health"),
        "generation_tokens": server.metric("vllm:generation_tokens_total"),
    }


async def client(
    server: LocalServer, chance: random.Random, end: float, statuses: Counter[str]
) -> None:
    """Send one request after the other: most are fine, some are left, some are nonsense."""
    while time.monotonic() < end:
        kind = chance.choices(("answer", "slow", "vanish", "nonsense"), (5, 1, 3, 2))[0]
        leave_after = chance.expovariate(2.0) if kind == "vanish" else None
        body = chance.choice(NONSENSE) if kind == "nonsense" else request(chance)
        pause = SLOW_SECONDS if kind == "slow" else 0.0
        path = "/v1/completions"
        answer = await server.post(path, body, leave_after=leave_after, pause_seconds=pause)
        statuses[f"{kind} {answer.status or 'left'}"] += 1
        if not answer.status and leave_after is None:
            print(f"{time.strftime('%X')}: no answer to {kind} after {answer.seconds:.1f} s")
        if answer.status == 200 and ERROR_EVENT in answer.body:
            statuses[f"{kind} error in stream"] += 1
        elif answer.status == 200 and not isinstance(body, bytes):
            statuses[f"{kind} {'whole' if is_whole(body, answer.body) else 'not whole'}"] += 1
        if answer.status == 429:
            await asyncio.sleep(chance.uniform(0.05, 0.3))


def is_whole(body: Mapping[str, Any], answer: bytes) -> bool:
    """Whether an answer has all the tokens that were asked for, and a stream its end."""
    if not body["stream"]:
        whole = json.loads(answer[answer.index(b"{") : answer.rindex(b"}") + 1])
    else:
        *_, last, done = [e for e in answer.split(b"\n\n") if b"data: " in e]
        if not done.endswith(b"data: [DONE]"):
            return False
        whole = json.loads(last[last.index(b"data: ") + 6 :])
    return bool(whole["usage"]["completion_tokens"] == body["max_tokens"] * body["n"])


async def kill_ranks(
    server: LocalServer, started: float, end: float, pause: float, kills: list[float]
) -> None:
    """Kill the engine's process every so many seconds, and note when."""
    while time.monotonic() + pause < end - QUIET_SECONDS:
        await asyncio.sleep(pause)
        for rank in server.ranks():
            rank.kill()
            kills.append(time.monotonic() - started)


def request(chance: random.Random) -> dict[str, Any]:
    """A request that is right."""
    length = chance.choice((8, 40, 200, 600))
    body: dict[str, Any] = {
        "model": NAME,
        "prompt": [chance.randrange(1000, 40000) for _ in range(length)],
        "max_tokens": chance.randrange(4, 96),
        "n": chance.choice((1, 1, 1, 2)),
        "stream": chance.random() < 0.7,
        "ignore_eos": True,
        "logprobs": chance.choice((None, None, 3)),
        "retention": chance.choice(RETENTIONS),
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    return {name: value for name, value in body.items() if value is not None}


async def sample(
    server: LocalServer, started: float, end: float, samples: list[dict[str, float]]
) -> None:
    """Note the replica's resident memory once a second."""
    [replica] = server.replicas()
    while time.monotonic() < end:
        seconds = time.monotonic() - started
        samples.append({"seconds": seconds, "rss_bytes": replica.memory_info().rss})
        await asyncio.sleep(SAMPLE_SECONDS)


async def settle(server: LocalServer, pages_free: float) -> float:
    """Wait until the engine has let go of everything; returns the sequences that it still has.

    The pages of a sequence are freed by the step after its last token.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        left = sum(server.metric(f"vllm:num_requests_{state}") for state in ("running", "waiting"))
        is_free = left == 0 and server.metric("saqqara:pages_free") == pages_free
        if is_free or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.2)


def checks(result: dict[str, Any]) -> dict[str, bool]:
    """What must hold."""
    codes = [name.rpartition(" ")[2] for name in result["statuses"]]
    before, after = memory(result)
    growth = max(MAX_GROWTH * before, MAX_GROWTH_BYTES)
    nonsense = [name for name in result["statuses"] if name.startswith("nonsense")]
    return {
        "no 5xx but 503": not any(c.startswith("5") and c != "503" for c in codes),
        "no error within a stream": not any(n.endswith("in stream") for n in result["statuses"]),
        "every answer waited for is whole": not any(
            name in result["statuses"]
            for name in ("answer not whole", "slow not whole", "answer left", "slow left")
        ),
        "a rank was lost for each kill": result["recoveries"] == len(result["kill_seconds"]),
        "nonsense got 4xx": all(name.startswith("nonsense 4") for name in nonsense),
        "the queue was full": "answer 429" in result["statuses"],
        "answers came": result["statuses"].get("answer whole", 0) > 0,
        "slow readers were served": result["statuses"].get("slow whole", 0) > 0,
        "memory is flat": after - before <= growth,
        "no page leaked": result["pages_free_before"] == result["pages_free_after"],
        "no sequence is left": result["sequences_left"] == 0,
        "page ownership held": result["is_healthy"],  # the engine ends where it does not
    }


def memory(result: dict[str, Any]) -> tuple[float, float]:
    """Median resident bytes of the second and of the last quarter of the time."""
    rss = [s["rss_bytes"] for s in result["samples"]]
    quarter = max(len(rss) // 4, 1)
    return statistics.median(rss[quarter : 2 * quarter] or rss), statistics.median(rss[-quarter:])


def report(result: dict[str, Any], folder: Path) -> None:
    """Print a table; leave the numbers as JSON and memory over time as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(title=f"{result['minutes']:g} minutes, {result['num_clients']} clients")
    table.add_column("requests and their answers")
    table.add_column("", justify="right")
    for name, count in result["statuses"].items():
        table.add_row(name, str(count))
    kills = ", ".join(f"{seconds:.0f}" for seconds in result["kill_seconds"])
    table.add_row("rank killed after, s", kills or "never")
    before, after = memory(result)
    table.add_row("resident memory, MiB", f"{before / MIB:.0f} -> {after / MIB:.0f}")
    pages = f"{result['pages_free_before']:.0f} -> {result['pages_free_after']:.0f}"
    table.add_row("pages free", pages)
    for name, holds in result["checks"].items():
        table.add_row(name, "yes" if holds else "NO")
    print_table(table)
    (folder / "soak.json").write_text(json_text(result, indent=2) + "\n", encoding="utf-8")
    figure, axes = plt.subplots(figsize=(8, 3.5))
    axes.plot(
        [s["seconds"] / 60 for s in result["samples"]],
        [s["rss_bytes"] / MIB for s in result["samples"]],
    )
    for seconds in result["kill_seconds"]:
        axes.axvline(seconds / 60, linestyle=":", color="tab:red")
    axes.set(xlabel="minutes", ylabel="resident memory of the replica, MiB", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(folder / "soak.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
