"""Saqqara as a model of lm-evaluation-harness (extra `lm-eval`).

Importing this module registers the model under the name `saqqara`:

    import lm_eval, saqqara.evaluation.lm_eval
    settings = "model=FOLDER,retention=pyramidkv,budget=25%"
    lm_eval.simple_evaluate("saqqara", settings, tasks=["piqa"])

Retention acts on the context of every request, as in `LLM.score` and `LLM.generate`. Short contexts
fit the budget and are kept whole, and so is the single token before a rolling window, so long
few-shot prompts and long documents are what shows a difference. Chat templates are not applied.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from saqqara import LLM, SamplingParams
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.settings import check_keys
from saqqara.workers.models.spec import load_spec

DEFAULT_MAX_TOKENS = 256
GENERATION_KEYS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "min_p")


@register_model("saqqara")
class SaqqaraLM(LM):  # type: ignore[misc]  # the harness has no types
    """An engine behind the harness's three questions.

    Args:
        model: folder or hub id.
        batch_size: of the harness; without effect, since the engine batches by itself.
        max_batch_size: as `batch_size`.
        settings: any other field of `EngineConfig`, such as `retention` and `budget`.

    Raises:
        ValueError: a setting is unknown or wrong.
    """

    def __init__(
        self,
        model: str,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.llm = LLM(model, **settings)
        config = self.llm.config
        self._tokenizer = Tokenizer.load(config.tokenizer or config.model)
        self.max_length = config.max_model_len or load_spec(config.model).max_position
        bos = self._tokenizer.bos_token_id
        self.prefix_token_id: int = self._tokenizer.eos_token_ids[0] if bos is None else bos

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each (context, continuation), and whether greedy would write it.

        A pair that is too long loses the beginning of its context.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        return self._score([self._fit(context, rest) for context, rest in pairs])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each whole text, in windows that predict every token once."""
        texts = [self._windows(self._tokenizer.encode(r.args[0], False)) for r in requests]
        scored = iter(self._score([window for windows in texts for window in windows]))
        return [sum(next(scored)[0] for _ in windows) for windows in texts]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continue each context up to one of its stop strings (`until`), greedily by default.

        Raises:
            ValueError: an unknown key in the generation settings.
        """
        sampling = [_sampling(request.args[1]) for request in requests]
        prompts = []
        for request, params in zip(requests, sampling, strict=True):
            room = self.max_length - (params.max_tokens or 0)
            if room < 1:
                raise ValueError(f"max_gen_toks: must be below the context of {self.max_length}")
            prompt = self._tokenizer.encode(request.args[0]) or [self.prefix_token_id]
            prompts.append(prompt[-room:])
        outputs = self.llm.generate(prompt_token_ids=prompts, sampling_params=sampling)
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
        return [output.outputs[0].text for output in outputs]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        if not pairs:
            return []
        outputs = self.llm.score([before for before, _ in pairs], [after for _, after in pairs])
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(output.error)
        return [(output.sum, output.is_greedy) for output in outputs]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; spaces between them belong to the continuation, as tokenizers see it."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        if not bare:
            return [self.prefix_token_id], self._tokenizer.encode(continuation, False)
        before = self._tokenizer.encode(bare)
        whole = self._tokenizer.encode(bare + continuation)
        # Where both share a token, it is the first to be scored.
        cut = min(len(before), len(whole) - 1)
        return whole[:cut] or [self.prefix_token_id], whole[cut:]

    def _fit(self, context: list[int], rest: list[int]) -> tuple[list[int], list[int]]:
        room = self.max_length - len(rest)
        if room < 1:
            raise ValueError(
                f"continuation: {len(rest)} tokens do not fit a context of {self.max_length}"
            )
        return context[-room:], rest

    def _windows(self, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        """Contexts and continuations that cover a text; the last context is as long as fits."""
        size = self.max_length - 1
        text = [self.prefix_token_id, *tokens]
        found = []
        for start in range(1, len(text), size):
            end = min(start + size, len(text))
            found.append((text[max(0, end - self.max_length) : start], text[start:end]))
        return found


def _sampling(given: Mapping[str, Any]) -> SamplingParams:
    """The harness's generation settings as ours."""
    check_keys(given, GENERATION_KEYS, "generation_kwargs")
    sample = bool(given.get("do_sample", False))
    until = given.get("until") or ()
    names = ("top_p", "top_k", "min_p") if sample else ()
    return SamplingParams(
        temperature=given.get("temperature", 1.0) if sample else 0.0,
        max_tokens=given.get("max_gen_toks", DEFAULT_MAX_TOKENS),
        stop=(until,) if isinstance(until, str) else tuple(until),
        **{name: given[name] for name in names if name in given},
    )
