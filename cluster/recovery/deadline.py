"""How long a step may take before its workers count as hung, learnt from the steps before it.

What a step takes is, near enough, a sum of parts, each of which grows with one *feature* of its
work: a constant, tokens x layers of prefill, those times the length of their prompt, tokens that
are decoded, those times their position. Then one measured step bounds any other: each part is at
most as many times larger as its feature is, so the whole is at most

    seconds measured  x  the largest ratio of a feature to the measured step's own,

whatever the parts are. The tightest such bound over recent steps, times `SLACK`, is the deadline.
A feature that no measured step had leaves it open: a first prefill is never called a hang.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Sequence

from saqqara.compression.layers import Layers
from saqqara.compression.retention import Retention
from saqqara.workers.plan import PrefillGroup, StepPlan

FLOOR_SECONDS = 5.0  # with the time to look around, lost workers are known within 10 s
MOST_SECONDS = 900.0  # longer than ranks wait for each other in a collective (600)
WARM_UP_SECONDS = 60.0  # more for a step of a kind that is new to a device with kernels to compile
SLACK = 4.0  # over the bound: other processes take their share of the machine
_RECENT = 8  # steps of a kind; the slowest of them stands for it
_MAX_KINDS = 64
_SHORTEST = 1e-6  # seconds; nothing times infinity is no number

Features = tuple[float, ...]
"""The constant 1, then what the module says, in that order."""

NOTHING: Features = (1.0, 0.0, 0.0, 0.0, 0.0)


class Workload:
    """Turns plans into features; it remembers the prompts of the slots that are in use.

    Args:
        layers: of the model; a number of them: all see all tokens.
    """

    def __init__(self, layers: Layers | int) -> None:
        self._layers = layers
        self._entering: dict[int, Sequence[int]] = {}  # tokens by layer, of what is computed

    def features(self, plan: StepPlan) -> Features:
        """The work of a plan; plans must come in order."""
        for slot in plan.free:
            self._entering.pop(slot, None)
        for new in plan.new:
            if new.shares_prefill_with is None:
                self._entering[new.slot] = self._tokens(new.retention, new.prompt_tokens)
        prefill = [self._prefill(group) for group in plan.prefill]
        return (
            1.0,
            float(sum(tokens for tokens, _ in prefill)),
            float(sum(squares for _, squares in prefill)),
            float(sum(item.num_tokens for item in plan.decode)),
            float(sum(item.num_tokens * (item.position + 1) for item in plan.decode)),
        )

    def _tokens(self, retention: Retention, prompt_tokens: int) -> Sequence[int]:
        return retention.entering_tokens(prompt_tokens, self._layers)

    def _prefill(self, group: PrefillGroup) -> tuple[int, int]:
        layers = slice(group.start_layer, group.stop_layer)
        prompts = [self._entering[slot] for slot in group.slots if slot in self._entering]
        tokens = [int(num) for prompt in prompts for num in prompt[layers]]
        return sum(tokens), sum(num * num for num in tokens)


class StepDeadline:
    """Learns what steps take, and says how long one may.

    Args:
        compiles: whether a step of a new kind may have to compile kernels first, which no
            measured step tells of.
    """

    def __init__(self, *, compiles: bool) -> None:
        self._compiles = compiles
        self._patience = 1.0
        self._samples: OrderedDict[Features, deque[tuple[float, Features]]] = OrderedDict()
        self._warm: set[Features] = set()

    def seconds(self, work: Features) -> float:
        """How long this work may take, all that is in flight before it included."""
        bound = self._bound(work) * SLACK
        if self._compiles and _kind(work) not in self._warm:
            bound += WARM_UP_SECONDS
        return min(max(FLOOR_SECONDS, bound) * self._patience, MOST_SECONDS)

    def note(self, work: Features, seconds: float) -> None:
        """This work took so long."""
        kind = _kind(work)
        self._patience = 1.0
        self._warm.add(kind)
        self._samples.setdefault(kind, deque(maxlen=_RECENT)).append(
            (max(seconds, _SHORTEST), work)
        )
        self._samples.move_to_end(kind)
        if len(self._samples) > _MAX_KINDS:
            self._samples.popitem(last=False)

    def passed(self) -> None:
        """A step took longer and its workers were ended: the next ones get twice the time.

        So a deadline that was wrong costs a few starts, not the engine.
        """
        self._patience *= 2.0

    def restart(self) -> None:
        """New processes: what they take is known, but they compile their kernels again."""
        self._warm.clear()

    def _bound(self, work: Features) -> float:
        slowest = (max(samples) for samples in self._samples.values())
        return min((seconds * _growth(work, like) for seconds, like in slowest), default=math.inf)


def together(works: Sequence[Features]) -> Features:
    """The work of several plans, one after the other."""
    _, *rest = zip(NOTHING, *works, strict=True)
    return (1.0, *(sum(feature) for feature in rest))


def _growth(work: Features, like: Features) -> float:
    """The largest ratio of a feature to that of another; infinite where the other has none."""
    growth = 0.0
    for mine, its in zip(work, like, strict=True):
        if mine > 0:
            growth = max(growth, mine / its if its > 0 else math.inf)
    return growth


def _kind(work: Features) -> Features:
    """Work of about the same size has the same kind: features by powers of two."""
    return tuple(float(math.frexp(feature)[1]) if feature else -1.0 for feature in work)
