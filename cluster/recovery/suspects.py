"""Which requests are to be kept apart after workers were lost, and which one ends them.

That a request was in flight when a worker was lost is no guilt: workers die of many things, and
whoever was there was there. After two losses without a new token in between it is a *suspect*:
once the workers are back, suspects run one after the other, alone, each until it has a new token.
Only a request that is alone with the workers at three losses, again without a new token in between,
is *guilty* and must end: one may be chance, and so may two where workers die for reasons of their
own. Between the first and the last somebody else must have got a token, or workers that are lost
whatever they do would cost one request after the other. Where no suspect can show that, one that
was at no loss runs alone as the *control*; where there is none either, the losses alone will do.

A new token clears its request of everything. Workers that cannot be reached were stopped or cut
off: whatever a request does, it does not do that.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from saqqara.cluster.errors import Cause

LOSSES_OF_A_SUSPECT = 2
LOSSES_OF_A_GUILTY = 3  # while it runs alone


class Suspects:
    """Finds the request that ends workers, by who was in flight whenever one was lost."""

    def __init__(self) -> None:
        self._losses: Counter[str] = Counter()  # since the request's last new token
        self._losses_alone: Counter[str] = Counter()
        self._unproven: set[str] = set()  # lost alone once, and since then nobody had a new token
        self._order: list[str] = []

    @property
    def order(self) -> tuple[str, ...]:
        """Ids of the suspects: they run alone, in this order, before all others."""
        return tuple(self._order)

    def turn(self, others: Iterable[str]) -> str | None:
        """Who runs alone now; None: all may run.

        Args:
            others: ids of all requests, in the order of their turns.
        """
        if not self._order:
            return None
        if self._unproven.issuperset(self._order):
            control = next((request for request in others if request not in self._losses), None)
            if control is not None:
                return control
        return self._order[0]

    def lost(self, in_flight: Sequence[str], cause: Cause) -> str | None:
        """A worker was lost while these requests were in flight; returns the guilty one, if any."""
        if cause == "unreachable":
            return None
        if len(in_flight) == 1 and in_flight[0] in self._order:
            return self._lost_alone(in_flight[0])
        for request_id in in_flight:
            self._losses[request_id] += 1
            is_new = request_id not in self._order
            if is_new and self._losses[request_id] >= LOSSES_OF_A_SUSPECT:
                self._order.append(request_id)
        return None

    def progress(self, request_id: str) -> bool:
        """A request has a new token; returns whether that may change whose turn it is."""
        was_control = bool(self._unproven)
        self._unproven.clear()
        return self.forget(request_id) or was_control

    def forget(self, request_id: str) -> bool:
        """A request is cleared, or has ended; returns whether it was a suspect."""
        self._losses.pop(request_id, None)
        self._losses_alone.pop(request_id, None)
        self._unproven.discard(request_id)
        if request_id not in self._order:
            return False
        self._order.remove(request_id)
        return True

    def _lost_alone(self, request_id: str) -> str | None:
        """Blame a suspect, or let it run again once the other suspects have had their turn."""
        self._losses_alone[request_id] += 1
        is_proven = request_id not in self._unproven or len(self._order) == 1
        if is_proven and self._losses_alone[request_id] >= LOSSES_OF_A_GUILTY:
            self.forget(request_id)
            return request_id
        if self._losses_alone[request_id] == 1:
            self._unproven.add(request_id)
        self._order.remove(request_id)
        self._order.append(request_id)
        return None


def verdict_on(request_id: str) -> str:
    """What is said of a request that is guilty."""
    return (
        f"request {request_id} has ended the workers {LOSSES_OF_A_GUILTY} times while it ran alone"
    )
