"""Which replica takes a request, how many replicas there should be, and what is said without one.

Serve copies this module into its proxies and its controller, where the package need not be
installed: only Ray is imported here. What it overrides is private to Serve, so `pyproject.toml`
bounds Ray's version from above, and `tests/ray/test_router.py` says what a new one must still have.
"""

import asyncio
import random
from hashlib import blake2b
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.exceptions import BackPressureError

PATIENCE_SECONDS = 2.0  # news of a replica's start and end come to a proxy one after the other
RETRY_SECONDS = 5
LOAD = "load"  # what a replica says of itself: see `Replica.load`
FULL_LOAD = 0.95  # from here on others are asked first
MOST_ASKED = 8  # replicas whose open requests are compared for one request
SESSION_SLACK = 0.25  # by so much more than the least may a session's replica be loaded


class NoReplicaError(BackPressureError):  # type: ignore[misc]
    """No replica takes requests now. Serve answers it with 503 and `Retry-After`."""

    @property
    def message(self) -> Any:
        """The body of the answer, in OpenAI's shape; Serve sends a mapping as JSON."""
        text = "no engine runs now: one that has failed is being replaced, or one is being started"
        return {
            "error": {"message": text, "type": "server_error", "param": None, "code": "no_engine"}
        }

    def __str__(self) -> str:
        return str(self.message["error"]["message"])


class LeastLoadedRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    """The replica with the fewest open requests, of those with free slots and pages if there are.

    Open requests are counted when a request comes. That a replica has sequences waiting, or its
    pages in use, it says itself once a second: a short question and a long text are one request
    each, but not one load.

    Requests of one session (the header `x-session-id`, which is all that a proxy sees of it: it
    does not read bodies) go to one replica, which may have their prefix or their conversation,
    unless it has much more to do than another one. Which one that is follows from the session's
    name and the replicas', so that proxies agree: the highest hash of both (rendezvous hashing;
    Thaler and Ravishankar, IEEE/ACM Transactions on Networking 6(1), 1998).

    Serve's router holds requests while there is no replica, which may take minutes, in which a
    client, or the load balancer that asks for `/health`, cannot tell a server that starts from one
    that hangs. This one refuses them, unless `waits` says that they are what starts a replica.
    """

    def initialize_state(self, waits: bool = False) -> None:
        """Take `request_router_kwargs`."""
        self._waits = waits

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Replicas in the order in which they are asked; of a list, the one with the fewest."""
        ranks: tuple[list[Any], list[Any]] = ([], [])
        for replica in candidate_replicas:
            ranks[_load(replica) >= FULL_LOAD].append(replica)
        order = [random.sample(rank, min(len(rank), MOST_ASKED)) for rank in ranks if rank]
        session_id = "" if pending_request is None else pending_request.metadata.session_id
        own = _replica_of(session_id, candidate_replicas) if session_id else None
        return order if own is None else [[own], *order]

    async def _choose_replica_for_request(
        self, pending_request: Any, *, is_retry: bool = False
    ) -> Any:
        """A replica for a request.

        Raises:
            NoReplicaError: there has been none for `PATIENCE_SECONDS`.
        """
        choice = asyncio.ensure_future(
            super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        )
        try:
            while not choice.done():
                await asyncio.wait((choice,), timeout=PATIENCE_SECONDS)
                if not choice.done() and not self.curr_replicas and not self._waits:
                    raise NoReplicaError(0, 0, 503, RETRY_SECONDS)
            return choice.result()
        finally:
            choice.cancel()


def _load(replica: Any) -> float:
    return float((replica.routing_stats or {}).get(LOAD, 0.0))


def _replica_of(session_id: str, replicas: list[Any]) -> Any:
    """The replica of a session; None where others have room and it has not, or much less to do."""
    if not replicas:
        return None

    def weight(replica: Any) -> bytes:
        name = f"{replica.replica_id.unique_id}/{session_id}"
        return blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()

    own = max(replicas, key=weight)
    most = min(FULL_LOAD, min(map(_load, replicas)) + SESSION_SLACK)
    return own if _load(own) < most else None


class LoadPolicy:
    """So many replicas that the load, divided among them, is what is aimed at.

    Serve rounds up, keeps to the bounds and waits out the delays of its `AutoscalingConfig`.

    Args:
        target_load: of one replica.
    """

    def __init__(self, target_load: float = 0.8) -> None:
        self._target_load = target_load

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """The number of replicas, and nothing to remember; see Serve's `AutoscalingContext`."""
        loads = (context.aggregated_metrics or {}).get(LOAD) or {}
        if not loads:  # nobody has said anything yet
            return context.target_num_replicas, {}
        return sum(loads.values()) / self._target_load, {}
