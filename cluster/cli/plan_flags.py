"""The flags of `saqqara plan`; what it does stands in `plan.py`, imported when it runs.

It imports nothing that takes long: the command is to answer within a second.
"""

from pathlib import Path
from typing import Annotated

import typer

from .help import errors_in_one_line


def plan(
    model: Annotated[str, typer.Option(help="Known model (llama-3-70b, ...), folder or hub id.")],
    gpu: Annotated[str, typer.Option(help="Known GPU (h100-80gb, ...), or a YAML file of one.")],
    gpus: Annotated[int, typer.Option(min=1, max=65536, help="GPUs in all.")] = 1,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, max=65536, help="Nodes they are spread over. [default: 8 on each]"),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=10**9, help="Tokens of a prompt.")
    ] = 2048,
    new_tokens: Annotated[
        int, typer.Option(min=1, max=10**9, help="Tokens generated for it.")
    ] = 256,
    requests: Annotated[
        int | None,
        typer.Option(min=1, max=10**12, help="Also: time for so many, all there at once."),
    ] = None,
    retention: Annotated[str, typer.Option(help="Method, preset, or YAML mapping.")] = "full",
    budget: Annotated[str | None, typer.Option(help="Tokens, or a share such as 25%.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, max=10**9, help="Longest sequence. [default: the model's context]"),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Slots. [default: as many as fit]")
    ] = None,
    max_prefill_tokens: Annotated[
        int, typer.Option(min=1, max=10**9, help="Prompt tokens of a prefill group.")
    ] = 2048,
    page_tokens: Annotated[int, typer.Option(min=1, max=1024, help="Tokens of a page.")] = 16,
    memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of GPU memory the engine may use.")
    ] = 0.9,
    kv_memory_gib: Annotated[
        float | None,
        typer.Option(min=0, max=16384, help="KV pool of a replica; default: what is left."),
    ] = None,
    prefix_cache_gib: Annotated[
        float | None,
        typer.Option(
            min=1e-6, max=16384, help="Most of a replica's cached prefixes; default: half the pool."
        ),
    ] = None,
    conversation_gib: Annotated[
        float | None,
        typer.Option(
            min=0, max=16384, help="Most of its conversations; default: a quarter of the pool."
        ),
    ] = None,
    host_kv_gib: Annotated[
        float | None,
        typer.Option(
            min=0, max=16384, help="Host memory of a replica's ranks; default: 4 per GPU."
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="Only such layouts.")
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="Only such layouts.")
    ] = None,
    layer_split: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Layers of each stage.")
    ] = None,
    gpu_hour_price: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Dollars for an hour of one GPU.")
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN.json", help="A measured run; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw sequences and tokens/s against the budget.")
    ] = None,
) -> None:
    """Size a deployment on paper: layouts, bytes, sequences, rates and cost. Loads no torch."""
    with errors_in_one_line():
        from saqqara.cluster.planning.reuse import ReuseSizes

        from .plan import PlanFlags, plan_and_print

        flags = PlanFlags(
            model=model,
            gpu=gpu,
            gpus=gpus,
            nodes=nodes,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            requests=requests,
            retention=retention,
            budget=budget,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_prefill_tokens=max_prefill_tokens,
            page_tokens=page_tokens,
            memory_utilization=memory_utilization,
            kv_memory_gib=kv_memory_gib,
            tensor_parallel_size=tensor_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            layer_split=layer_split,
            gpu_hour_price=gpu_hour_price,
            calibrate=tuple(calibrate or ()),
            as_json=as_json,
            plot=plot,
            reuse=ReuseSizes(prefix_cache_gib, conversation_gib, host_kv_gib),
        )
        if code := plan_and_print(flags):
            raise typer.Exit(code)
