"""A tiny Llama without weights whose tokens are bytes; `load_format="dummy"` fills it."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_tiny_llama(
    folder: Path, max_position: int = 512, chat_template: str = CHAT_TEMPLATE, **sizes: Any
) -> None:
    """Write the config of a four-layer Llama (or of other sizes) and a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", chat_template=chat_template
    ).save_pretrained(folder)
    usual = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    LlamaConfig(
        **(usual | sizes),
        vocab_size=len(vocab),
        max_position_embeddings=max_position,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
