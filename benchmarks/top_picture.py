"""Draws `saqqara top` of a running engine as an SVG, for the docs.

    python benchmarks/top_picture.py [docs/images/top.svg]

Two ranks on a local Ray serve the demo model under PyramidKV; the picture is what `top` shows while
they decode. Paths and the machine's name are replaced; the numbers are not.
"""

import argparse
import io
import re
import time
from pathlib import Path

from rich.console import Console, Group

from saqqara.cluster.launch import launch
from saqqara.cluster.live.snapshot import LiveStats
from saqqara.cluster.request import Request
from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.top.source import Address, Source
from saqqara.cluster.top.view import Look, draw
from saqqara.configs.schema import EngineConfig
from saqqara.workers.gguf.demo import fetch_demo_model

COLUMNS, LINES = 104, 43
NUM_RUNNING, NUM_WAITING = 6, 2
PROMPT_TOKENS, BUDGET = 1200, 160
_SECONDS_BETWEEN = 3.0  # shares of time are those between two looks
_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # rich's is on the web


def main() -> None:
    """Run the engine and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=Path("docs/images/top.svg"))
    output = parser.parse_args().output
    before, stats = look_twice()
    host = {"hostname": "node-a"}
    ranks = [rank.model_copy(update=host) for rank in stats.ranks]
    replica = stats.replica.model_copy(update={"id": "node-a-4711"})
    shown = {"model": Path(stats.model).name, "ranks": ranks, "replica": replica}
    lines = draw(stats.model_copy(update=shown), Look(COLUMNS, LINES), before=before)
    console = Console(record=True, file=io.StringIO(), width=COLUMNS, force_terminal=True)
    console.print(Group(*lines))
    svg = _FONT.sub("", console.export_svg(title="saqqara top")).replace("Fira Code, ", "")
    output.write_text(svg + "\n", encoding="utf-8")
    print(f"wrote {output}")


def look_twice() -> tuple[LiveStats, LiveStats]:
    """Two snapshots of the engine at work, some seconds apart."""
    config = EngineConfig(
        model=str(fetch_demo_model()),
        device="cpu",
        executor="ray",
        pipeline_parallel_size=2,
        num_threads=1,
        max_num_seqs=NUM_RUNNING,
        max_model_len=4096,
        kv_memory_gib=0.25,
        retention="pyramidkv",
        budget=BUDGET,
        metrics_port=0,
    )
    client = launch(config)
    try:
        address = client.metrics_address()
        assert address is not None
        source = Source(Address.parse(address), None)
        sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=2000, ignore_eos=True)
        for number in range(NUM_RUNNING + NUM_WAITING):
            prompt = tuple(1000 + (number * 7919 + i * 31) % 20000 for i in range(PROMPT_TOKENS))
            assert client.submit([Request(str(number), prompt, sampling)]) == []
        while source.read().pyramid.num_sequences < NUM_RUNNING:
            time.sleep(1)
        time.sleep(_SECONDS_BETWEEN)
        before = source.read()
        time.sleep(_SECONDS_BETWEEN)
        return before, source.read()
    finally:
        client.shutdown()


if __name__ == "__main__":
    main()
