"""vLLM's names of engine settings: taken where they mean the same, else refused with ours.

One table for keyword arguments, YAML and flags.
"""

from collections.abc import Mapping
from typing import Any

SAME = {
    "gpu_memory_utilization": "memory_utilization",
    "block_size": "page_tokens",
    "max_num_batched_tokens": "max_prefill_tokens",
}
"""Settings of ours that have another name there."""

VALUES: dict[str, tuple[str, dict[Any, Any]]] = {
    "enforce_eager": ("cuda_graphs", {True: "off", False: "auto"}),
    "enable_prefix_caching": ("prefix_caching", {True: True, False: False, None: True}),
    "distributed_executor_backend": ("executor", {"ray": "ray", "uni": "local"}),
}
"""Settings of ours that have another name and other values there."""

REVISION = "revision"
"""Of a hub id; `with_revision` puts it behind the id."""

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tokenizer_revision": ((None,), "write it behind the hub id: tokenizer ORG/NAME@REVISION"),
    "tokenizer_mode": (("auto",), "the tokenizer is the one of the model's folder"),
    "trust_remote_code": ((False,), "code from a model's repository is never run"),
    "quantization": ((None,), "use a checkpoint in float32, bfloat16 or float16"),
    "kv_cache_dtype": (("auto",), "keys and values have the model's dtype; see dtype"),
    "swap_space": ((0,), "a sequence that has to make room is computed anew"),
    "cpu_offload_gb": ((0,), "weights stay on the device; see pipeline_parallel_size"),
    "enable_chunked_prefill": ((None,), "prefill_quantum bounds what prefill takes of a step"),
    "num_gpu_blocks_override": ((None,), "kv_memory_gib sizes the pool"),
    "kv_cache_memory_bytes": ((None,), "kv_memory_gib sizes the pool"),
    "data_parallel_size": ((1,), "start a server with num_replicas, or several engines"),
    "download_dir": ((None,), "the environment variable HF_HOME says where downloads go"),
    "hf_token": ((None,), "set the environment variable HF_TOKEN"),
    "max_logprobs": ((20,), "it is 20, and for a server limits.max_logprobs"),
}
"""Settings that are not here: the values that ask for nothing, and what to do for the others."""

BOOLEAN = (
    "enforce_eager",
    "trust_remote_code",
    "enable_prefix_caching",
    "enable_chunked_prefill",
)
"""Those that are flags without a value on the command line."""

ALL = (*SAME, *VALUES, REVISION, *REFUSED)


def with_our_names(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Settings with our names in place of vLLM's; `revision` stays (see `with_revision`).

    Raises:
        ValueError: a setting that is not here, with what to use; or one that is given twice.
    """
    before = f"{where}: " if where else ""
    found = {name: value for name, value in settings.items() if name not in ALL}
    for name, value in settings.items():
        if name in REFUSED:
            empty, instead = REFUSED[name]
            if value not in empty:
                raise ValueError(f"{before}{name}: there is no such setting; {instead}")
            continue
        if name not in ALL:
            continue
        ours, value = _ours(name, value, before)
        if found.setdefault(ours, value) != value:
            raise ValueError(f"{before}{name}: it means {ours}, which is {found[ours]!r} already")
    return found


def with_revision(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Settings with `revision`, where it is given, put behind the model's hub id."""
    found = dict(settings)
    revision = found.pop(REVISION, None)
    if revision is not None:
        model = str(found.get("model", ""))
        if "@" in model:
            raise ValueError(f"{where}{': ' if where else ''}revision: {model!r} names one already")
        found["model"] = f"{model}@{revision}"
    return found


def _ours(name: str, value: Any, before: str) -> tuple[str, Any]:
    """Our name and value of a setting that is taken."""
    if name in SAME:
        return SAME[name], value
    if name == REVISION:
        return REVISION, value
    ours, values = VALUES[name]
    if value not in values:
        known = ", ".join(str(one) for one in values)
        raise ValueError(f"{before}{name}: known here: {known}; see {ours}, not {value!r}")
    return ours, values[value]
