"""A thread that many ask: they have turns, and who leaves lets the next one in."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from saqqara.cluster.server.admission import OverloadedError
from saqqara.cluster.server.desk import Desk

MOST = 3


class Bed:
    """A desk that is held up until `open` is set; notes who was served."""

    def __init__(self) -> None:
        self.desk = Desk("desk", lambda owner: MOST)
        self.open = threading.Event()
        self.served: list[str] = []
        self.first = self.ask("first", "x")

    def ask(self, owner: str, name: str, cost: int = 10) -> "asyncio.Task[None]":
        def work() -> None:
            self.open.wait(60)
            self.served.append(name)

        return asyncio.create_task(self.desk.run(owner, cost, work))


@pytest.fixture
async def bed() -> AsyncIterator[Bed]:
    bed = Bed()
    await asyncio.sleep(0)
    yield bed
    bed.open.set()
    bed.desk.close()


async def test_owners_have_turns_by_cost(bed: Bed) -> None:
    asked = [bed.ask("a", f"a{i}") for i in range(MOST)]
    asked += [bed.ask("b", f"b{i}", cost=5) for i in range(MOST)]
    await asyncio.sleep(0)
    bed.open.set()
    await asyncio.gather(bed.first, *asked)
    assert bed.served == ["x", "a0", "b0", "b1", "a1", "b2", "a2"]


async def test_an_owner_may_wait_with_so_many(bed: Bed) -> None:
    asked = [bed.ask("a", "a") for _ in range(MOST + 1)]
    await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    assert [type(task.exception()) for task in asked if task.done()] == [OverloadedError]
    other = bed.ask("b", "b")
    bed.open.set()
    await other


async def test_who_leaves_lets_the_next_one_in(bed: Bed) -> None:
    """Before its turn, when it has just come, or in it; and nobody's place stays taken."""
    for _ in range(2 * MOST):
        leaver = bed.ask("a", "left")
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.wait([leaver])
    just_let_in, after = bed.ask("a", "left"), bed.ask("b", "b")
    await asyncio.sleep(0)
    bed.first.cancel()
    await asyncio.wait([bed.first])
    just_let_in.cancel()
    bed.open.set()
    await after
    assert bed.served == ["x", "b"]
    await bed.ask("a", "a")
