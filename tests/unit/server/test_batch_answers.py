"""Lines of a batch take the way of requests over HTTP, behind those of clients."""

import json
from typing import Any

import pytest

from saqqara.cluster.server.batches.answers import BATCH_PRIORITY, AppAnswers
from saqqara.cluster.server.routes.base import OWNER

MOST = 2**31 - 1


class App:
    """An application that keeps what it was asked."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.scope: Any = None
        self.body: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        self.body = json.loads((await receive())["body"])
        await send({"type": "http.response.start", "status": 500 if self.fails else 200})
        for piece in (b'{"a":', b" 1}"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if self.fails:  # as Starlette's outermost layer does when it has answered
            raise KeyError("a fault of ours")


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (None, BATCH_PRIORITY),
        (0, BATCH_PRIORITY),
        (-5, BATCH_PRIORITY - 5),
        (MOST, MOST),
        ("high", "high"),
        (True, True),
    ],
)
async def test_a_line_is_asked_for_its_owner_behind_others(given: Any, sent: Any) -> None:
    app = App()
    answer = await AppAnswers(app)("owner", "/v1/completions", {"n": 1, "priority": given})
    assert (answer.status, answer.body) == (200, {"a": 1})
    assert (app.scope["path"], app.scope[OWNER]) == ("/v1/completions", "owner")
    assert app.body == {"n": 1, "priority": sent}


@pytest.mark.parametrize(("given", "sent"), [({}, 60.0), ({"timeout_seconds": 5}, 5)])
async def test_a_line_is_not_ended_as_early_as_who_waits(given: Any, sent: float) -> None:
    app = App()
    await AppAnswers(app, timeout_seconds=60.0)("owner", "/v1/completions", given)
    assert app.body["timeout_seconds"] == sent


async def test_a_fault_of_the_application_is_an_answer() -> None:
    answer = await AppAnswers(App(fails=True))("owner", "/v1/completions", {})
    assert answer.status == 500
