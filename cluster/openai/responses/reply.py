"""A response as clients get it: what is asked for, what came out, and what it took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saqqara.cluster.openai.replies import usage as chat_usage
from saqqara.cluster.openai.tools.reader import PLAIN, AnswerFormat
from saqqara.cluster.request import RequestOutput
from saqqara.cluster.sampling import SamplingParams

from .request import ResponseRequest

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """What every piece of one response says of it.

    Attributes:
        id: of the response.
        created: Unix time in seconds.
        model: that answers.
        request: what is asked for.
        sampling: how it is sampled, in effect.
        answers: how answers are read.
    """

    id: str
    created: int
    model: str
    request: ResponseRequest
    sampling: SamplingParams
    answers: AnswerFormat = PLAIN

    def json(self, output: Sequence[Json], status: str = "in_progress", **more: Any) -> Json:
        """A response with what came out so far; `more` are fields that it ends with."""
        asked = self.request
        text = asked.text.model_dump(exclude_none=True) if asked.text is not None else {}
        reasoning = asked.reasoning
        choice = asked.tool_choice
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "max_tool_calls": None,
            "metadata": asked.metadata or {},
            "model": self.model,
            "output": list(output),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "safety_identifier": asked.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": self.sampling.temperature,
            "text": {"format": {"type": "text"}, **text, "verbosity": "medium"},
            "tool_choice": (choice or "auto")
            if choice is None or isinstance(choice, str)
            else choice.model_dump(exclude_none=True),
            "tools": [_echoed(tool.shown) for tool in asked.tools or ()],
            "top_logprobs": self.sampling.logprobs or 0,
            "top_p": self.sampling.top_p,
            "truncation": asked.truncation or "disabled",
            "usage": None,
            "user": asked.user,
            **more,
        }

    def ended(
        self, output: Sequence[Json], engine_output: RequestOutput, num_thoughts: int
    ) -> Json:
        """The whole response; `engine_output` is the engine's last.

        `num_thoughts` are the tokens of its thoughts.
        """
        is_cut = engine_output.outputs[0].finish_reason == "length"
        details = {"reason": "max_output_tokens"} if is_cut else None
        return self.json(
            output,
            "incomplete" if is_cut else "completed",
            incomplete_details=details,
            usage=usage(engine_output, num_thoughts),
        )


def usage(output: RequestOutput, num_thoughts: int) -> Json:
    """Tokens of the input and of the answer, and how much of their KV was kept."""
    counted = chat_usage([output])
    kept = {"kv_cache": counted["kv_cache"]} if "kv_cache" in counted else {}
    return {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": {
            **counted["prompt_tokens_details"],
            "cache_write_tokens": output.num_stored_tokens,
        },
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": min(num_thoughts, counted["completion_tokens"])
        },
        "total_tokens": counted["total_tokens"],
        **kept,
    }


def _echoed(tool: Mapping[str, Any]) -> Json:
    """A tool as OpenAI shows it: all of its fields."""
    return {
        "type": "function",
        **tool,
        "parameters": tool["parameters"] or {},
        "strict": tool["strict"] is True,
    }
