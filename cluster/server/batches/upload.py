"""An upload as clients send it, `multipart/form-data`, read piece by piece into the store.

Neither its file nor its fields are ever in memory as a whole: the file goes to the disk as it
comes, and fields have bounds.
"""

import logging
import sys
from collections.abc import Callable, Mapping

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from saqqara.cluster.batch_store.files import Upload
from saqqara.cluster.batch_store.records import StoreLimitError
from saqqara.cluster.openai.errors import ApiError

# It warns of each form that is none, of which anybody can send as many as they like.
logging.getLogger("python_multipart").setLevel(logging.ERROR)

FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
FILE = "file"
MAX_FIELD_BYTES = 1024
MAX_NAME_CHARS = 512
MAX_LENGTH_DIGITS = 18
FORM_BYTES = 64 * 1024
"""What the form may take beside its file."""


def boundary_of(request: Request) -> bytes:
    """What is between the parts of a form.

    Raises:
        ApiError: (415) the body is none.
    """
    given = request.headers.get("content-type", "")
    kind, options = parse_options_header(given.encode("latin-1"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not boundary or len(boundary) > 256:
        said = f"not {given!r:.100}" if given else "which is missing"
        message = f"an upload must have `Content-Type: multipart/form-data; boundary=...`, {said}"
        raise ApiError(415, message, None, "unsupported_media_type")
    return boundary


def declared_length(request: Request) -> int | None:
    """The bytes that a body says it has; None where it does not say."""
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        return None
    return int(length) if len(length) <= MAX_LENGTH_DIGITS else sys.maxsize


def check_length(request: Request, max_file_bytes: int) -> None:
    """Raise an `ApiError` (413) if the body says that its file is larger than it may be."""
    if (declared_length(request) or 0) > max_file_bytes + FORM_BYTES:
        message = f"file: it may have at most {max_file_bytes} bytes (batches.max_file_bytes)"
        raise ApiError(413, message, FILE, "request_too_large")


class FormReader:
    """Takes the bytes of a form.

    Args:
        boundary: what is between its parts.
        upload: where the file goes.

    Attributes:
        fields: the other parts, by name.
        filename: what the client calls the file; None: there was none yet.
    """

    def __init__(self, boundary: bytes, upload: Upload) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._upload = upload
        self._is_complete = False
        self._header = (bytearray(), bytearray())  # the name and value that are being read
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self._value = bytearray()
        self._num_bytes = 0
        callbacks: Mapping[str, Callable[..., None]] = {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._add_to_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_to_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": lambda data, start, end: self._take(data[start:end]),
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        except MultipartParseError as error:
            raise _bad_form(str(error)) from None

    def write(self, data: bytes) -> None:
        """Take the next bytes.

        Raises:
            ApiError: they are no form, or not that of an upload.
            StoreBusyError: the disk does not take them.
        """
        self._num_bytes += len(data)
        if self._num_bytes - self._upload.num_bytes > FORM_BYTES + len(data):
            raise _bad_form(f"its fields may have {FORM_BYTES} bytes in all")
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise _bad_form(str(error)) from None
        except StoreLimitError as error:
            raise ApiError(413, str(error), FILE, "request_too_large") from None

    def finish(self) -> None:
        """Check that all has come.

        Raises:
            ApiError: the form has no end, or has no file or purpose.
        """
        if not self._is_complete:
            raise _bad_form("it ends before its last boundary")
        if self.filename is None:
            raise ApiError(400, "file is required", FILE, "missing_required_parameter")
        if "purpose" not in self.fields:
            raise ApiError(400, "purpose is required", "purpose", "missing_required_parameter")

    def _begin_part(self) -> None:
        self._headers = {}

    def _add_to_header(self, which: int, data: bytes) -> None:
        self._header[which].extend(data)  # the parser bounds how long and how many they are

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _end_headers(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if kind != b"form-data" or b"name" not in options:
            raise _bad_form("a part has no `Content-Disposition: form-data; name=...`")
        self._name = options[b"name"].decode(errors="replace")
        self._value = bytearray()
        if self._name in self.fields or (self._name == FILE and self.filename is not None):
            raise ApiError(400, f"{self._name} is there twice", self._name, "invalid_value")
        if self._name == FILE:
            filename = options.get(b"filename", b"").decode(errors="replace")
            if not 0 < len(filename) <= MAX_NAME_CHARS:
                message = f"file needs a filename of 1 to {MAX_NAME_CHARS} characters"
                raise ApiError(400, message, FILE, "invalid_value")
            self.filename = filename
        elif self._name not in FIELDS:
            raise ApiError.unknown(self._name, (FILE, *FIELDS))

    def _take(self, data: bytes) -> None:
        if self._name == FILE:
            self._upload.write(data)
            return
        self._value += data
        if len(self._value) > MAX_FIELD_BYTES:
            message = f"{self._name} may have at most {MAX_FIELD_BYTES} bytes"
            raise ApiError(400, message, self._name, "invalid_value")

    def _end_part(self) -> None:
        if self._name != FILE:
            self.fields[self._name] = self._value.decode(errors="replace")

    def _end(self) -> None:
        self._is_complete = True


def _bad_form(why: str) -> ApiError:
    return ApiError(400, f"the body is no form: {why}", None, "invalid_value")
