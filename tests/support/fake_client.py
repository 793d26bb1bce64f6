"""An engine client without an engine: answers are a function of the prompt, in any order."""

from collections.abc import Iterable, Sequence

from saqqara.cluster.engine.client import EngineDescription, Rejection
from saqqara.cluster.engine.report import BatchRows, EngineReport, Latency
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.request import (
    CompletionOutput,
    Logprob,
    Prompt,
    Request,
    RequestMetrics,
    RequestOutput,
    ScoreOutput,
)
from saqqara.configs.schema import EngineConfig


def prompt_tokens(request: Request) -> tuple[int, ...]:
    """One token per character, or the token ids that were given."""
    if request.messages is not None:
        return tuple(map(ord, "".join(str(m["content"]) for m in request.messages)))
    assert request.prompt is not None
    return _tokens(request.prompt)


def _tokens(prompt: Prompt) -> tuple[int, ...]:
    return tuple(map(ord, prompt)) if isinstance(prompt, str) else tuple(prompt)


def answer_tokens(request: Request) -> tuple[int, ...]:
    """The answer: the prompt backwards, cut to `max_tokens`."""
    return prompt_tokens(request)[::-1][: request.sampling_params.max_tokens]


class FakeClient:
    """Answers up to `per_poll` requests at a time, the newest first.

    Args:
        config: only passed on by `describe`.
        max_prompt_tokens: longer prompts are rejected.
        die_after: raise `EngineDeadError` once this many requests are answered.
        fail: prompts (text) whose requests end with an error.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        max_prompt_tokens: int = 1000,
        per_poll: int = 3,
        die_after: int | None = None,
        fail: Iterable[str] = (),
    ) -> None:
        self.config = config or EngineConfig(model="fake")
        self.max_prompt_tokens = max_prompt_tokens
        self.per_poll = per_poll
        self.die_after = die_after
        self.fail = set(fail)
        self.waiting: list[Request] = []
        self.submitted: list[Request] = []
        self.aborted: list[str] = []
        self.max_waiting = 0
        self.answered = 0
        self.noted: list[BatchRows] = []
        self.closed = False

    def submit(self, requests: Sequence[Request]) -> list[Rejection]:
        rejections = []
        for request in requests:
            self.submitted.append(request)
            num_tokens = len(prompt_tokens(request))
            if num_tokens > self.max_prompt_tokens:
                message = f"prompt has {num_tokens} tokens; at most {self.max_prompt_tokens} fit"
                rejections.append(Rejection(request.request_id, message))
            else:
                self.waiting.append(request)
        self.max_waiting = max(self.max_waiting, len(self.waiting))
        return rejections

    def poll(self, timeout_seconds: float = 0.0) -> list[RequestOutput | ScoreOutput]:
        if self.die_after is not None and self.answered >= self.die_after:
            raise EngineDeadError("rank 1 died; its log: /nowhere/rank-1.log")
        outputs = []
        for _ in range(min(self.per_poll, len(self.waiting))):
            outputs.append(self._output(self.waiting.pop()))
            self.answered += 1
        return outputs

    def abort(self, request_ids: Iterable[str]) -> None:
        ids = set(request_ids)
        self.aborted += sorted(ids)
        self.waiting = [request for request in self.waiting if request.request_id not in ids]

    def report(self) -> EngineReport:
        latency = Latency(count=1, mean=0.5, p50=0.5, p99=0.75)
        return EngineReport(
            model="fake",
            retention="full",
            requests={"length": self.answered},
            prompt_tokens=100,
            generation_tokens=10,
            scored_tokens=0,
            num_steps=7,
            num_preemptions=0,
            num_running_peak=2,
            wall_seconds=2.0,
            prefill_seconds=1.0,
            decode_seconds=1.0,
            phase_seconds={},
            prompt_tokens_per_second=50.0,
            generation_tokens_per_second=5.0,
            time_to_first_token=latency,
            inter_token_latency=latency,
            e2e_latency=latency,
            kv_kept_bytes_peak=2**20,
            kv_full_bytes_peak=2**22,
            kv_ring_bytes_peak=0,
            kept_tokens_by_layer=(10, 5),
            dropped_tokens_by_layer=(0, 5),
            pages_leaked=0,
            prefill_kv_bytes_peak=0,
            prefill_activation_bytes_peak=0,
            resident_bytes_peak=0,
            workers=(),
        )

    def reset_stats(self) -> None:
        return None

    def note_rows(self, rows: BatchRows) -> None:
        self.noted.append(rows)

    def end_conversation(self, conversation_id: str, owner: str = "") -> bool:
        before = len(self.submitted)
        self.submitted = [r for r in self.submitted if r.conversation_id != conversation_id]
        return len(self.submitted) < before

    def reset_prefix_cache(self) -> bool:
        return not self.submitted

    def metrics_address(self) -> str | None:
        return None

    def describe(self) -> EngineDescription:
        return EngineDescription(self.config, (), None, None, 0.0)

    def shutdown(self) -> None:
        self.closed = True

    def _output(self, request: Request) -> RequestOutput | ScoreOutput:
        metrics = RequestMetrics(arrival_time=1.0, first_token_time=2.0, finished_time=3.0)
        tokens = prompt_tokens(request)
        text_prompt = request.prompt if isinstance(request.prompt, str) else None
        if request.score_continuation is not None:
            ids = _tokens(request.score_continuation)
            return ScoreOutput(
                request_id=request.request_id,
                prompt=text_prompt,
                prompt_token_ids=tokens,
                token_ids=ids,
                logprobs=tuple(-float(i) for i in ids),
                ranks=tuple(1 for _ in ids),
                metrics=metrics,
            )
        answer = answer_tokens(request)
        text = "".join(map(chr, answer))
        failed = text_prompt in self.fail
        logprobs = None
        if request.sampling_params.logprobs is not None:
            logprobs = tuple({token: Logprob(-0.5, 1, chr(token))} for token in answer)
        choice = CompletionOutput(
            index=0,
            text=text,
            token_ids=answer,
            logprobs=logprobs,
            finish_reason="error" if failed else "length",
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=text_prompt,
            prompt_token_ids=tokens,
            outputs=(choice,) * request.sampling_params.n,
            finished=True,
            metrics=metrics,
            error="its pages do not fit" if failed else None,
        )
