"""A tokenizer of Llama 2's kind, built from scratch."""

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from saqqara.cluster.engine.tokenizer import Tokenizer


def byte_fallback_tokenizer() -> Tokenizer:
    """A Llama-2 style tokenizer: `▁` for spaces, a leading space stripped, `<0x..>` bytes."""
    words = ["<unk>", "<s>", "</s>", "▁Hello", "▁world", "!", "▁", "é"]
    vocab = {word: i for i, word in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Prepend("▁")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", 1)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    )
