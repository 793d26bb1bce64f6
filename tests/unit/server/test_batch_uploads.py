"""Uploads that are no uploads, or too large, or never end: refused clearly, and nothing is left.

The first test is an upload as it should be, byte by byte.
"""

import asyncio
import random
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from support.fake_model import SPEC, Ascii
from support.fake_replica import FakeReplica, make_workers

from saqqara.cluster.batch_store.records import Page
from saqqara.cluster.batch_store.store import Store
from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.server.api_keys import ANYBODY, KEYS_VARIABLE, ApiKeys
from saqqara.cluster.server.app import make_app
from saqqara.cluster.server.batches import files
from saqqara.cluster.server.generation import Generation
from saqqara.cluster.settings import serve_config
from saqqara.configs.schema import BatchLimits, EngineConfig

FORM = "multipart/form-data; boundary=x"
FILE_PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
PURPOSE = b'\r\n--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch'
END = b"\r\n--x--\r\n"


class Server:
    """The application over an engine that has nothing to do."""

    def __init__(
        self, folder: Path, limits: BatchLimits, body_seconds: float = 300.0, keys: str = ""
    ) -> None:
        config = EngineConfig(model="fake", max_num_seqs=4)
        tokenizer = Tokenizer(Ascii())
        engine = Engine(config, FakeReplica(make_workers(1000)), tokenizer, SPEC)
        serve = serve_config(
            {
                "model_loading_config": {"model_id": "m", "model_source": "fake"},
                "limits": {"body_timeout_seconds": body_seconds},
            }
        )
        self.folder = folder / "files"
        self.store = Store(folder, limits)
        self.generation = Generation(serve, config, engine, tokenizer)
        given_keys = {KEYS_VARIABLE: keys} if keys else {}
        self.app = make_app(self.generation, ApiKeys.load(None, given_keys), store=self.store)
        self.http = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=self.app), base_url="http://127.0.0.1"
        )

    async def upload(self, body: Any, kind: str | None = FORM, **headers: str) -> Any:
        """Status and JSON of the answer."""
        given = {**({} if kind is None else {"Content-Type": kind}), **headers}
        answer = await self.http.post("/v1/files", content=body, headers=given)
        return answer.status_code, answer.json()

    @property
    def num_left(self) -> int:
        """Contents on the disk."""
        return len(list(self.folder.iterdir()))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path, BatchLimits(max_file_bytes=1000, max_stored_bytes=1500, max_files=3))
    async with server.app.router.lifespan_context(server.app):
        yield server


def pieces(body: bytes, size: int) -> Callable[[], AsyncIterator[bytes]]:
    async def source() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    return source


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_an_upload_is_read_in_whatever_pieces_it_comes(server: Server, size: int) -> None:
    content = b"one\r\n--x-\r\ntwo\r\n-"
    status, file = await server.upload(pieces(FILE_PART + content + PURPOSE + END, size)())
    assert status == 200
    assert (file["filename"], file["bytes"], file["purpose"]) == ("a", len(content), "batch")
    answer = await server.http.get(f"/v1/files/{file['id']}/content")
    assert answer.content == content


FIELD = b'\r\n--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'
BAD: dict[str, tuple[bytes, str | None]] = {
    "nothing": (b"", None),
    "no form": (b"hello", None),
    "no end": (FILE_PART + b"x" + PURPOSE, None),
    "no end of a header": (b"--x\r\nContent-Disposition: form-data", None),
    "other boundary": (FILE_PART.replace(b"--x", b"--y") + b"x" + PURPOSE + END, None),
    "no parts": (b"--x--\r\n", "file"),
    "no file": (PURPOSE[2:] + END, "file"),
    "no purpose": (FILE_PART + b"x" + END, "purpose"),
    "two files": (FILE_PART + b"x\r\n" + FILE_PART + b"y" + PURPOSE + END, "file"),
    "two purposes": (FILE_PART + b"x" + PURPOSE + PURPOSE + END, "purpose"),
    "another field": (FILE_PART + b"x" + PURPOSE + FIELD % b"more" + b"1" + END, "more"),
    "a long field": (FILE_PART + b"x" + FIELD % b"purpose" + b"b" * 2000 + END, "purpose"),
    "a purpose of bytes": (FILE_PART + b"x" + FIELD % b"purpose" + b"\xff\0" + END, "purpose"),
    "a file without a name": (FIELD[2:] % b"file" + b"x" + PURPOSE + END, "file"),
    "a long name": (FILE_PART.replace(b'"a"', b'"' + b"a" * 600 + b'"') + b"x" + END, "file"),
    "no disposition": (b"--x\r\nA: b\r\n\r\nx" + PURPOSE + END, None),
    "a long header": (b"--x\r\nA: " + b"b" * 100_000 + b"\r\n\r\nx" + END, None),
    "many headers": (b"--x\r\n" + b"A: b\r\n" * 5000 + b"\r\nx" + END, None),
    "no anchor": (
        FILE_PART + b"x" + PURPOSE + FIELD % b"expires_after[seconds]" + b"3600" + END,
        "expires_after[anchor]",
    ),
    "seconds of text": (
        FILE_PART
        + b"x"
        + PURPOSE
        + FIELD % b"expires_after[seconds]"
        + "²".encode()
        + FIELD % b"expires_after[anchor]"
        + b"created_at"
        + END,
        "expires_after[seconds]",
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_what_is_no_upload_is_refused(server: Server, case: str) -> None:
    body, param = BAD[case]
    for size in (5, 100_000):
        status, answer = await server.upload(pieces(body, size)())
        assert (status, answer["error"]["param"]) == (400, param), answer
        assert len(answer["error"]["message"]) < 500
    assert server.num_left == 0


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/mixed; boundary=x",
        f"multipart/form-data; boundary={'x' * 300}",
    ],
)
async def test_a_body_that_says_it_is_something_else_gets_415(
    server: Server, kind: str | None
) -> None:
    status, answer = await server.upload(FILE_PART + b"x" + PURPOSE + END, kind)
    assert status == 415
    assert "multipart/form-data" in answer["error"]["message"]


async def test_a_file_that_is_too_large_is_not_read_to_its_end(server: Server) -> None:
    num_read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_read
        yield FILE_PART
        while True:
            num_read += 100
            yield b"x" * 100

    status, answer = await server.upload(endless())
    assert (status, answer["error"]["param"]) == (413, "file")
    assert num_read <= 1200
    status, answer = await server.upload(b"", **{"Content-Length": "9" * 12})
    assert status == 413
    assert server.num_left == 0


async def test_fields_and_what_comes_behind_them_are_bounded_too(server: Server) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield FILE_PART + b"x" + PURPOSE + END
        while True:
            yield b"y" * 1000

    status, answer = await server.upload(endless())
    assert status == 400
    assert "in all" in answer["error"]["message"]


async def test_a_full_store_says_so(server: Server) -> None:
    whole = FILE_PART + b"x" * 800 + PURPOSE + END
    assert (await server.upload(whole))[0] == 200
    status, answer = await server.upload(whole)
    assert (status, answer["error"]["param"]) == (413, "file")
    assert "1500 bytes in all" in answer["error"]["message"]
    small = FILE_PART + b"x" + PURPOSE + END
    assert [(await server.upload(small))[0] for _ in range(2)] == [200, 200]
    status, answer = await server.upload(small)
    assert (status, answer["error"]["code"]) == (400, "limit_exceeded")
    assert server.num_left == 3


async def test_an_upload_that_stands_still_gets_408_and_leaves_nothing(tmp_path: Path) -> None:
    async def still() -> AsyncIterator[bytes]:
        yield FILE_PART + b"x"
        await asyncio.Event().wait()

    server = Server(tmp_path, BatchLimits(), body_seconds=0.2)
    async with server.app.router.lifespan_context(server.app):
        status, answer = await server.upload(still())
        assert (status, answer["error"]["code"]) == (408, "request_timeout")
        assert server.num_left == 0


async def test_an_upload_of_a_server_that_ends_is_given_up(server: Server) -> None:
    came = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield FILE_PART + b"x"
        came.set()
        await asyncio.Event().wait()

    uploading = asyncio.ensure_future(server.upload(slow()))
    await came.wait()
    server.generation.admission.close()
    status, answer = await uploading
    assert (status, answer["error"]["code"]) == (503, "shutting_down")
    assert server.num_left == 0


@pytest.mark.parametrize(
    ("keys", "bound", "code"),
    [("", "MAX_UPLOADS", "queue_full"), ("a,b", "MAX_UPLOADS_OF_KEY", "queue_share_full")],
)
async def test_more_uploads_at_once_than_may_be_are_told_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: str, bound: str, code: str
) -> None:
    monkeypatch.setattr(files, bound, 1)
    come, go = asyncio.Event(), asyncio.Event()
    small = FILE_PART + b"x" + PURPOSE + END
    own, others = {"Authorization": "Bearer a"}, {"Authorization": "Bearer b"}

    async def slow() -> AsyncIterator[bytes]:
        yield FILE_PART + b"x"
        come.set()
        await go.wait()
        yield PURPOSE + END

    server = Server(tmp_path, BatchLimits(), keys=keys)
    async with server.app.router.lifespan_context(server.app):
        first = asyncio.ensure_future(server.upload(slow(), **own))
        await come.wait()
        status, answer = await server.upload(small, **own)
        assert (status, answer["error"]["code"]) == (429, code)
        assert (await server.upload(small, **others))[0] == (200 if keys else 429)
        go.set()
        assert (await first)[0] == 200


async def test_a_large_upload_is_never_in_memory(tmp_path: Path) -> None:
    server = Server(tmp_path, BatchLimits())
    size = 64 * 2**20
    piece = b"y" * 2**16

    async def large() -> AsyncIterator[bytes]:
        yield FILE_PART
        for _ in range(size // len(piece)):
            yield piece
        yield PURPOSE + END

    async with server.app.router.lifespan_context(server.app):
        tracemalloc.start()
        try:
            status, file = await server.upload(large())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (status, file["bytes"]) == (200, size)
    assert peak < 8 * 2**20


async def test_random_forms_are_answered_and_leave_only_whole_files(server: Server) -> None:
    chance = random.Random(7)
    whole = FILE_PART + b"content" + PURPOSE + END
    for _ in range(300):
        body = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(body))
            change = chance.choice(["cut", "byte", "double", "line"])
            if change == "cut":
                del body[place : place + chance.randint(1, 20)]
            elif change == "byte":
                body[place] = chance.randrange(256)
            elif change == "double":
                body[place:place] = body[place : place + 30]
            else:
                body[place:place] = b"\r\n--x"
        status, _ = await server.upload(pieces(bytes(body), chance.randint(1, 60))())
        assert status in (200, 400, 413)
        stored, _ = server.store.files.list(ANYBODY, Page(10))
        assert server.num_left == len(stored)
        for file in stored:
            server.store.files.delete(ANYBODY, file.id)
