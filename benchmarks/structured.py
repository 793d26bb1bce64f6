"""Structured output: how many answers of random schemas end, that they validate, and what it costs.

    python benchmarks/structured.py --schemas 500 --rounds 9

Part one asks the demo model, at temperature 1, for JSON of `--schemas` random schemas (see
`harness/random_schemas.py`; `--seed` names the list, `--save` writes it to a file), with 512 tokens
at most. It counts the schemas that are refused for a keyword, those that no value satisfies, and of
the others the answers that end; every answer that ends is validated by `jsonschema`.

Part two decodes a batch of 16 answers of as many tokens, once free and once held to a schema of
lists of objects that does not end, in `--rounds` pairs whose order alternates. The cost is the
median over the pairs of what the throughput loses. `--schemas 0` or `--rounds 0` leaves a part out.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jsonschema
from harness.random_schemas import Json, digest, random_schemas
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from saqqara import LLM, SamplingParams
from saqqara.cluster.cli.tables import print_table
from saqqara.cluster.request import RequestOutput
from saqqara.workers.gguf.demo import fetch_demo_model

BATCH = 16
MAX_TOKENS = 512
ASK = "Answer with one JSON value of this JSON schema, and nothing else: "
ENDLESS: Json = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
}


def main() -> None:
    """Measure what the flags ask for and print each part when it is done."""
    args = _arguments()
    model = args.model or str(fetch_demo_model())
    console = Console(stderr=True)
    with (
        LLM(
            model, dtype=args.dtype, max_num_seqs=BATCH, max_model_len=2048, prefix_caching=False
        ) as llm,
        Progress(console=console) as progress,
    ):
        if args.schemas:
            schemas = random_schemas(args.schemas, args.seed)
            if args.save is not None:
                args.save.write_text(json.dumps(schemas, allow_nan=False), encoding="utf-8")
            print_table(_answers(llm, schemas, progress, args.answers))
        if args.rounds:
            print_table(_cost(llm, args.rounds, args.tokens, progress))


def _answers(
    llm: LLM, schemas: Sequence[Json], progress: Progress, written_to: Path | None
) -> Table:
    counts: Counter[str] = Counter()
    params: list[SamplingParams] = []
    asked: list[Json] = []
    for number, schema in enumerate(schemas):
        try:
            form = {"json": schema}
            params.append(
                SamplingParams(max_tokens=MAX_TOKENS, seed=number, structured_outputs=form)
            )
        except ValidationError as error:
            counts["refused" if "is not supported" in str(error) else "unsatisfiable"] += 1
        else:
            asked.append(schema)
    outputs: list[RequestOutput] = []
    task = progress.add_task("answers", total=len(asked))
    for start in range(0, len(asked), 4 * BATCH):
        part = slice(start, start + 4 * BATCH)
        messages = [[_user(ASK + json.dumps(s, allow_nan=False))] for s in asked[part]]
        outputs += llm.chat(messages, params[part], use_tqdm=False)
        progress.update(task, completed=len(outputs))
    if written_to is not None:
        written_to.write_text("".join(map(_line, asked, outputs)), encoding="utf-8")
    wrong: list[str] = []
    for schema, output in zip(asked, outputs, strict=True):
        reason = str(output.outputs[0].finish_reason)
        counts[reason] += 1
        counts["cut"] += output.outputs[0].stop_reason == "max_tokens"
        if reason == "stop" and (why := _mistake(schema, output.outputs[0].text)) is not None:
            wrong.append(f"{json.dumps(schema, allow_nan=False)}: {why}")
    tokens = sorted(len(output.outputs[0].token_ids) for output in outputs)
    rows = {
        f"schemas ({digest(list(schemas))})": f"{len(schemas)}",
        "refused for a keyword": _share(counts["refused"], len(schemas)),
        "no value satisfies it": _share(counts["unsatisfiable"], len(schemas)),
        f"finished within {MAX_TOKENS} tokens": _share(counts["stop"], len(asked)),
        "of these by an ending that fits": _share(counts["cut"], counts["stop"]),
        "ended with an error": _share(counts["error"], len(asked)),
        "finished and valid": _share(counts["stop"] - len(wrong), counts["stop"]),
        "median tokens of an answer": f"{median(tokens):.0f}",
    }
    for line in wrong[:5]:
        progress.console.print(line)
    return _table("JSON of random schemas, temperature 1", rows)


def _line(schema: Json, output: RequestOutput) -> str:
    """One answer and why it ended, for whoever asks why some do not."""
    answer = output.outputs[0]
    record = {
        "schema": schema,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "num_tokens": len(answer.token_ids),
        "text": answer.text,
    }
    return json.dumps(record, allow_nan=False) + "\n"


def _mistake(schema: Json, text: str) -> str | None:
    """Why a finished answer is not what was asked for."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text!r}: {str(error).splitlines()[0]}"
    return None


def _cost(llm: LLM, rounds: int, tokens: int, progress: Progress) -> Table:
    forms: dict[str, Any] = {"free": None, "held": {"json": ENDLESS}}
    task = progress.add_task("rounds", total=rounds + 1)
    pairs: list[dict[str, float]] = []
    for number in range(rounds + 1):
        names = list(forms) if number % 2 else list(reversed(forms))
        pairs.append({name: _throughput(llm, forms[name], tokens, number) for name in names})
        progress.advance(task)
    pairs = pairs[1:]  # the first one warms up
    costs = sorted(1 - pair["held"] / pair["free"] for pair in pairs)
    rows = {name: f"{median(pair[name] for pair in pairs):.1f} tokens/s" for name in forms} | {
        "cost": f"{median(costs):+.1%} ({costs[0]:+.1%} to {costs[-1]:+.1%})"
    }
    return _table(f"{BATCH} answers of {tokens} tokens, {rounds} pairs", rows)


def _throughput(llm: LLM, form: Json | None, tokens: int, number: int) -> float:
    """Generated tokens a second of a batch, from its submission to its end."""
    params = [
        SamplingParams(
            max_tokens=tokens, ignore_eos=True, seed=1000 * number + place, structured_outputs=form
        )
        for place in range(BATCH)
    ]
    messages = [[_user(f"List {place + 3} people as JSON.")] for place in range(BATCH)]
    begun = time.perf_counter()
    outputs = llm.chat(messages, params, use_tqdm=False)
    seconds = time.perf_counter() - begun
    count = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert count == BATCH * tokens, "an answer has ended early"
    return count / seconds


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _share(count: int, total: int) -> str:
    return f"{count} of {total} ({count / total:.1%})" if total else "0"


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title)
    for name in ("", "measured"):
        table.add_column(name)
    for row in rows.items():
        table.add_row(*row)
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="default: the demo model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write the schemas to this file")
    parser.add_argument(
        "--answers", type=Path, help="write each schema and its answer to this file"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer of part two")
    return parser.parse_args()


if __name__ == "__main__":
    main()
