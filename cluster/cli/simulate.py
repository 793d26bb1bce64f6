"""The flags of `saqqara simulate`; what it does stands in `simulated.py`, imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from .help import errors_in_one_line

_FILE = "FILE"


def simulate(
    model: Annotated[str, typer.Option(help="Known model (llama-3-70b, ...), folder or hub id.")],
    gpu: Annotated[str, typer.Option(help="Known GPU (h100-80gb, ...), or a YAML file of one.")],
    gpus: Annotated[int, typer.Option(min=1, max=65536, help="GPUs in all.")] = 1,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, max=65536, help="Nodes they are spread over. [default: 8 on each]"),
    ] = None,
    arrivals: Annotated[
        str, typer.Option(help="poisson, bursts, or a file of JSON lines.")
    ] = "poisson",
    rate: Annotated[
        float | None, typer.Option(min=1e-6, max=1e9, help="Requests a second, all GPUs together.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, max=10**8, help="How many arrive. [default: 1000]")
    ] = None,
    burst_size: Annotated[
        int | None, typer.Option(min=1, max=10**8, help="Requests of a burst. [default: 32]")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Tokens of a prompt, mean. [default: 2048]")
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=10**9, help="Tokens generated for it, mean. [default: 256]"),
    ] = None,
    spread: Annotated[
        float | None,
        typer.Option(min=0, max=10, help="Deviation of both over their mean. [default: 0]"),
    ] = None,
    retention: Annotated[str, typer.Option(help="Method, preset, or YAML mapping.")] = "full",
    budget: Annotated[str | None, typer.Option(help="Tokens, or a share such as 25%.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Also the same under this method, such as full.")
    ] = None,
    slo_ttft: Annotated[
        float, typer.Option(min=0, max=1e6, help="Objective: seconds to the first token.")
    ] = 2.0,
    slo_itl: Annotated[
        float,
        typer.Option(min=0, max=1e6, help="Objective: seconds between tokens, mean of an answer."),
    ] = 0.1,
    faults: Annotated[
        Path | None, typer.Option(metavar=_FILE, help="What dies and when, as JSON lines.")
    ] = None,
    rank_mtbf_hours: Annotated[
        float | None,
        typer.Option(min=1e-4, max=1e9, help="A rank dies once in so many, on average."),
    ] = None,
    node_mtbf_hours: Annotated[
        float | None,
        typer.Option(min=1e-4, max=1e9, help="A node dies once in so many, on average."),
    ] = None,
    node_return_seconds: Annotated[
        float, typer.Option(min=0, max=1e8, help="Until a node that died so is there again.")
    ] = 600.0,
    detect_seconds: Annotated[
        float, typer.Option(min=0, max=1e8, help="Until a death is noticed.")
    ] = 5.0,
    restart_seconds: Annotated[
        float, typer.Option(min=0, max=1e8, help="Until a replica's ranks have started again.")
    ] = 60.0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, max=10**9, help="Longest sequence. [default: the model's context]"),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Slots of a replica. [default: as many as fit]"),
    ] = None,
    max_prefill_tokens: Annotated[
        int, typer.Option(min=1, max=10**9, help="Prompt tokens of a prefill group.")
    ] = 2048,
    prefill_quantum: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=10**12,
            help="Layers x tokens of prefill per step while others decode. "
            "[default: the engine's, by GPU and model]",
        ),
    ] = None,
    max_extend_tokens: Annotated[
        int,
        typer.Option(min=1, max=10**9, help="Tokens replayed per step, all sequences together."),
    ] = 1024,
    page_tokens: Annotated[int, typer.Option(min=1, max=1024, help="Tokens of a page.")] = 16,
    memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of GPU memory the engine may use.")
    ] = 0.9,
    kv_memory_gib: Annotated[
        float | None,
        typer.Option(min=0, max=16384, help="KV pool of a replica; default: what is left."),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a stage. [default: what is planned best]")
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="Stages. [default: what is planned best]")
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
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all that is drawn.")] = 0,
    processes: Annotated[
        int | None, typer.Option(min=1, max=1024, help="To simulate in. [default: one per CPU]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw latencies, and tokens/s over time.")
    ] = None,
) -> None:
    """Run a deployment on a simulated clock: latencies, goodput, faults. Loads no torch."""
    with errors_in_one_line():
        from .plan import PlanFlags
        from .simulated import SimulateFlags, simulate_and_print

        planned = PlanFlags(
            model=model,
            gpu=gpu,
            gpus=gpus,
            nodes=nodes,
            prompt_tokens=prompt_tokens or 2048,
            new_tokens=new_tokens or 256,
            requests=None,
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
        )
        simulate_and_print(
            SimulateFlags(
                planned=planned,
                arrivals=arrivals,
                rate=rate,
                requests=requests,
                burst_size=burst_size,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                spread=spread,
                against=against,
                slo_ttft=slo_ttft,
                slo_itl=slo_itl,
                faults=faults,
                rank_mtbf_hours=rank_mtbf_hours,
                node_mtbf_hours=node_mtbf_hours,
                node_return_seconds=node_return_seconds,
                detect_seconds=detect_seconds,
                restart_seconds=restart_seconds,
                prefill_quantum=prefill_quantum,
                max_extend_tokens=max_extend_tokens,
                seed=seed,
                processes=processes,
            )
        )
