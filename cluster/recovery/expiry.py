"""Which requests have run out of the time that they were given."""

import heapq


class Expiry:
    """The deadlines of unfinished requests, the soonest first.

    Adding, ending and finding the soonest cost the logarithm of how many there are.
    """

    def __init__(self) -> None:
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []  # also entries that count no more

    def __len__(self) -> int:
        return len(self._due)

    def add(self, request_id: str, due: float) -> None:
        """Count a request as expired from a moment on."""
        self._due[request_id] = due
        heapq.heappush(self._heap, (due, request_id))

    def forget(self, request_id: str) -> None:
        """The request has ended, if it had a deadline at all."""
        if self._due.pop(request_id, None) is None:
            return
        if len(self._heap) > 2 * len(self._due) + 64:  # most of what is there counts no more
            self._heap = [(due, name) for name, due in self._due.items()]
            heapq.heapify(self._heap)

    def pop_expired(self, now: float) -> list[str]:
        """The requests whose time has passed, each told once."""
        expired = []
        while self._heap and self._heap[0][0] <= now:
            due, request_id = heapq.heappop(self._heap)
            if self._due.get(request_id) == due:
                del self._due[request_id]
                expired.append(request_id)
        return expired
