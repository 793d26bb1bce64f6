"""DeepSpeed: `init_inference` around the transformers model, then `generate` on one batch."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # read when it is imported

from protocol import parser, serve
from run_transformers import Generate


class DeepSpeed(Generate):
    """Its inference engine in bf16, one rank; all prompts in one batch as with transformers.

    `init_inference` casts buffers to bf16, too; the frequencies of the rotary embedding, which all
    others keep in fp32, are put back, or answers would part for that reason alone.
    """

    def __init__(self, model: str, threads: int, kernel_inject: bool) -> None:
        import deepspeed
        import torch

        super().__init__(model, threads)
        buffers = dict(self.model.named_buffers())
        self.model = deepspeed.init_inference(
            self.model, dtype=torch.bfloat16, replace_with_kernel_inject=kernel_inject
        )
        for name, buffer in buffers.items():
            owner, _, attribute = name.rpartition(".")
            setattr(self.model.module.get_submodule(owner), attribute, buffer)
        self.settings = {"attn_implementation": "sdpa", "replace_with_kernel_inject": kernel_inject}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--kernel-inject", choices=("yes", "no"), default="no")
    given = options.parse_args()
    serve(
        lambda: DeepSpeed(given.model, given.threads, given.kernel_inject == "yes"),
        ["deepspeed", "transformers", "torch"],
    )
