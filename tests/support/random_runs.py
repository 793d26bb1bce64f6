"""Runs random requests on a really tiny engine, through Python and through the HTTP application."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saqqara.cluster.engine import Engine, LocalExecutor
from saqqara.cluster.openai_api import CompletionRequest
from saqqara.cluster.request import SamplingParams
from saqqara.cluster.tokenizer import Tokenizer
from saqqara.configs.schema import EngineConfig
from saqqara.workers.models.spec import load_spec

from .api_server import MODEL
from .byte_llama import save_tiny_llama
from .in_process import InProcessServer
from .random_requests import CONTEXT, Drawn

ENGINE: dict[str, Any] = {
    "load_format": "dummy",
    "dtype": "float32",
    "device": "cpu",
    "num_threads": 1,
    "max_num_seqs": 16,
    "max_model_len": CONTEXT,
    "kv_memory_gib": 0.004,
    "page_tokens": 4,
}
MAX_STEPS = 20_000  # of one batch; more would be requests that do not end


class RandomRuns:
    """One engine, and what became of the requests that it got.

    Attributes:
        counts: requests by what became of them: refused, or the reason why they finished.
        tried: edges by field and side, of what was sent.
        refusals: how the messages of requests begin that were not taken.
        errors: messages of requests that were taken and ended with an error.
    """

    def __init__(self, folder: Path) -> None:
        save_tiny_llama(folder)
        config = EngineConfig(model=str(folder), **ENGINE)
        self.engine = Engine(
            config, LocalExecutor(config), Tokenizer.load(folder), load_spec(str(folder))
        )
        self.server = InProcessServer(folder, **ENGINE)
        self.counts: Counter[str] = Counter()
        self.tried: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._num_added = 0
        self._open: set[str] = set()

    @property
    def num_finished(self) -> int:
        """Requests that ended as they should."""
        return sum(self.counts[reason] for reason in ("stop", "length", "200"))

    def python(self, batch: Sequence[Drawn]) -> None:
        """Add all of a batch and step until they have ended."""
        self.engine.abort(list(self._open))  # where an earlier batch has failed
        self._step_to_the_end()
        for drawn in batch:
            self._note(drawn)
            try:
                self._add(drawn)
            except ValueError as error:
                self.counts["refused"] += 1
                self.refusals[str(error)[:60]] += 1
                continue
            assert not drawn.is_wrong, f"taken, with a value beyond its bounds: {drawn}"
        for output in self._step_to_the_end():
            self._finished(output)
        assert not self._open, "requests that did not end"

    def _step_to_the_end(self) -> list[Any]:
        ended: list[Any] = []
        for _ in range(MAX_STEPS):
            if not self.engine.has_unfinished():
                break
            ended += [output for output in self.engine.step() if output.finished]
        self._open -= {output.request_id for output in ended}
        return ended

    def http(self, batch: Sequence[Drawn]) -> None:
        """Post all of a batch at once; the caller's event loop is not running."""
        for drawn in batch:
            self._note(drawn)
        for drawn, (status, reply) in zip(batch, asyncio.run(self._post(batch)), strict=True):
            assert status in (200, 400), f"{status} {reply} of {drawn}"
            assert status == 400 or not drawn.is_wrong, f"taken: {drawn}"
            self.counts[str(status)] += 1
            assert status == 200 or reply["error"]["message"]

    async def _post(self, batch: Sequence[Drawn]) -> list[tuple[int, Any]]:
        posts = [self.server.post("/v1/completions", None, raw=_body(d)) for d in batch]
        return await asyncio.gather(*posts)

    def _note(self, drawn: Drawn) -> None:
        self.tried.update(f"{tried.name} {tried.side}" for tried in drawn.tried)

    def _add(self, drawn: Drawn) -> None:
        self._num_added += 1
        self.engine.add_request(
            f"r{self._num_added}",
            drawn.prompt,
            SamplingParams(**drawn.sampling),
            retention=drawn.retention,
            budget=drawn.budget,
            priority=drawn.priority,
            stream=False,
        )
        self._open.add(f"r{self._num_added}")

    def _finished(self, output: Any) -> None:
        reasons = {choice.finish_reason for choice in output.outputs}
        self.counts["error" if "error" in reasons else sorted(reasons)[0]] += 1
        if output.error is not None:
            self.errors[output.error] += 1


def _body(drawn: Drawn) -> bytes:
    """The request as JSON (with NaN, as some clients write it)."""
    fields = {k: v for k, v in drawn.sampling.items() if k in CompletionRequest.model_fields}
    body: dict[str, Any] = {"model": MODEL, "prompt": drawn.prompt, "priority": drawn.priority}
    body |= {"retention": drawn.retention, "budget": drawn.budget}
    return json.dumps(body | fields).encode()
