"""transformers: `generate` on one batch with Accelerate's placement, or its continuous batching."""

from typing import Any

from protocol import Answers, Clock, Prompts, parser, serve


def load_model(model: str, threads: int) -> Any:
    """A bf16 model with SDPA attention that never stops at an end-of-sequence token."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": "cpu"}
    ).eval()
    loaded.generation_config.eos_token_id = None
    loaded.generation_config.pad_token_id = 0
    return loaded


class Generate:
    """All prompts in one batch; they are of one length, so nothing is padded."""

    def __init__(self, model: str, threads: int) -> None:
        self.model = load_model(model, threads)
        self.settings: dict[str, Any] = {"attn_implementation": "sdpa", "device_map": "cpu"}

    def prepare(self, prompts: Prompts, new_tokens: int) -> None:
        """Nothing depends on the lengths."""

    def generate(self, prompts: Prompts, new_tokens: int) -> Answers:
        """One call of `generate`."""
        import torch

        clock = Clock()

        def after_each_token(ids: Any, scores: Any, **_: Any) -> Any:
            clock.first_token()
            return torch.zeros(len(ids), dtype=torch.bool)

        ids = torch.tensor(prompts)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            stopping_criteria=[after_each_token],
        )
        return Answers(output[:, ids.shape[1] :].tolist(), clock.last_first_token)


class ContinuousBatching:
    """`generate_batch`: paged attention through SDPA."""

    def __init__(self, model: str, threads: int) -> None:
        self.model = load_model(model, threads)
        self.settings = {"attn_implementation": "sdpa", "allow_block_sharing": False}

    def prepare(self, prompts: Prompts, new_tokens: int) -> None:
        """Nothing depends on the lengths."""

    def generate(self, prompts: Prompts, new_tokens: int) -> Answers:
        """One call of `generate_batch`."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        clock = Clock()
        results = self.model.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False),
            record_timestamps=True,
        )
        outputs = list(results.values())
        firsts = [output.timestamps[0] for output in outputs]
        return Answers(
            [list(output.generated_tokens) for output in outputs], max(firsts) - clock.start
        )


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--continuous", action="store_true", help="continuous batching")
    given = options.parse_args()
    kind = ContinuousBatching if given.continuous else Generate
    serve(lambda: kind(given.model, given.threads), ["transformers", "accelerate", "torch"])
