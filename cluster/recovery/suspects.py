"""Which requests are to be kept apart after workers were lost, and which one ends them.

That a request was in flight when a worker was lost is no guilt: workers die of many things, and
whoever was there was there. After two losses without a new token in between it is a *suspect*:
once the workers are back, suspects run one after the other, alone, each until it has a new token.
Only a request that is alone with the workers at two losses, again without a new token in between,
is *guilty* and must end. A new token clears its request of everything.
"""

from collections import Counter
from collections.abc import Collection

LOSSES_OF_A_SUSPECT = 2
LOSSES_OF_A_GUILTY = 2  # while it runs alone


class Suspects:
    """Finds the request that ends workers, by who was in flight whenever one was lost."""

    def __init__(self) -> None:
        self._losses: Counter[str] = Counter()  # since the request's last new token
        self._losses_alone: Counter[str] = Counter()
        self._order: list[str] = []

    @property
    def order(self) -> tuple[str, ...]:
        """Ids of the suspects: they run alone, in this order, before all others."""
        return tuple(self._order)

    def lost(self, in_flight: Collection[str]) -> str | None:
        """A worker was lost while these requests were in flight; returns the guilty one, if any.

        A suspect that was alone comes last from now on, so that no suspect waits for ever.
        """
        if len(in_flight) == 1:
            [alone] = in_flight
            if alone in self._order:
                self._losses_alone[alone] += 1
                if self._losses_alone[alone] >= LOSSES_OF_A_GUILTY:
                    self.clear(alone)
                    return alone
                self._order.remove(alone)
                self._order.append(alone)
        for request_id in sorted(in_flight):
            self._losses[request_id] += 1
            is_new = request_id not in self._order
            if is_new and self._losses[request_id] >= LOSSES_OF_A_SUSPECT:
                self._order.append(request_id)
        return None

    def clear(self, request_id: str) -> bool:
        """A request has a new token, or has ended; returns whether it was a suspect."""
        self._losses.pop(request_id, None)
        self._losses_alone.pop(request_id, None)
        if request_id not in self._order:
            return False
        self._order.remove(request_id)
        return True
