"""What an answer shows of what was computed for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from saqqara.cluster.request import CompletionOutput


@dataclass(frozen=True, slots=True)
class Shown:
    """What a client has asked to see.

    Attributes:
        num_choices: of each prompt; if more were computed, the most likely ones.
        num_logprobs: best tokens beside the sampled one; None: no log-probabilities.
        num_prompt_logprobs: the same of the prompt, in vLLM's form.
        echo: the text begins with the prompt, and its log-probabilities with the prompt's.
        answer: whether the answer is wanted at all; without it one token was computed.
        token_ids: the answer's tokens have their ids, too.
        prompt_token_ids: the prompt's ids are shown.
        tokens_as_ids: log-probabilities name tokens by their ids, as `token_id:123`.
    """

    num_choices: int = 1
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    echo: bool = False
    answer: bool = True
    token_ids: bool = False
    prompt_token_ids: bool = False
    tokens_as_ids: bool = False

    def choices(self, computed: Sequence[CompletionOutput]) -> list[CompletionOutput]:
        """The choices that are shown, in their order, of those that were computed."""
        if len(computed) > self.num_choices:
            ranked = sorted(computed, key=lambda choice: -(choice.cumulative_logprob or 0.0))
            best = enumerate(ranked[: self.num_choices])
            computed = [replace(choice, index=index) for index, choice in best]
        return [self.choice(choice) for choice in computed]

    def choice(self, computed: CompletionOutput) -> CompletionOutput:
        """A choice as it is shown."""
        if self.answer:
            return computed
        finish_reason = computed.finish_reason and "length"
        return CompletionOutput(computed.index, "", (), logprobs=(), finish_reason=finish_reason)


ANSWER_ONLY = Shown()
