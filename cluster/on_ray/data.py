"""Work spread over replicas by Ray Data: one actor a replica, one task an item.

Only small descriptions travel: what an item is about, each replica reads and writes itself. Ray
Data starts the actors, feeds them, and gives the items of an actor that has died to another one, so
running an item again must do no harm.
"""

import logging
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from saqqara.configs.schema import EngineConfig

from .controller import connect
from .placement import CPU_SHARE, uses_gpus

if TYPE_CHECKING:
    from ray.data import Dataset

logger = logging.getLogger(__name__)

# Ray Data holds tasks back by what their blocks may come to, so it needs more than plans do.
OBJECT_STORE_BYTES = 512 * 2**20


class Replica(Protocol):
    """What runs items, several at once; made in the actor's process."""

    def run(self, item: Any) -> Any:
        """Run one item; what it returns goes back to the driver."""
        ...

    def close(self) -> None:
        """End it."""
        ...


BOARD_SECONDS = 2.0  # how long a look at the board may take
_STOP_SECONDS = 30.0  # for one step of Ray Data's loop

Notes = Callable[..., None]
Alone = Callable[[Callable[[], None]], None]
MakeReplica = Callable[[str, Notes, Alone], Replica]
"""Makes a replica of that name; it tells the board how far it is, and has it call functions, one
of all replicas at a time."""


class Board:
    """The actor that replicas write to while they work, and the driver reads.

    It is begun anew where it is lost, with the state that it had at its start.
    """

    def __init__(self, state: Any) -> None:
        self._state = state

    def note(self, *args: Any) -> None:
        """Pass a note on to the state."""
        self._state.note(*args)

    def read(self) -> Any:
        """The state as it is."""
        return self._state

    def call(self, function: Callable[[], None]) -> Exception | None:
        """Call a function; an error is handed back, to be raised in its own words."""
        try:
            function()
        except Exception as error:
            return error
        return None


class ReplicaFleet:
    """Replicas on Ray; connects to Ray, and starts a local one where there is none.

    Args:
        config: of each replica's engine. An engine in the replica's own process takes its GPU.
        make_replica: makes a replica, in its process. What it raises, `results` raises.
        num_replicas: how many.
        at_once: items that a replica runs at once.
        state: what the board keeps; `state.note(...)` is called with the replicas' notes.

    Raises:
        ImportError: Ray Data is not installed.
    """

    def __init__(
        self,
        config: EngineConfig,
        make_replica: MakeReplica,
        num_replicas: int,
        at_once: int,
        state: Any,
    ) -> None:
        try:
            import ray.data
        except ImportError as error:
            raise ImportError(
                f"several replicas need Ray Data: pip install 'saqqara[data]' ({error})"
            ) from None
        self._owns_ray = connect(object_store_bytes=OBJECT_STORE_BYTES)
        self._make_replica = make_replica
        self._num_replicas = num_replicas
        self._at_once = at_once
        self._num_gpus = int(config.executor == "local" and uses_gpus(config))
        num_gpus = ray.cluster_resources().get("GPU", 0)
        if self._num_gpus * num_replicas > num_gpus:
            logger.warning(
                "%d replicas need a GPU each and the cluster has %d: others wait until it grows",
                num_replicas,
                num_gpus,
            )
        # Its calls may be repeated: a note says how far a part is, not how much further.
        lasting = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        self._board = ray.remote(Board).options(**lasting).remote(state)
        self._seen = state
        self._dataset: Dataset | None = None
        self._stopped = threading.Event()

    def results(self, items: Sequence[Any]) -> Iterator[Any]:
        """What the items have come to, in the order they end; fewer of them after `stop`.

        Raises:
            Exception: what a replica has raised.
        """
        from ray.data import ActorPoolStrategy, DataContext, from_items

        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.issue_detectors_config.detectors = []  # they guess at what replicas do by design
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # what fails, is raised
        rows = [{"item": pickle.dumps(item)} for item in items]
        dataset = from_items(rows, override_num_blocks=len(rows)).map_batches(
            ReplicaActor,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ActorPoolStrategy(
                size=self._num_replicas,
                max_tasks_in_flight_per_actor=self._at_once,
                max_concurrent_calls_per_actor=self._at_once,
                enable_true_multi_threading=True,
            ),
            fn_constructor_args=(self._make_replica, self._board),
            num_cpus=CPU_SHARE,
            num_gpus=self._num_gpus,
        )
        self._dataset = dataset
        try:
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in batch.column("result").to_pylist():
                    result = pickle.loads(row)
                    if isinstance(result, BaseException):
                        raise result
                    yield result
                if self._stopped.is_set():
                    return
        finally:
            self._end_replicas()

    def stop(self) -> None:
        """End the replicas, whatever they are at, and with them `results`.

        Another thread than that of `results` calls it, until that one has ended: what it has not
        begun yet cannot be ended.
        """
        self._stopped.set()
        self._end_replicas()

    def board(self) -> Any:
        """The state of the board; as it was last seen where the board cannot be reached."""
        try:
            self._seen = ray.get(self._board.read.remote(), timeout=BOARD_SECONDS)
        except (RayActorError, GetTimeoutError):
            logger.debug("the board of the replicas cannot be reached", exc_info=True)
        return self._seen

    def _end_replicas(self) -> None:
        # There is no public way to end a dataset from another thread. Left alone, it takes the end
        # of Ray for a loss of its actors: it tries again, and starts a Ray of its own for that.
        executor = self._dataset and self._dataset._current_executor
        if executor:
            executor.shutdown(force=True)
            executor.join(_STOP_SECONDS)

    def close(self) -> None:
        """End what is left, after `stop`; a Ray that was there before stays."""
        if not ray.is_initialized():
            return
        ray.kill(self._board, no_restart=True)
        if self._owns_ray:
            ray.shutdown()


class ReplicaActor:
    """A replica as Ray Data calls it: a table with an item in, a table with its result out."""

    def __init__(self, make_replica: MakeReplica, board: Any) -> None:
        self._replica: Replica | None = None
        self._error: Exception | None = None
        name = ray.get_runtime_context().get_actor_id()[:8]
        try:
            self._replica = make_replica(
                name, lambda *note: board.note.remote(*note) and None, partial(_call_alone, board)
            )
        except Exception as error:  # travels back as a result, whole and in its own words
            logger.debug("a replica did not start", exc_info=True)
            self._error = error

    def __call__(self, table: Any) -> Any:
        """Run the items of a table."""
        import pyarrow as pa

        results = [self._run(pickle.loads(row)) for row in table.column("item").to_pylist()]
        return pa.table({"result": pa.array([pickle.dumps(r) for r in results], pa.binary())})

    def __del__(self) -> None:
        if self._replica is not None:
            self._replica.close()

    def _run(self, item: Any) -> Any:
        if self._replica is None:
            return self._error
        try:
            return self._replica.run(item)
        except Exception as error:
            return error


def _call_alone(board: Any, function: Callable[[], None]) -> None:
    """See `Alone`."""
    error = ray.get(board.call.remote(function))
    if error is not None:
        raise error
