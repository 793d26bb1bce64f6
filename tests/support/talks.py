"""Turns of conversations under a real scheduler, on a replica without a model."""

from collections import deque
from collections.abc import Sequence as Many
from typing import Any

from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import Sequence, TokenRequest
from saqqara.compression.retention import Retention
from saqqara.compression.scores import SnapKV

from .fake_replica import FakeReplica, RaggedRetention, make_workers, next_token

FULL = Retention.parse("full")
HALF = Retention.parse({"method": "snapkv", "window": 2, "sinks": 1, "budget": "50%"})
RAGGED = RaggedRetention(method="ragged", score=SnapKV(), budget=12, window=3)
CUT = Retention.parse(
    {"method": "snapkv", "budget": 8, "window": 2, "sinks": 1, "decode": {"slack_pages": 1}}
)
ME = "me"
PROMPT = tuple(range(1, 20))


class Talks:
    """A scheduler over a replica without a model; every plan is carried out at once."""

    def __init__(self, num_pages: int = 1000, **settings: Any) -> None:
        shape = {
            name: settings.pop(name)
            for name in ("stages", "head_ranges", "windows", "host_pages")
            if name in settings
        }
        workers = make_workers(num_pages, **shape)
        given: dict[str, Any] = {
            "max_num_seqs": 4,
            "max_model_len": 256,
            "conversation_bytes": None,
        }
        self.workers = workers
        self.scheduler = Scheduler(workers, **given | settings)
        self.replica = FakeReplica(workers)
        self._flights: deque[Any] = deque()
        self._num = 0

    def step(self) -> bool:
        while (plan := self.scheduler.schedule()) is not None:
            self._flights.append((plan, self.replica.run(plan)))
        if not self._flights:
            return False
        self.scheduler.absorb(*self._flights.popleft())
        return True

    def add(
        self,
        prompt: Many[int],
        name: str | None = "a",
        retention: Retention = FULL,
        owner: str = ME,
        **sampling: Any,
    ) -> Sequence:
        self._num += 1
        params = SamplingParams(**({"max_tokens": 6} | sampling))
        request = TokenRequest(
            f"r{self._num}",
            tuple(prompt),
            params,
            retention,
            owner=owner,
            conversation_id=name,
        )
        return self.scheduler.add(request, params.spec(0, (0,)))

    def run(self) -> None:
        for _ in range(5000):
            if not self.step():
                return
        raise AssertionError("it does not end")

    def turn(self, prompt: Many[int], *args: Any, **kwargs: Any) -> tuple[tuple[int, ...], int]:
        """A turn to its end: all of its tokens, and how many of its prompt were computed."""
        before = self.replica.prefilled_tokens
        sequence = self.add(prompt, *args, **kwargs)
        self.run()
        check_answer(sequence)
        num = self.replica.prefilled_tokens - before
        return (*prompt, *sequence.output_token_ids), num

    def lose_workers(self) -> None:
        """All of them, and what they hold; others take their places."""
        self._flights.clear()
        self.scheduler.restart(self.workers)
        from_host = self.replica.parked.num_from_host
        self.replica = FakeReplica(self.workers)
        self.replica.parked.num_from_host = from_host

    @property
    def counts(self) -> Any:
        return self.scheduler.conversations.counts

    def close(self) -> None:
        """Nothing is left once all conversations are gone."""
        self.scheduler.expire(1e9)
        self.run()
        assert self.scheduler.is_idle
        assert len(self.replica.parked) == 0
        if self.scheduler.prefixes.num_blocks:
            assert self.scheduler.reset_prefix_cache()
            self.run()
        assert all(worker.pages_free == worker.info.num_pages for worker in self.replica.fakes)
        assert (self.scheduler.ledger.free == self.scheduler.ledger.num_pages).all()
        host = self.scheduler.host_memory
        assert (host.num_parked, host.num_quiet) == (0, 0)
        assert host.free_bytes.tolist() == [worker.host_kv_bytes for worker in self.workers]


def check_answer(sequence: Sequence) -> None:
    tokens = list(sequence.request.prompt_token_ids)
    for token in sequence.output_token_ids:
        assert token == next_token(tokens)
        tokens.append(token)


SHAPES: dict[str, dict[str, Any]] = {
    "one worker": {},
    "two stages, ahead": {"stages": (2, 2), "lookahead": 2},
    "two ranks": {"head_ranges": ((0, 1), (1, 2)), "prefill_quantum": 1},
}
