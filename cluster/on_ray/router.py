"""Chooses a replica for each request, and says so when there is none.

Serve copies this module into its proxies, where the package need not be installed: only Ray is
imported here. What it overrides is private to Serve, so `pyproject.toml` bounds Ray's version from
above, and `tests/ray/test_router.py` says what a new one must still have.
"""

import asyncio
from typing import Any

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.exceptions import BackPressureError

PATIENCE_SECONDS = 2.0  # news of a replica's start and end come to a proxy one after the other
RETRY_SECONDS = 5


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


class RefusingRouter(PowerOfTwoChoicesRequestRouter):  # type: ignore[misc]
    """Serve's own choice of a replica, but requests do not wait while there is no replica.

    Serve's router holds them until one has started, which may take minutes, in which a client, or
    the load balancer that asks for `/health`, cannot tell a server that starts from one that hangs.
    """

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
                if not choice.done() and not self.curr_replicas:
                    raise NoReplicaError(0, 0, 503, RETRY_SECONDS)
            return choice.result()
        finally:
            choice.cancel()
