"""Real ranks under a real scheduler, without an engine: each rank has a scheduler of its own.

All of them are told the same results, so they make the same plans. Every rank checks its pages
after every step.
"""

import pickle
import random
from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in __all__

from saqqara.cluster.engine.intake import sampling_of
from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.scheduling.events import Preempted
from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.cluster.scheduling.sequence import Sequence, TokenRequest
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.worker import Worker

from .ranks import Store, leave_together

VOCAB = 199  # of `support.tiny`
NUM_TURNS = 5
METHODS: tuple[Any, ...] = (
    "full",
    "full",
    {"method": "snapkv", "window": 6, "sinks": 1, "budget": "40%"},
    {"method": "snapkv", "window": 6, "sinks": 1, "budget": 24, "decode": {"slack_pages": 1}},
    {"method": "pyramidkv", "window": 4, "sinks": 1, "budget": 16},
    {"method": "knorm", "window": 4, "sinks": 1, "budget": 16},
    {"method": "h2o", "budget": 20},
)
# Which no model with windows serves. Of six layers each cut is in another place of two stages.
PROPAGATING: tuple[Any, ...] = (
    {"propagate": {"kind": "once", "layer": 1, "keep": 0.5, "window": 4}},
    {"propagate": {"kind": "once", "layer": 2, "keep": 0.4, "window": 6}},
    {**METHODS[2], "propagate": {"kind": "once", "layer": 3, "keep": 0.3, "window": 6}},
)


@dataclass(frozen=True)
class Traffic:
    """Requests, and what befalls them.

    Attributes:
        config: of the ranks; `layout` theirs.
        seed: of all that is drawn.
        num_requests: in all.
        prefix_bytes: of cached prefixes; 0: none.
        restart_at: step after which all ranks are lost; None: never.
        may_abort: whether clients go.
        num_talks: conversations of `NUM_TURNS` turns, beside the requests.
        keeps_talks: whether what a turn keeps stays for the next.
        methods: of the requests.
    """

    config: EngineConfig
    layout: MeshLayout
    seed: int
    num_requests: int
    prefix_bytes: int | None
    restart_at: int | None = None
    may_abort: bool = False
    num_talks: int = 0
    keeps_talks: bool = True
    methods: tuple[Any, ...] = METHODS


@dataclass
class Outcome:
    """What came of it: tokens by request, and counts."""

    tokens: dict[str, list[int]]
    errors: dict[str, str]
    num_preemptions: int
    hit_tokens: int
    pages_left: int
    num_steps: int
    host_bytes_left: int
    num_brought_back: int


def turn_of(seed: int, talk: int, turn: int, said: tuple[int, ...]) -> TokenRequest:
    """What a conversation asks next, after all that was asked and answered: `said`."""
    rng = random.Random(f"{seed}/{talk}/{turn}")
    more = (rng.randrange(3, VOCAB) for _ in range(rng.randint(2, 9) if turn else 24))
    sampling = SamplingParams(temperature=0.0, max_tokens=rng.randint(2, 9), ignore_eos=True)
    number = str(1000 * (talk + 1) + turn)
    full = Retention.parse("full")
    return TokenRequest(number, (*said, *more), sampling, full, conversation_id=f"talk{talk}")


def requests(traffic: Traffic) -> list[TokenRequest]:
    """Prompts with prefixes that are shared, nested and diverging."""
    rng = random.Random(traffic.seed)
    bases = [[rng.randrange(3, VOCAB) for _ in range(60)] for _ in range(3)]
    made = []
    for number in range(traffic.num_requests):
        base = rng.choice(bases)
        prompt = base[: rng.choice((20, 33, 60))]
        prompt = prompt + [rng.randrange(3, VOCAB) for _ in range(rng.choice((0, 1, 5, 12)))]
        sampling = SamplingParams(
            temperature=rng.choice((0.0, 0.8)),
            seed=number,
            max_tokens=rng.randint(1, 24),
            ignore_eos=True,
        )
        owner = rng.choice(("a", "a", "b"))
        retention = Retention.parse(rng.choice(traffic.methods))
        made.append(TokenRequest(str(number), tuple(prompt), sampling, retention, owner=owner))
    return made


def serve(traffic: Traffic, rank: int, stores: Many[Store]) -> Outcome | None:
    """Serve all requests as one of the ranks.

    Args:
        traffic: what is asked.
        rank: of this process; one beyond the layout does nothing.
        stores: to meet at: one for each start of the ranks, then one to tell results.
    """
    if rank >= traffic.layout.world_size:
        return None
    return _Rank(traffic, rank, stores).serve()


class _Rank:
    def __init__(self, traffic: Traffic, rank: int, stores: Many[Store]) -> None:
        self._traffic, self._rank = traffic, rank
        *self._meetings, (host, port) = stores
        self._store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=120))
        self._num_told = 0
        self._num_preemptions = self._hit_tokens = self._num_steps = 0
        self._latest: dict[int, tuple[int, Sequence]] = {}  # turn of each conversation

    def serve(self) -> Outcome:
        traffic = self._traffic
        worker = self._start()
        scheduler = Scheduler(
            self._tell(worker.info),
            max_num_seqs=traffic.config.max_num_seqs,
            max_model_len=256,
            max_prefill_tokens=96,
            prefill_quantum=60,
            prefix_bytes=traffic.prefix_bytes,
            conversation_bytes=2**30 if traffic.keeps_talks else 0,
        )
        rng, todo = random.Random(traffic.seed + 1), deque(requests(traffic))
        sequences: list[Sequence] = []
        flights: deque[Any] = deque()
        while todo or not scheduler.is_idle or self._next_turns(scheduler, sequences):
            for _ in range(min(rng.randint(0, 2), len(todo))):
                request = todo.popleft()
                spec = sampling_of(request).spec(int(request.request_id), ())
                sequences.append(scheduler.add(request, spec))
            if self._num_steps % 3 == 0:
                self._next_turns(scheduler, sequences)
            if traffic.may_abort and sequences and rng.random() < 0.05:
                scheduler.finish(rng.choice(sequences), "abort")
            while (plan := scheduler.schedule()) is not None:
                for started, _ in scheduler.started():
                    self._hit_tokens += started.num_cached_tokens
                flights.append((plan, worker.execute(plan)))
                worker.check_integrity()
            if self._num_steps == traffic.restart_at:
                flights.clear()
                leave_together(worker)
                worker = self._start()
                scheduler.restart(self._tell(worker.info))
            self._num_steps += 1
            if flights:
                plan, result = flights.popleft()
                self._note(scheduler.absorb(plan, self._tell(result)))
        scheduler.expire(1e9)  # conversations
        scheduler.reset_prefix_cache()
        while (plan := scheduler.schedule()) is not None:
            scheduler.absorb(plan, self._tell(worker.execute(plan)))
        outcome = Outcome(
            {s.request.request_id: list(s.output_token_ids) for s in sequences},
            {s.request.request_id: s.error for s in sequences if s.error is not None},
            self._num_preemptions,
            self._hit_tokens,
            worker.kv.num_pages - worker.kv.pages_free,
            self._num_steps,
            worker._shard.parked.host_bytes,
            scheduler.conversations.counts.brought_back,
        )
        leave_together(worker)
        return outcome

    def _next_turns(self, scheduler: Scheduler, sequences: list[Sequence]) -> bool:
        """Ask the next question of conversations that have their answers; whether there is one."""
        num_before = len(sequences)
        for talk in range(self._traffic.num_talks):
            said: tuple[int, ...] = ()
            turn, latest = self._latest.get(talk, (-1, None))
            if latest is not None:
                if latest.finish_reason != "length" or turn + 1 == NUM_TURNS:
                    continue
                said = (*latest.request.prompt_token_ids, *latest.output_token_ids)
            request = turn_of(self._traffic.seed, talk, turn + 1, said)
            spec = sampling_of(request).spec(0, ())
            sequences.append(scheduler.add(request, spec))
            self._latest[talk] = turn + 1, sequences[-1]
        return len(sequences) > num_before

    def _start(self) -> Worker:
        traffic = self._traffic
        return Worker(
            traffic.config.for_worker(), traffic.layout, self._rank, self._meetings.pop(0)
        )

    def _note(self, events: Many[Any]) -> None:
        self._num_preemptions += sum(isinstance(event, Preempted) for event in events)

    def _tell(self, own: Any) -> list[Any]:
        """What each rank has for this moment, by rank."""
        self._num_told += 1
        self._store.set(f"{self._num_told}/{self._rank}", pickle.dumps(own).hex())
        ranks = range(self._traffic.layout.world_size)
        return [
            pickle.loads(bytes.fromhex(self._store.get(f"{self._num_told}/{rank}").decode()))
            for rank in ranks
        ]
