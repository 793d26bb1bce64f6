"""The content of a stored file as an answer, all of it or a part, never in memory as a whole."""

import asyncio
import os
import re
from typing import BinaryIO

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from saqqara.cluster.openai.errors import ApiError

_CHUNK_BYTES = 256 * 1024
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class FileContent(Response):
    """A file, or the bytes of it that a client asks for by `Range`; closed in any case.

    Args:
        file: open, at any place.
        wanted: the header `Range`; what is no single range of bytes stands for the whole.

    Raises:
        ApiError: (416) the file has no such bytes.
    """

    media_type = "application/octet-stream"

    def __init__(self, file: BinaryIO, wanted: str | None) -> None:
        self._file = file
        size = os.fstat(file.fileno()).st_size
        part = _range(wanted, size)
        self._start, self._stop = (0, size) if part is None else part
        self.status_code = 200 if part is None else 206
        self.background = None
        headers = {
            "content-length": str(self._stop - self._start),
            "accept-ranges": "bytes",
            "content-disposition": "attachment",
            "x-content-type-options": "nosniff",
        }
        if part is not None:
            headers["content-range"] = f"bytes {self._start}-{self._stop - 1}/{size}"
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; see ASGI."""
        head = {"status": self.status_code, "headers": self.raw_headers}
        try:
            await send({"type": "http.response.start", **head})
            start = self._start if scope["method"] != "HEAD" else self._stop
            while start < self._stop:
                count = min(_CHUNK_BYTES, self._stop - start)
                data = await asyncio.to_thread(os.pread, self._file.fileno(), count, start)
                start += len(data)
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._file.close()


def _range(wanted: str | None, size: int) -> tuple[int, int] | None:
    found = _RANGE.fullmatch(wanted or "")
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if first:
        start, stop = int(first), min(int(last) + 1 if last else size, size)
    else:  # so many at the end
        start, stop = max(size - int(last), 0), size
    if last and first and int(last) < int(first):
        return None
    if start >= size or start >= stop:
        headers = {"Content-Range": f"bytes */{size}"}
        message = f"the file has {size} bytes, none of which are {wanted!r:.80}"
        raise ApiError(416, message, None, "invalid_range", headers)
    return start, stop
