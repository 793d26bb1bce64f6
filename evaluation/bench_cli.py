"""`saqqara bench ...`: how fast an engine is, and where its time goes."""

from pathlib import Path
from typing import Annotated

import typer

from saqqara.cluster.cli.help import App
from saqqara.cluster.cli.options import Settings, with_settings

bench = App(help="Measure speed and memory.")


@bench.command()
@with_settings(sampling=False, watched=True)
def throughput(
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Lists of token ids; default: made-up prompts."),
    ] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="Made-up prompts.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a made-up prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated per prompt.")] = 64,
    text: Annotated[
        bool,
        typer.Option(
            "--text", help="Make prompts from English text (pydoc topics), not random token ids."
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write all numbers here.")
    ] = None,
    *,
    settings: Settings,
) -> None:
    """Measure an engine: greedy, all prompts at once, ends of sequences ignored."""
    from saqqara.cluster.batch.files import write_json
    from saqqara.cluster.cli.tables import print_table
    from saqqara.evaluation.speed.throughput import Workload, measure, throughput_table

    workload = Workload(prompts, num_requests, prompt_tokens, new_tokens, text)
    result = measure(settings.config, workload)
    print_table(throughput_table(result))
    if json_file is not None:
        write_json(json_file, result)


@bench.command()
@with_settings(sampling=False, watched=True)
def profile(
    num_requests: Annotated[int, typer.Option(min=1, help="Prompts, random token ids.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated per prompt.")] = 64,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="OUT.json", help="Write every span here, for Perfetto."),
    ] = None,
    *,
    settings: Settings,
) -> None:
    """Show where a step's time goes, part by part."""
    from saqqara.cluster.cli.tables import print_table
    from saqqara.evaluation.speed import profile as profiling
    from saqqara.evaluation.speed.throughput import Workload

    workload = Workload(None, num_requests, prompt_tokens, new_tokens)
    rows, spans = profiling.profile(settings.config, workload)
    print_table(profiling.profile_table(rows))
    if trace is not None:
        profiling.write_trace(spans, trace)
