"""Recorded steps where there is no GPU: what is replayed is done again, in the same tensors."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from saqqara.workers.device_steps.device_decode import DeviceDecode
from saqqara.workers.device_steps.device_head import DeviceHead
from saqqara.workers.device_steps.graphs import Graphs, Recorded
from saqqara.workers.worker import Worker


@dataclass(frozen=True)
class _Again:
    step: Callable[[], Tensor]
    output: Tensor

    def replay(self) -> None:
        self.output.copy_(self.step())


class Replays:
    """Stands for `Graphs`."""

    def __init__(self) -> None:
        self.recorded: dict[Hashable, Recorded] = {}

    def get(self, key: Hashable) -> Recorded | None:
        return self.recorded.get(key)

    def record(
        self, key: Hashable, inputs: Sequence[Tensor], step: Callable[[], Tensor]
    ) -> Recorded:
        output = step().clone()
        self.recorded[key] = Recorded(inputs, cast(Any, _Again(step, output)), output)
        return self.recorded[key]


def replay_steps(worker: Worker) -> Replays:
    """Let a worker replay its steps from now on."""
    replays, shard = Replays(), worker._shard
    part, slots = shard.part, shard.device_slots
    assert slots is not None
    graphs = cast(Graphs, replays)
    worker._decode._on_device = DeviceDecode(shard, slots, graphs)
    assert worker._head is not None
    sizes = slots, part.config.max_num_seqs
    worker._head._on_device = DeviceHead(part.decoder, part.mesh, *sizes, graphs)
    return replays
