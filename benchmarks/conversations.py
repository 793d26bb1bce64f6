"""What a conversation's turns cost: the first token's wait, and the tokens that are computed.

    python benchmarks/conversations.py --json results/conversations.json

One user asks about a document of `--tokens` tokens, turn after turn, as chats do: each prompt has
all messages and answers before it. Each turn is asked twice, of one engine: without a session, so
that its whole prompt is computed, and as a turn of a session, which goes on from what the turns
before it have kept. Prefixes are not cached, so that the two are all there is to compare.

prompt      tokens of the turn's prompt
computed    of them, those that the session's turn has computed
anew        milliseconds to the first token without a session
session     the same with one
faster      how many times sooner the first token comes
agreement   how many of an answer's tokens are the same in the same place, before the first that
            differs: with a retention that drops, a session chooses among what earlier turns kept,
            so its answers may be others
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from saqqara import LLM, SamplingParams
from saqqara.cluster.cli.tables import print_table
from saqqara.cluster.request import RequestOutput
from saqqara.configs.json_text import json_text
from saqqara.evaluation.prompts.corpus import pydoc_text
from saqqara.workers.gguf.demo import fetch_demo_model

QUESTIONS = (
    "What is this text about? Answer in one sentence.",
    "Name one thing that it explains in detail.",
    "Which words does it use most often?",
    "Give it a title.",
    "Who should read it, and why?",
)
RETENTIONS: dict[str, dict[str, Any]] = {
    "full": {"retention": "full"},
    "snapkv 25%": {"retention": "snapkv", "budget": "25%"},
    "recommended 25%": {"retention": "recommended", "budget": "25%"},
    "adakv 25%": {"retention": "adakv", "budget": "25%"},
}
SESSION = "talk"


@dataclass(frozen=True)
class Turn:
    """One row of the table; see the top of this file."""

    retention: str
    turn: int
    prompt_tokens: int
    computed_tokens: int
    anew_seconds: float
    session_seconds: float
    agreement: float


def main() -> int:
    """Run the conversations and print the table."""
    arguments = parse_arguments()
    turns: list[Turn] = []
    with LLM(
        arguments.model or str(fetch_demo_model()),
        dtype=arguments.dtype,
        max_num_seqs=2,
        max_model_len=8192,
        kv_memory_gib=1.0,
        prefix_caching=False,
        conversation_gib=0.5,
    ) as llm:
        document = document_of(llm, arguments.tokens)
        for name, settings in RETENTIONS.items():
            for _ in range(2):  # the first one warms up
                found = converse(llm, document, name, settings, arguments.max_tokens)
            turns += found
    show(turns)
    if arguments.json is not None:
        arguments.json.write_text(json_text([asdict(turn) for turn in turns]), encoding="utf-8")
    return 0


def parse_arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a chat model; default: the demo model")
    parser.add_argument("--tokens", type=int, default=2000, help="of the document")
    parser.add_argument("--max-tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    return parser.parse_args()


def document_of(llm: LLM, num_tokens: int) -> str:
    """English text of so many tokens."""
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode(pydoc_text()[: 12 * num_tokens])[:num_tokens]
    return str(tokenizer.decode(ids))


def converse(
    llm: LLM, document: str, name: str, settings: dict[str, Any], max_tokens: int
) -> list[Turn]:
    """A conversation about a document; each turn without a session, and with one."""
    llm.end_conversation(SESSION)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    messages: list[dict[str, str]] = []
    turns = []
    for number, question in enumerate(QUESTIONS, start=1):
        content = f"{document}\n\n{question}" if number == 1 else question
        messages.append({"role": "user", "content": content})
        common: dict[str, Any] = {"use_tqdm": False, **settings}
        [anew] = llm.chat(messages, sampling, **common)
        [ours] = llm.chat(messages, sampling, session=SESSION, **common)
        length = len(ours.prompt_token_ids)
        turns.append(
            Turn(
                retention=name,
                turn=number,
                prompt_tokens=length,
                computed_tokens=length - ours.num_cached_tokens,
                anew_seconds=first_token_seconds(anew),
                session_seconds=first_token_seconds(ours),
                agreement=agreement(anew, ours),
            )
        )
        messages.append({"role": "assistant", "content": ours.outputs[0].text})
    return turns


def first_token_seconds(output: RequestOutput) -> float:
    """Seconds from a request's arrival to its first token."""
    metrics = output.metrics
    assert metrics.first_token_time is not None
    return metrics.first_token_time - metrics.arrival_time


def agreement(first: RequestOutput, second: RequestOutput) -> float:
    """Share of an answer's tokens before the first that differs."""
    ours, theirs = first.outputs[0].token_ids, second.outputs[0].token_ids
    longest = max(len(ours), len(theirs))
    pairs = zip(ours, theirs, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return same / longest


def show(turns: list[Turn]) -> None:
    """Print the table."""
    table = Table(title="A conversation of five turns")
    for column in (
        *("retention", "turn", "prompt", "computed", "anew ms", "session ms", "faster"),
        "agreement",
    ):
        table.add_column(column, justify="left" if column == "retention" else "right")
    for turn in turns:
        table.add_row(
            turn.retention,
            str(turn.turn),
            str(turn.prompt_tokens),
            str(turn.computed_tokens),
            f"{1000 * turn.anew_seconds:.0f}",
            f"{1000 * turn.session_seconds:.0f}",
            f"{turn.anew_seconds / turn.session_seconds:.1f}x",
            f"{turn.agreement:.0%}",
        )
    print_table(table)


if __name__ == "__main__":
    raise SystemExit(main())
