"""Greedy parity with transformers, as the project defines it.

In fp32: identical tokens, except where the reference's two best logits differ by less than
`TIE_LOGITS`; there ours must be one of the two, and the comparison goes on along our tokens. Such
ties may be at most 1 in `TOKENS_PER_TIE` tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TIE_LOGITS = 1e-3
TOKENS_PER_TIE = 512


@dataclass(frozen=True)
class Reference:
    """Greedy continuations of `prompts` by transformers, and the model that wrote them."""

    model: Any
    prompts: list[list[int]]
    outputs: list[list[int]]


def english_prompts(tokenizer: Any, lengths: list[int]) -> list[list[int]]:
    """One prompt per length: real English at fixed, distinct offsets."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    prompts = []
    for number, length in enumerate(lengths):
        piece = text[number * 60_000 : number * 60_000 + 12 * length]
        prompts.append(tokenizer.encode(piece)[:length])
        assert len(prompts[-1]) == length
    return prompts


@torch.inference_mode()
def generate(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens after a prompt, never stopping early."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return list(output[0, len(prompt) :].tolist())


@torch.inference_mode()
def following_logits(model: Any, tokens: list[int], last: int) -> torch.Tensor:
    """Logits, fp32 [last, V], that follow each of the last `last` of `tokens`."""
    logits = model(torch.tensor([tokens]), logits_to_keep=last).logits[0]
    return torch.as_tensor(logits).float()


def make_reference(model: Any, prompts: list[list[int]], num_tokens: int) -> Reference:
    """Generate greedily with transformers, one prompt at a time."""
    return Reference(model, prompts, [generate(model, p, num_tokens) for p in prompts])


def reference_of(folder: Path, lengths: list[int], num_tokens: int) -> Reference:
    """What the model of a folder writes in fp32 after real English of these lengths."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = english_prompts(AutoTokenizer.from_pretrained(folder), lengths)
    return make_reference(model, prompts, num_tokens)


class Judge:
    """Says whether tokens are what transformers would write, by its logits along them.

    A text is passed through the model once, whole, however many tests ask about it.

    Args:
        folder: of the model, which is loaded in fp32.
        lengths: of the prompts, in tokens of real English.
    """

    def __init__(self, folder: Path, lengths: list[int]) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.prompts = english_prompts(AutoTokenizer.from_pretrained(folder), lengths)
        self._known: dict[tuple[int, ...], torch.Tensor] = {}  # logits by text

    def logits(self, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        """Logits, fp32 [len(tokens), V], of which each of `tokens` is drawn after those before."""
        text = (*prompt, *tokens)
        for known, logits in self._known.items():
            if known[: len(text)] == text:
                begin = len(known) - len(logits)
                if begin <= len(prompt):
                    return logits[len(prompt) - begin : len(text) - begin]
        logits = following_logits(self._model, list(text[:-1]), len(tokens))
        self._known[text] = logits
        return logits

    def assert_greedy(
        self, prompts: list[list[int]], ours: list[list[int]], num_tokens: int
    ) -> None:
        """Check continuations of so many tokens, each token along our own ones."""
        ties = 0
        for prompt, tokens in zip(prompts, ours, strict=True):
            assert len(tokens) == num_tokens
            best = self.logits(prompt, tokens).topk(2)
            for at, token in enumerate(tokens):
                first, second = best.indices[at].tolist()
                if token != first:
                    gap = float(best.values[at, 0] - best.values[at, 1])
                    assert gap < TIE_LOGITS, f"token {at}: {token} for {first}, gap {gap:.2e}"
                    assert token == second
                    ties += 1
        total = num_tokens * len(ours)
        allowed = -(-total // TOKENS_PER_TIE)
        assert ties <= allowed, f"{ties} ties in {total} tokens"

    def assert_logprobs(self, prompt: list[int], tokens: list[int], logprobs: list[float]) -> None:
        """Check the scores of a continuation."""
        expected = self.logits(prompt, tokens).log_softmax(-1)
        expected = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-3, rtol=0)


def token_ids(outputs: list[Any]) -> list[list[int]]:
    """The tokens of each request's first answer."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_greedy_parity(reference: Reference, ours: list[list[int]]) -> int:
    """Check every continuation; returns the number of ties."""
    ties = tokens = 0
    for prompt, wanted, tokens_got in zip(reference.prompts, reference.outputs, ours, strict=True):
        got, expected = list(tokens_got), list(wanted[: len(tokens_got)])
        tokens += len(got)
        while got != expected:
            at = next(i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
            best = following_logits(reference.model, prompt + got[:at], 1)[0].topk(2)
            gap = float(best.values[0] - best.values[1])
            assert gap < TIE_LOGITS, f"token {at}: {got[at]} for {expected[at]}, gap {gap:.2e}"
            assert got[at] in best.indices.tolist()
            ties += 1
            rest = len(got) - at - 1
            more = generate(reference.model, prompt + got[: at + 1], rest) if rest else []
            expected = got[: at + 1] + more
    allowed = -(-tokens // TOKENS_PER_TIE)
    assert ties <= allowed, f"{ties} ties in {tokens} tokens"
    return ties
