"""Attention of one prompt by layer and kv head, with what each retention setting keeps below it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from saqqara.cluster.presets import ModelPresets
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.models.source import whole_folder
from saqqara.workers.models.spec import load_spec

from .kept_positions import Rows, kept_positions

MAX_PROMPT_TOKENS = 1024
LEAST_SHOWN = 1e-4  # attention below this has the darkest colour

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMaps:
    """Attention of one prompt and what settings keep of it.

    Attributes:
        maps: fp32 [layers, kv heads, queries, keys], softmax weights of transformers' eager
            attention in fp32, mean over the query heads of each kv head.
        layers: numbers of these layers in the model.
        kept: by the settings' labels, the positions kept in every layer of the model, as the
            engine's own worker says.
    """

    maps: Floats
    layers: tuple[int, ...]
    kept: dict[str, Rows]


def attention_maps(
    config: EngineConfig,
    prompt: Sequence[int],
    settings: Sequence[Retention],
    layers: Sequence[int] | None = None,
) -> AttentionMaps:
    """Run one prompt through transformers for its attention, and through a worker for its pages.

    Args:
        config: names the model.
        prompt: token ids, at most `MAX_PROMPT_TOKENS`: a map takes their square per head.
        settings: retention settings to compare.
        layers: layers to show; default: the first, the last and two between.

    Raises:
        ValueError: the prompt is too long, a layer is none of the model's, a setting is wrong.
    """
    if not 1 <= len(prompt) <= MAX_PROMPT_TOKENS:
        raise ValueError(f"prompt: has {len(prompt)} tokens; maps take 1 to {MAX_PROMPT_TOKENS}")
    spec = load_spec(config.model)
    num_layers = spec.num_layers
    if layers is None:
        layers = sorted({round(i * (num_layers - 1) / 3) for i in range(4)})
    if not layers or not all(0 <= layer < num_layers for layer in layers):
        raise ValueError(f"layers: must be of 0 to {num_layers - 1}, not {list(layers)}")
    settings = [*map(ModelPresets.of(config).resolve, settings)]
    kept = kept_positions(config, prompt, settings)
    labels = [setting.label for setting in settings]
    maps = _eager_attention(config.model, prompt, layers, spec.num_kv_heads)
    return AttentionMaps(maps, tuple(layers), dict(zip(labels, kept, strict=True)))


def _eager_attention(
    model_name: str, prompt: Sequence[int], layers: Sequence[int], num_heads: int
) -> Floats:
    """Weights of some layers, [layers, kv heads, n, n]."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(whole_folder(model_name)), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        attentions = model(torch.tensor([list(prompt)]), output_attentions=True).attentions
    found = []
    for layer in layers:
        weights = attentions[layer][0]
        found.append(weights.view(num_heads, -1, *weights.shape[1:]).mean(dim=1).numpy())
    return np.stack(found)


def draw(found: AttentionMaps) -> Figure:
    """A map for every shown layer and kv head; below each, a row of marks for every setting."""
    num_layers, num_heads, num_tokens, _ = found.maps.shape
    labels = list(found.kept)
    strip = 0.16 * len(labels)
    figure = Figure(
        figsize=(2.6 * num_heads + 1.4, (2.4 + strip + 0.5) * num_layers), layout="constrained"
    )
    panels = figure.subplots(
        2 * num_layers, num_heads, squeeze=False, height_ratios=[2.4, max(strip, 0.01)] * num_layers
    )
    for row, layer in enumerate(found.layers):
        for head in range(num_heads):
            above, below = panels[2 * row, head], panels[2 * row + 1, head]
            weights = np.maximum(found.maps[row, head], LEAST_SHOWN)
            above.imshow(weights, norm=LogNorm(LEAST_SHOWN, 1), cmap="magma", aspect="auto")
            above.set_title(f"layer {layer}, kv head {head}", fontsize=8)
            above.tick_params(labelsize=6, labelbottom=False)
            marks = np.zeros((len(labels), num_tokens))
            for at, label in enumerate(labels):
                marks[at, list(found.kept[label][layer][head])] = 1
            if labels:
                below.imshow(
                    marks, cmap="Greys", vmin=0, vmax=1.2, aspect="auto", interpolation="nearest"
                )
            below.set_yticks(range(len(labels)), labels if head == 0 else [], fontsize=6)
            below.tick_params(labelsize=6)
    figure.suptitle("attention (query down, key across); below: tokens kept", fontsize=9)
    return figure
