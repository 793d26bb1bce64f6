"""CUDA graphs of one rank: recorded once, replayed with other numbers in the same inputs."""

import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded step.

    Attributes:
        inputs: what it reads; to be overwritten before it is replayed.
    """

    inputs: Sequence[Tensor]
    _graph: torch.cuda.CUDAGraph
    _output: Tensor

    def replay(self) -> Tensor:
        """Let the device do it again; what it returns is overwritten by the next time."""
        self._graph.replay()
        return self._output


class Graphs:
    """The recorded steps of a rank, which share the memory of their temporaries.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recorded: dict[Hashable, Recorded] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def get(self, key: Hashable) -> Recorded | None:
        """What was recorded under a key."""
        return self._recorded.get(key)

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Say how much memory takes what is recorded meanwhile."""
        torch.cuda.empty_cache()
        before, _ = torch.cuda.mem_get_info(self._device)
        yield
        torch.cuda.empty_cache()
        after, _ = torch.cuda.mem_get_info(self._device)
        logger.info("recorded %d graphs: %.0f MiB", len(self._recorded), (before - after) / 2**20)

    def record(
        self, key: Hashable, inputs: Sequence[Tensor], step: Callable[[], Tensor]
    ) -> Recorded:
        """Record a step, which must change nothing while its inputs are padding.

        It is run twice: kernels are compiled, and libraries set up, before anything is recorded.
        """
        stream = _recording_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile.
        with torch.cuda.graph(
            graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"
        ):
            output = step()
        self._recorded[key] = recorded = Recorded(inputs, graph, output)
        return recorded


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream on which a process warms up and records.

    cuBLAS takes a workspace, 32 MiB on an H100, for every stream that multiplies, and keeps it.
    """
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
