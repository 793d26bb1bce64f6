"""What kvpress would keep: one forward pass, its presses asked about every layer, nothing dropped.

Runs under the Python of kvpress's environment and imports nothing of Saqqara. Each layer's rotated
keys and last queries go to a safetensors file, with the positions that each press keeps of them and
its scores; `kvpress_agreement.py` selects from the same tensors.

Names in the file, for layer 3: `3.keys` [n, H, D], `3.queries` [w, Hq, D] (both fp32),
`3.PRESS.scores` [H, n] fp32, `3.PRESS.SHARE` [H, kept] int32, ascending.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from kvpress import KnormPress, PyramidKVPress, SnapKVPress, TOVAPress
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def make_random(given: argparse.Namespace) -> Any:
    """A Llama of random weights, large enough that attention is far from uniform."""
    torch.manual_seed(given.seed)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=16 * given.query_heads,
        intermediate_size=64,
        num_hidden_layers=given.layers,
        num_attention_heads=given.query_heads,
        num_key_value_heads=given.kv_heads,
        max_position_embeddings=4096,
        initializer_range=0.2,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def presses(given: argparse.Namespace, share: float) -> dict[str, Any]:
    """The presses by name, set to keep that share of the prompt."""
    ratio = {"compression_ratio": 1 - share}
    window = {"window_size": given.window, "kernel_size": given.kernel, **ratio}
    return {
        "snapkv": SnapKVPress(**window),
        "pyramidkv": PyramidKVPress(**window, beta=given.beta),
        "tova": TOVAPress(**ratio),
        "knorm": KnormPress(**ratio),
    }


def ask(
    given: argparse.Namespace, module: Any, hidden: Any, keys: Any, kwargs: Any
) -> dict[str, Any]:
    """Keys, queries, scores and kept positions of one layer."""
    layer, dim = module.layer_idx, module.head_dim
    last = hidden[:, -given.window :]
    queries = module.q_proj(last).view(1, given.window, -1, dim).transpose(1, 2)
    cos, sin = (x[:, -given.window :] for x in kwargs["position_embeddings"])
    queries, _ = apply_rotary_pos_emb(queries, queries, cos, sin)
    found = {
        f"{layer}.keys": keys[0].transpose(0, 1).contiguous(),
        f"{layer}.queries": queries[0].transpose(0, 1).contiguous(),
    }
    # A press returns the values that it keeps: values that say where they stand tell what it kept.
    places = torch.arange(keys.shape[2]).float().view(1, 1, -1, 1).expand_as(keys)
    for share in given.shares:
        for name, press in presses(given, share).items():
            scores = press.score(module, hidden, keys, places, None, kwargs)
            found[f"{layer}.{name}.scores"] = scores[0].float().contiguous()
            _, kept = press.compress(module, hidden, keys, places, None, kwargs)
            positions = kept[0, :, :, 0].sort(dim=1).values
            found[f"{layer}.{name}.{share}"] = positions.to(torch.int32).contiguous()
    return found


def main() -> None:
    """One prompt through the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a Llama; default: random weights")
    parser.add_argument("--tokens", type=Path, required=True, help="JSON list of token ids")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file")
    parser.add_argument("--shares", type=json.loads, required=True, help="JSON list of kept shares")
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--kernel", type=int, required=True)
    parser.add_argument("--beta", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--layers", type=int, default=4, help="random weights: layers")
    parser.add_argument("--query-heads", type=int, default=8, help="random weights: query heads")
    parser.add_argument("--kv-heads", type=int, default=8, help="random weights: kv heads")
    parser.add_argument("--seed", type=int, default=0, help="random weights: seed")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.model is None:
        model = make_random(given)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            given.model, dtype=torch.float32, attn_implementation="sdpa"
        )
    model.eval()
    found: dict[str, Any] = {}

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        keys = kwargs["past_key_values"].layers[module.layer_idx].keys
        found.update(ask(given, module, kwargs["hidden_states"], keys, kwargs))

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(look, with_kwargs=True)
    prompt = torch.tensor([json.loads(given.tokens.read_text(encoding="utf-8"))])
    with torch.inference_mode():
        model(prompt, past_key_values=DynamicCache(), logits_to_keep=1)
    save_file({name: tensor.clone() for name, tensor in found.items()}, given.out)


if __name__ == "__main__":
    main()
