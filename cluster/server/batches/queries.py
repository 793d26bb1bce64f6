"""What a list is asked for in the query of its address."""

from collections.abc import Collection

from starlette.requests import Request

from saqqara.cluster.batch_store.records import Page
from saqqara.cluster.openai.errors import ApiError

MAX_ID_CHARS = 256


def read_query(request: Request, known: Collection[str]) -> dict[str, str]:
    """The parameters of a query.

    Raises:
        ApiError: there is another, or one twice.
    """
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise ApiError.unknown(name, known)
        if name in given:
            raise _wrong(name, f"{name} is there twice")
        if len(value) > MAX_ID_CHARS:
            raise _wrong(name, f"{name} may have at most {MAX_ID_CHARS} characters")
        given[name] = value
    return given


def read_page(given: dict[str, str], usual: int, most: int) -> Page:
    """Which part of a list is wanted.

    Raises:
        ApiError: `limit` or `order` is wrong.
    """
    limit = given.get("limit", str(usual))
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 9 and 1 <= int(limit) <= most):
        raise _wrong("limit", f"limit must be from 1 to {most}, not {limit!r:.80}")
    order = given.get("order", "desc")
    if order not in ("asc", "desc"):
        raise _wrong("order", f"order must be 'asc' or 'desc', not {order!r:.80}")
    return Page(int(limit), given.get("after"), order == "asc")


def _wrong(name: str, message: str) -> ApiError:
    return ApiError(400, message, name, "invalid_value")
