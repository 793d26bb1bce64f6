"""Which models are compared with transformers, and how: what `docs/models.md` shows as a table."""

from typing import Any

from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.models.choice import why_not_triton
from saqqara.workers.models.spec import ModelSpec

from .tiny import CONFIGS

LAYOUTS = {
    "one rank": MeshLayout(),
    "tensor 2": MeshLayout(tensor_size=2),
    "pipeline 2": MeshLayout(pipeline_size=2),
}
BUDGETED = ("snapkv", "pyramidkv")
# In words, what the tiny model of each name has beyond the plainest of its family.
SHOWN = {
    "gemma2": "windows in every second layer, soft-caps, norms behind attention and MLP",
    "gemma3": "windows but in every third layer, two rope bases, tied embeddings",
    "llama-gqa": "grouped queries",
    "llama-tied": "tied embeddings",
    "llama-bias": "biases everywhere",
    "llama-rope3": "rope `llama3` (Llama 3.1 to 3.3)",
    "llama-linear": "rope `linear`",
    "llama-dynamic": "rope `dynamic`",
    "llama-yarn": "rope `yarn`",
    "mistral": "a window in every layer",
    "mistral-plain": "no window",
    "mixtral": "5 experts, 2 for a token",
    "phi3": "joined weights",
    "phi3-longrope": "rope `longrope` of 12 of 16 channels (Phi-3 and Phi-4)",
    "qwen2": "biases of q, k and v, a window but in the first layer",
    "qwen2-moe": "7 experts and a shared one in every second layer",
    "qwen3": "norms of queries and keys",
    "qwen3-moe": "7 experts, 3 for a token, in all layers but one",
    "smollm3": "every second layer without rope",
}


def spec_of(name: str) -> ModelSpec:
    """The spec of a tiny model."""
    return ModelSpec.from_hf(CONFIGS[name])


def methods_of(name: str) -> tuple[str, ...]:
    """Retention methods that a tiny model is run under: a budget needs a layer without a window."""
    return ("full", *BUDGETED) if spec_of(name).layers.global_layers else ("full",)


def table() -> list[str]:
    """The lines of the table in `docs/models.md`."""
    head = ("`model_type`", "tiny model", "compared at", "under", "native CPU", "fused on GPUs")
    rows: list[tuple[Any, ...]] = [head, tuple("---" for _ in head)]
    for name in sorted(SHOWN, key=lambda each: (CONFIGS[each].model_type, each)):
        spec = spec_of(name)
        # The native kernels serve all: `test_native_layer.py` runs them on each of these.
        kernels = ("yes", "no" if why_not_triton(spec) else "yes")
        methods = ", ".join(f"`{method}`" for method in methods_of(name))
        rows.append((f"`{spec.family}`", SHOWN[name], ", ".join(LAYOUTS), methods, *kernels))
    return [f"| {' | '.join(row)} |" for row in rows]


if __name__ == "__main__":
    print("\n".join(table()))
