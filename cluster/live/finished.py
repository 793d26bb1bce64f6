"""A request that has ended, as its engine measures it."""

from dataclasses import dataclass

from saqqara.cluster.outcome import FinishReason


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """What became of a request, and when. Times are in seconds, from any fixed point.

    Attributes:
        reason: why it ended, as a whole.
        prompt_tokens: length of its prompt.
        generation_tokens: of each of its choices; empty for a request that scores.
        max_tokens: most that a choice might have had; None: nothing was to be generated.
        arrival: when it came in.
        scheduled: when its first sequence took a slot; None: none did.
        first_token, last_token: None: there was none.
        finished: when it ended.
    """

    reason: FinishReason
    prompt_tokens: int
    generation_tokens: tuple[int, ...]
    max_tokens: int | None
    arrival: float
    scheduled: float | None
    first_token: float | None
    last_token: float | None
    finished: float

    def seconds(self) -> dict[str, float]:
        """Its times by the name of their metric; what it did not come to is left out."""
        found = {"vllm:e2e_request_latency_seconds": self.finished - self.arrival}
        if self.scheduled is None:
            return found
        found["vllm:request_queue_time_seconds"] = self.scheduled - self.arrival
        if self.first_token is None or self.last_token is None:
            return found
        found["vllm:request_prefill_time_seconds"] = self.first_token - self.scheduled
        found["vllm:request_decode_time_seconds"] = self.last_token - self.first_token
        found["vllm:request_inference_time_seconds"] = self.last_token - self.scheduled
        if (later := max(self.generation_tokens, default=0) - 1) > 0:
            each = (self.last_token - self.first_token) / later
            found["vllm:request_time_per_output_token_seconds"] = each
        return found

    def sizes(self) -> dict[str, int]:
        """Its numbers of tokens, and what it asked for, by the name of their metric."""
        found = {"vllm:request_prompt_tokens": self.prompt_tokens}
        if self.max_tokens is not None:
            found["vllm:request_generation_tokens"] = sum(self.generation_tokens)
            found["vllm:request_max_num_generation_tokens"] = max(self.generation_tokens)
            found["vllm:request_params_n"] = len(self.generation_tokens)
            found["vllm:request_params_max_tokens"] = self.max_tokens
        return found
