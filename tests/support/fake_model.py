"""What an engine over a `FakeReplica` believes its model to be, and what that model says."""

from collections.abc import Mapping, Sequence
from typing import Any

from saqqara.cluster.sampling import SamplingParams
from saqqara.workers.models.reading.rope_spec import RopeSpec
from saqqara.workers.models.spec import ModelSpec

from .fake_replica import next_token

EOS = 3

SPEC = ModelSpec(
    family="llama",
    vocab_size=128,
    hidden_size=8,
    intermediate_size=8,
    num_layers=4,
    num_query_heads=2,
    num_kv_heads=2,
    head_dim=4,
    max_position=200,
    rms_norm_eps=1e-5,
    rope=RopeSpec(),
    eos_token_ids=(EOS,),
)


class Ascii:
    """A tokenizer backend in which a token is an ASCII character and 0 to 4 are special."""

    eos_token_id = EOS
    bos_token_id = 1
    all_special_ids = (0, 1, 2, 3, 4)
    added_tokens_decoder: Mapping[int, Any] = {}
    chat_template = "yes"

    def __len__(self) -> int:
        return 128

    def encode(self, text: str, add_special_tokens: bool, verbose: bool) -> list[int]:
        return [1] * add_special_tokens + [ord(c) for c in text]

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str:
        return "".join(chr(i) if i > 4 else f"<{i}>" for i in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return "".join(f"{m['role']}:{m['content']};" for m in messages)


def continue_text(prompt: str, num_tokens: int) -> tuple[str, list[int]]:
    """What the fake model says after a prompt, if nothing stops it."""
    tokens = [1, *map(ord, prompt)]
    start = len(tokens)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens))
    return "".join(chr(t) for t in tokens[start:] if t > 4), tokens[start:]


def greedy(**settings: Any) -> SamplingParams:
    return SamplingParams.model_validate({"ignore_eos": True} | settings)
