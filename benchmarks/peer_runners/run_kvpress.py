"""kvpress: PyramidKV as its pipeline applies it, one prompt at a time."""

from typing import Any

from protocol import Answers, Clock, Prompts, parser, serve


class KvPress:
    """Prefill under the press, then greedy decoding on the compressed cache."""

    def __init__(self, model: str, threads: int, kept_share: float) -> None:
        import torch
        from kvpress import PyramidKVPress
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.press = PyramidKVPress(compression_ratio=1 - kept_share)
        self.settings = {"press": "PyramidKVPress", "compression_ratio": 1 - kept_share}

    def prepare(self, prompts: Prompts, new_tokens: int) -> None:
        """Nothing depends on the lengths."""

    def generate(self, prompts: Prompts, new_tokens: int) -> Answers:
        """One prompt after the other; prefill seconds are the sum over the prompts."""
        answers, prefill_seconds = [], 0.0
        for prompt in prompts:
            answer, seconds = self.generate_one(list(prompt), new_tokens)
            answers.append(answer)
            prefill_seconds += seconds
        return Answers(answers, prefill_seconds)

    def generate_one(self, prompt: list[int], new_tokens: int) -> tuple[list[int], float]:
        """Answer of one prompt and the seconds until its first token."""
        import torch
        from transformers import DynamicCache

        with torch.inference_mode():
            clock = Clock()
            cache: Any = DynamicCache()
            with self.press(self.model):
                output = self.model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
            token = output.logits[0, -1].argmax()
            answer = [int(token)]
            clock.first_token()
            for position in range(len(prompt), len(prompt) + new_tokens - 1):
                output = self.model(
                    token.view(1, 1),
                    past_key_values=cache,
                    position_ids=torch.tensor([[position]]),
                )
                token = output.logits[0, -1].argmax()
                answer.append(int(token))
        return answer, clock.last_first_token


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--kept-share", type=float, default=0.25, help="of the prompt's tokens")
    given = options.parse_args()
    serve(
        lambda: KvPress(given.model, given.threads, given.kept_share),
        ["kvpress", "transformers", "torch"],
    )
