"""A checkpoint with the topology of Llama-3-70B, and everything else small.

    python tests/support/llama_70b.py FOLDER

80 layers, 64 query heads, 8 kv heads; random weights in several files with an index, as large
models come. They are large enough for logits to differ by more than the order of a sum changes.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from saqqara.cluster.planning.models import MODEL_DIR, model_of
from saqqara.workers.models.weights import weight_shapes

TOPOLOGY = {
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
SMALL = {
    "head_dim": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 500,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
_STD = 0.15
_FILES = 5


def write(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """Write the model; `sizes` are fields of its config that differ. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    published = json.loads((MODEL_DIR / "llama-3-70b.json").read_text(encoding="utf-8"))
    assert published.items() >= TOPOLOGY.items()
    config = {**published, **SMALL, **sizes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = weight_shapes(model_of(str(folder)).spec)
    generator = torch.Generator().manual_seed(seed)
    names = sorted(shapes)  # so that the numbers do not go by the order in which shapes are told
    weight_map: dict[str, str] = {}
    for number in range(_FILES):
        file = f"model-{number + 1:05}-of-{_FILES:05}.safetensors"
        held = names[number * len(names) // _FILES : (number + 1) * len(names) // _FILES]
        tensors = {name: _numbers(name, shapes[name], generator) for name in held}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _numbers(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    random = torch.randn(shape, generator=generator)
    return 1 + 0.1 * random if name.endswith("norm.weight") else _STD * random


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
