"""From JSON to the models of requests, with errors that name the field."""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from saqqara.cluster.openai.errors import ApiError, a_type
from saqqara.configs.json_text import StrictJsonError, parse_json

Body = TypeVar("Body", bound=BaseModel)


def read_object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ApiError: it is none, has a key twice, or a number that is not finite; `what` says what
            was read.
    """
    try:
        data = parse_json(text)
    except StrictJsonError as error:
        raise ApiError(400, str(error), error.field or None, "invalid_value") from None
    except ValueError as error:
        half = (
            "; half of a surrogate pair (\\udXXX) is no text" if "hex escape" in str(error) else ""
        )
        message = f"{what} is not JSON: {error}{half}"
        raise ApiError(400, message, None, "invalid_value") from None
    if not isinstance(data, dict):
        message = f"{what} must be a JSON object, not {a_type(data)}"
        raise ApiError(400, message, None, "invalid_value")
    return data


def read_request(kind: type[Body], fields: Mapping[str, Any]) -> Body:
    """A request from its fields.

    Raises:
        ApiError: a field is unknown, missing or wrong; names it.
    """
    if len(fields) > len(kind.model_fields):  # pydantic would write an error for each of them
        unknown = next(name for name in fields if name not in kind.model_fields)
        raise ApiError.unknown(unknown, kind.model_fields)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise ApiError.of(error, known=kind.model_fields) from None


def check_model(model: str | None, names: Collection[str]) -> None:
    """Raise an `ApiError` (404) unless a request's model is the one that is here."""
    if model is not None and model not in names:
        known = " or ".join(repr(name) for name in names)
        raise ApiError(
            404,
            f"model {model!r:.200} does not exist here; there is {known}",
            "model",
            "model_not_found",
        )


def check_limit(name: str, value: float, limit: float, what: str = "") -> None:
    """Raise an `ApiError` if a field asks for more than a limit; `what` is what it counts."""
    if value > limit:
        message = f"{name} may be at most {limit:.10g}{what} here, not {value:.10g}"
        raise ApiError(400, message, name, "limit_exceeded")
