"""What computes the layers of a model: native CPU kernels, Triton's, or torch, and why."""

from typing import TYPE_CHECKING

from .spec import ModelSpec

if TYPE_CHECKING:
    import torch


def choose_linear_backend(
    name: str,
    device: "torch.device",
    dtype: "torch.dtype",
    attention_backend: str,
    spec: ModelSpec,
) -> tuple[str, str]:
    """What computes the linear layers, `native`, `triton` or `torch`, and why.

    With the attention backend `triton`, which has made sure that its kernels run here, other
    kernels of the same kind take what lies between the products. The native kernels serve every
    model in bfloat16 on a CPU.

    Raises:
        ValueError: `native` is asked for and cannot be had.
    """
    if name == "torch":
        return "torch", "as set"
    if name == "auto" and attention_backend == "triton":
        if (missing := why_not_triton(spec)) is not None:
            return "torch", f"auto: no Triton kernels ({missing})"
        return "triton", "auto: torch's products, fused kernels between them"
    if device.type != "cpu" or str(dtype) != "torch.bfloat16":
        reason: str | None = f"it is for bfloat16 on a CPU, not {str(dtype)[6:]} on {device.type}"
    else:
        from saqqara.workers.native.build import unavailable_reason

        reason = unavailable_reason()
    if reason is None:
        return "native", "as set" if name == "native" else "auto: packed weights, fused layers"
    if name == "native":
        raise ValueError(f"linear_backend='native' cannot be had here: {reason}")
    return "torch", f"auto: no native kernels ({reason})"


def why_not_triton(spec: ModelSpec) -> str | None:
    """Why the Triton kernels between a layer's products do not serve a model; None: they do."""
    only_torch = {
        f"activation {spec.activation}": spec.activation != "silu",
        f"norm weights + {spec.norm_offset:g}": spec.norm_offset != 0,
        "norms behind attention and MLP": spec.post_norms,
        "a mixture of experts": spec.experts is not None,
    }
    return next((f"not for {what}" for what, is_so in only_torch.items() if is_so), None)
