"""How much prefill a step may hold while other sequences decode, where the settings leave it open.

A quantum is counted in layers x tokens, each of which multiplies with a layer's weights. A GPU does
in a tenth of a second what a CPU does in many, and a large model's layer is more work than a small
one's: the stall is what should be alike.
"""

CPU_QUANTUM = 32768
_STALL_SECONDS = 0.1
_GPU_FLOPS = 250e12  # of dense 16-bit products in prefill: half of an H100's, most of an A100's


def prefill_quantum(
    setting: int | str | None, device: str, tensor_parallel_size: int, layer_parameters: int
) -> int | None:
    """Layers x tokens of prefill per step; None: no bound.

    Args:
        setting: `EngineConfig.prefill_quantum`; 'auto' leaves it to this function, 'none' (in
            Python also None) is no bound.
        device: of the ranks, such as `cuda:0`.
        tensor_parallel_size: ranks that share a layer.
        layer_parameters: of one layer of the whole model.
    """
    if setting == "none":
        return None
    if not isinstance(setting, str):
        return setting
    if not device.startswith("cuda"):
        return CPU_QUANTUM
    flops = _GPU_FLOPS * tensor_parallel_size
    return int(_STALL_SECONDS * flops / (2 * layer_parameters))
