"""Runs random requests on a really tiny engine, through Python and through the HTTP application."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.executor import LocalExecutor
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.openai.requests import CompletionRequest
from saqqara.cluster.request import Request
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.schema import EngineConfig
from saqqara.workers.models.spec import load_spec

from .api_server import MODEL
from .byte_llama import save_tiny_llama
from .in_process import InProcessServer
from .random_requests import CONTEXT, EDGES, NUM_HEADS, NUM_LAYERS, Drawn, Edge, batches

Door = Literal["python", "http"]

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": 2,
}
ENGINE: dict[str, Any] = {
    "load_format": "dummy",
    "dtype": "float32",
    "device": "cpu",
    "num_threads": 1,
    "max_num_seqs": 16,
    "max_model_len": CONTEXT,
    "kv_memory_gib": 0.001,
    "page_tokens": 4,
}
MAX_STEPS = 20_000  # of one batch; more would be requests that do not end
UNFORESEEN = "no token is left that may stand at position"
"""What errors of requests may say that were taken: bad words and forms follow what is written."""
ABOUT_BOUNDS = "nput should be", "must be an integer of", "must be a number"
RISES = "propagate.min_context"  # its lower bound is the number of sinks


@dataclass
class Tally:
    """What became of requests.

    Attributes:
        counts: requests by what became of them: refused, or the reason why they finished; over
            HTTP the status.
        tried: edges of what was sent.
        taken: edges of what was not refused.
        refusals: how the messages of requests begin that were not taken.
        errors: messages of requests that were taken and ended with an error.
    """

    counts: Counter[str] = field(default_factory=Counter)
    tried: Counter[str] = field(default_factory=Counter)
    taken: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def num_finished(self) -> int:
        """Requests that ended as they should."""
        return sum(self.counts[reason] for reason in ("stop", "length", "200"))

    @property
    def untried(self) -> list[str]:
        """Edges that were not sent."""
        return [str(edge) for edge in EDGES if not self.tried[str(edge)]]

    @property
    def never_taken(self) -> list[str]:
        """Edges in the bounds that other checks refused each time."""
        inside = [str(edge) for edge in EDGES if not edge.is_wrong]
        return sorted(edge for edge in inside if not self.taken[edge])

    def refuse(self, reason: str, drawn: Drawn, message: str) -> None:
        """Count a refusal, which is not to speak of bounds where all values are in them."""
        self.counts[reason] += 1
        self.refusals[message[:60]] += 1
        if not drawn.is_wrong and RISES not in message:
            is_about_bounds = any(text in message for text in ABOUT_BOUNDS)
            assert not is_about_bounds, f"refused: {message}: {drawn}"

    def take(self, drawn: Drawn) -> None:
        """Note a request that was not refused."""
        assert not drawn.is_wrong, f"taken, with a value beyond its bounds: {drawn}"
        self.taken.update(map(str, drawn.tried))


class RandomRuns:
    """Two engines, one of them behind the HTTP application, and what became of their requests."""

    def __init__(self, folder: Path) -> None:
        save_tiny_llama(folder, **SIZES)
        config = EngineConfig(model=str(folder), **ENGINE)
        self.engine = Engine(
            config, LocalExecutor(config), Tokenizer.load(folder), load_spec(str(folder))
        )
        self.server = InProcessServer(folder, **ENGINE)
        self.tallies: dict[Door, Tally] = {"python": Tally(), "http": Tally()}
        self._num_added = 0
        self._open: set[str] = set()

    def run(
        self,
        door: Door,
        seed: int,
        num_batches: int,
        *,
        size: int,
        num_aimed: int,
        edges: Sequence[Edge] = EDGES,
    ) -> None:
        """Send random batches to one of the doors; see `batches`.

        Raises:
            AssertionError: a request that must be refused was taken, one did not end, or an answer
                says that the server failed; a note says which batch.
        """
        send = self._python if door == "python" else self._http
        for i, batch in enumerate(islice(batches(seed, size, num_aimed, edges), num_batches)):
            try:
                send(batch, self.tallies[door])
            except Exception as error:
                error.add_note(f"batch {i} of seed {seed} through {door}")
                raise

    def _python(self, batch: Sequence[Drawn], tally: Tally) -> None:
        """Add all of a batch and step until they have ended."""
        for drawn in batch:
            tally.tried.update(map(str, drawn.tried))
            try:
                self._add(drawn)
            except ValueError as error:
                tally.refuse("refused", drawn, str(error))
            else:
                tally.take(drawn)
        for output in self._step_to_the_end():
            reasons = {choice.finish_reason for choice in output.outputs}
            tally.counts["error" if "error" in reasons else sorted(reasons)[0]] += 1
            if output.error is not None:
                tally.errors[output.error] += 1
        assert not self._open, "requests that did not end"

    def _step_to_the_end(self) -> list[Any]:
        ended: list[Any] = []
        for _ in range(MAX_STEPS):
            if not self.engine.has_unfinished():
                break
            ended += [output for output in self.engine.step() if output.finished]
        self._open -= {output.request_id for output in ended}
        return ended

    def _add(self, drawn: Drawn) -> None:
        self._num_added += 1
        self.engine.add(
            Request(
                f"r{self._num_added}",
                drawn.prompt,
                SamplingParams(**drawn.sampling),
                retention=drawn.retention,
                budget=drawn.budget,
                priority=drawn.priority,
            )
        )
        self._open.add(f"r{self._num_added}")

    def _http(self, batch: Sequence[Drawn], tally: Tally) -> None:
        """Post all of a batch at once; the caller's event loop is not running."""
        for drawn, (status, reply) in zip(batch, asyncio.run(self._post(batch)), strict=True):
            tally.tried.update(map(str, drawn.tried))
            assert status in (200, 400), f"{status} {reply} of {drawn}"
            if status == 400:
                tally.refuse("400", drawn, reply["error"]["message"])
            else:
                tally.take(drawn)
                tally.counts["200"] += 1

    async def _post(self, batch: Sequence[Drawn]) -> list[tuple[int, Any]]:
        posts = [self.server.post("/v1/completions", None, raw=_body(d)) for d in batch]
        return await asyncio.gather(*posts)


def run_door(folder: Path, door: Door, seed: int, num_requests: int) -> Tally:
    """Send requests to one of the doors, a quarter of them aimed; for a process of its own."""
    size = 16
    runs = RandomRuns(folder)
    runs.run(door, seed, -(-num_requests // size), size=size, num_aimed=4)
    return runs.tallies[door]


def _body(drawn: Drawn) -> bytes:
    """The request as JSON (with NaN, as some clients write it)."""
    unknown = drawn.sampling.keys() - CompletionRequest.model_fields.keys()
    assert not unknown, f"no fields of HTTP: {unknown}"
    body: dict[str, Any] = {"model": MODEL, "prompt": drawn.prompt, "priority": drawn.priority}
    body |= {"retention": drawn.retention, "budget": drawn.budget}
    return json.dumps(body | dict(drawn.sampling)).encode()
