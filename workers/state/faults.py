"""The slots that one rank has given up, and the faults that end a sequence alone."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from saqqara.workers.plan import Fault, FaultCode

logger = logging.getLogger(__name__)


class Faults:
    """The slots of one rank that are refused, and those of them whose sequences cannot go on.

    A slot at fault is refused like one whose tokens do not fit: this rank gives its pages back and
    holds nothing of it, but goes on to do its part where ranks work together. So it does not matter
    whether the other ranks have met the fault, too.

    Args:
        free_pages: takes all pages of a slot back.
        is_alone: whether no other rank works on the same layers. If some do, they may wait in the
            middle of what failed here, so only faults outside such work cost one sequence alone.

    Attributes:
        refused: slots that this rank holds nothing of.
    """

    def __init__(self, free_pages: Callable[[int], None], is_alone: bool) -> None:
        self.refused: set[int] = set()
        self._free_pages = free_pages
        self._is_alone = is_alone
        self._new: list[Fault] = []
        self._slots: set[int] = set()

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def refuse(self, slot: int) -> None:
        """Give up a slot: what it held is room for others."""
        self._free_pages(slot)
        self.refused.add(slot)

    def add(self, slot: int, message: str, code: FaultCode = "computation_failed") -> None:
        """End the sequence of a slot; only its first fault counts."""
        if slot in self._slots:
            return
        logger.warning("slot %d: %s", slot, message)
        self._slots.add(slot)
        self._new.append(Fault(slot, message, code))
        self.refuse(slot)

    def tell(self, slot: int, message: str, code: FaultCode = "computation_failed") -> None:
        """Note a fault of a sequence that has left its slot already."""
        logger.warning("slot %d, before it was freed: %s", slot, message)
        self._new.append(Fault(slot, message, code))

    @contextmanager
    def blame(self, slots: Iterable[int], doing: str, *, is_local: bool = False) -> Iterator[None]:
        """Let an exception of what is done for these slots end their sequences, and only these.

        Args:
            slots: whose work it is.
            doing: what it is, for the message: "sampling".
            is_local: no other rank waits for anything inside; else it may only be caught where this
                rank is alone.
        """
        try:
            yield
        except Exception as error:
            if not (is_local or self._is_alone):
                raise
            new = [slot for slot in slots if slot not in self._slots]
            if new:
                logger.exception("%s failed for slots %s", doing, new)
            for slot in new:
                self.add(slot, f"{doing} failed: {type(error).__name__}: {error}")

    def take(self) -> tuple[Fault, ...]:
        """The faults since the last call."""
        faults, self._new = tuple(self._new), []
        return faults

    def forget(self, slot: int) -> None:
        """Note that the slot is free."""
        self.refused.discard(slot)
        self._slots.discard(slot)
