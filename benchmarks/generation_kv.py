"""How much of full retention's KV PyramidInfer holds, on average, while sequences generate.

The setting of its paper: 512 tokens in, 256 out, the 13B setting, 40 layers. How many tokens each
layer stores depends on these numbers alone and not on weights, so a narrow model with random
weights shows it: one sequence without a generation stage and one with each trigger, in one batch.
After every step the lengths of all rows are read from the worker.

    python benchmarks/generation_kv.py [--json FILE]

All figures are shares of what full retention holds:

prompt     after the prompt
average    sum over all moments from then to the last token, by full's sum over the same
end        after the last token
with ring  the average again, with the queries (and normalisers) that the stage remembers; a query
           of a head takes half of what a key and a value take

The paper (arXiv 2405.12532) reports 54% less than full, that is 46%.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from transformers import LlamaConfig

from saqqara.cluster.cli.tables import print_table
from saqqara.cluster.scheduling.ledger import Ledger
from saqqara.compression.decode import TRIGGERS
from saqqara.compression.retention import Retention
from saqqara.configs.worker_settings import WorkerSettings
from saqqara.workers.plan import (
    DecodeItem,
    NewSequence,
    PrefillGroup,
    SamplingSpec,
    StepPlan,
)
from saqqara.workers.worker import Worker

HEADS, HEAD_DIM, VOCAB = 2, 128, 512  # as in a 13B Llama every query head has a kv head


@dataclass(frozen=True)
class Shares:
    """One line of the table; see the top of this file."""

    setting: str
    prompt: float
    average: float
    end: float
    with_ring: float


def random_worker(folder: Path, num_layers: int, max_tokens: int, num_seqs: int) -> Worker:
    """A narrow model with random weights."""
    LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_tokens,
        eos_token_id=None,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    settings = WorkerSettings(
        model=str(folder),
        load_format="dummy",
        dtype="float32",
        device="cpu",
        max_num_seqs=num_seqs,
        max_model_len=max_tokens,
        num_threads=1,
        kv_memory_gib=1.0,
    )
    return Worker.local(settings)


def run(
    worker: Worker, retentions: Sequence[Retention], prompt_tokens: int, new_tokens: int
) -> list[Shares]:
    """Generate under all settings at once."""
    numbers = np.random.default_rng(0)
    prompt = numbers.integers(0, VOCAB, prompt_tokens, dtype=np.int32).tobytes()
    new = tuple(
        NewSequence(slot, prompt, prompt_tokens, SamplingSpec(temperature=0.0), retention)
        for slot, retention in enumerate(retentions)
    )
    slots = tuple(range(len(new)))
    group = PrefillGroup(slots, 0, worker.spec.num_layers)
    plan = StepPlan(0, new=new, prefill=(group,))
    held = []
    for fed in range(new_tokens):
        assert not worker.execute(plan).refused
        held.append([int(worker.kv.kept(slot).sum()) for slot in slots])
        position = prompt_tokens + fed
        plan = StepPlan(fed + 1, decode=tuple(DecodeItem(slot, position) for slot in slots))
    ledger = Ledger([worker.info], len(new))
    rings = [int(ledger.demand(r, prompt_tokens).ring_bytes[0]) for r in retentions]
    num_rows = worker.spec.num_layers * worker.spec.num_kv_heads
    full = num_rows * np.arange(prompt_tokens, prompt_tokens + new_tokens)
    tokens = np.array(held, dtype=np.float64)
    token_bytes = worker.spec.kv_bytes_per_row_token(torch.float32)
    return [
        Shares(
            setting=retention.label,
            prompt=float(tokens[0, slot] / full[0]),
            average=float(tokens[:, slot].sum() / full.sum()),
            end=float(tokens[-1, slot] / full[-1]),
            with_ring=float((tokens[:, slot] + rings[slot] / token_bytes).sum() / full.sum()),
        )
        for slot, retention in enumerate(retentions)
    ]


def main() -> None:
    """Run, print the table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="pyramidinfer-13b")
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if min(options.layers, options.prompt_tokens, options.new_tokens) < 1:
        parser.error("--layers, --prompt-tokens and --new-tokens must be at least 1")
    stages = [{}, *({"decode": {"trigger": trigger}} for trigger in TRIGGERS)]
    try:
        retentions = [Retention.parse({"method": options.method, **stage}) for stage in stages]
    except ValueError as error:
        parser.error(str(error))
    most = options.prompt_tokens + options.new_tokens
    with tempfile.TemporaryDirectory() as folder:
        worker = random_worker(Path(folder), options.layers, most, len(retentions))
    results = run(worker, retentions, options.prompt_tokens, options.new_tokens)
    worker.close()
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        figures = [asdict(one) for one in results]
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    title = f"{options.prompt_tokens} in, {options.new_tokens} out, {options.layers} layers"
    table = Table("setting", title=f"{title}: KV, % of full")
    for column in ("prompt", "average", "end", "with ring"):
        table.add_column(column, justify="right")
    for one in results:
        table.add_row(
            one.setting,
            *(f"{share:.1%}" for share in (one.prompt, one.average, one.end, one.with_ring)),
        )
    print_table(table)


if __name__ == "__main__":
    main()
