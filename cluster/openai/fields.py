"""Fields that change nothing: taken where they ask for nothing, refused with the reason otherwise.

Clients of OpenAI and vLLM send many fields at their defaults. A value that would have to change the
answer is an error, so that nothing is dropped silently.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import core_schema

_FORMER_TOOLS = "write tools and tool_choice, OpenAI's later form"
MAX_DEPTH = 16
MAX_MEMBERS = 1024
_NO_BEAMS = "there is no beam search here"
_TEXT_ONLY = "models here read and write text alone"
_NO_STORE = "no answers are stored here"
EMPTY: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True)
class Only:
    """An annotation of a field that has no effect: it may be null or empty, or one of `values`.

    Anything else is an error that says why.
    """

    values: tuple[Any, ...]
    why: str

    def check(self, value: Any) -> Any:
        """The value; raises a `ValueError` if it asks for something."""
        if value in EMPTY or any(_is_same(value, other) for other in self.values):
            return value
        shown = json.dumps(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        instead = ["leave it out", *(f"send {json.dumps(v)}" for v in self.values)]
        raise ValueError(f"{shown} is not supported: {self.why}; {' or '.join(instead)}")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """Check after the field's own type."""
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> Any:
        """The values, and why there are no others."""
        return {"enum": [*EMPTY, *self.values], "description": f"Without effect: {self.why}."}


def only(*values: Any, why: str) -> Only:
    """See `Only`."""
    return Only(values, why)


def _is_same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _check_small(value: Any) -> Any:
    """Bound what is not read: members at any depth, and the depth."""
    waiting, count = [(value, 1)], 0
    while waiting:
        item, depth = waiting.pop()
        members = item.values() if isinstance(item, dict) else item
        if not isinstance(item, dict | list):
            continue
        count += len(item)
        if depth > MAX_DEPTH or count > MAX_MEMBERS:
            raise ValueError(
                f"may have at most {MAX_MEMBERS} members, at most {MAX_DEPTH} levels deep"
            )
        waiting += [(member, depth + 1) for member in members]
    return value


SmallObject = Annotated[dict[str, Any], AfterValidator(_check_small)]


class StreamOptions(BaseModel):
    """Settings of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, only(False, why="streams are not padded here")] = None


class IdleFields(BaseModel):
    """What completions and chats may say without an effect."""

    # For the client's own book-keeping.
    user: str | None = None
    metadata: SmallObject | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: SmallObject | None = None
    session_id: str | None = None

    # OpenAI's.
    store: Annotated[Any, only(False, why=_NO_STORE)] = None
    moderation: Annotated[Any, only(why="nothing is moderated here")] = None

    # vLLM's.
    use_beam_search: Annotated[Any, only(False, why=_NO_BEAMS)] = None
    length_penalty: Annotated[Any, only(1.0, why=_NO_BEAMS)] = None
    early_stopping: Annotated[Any, only(False, why=_NO_BEAMS)] = None
    spaces_between_special_tokens: bool | None = None  # only tokenizers in Python heed it
    detokenize: Annotated[Any, only(True, why="answers are text")] = None
    logits_processors: Annotated[Any, only(why="clients bring no code")] = None
    kv_transfer_params: Annotated[Any, only(why="keys and values stay in their engine")] = None
    request_id: Annotated[Any, only(why="answers get their id here")] = None
    ec_transfer_params: Annotated[Any, only(why=_TEXT_ONLY)] = None
    logprob_token_ids: Annotated[Any, only(why="the best tokens are shown; set logprobs")] = None
    repetition_detection: Annotated[Any, only(why="set repetition_penalty")] = None
    return_token_offsets: Annotated[Any, only(False, why="set logprobs, for text_offset")] = None
    stream_interval: Annotated[Any, only(1, why="tokens are sent as they come")] = None
    thinking_token_budget: Annotated[Any, only(-1, why="thoughts are not bounded apart")] = None
    watermarking: Annotated[Any, only(False, why="answers carry no mark")] = None
    vllm_xargs: Annotated[Any, only(why="there are no further arguments")] = None


class IdleChatFields(BaseModel):
    """What chats may say without an effect."""

    # OpenAI's.
    functions: Annotated[Any, only(why=_FORMER_TOOLS)] = None
    function_call: Annotated[Any, only("none", "auto", why=_FORMER_TOOLS)] = None
    verbosity: Annotated[Any, only("medium", why="say it in a message")] = None
    modalities: Annotated[Any, only(["text"], why=_TEXT_ONLY)] = None
    audio: Annotated[Any, only(why=_TEXT_ONLY)] = None
    prediction: Annotated[Any, only(why="there is no speculative decoding here")] = None
    web_search_options: Annotated[Any, only(why="nothing is looked up here")] = None

    # vLLM's.
    echo: Annotated[Any, only(False, why="answers do not repeat their prompt")] = None
    documents: Annotated[Any, only(why="put them into a message")] = None
    mm_processor_kwargs: Annotated[Any, only(why=_TEXT_ONLY)] = None
    media_io_kwargs: Annotated[Any, only(why=_TEXT_ONLY)] = None
    return_prompt_text: Annotated[Any, only(False, why="set return_token_ids")] = None


class IdleCompletionFields(BaseModel):
    """What completions may say without an effect."""

    suffix: Annotated[Any, only(why="models here do not fill in the middle")] = None
    prompt_embeds: Annotated[Any, only(why="prompts are texts or token ids")] = None
