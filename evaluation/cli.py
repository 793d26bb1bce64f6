"""`saqqara eval ...`: what retention settings cost in quality, all beside full retention."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saqqara.cluster.cli.help import App
from saqqara.cluster.cli.options import Settings

from .options import (
    Compared,
    OutputFiles,
    SourceText,
    check_output_file,
    check_output_folder,
    eval_settings,
    layer_numbers,
    lengths_in_tokens,
    names,
    shares,
)

if TYPE_CHECKING:
    from saqqara.evaluation.tasks.task import Task

evaluation = App(help="Measure the quality of retention settings, beside full retention.")

REPORTED_TEXT = SourceText(split="report")  # the half that no method was tuned on
NumSamples = Annotated[int, typer.Option(min=1, help="Prompts (of each kind).")]
Lengths = Annotated[str, typer.Option(metavar="N,...", help="Prompt lengths in tokens.")]


@evaluation.command()
@eval_settings
def needle(
    lengths: Lengths = "1024,2048",
    depths: Annotated[
        str, typer.Option(metavar="D,...", help="Where the fact stands, 0 to 1.")
    ] = "0,0.25,0.5,0.75,1",
    num_samples: NumSamples = 5,
    *,
    compared: Compared,
    text: SourceText,
    files: OutputFiles,
    settings: Settings,
) -> None:
    """Find one fact in a long text, by prompt length and depth."""
    from saqqara.evaluation.tasks.needle import NeedleTask

    task = NeedleTask(
        lengths=lengths_in_tokens(lengths, "lengths"),
        depths=shares(depths, "depths"),
        num_samples=num_samples,
        seed=settings.config.seed,
        haystack=text.haystack,
        split=text.half,
    )
    _evaluate(settings, compared, task, files)


@evaluation.command()
@eval_settings
def ruler(
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Which tasks; default: all.")
    ] = None,
    lengths: Lengths = "2048",
    num_samples: NumSamples = 5,
    *,
    compared: Compared,
    text: SourceText,
    files: OutputFiles,
    settings: Settings,
) -> None:
    """Run generated tasks in the style of RULER: needles, variables, word counts."""
    from saqqara.evaluation.tasks.ruler import RulerTask
    from saqqara.evaluation.tasks.ruler_tasks import TASKS

    task = RulerTask(
        tasks=tuple(TASKS) if tasks is None else names(tasks, "tasks"),
        lengths=lengths_in_tokens(lengths, "lengths"),
        num_samples=num_samples,
        seed=settings.config.seed,
        haystack=text.haystack,
        split=text.half,
    )
    _evaluate(settings, compared, task, files)


@evaluation.command()
@eval_settings
def longbench(
    data: Annotated[
        Path,
        typer.Option(
            exists=True, file_okay=False, help="Folder of the official JSONL files, one a data set."
        ),
    ],
    datasets: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Which data sets; default: all there.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Templates in place of ours; see the docs."),
    ] = None,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Longer prompts lose their middle.")
    ] = 3500,
    num_samples: NumSamples = 10,
    *,
    compared: Compared,
    files: OutputFiles,
    settings: Settings,
) -> None:
    """Run LongBench from its JSONL files, with prompts in our own words."""
    from saqqara.evaluation.tasks.longbench import LongBenchTask

    task = LongBenchTask(
        data=data,
        datasets=None if datasets is None else names(datasets, "datasets"),
        prompts=prompts,
        max_prompt_tokens=max_prompt_tokens,
        num_samples=num_samples,
    )
    _evaluate(settings, compared, task, files)


@evaluation.command()
@eval_settings
def perplexity(
    context_tokens: Annotated[int, typer.Option(min=1, help="Tokens before the scored ones.")] = (
        1024
    ),
    continuation_tokens: Annotated[int, typer.Option(min=1, help="Scored tokens.")] = 128,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="From window to window; default: spread over the text."),
    ] = None,
    num_samples: NumSamples = 10,
    *,
    compared: Compared,
    text: SourceText,
    files: OutputFiles,
    settings: Settings,
) -> None:
    """Score real text after a context that went through retention."""
    from saqqara.evaluation.tasks.perplexity import PerplexityTask

    task = PerplexityTask(
        context_tokens=context_tokens,
        continuation_tokens=continuation_tokens,
        stride=stride,
        num_samples=num_samples,
        haystack=text.haystack,
        split=text.half,
    )
    _evaluate(settings, compared, task, files)


@evaluation.command()
@eval_settings
def agreement(
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of full's answers.")] = 64,
    num_samples: NumSamples = 10,
    *,
    compared: Compared,
    text: SourceText,
    files: OutputFiles,
    settings: Settings,
) -> None:
    """Follow full's greedy answers token by token, and count where a setting agrees."""
    from saqqara.evaluation.tasks.forced_agreement import AgreementTask

    task = AgreementTask(
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        num_samples=num_samples,
        seed=settings.config.seed,
        haystack=text.haystack,
        split=text.half,
    )
    _evaluate(settings, compared, task, files)


@evaluation.command()
@eval_settings
def attention(
    plot: Annotated[Path, typer.Option(metavar="OUT.png", help="Write the picture here.")],
    prompt: Annotated[
        str | None, typer.Option(help="A user's message; default: a needle in the middle.")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=1024, help="Length of the prompt with a needle.")
    ] = 256,
    layers: Annotated[
        str | None, typer.Option(metavar="N,...", help="Layers to show; default: four of them.")
    ] = None,
    *,
    compared: Compared,
    text: SourceText,
    settings: Settings,
) -> None:
    """Draw one prompt's attention by layer and head, and what each setting keeps of it."""
    from saqqara.cluster.engine.tokenizer import Tokenizer
    from saqqara.evaluation.figures import plots
    from saqqara.evaluation.tasks.needle import NeedleTask

    from .attention_map import attention_maps, draw

    plots.check_plot_file(plot)
    check_output_file(plot, "plot")
    config = settings.config
    tokenizer = Tokenizer.load(config.tokenizer or config.model)
    if prompt is None:
        half = text.half
        task = NeedleTask((prompt_tokens,), (0.5,), 1, config.seed, text.haystack, half)
        token_ids = list(task.questions(tokenizer)[0].token_ids)
    elif tokenizer.has_chat_template:
        token_ids = tokenizer.apply_chat([{"role": "user", "content": prompt}])
    else:
        token_ids = tokenizer.encode(prompt)
    shown = None if layers is None else layer_numbers(layers)
    maps = attention_maps(config, token_ids, compared.retentions(), shown)
    plots.save(draw(maps), plot)
    typer.echo(plot)


@evaluation.command()
@eval_settings
def calibrate(
    out: Annotated[
        Path | None,
        typer.Option(metavar="PROFILE.json", help="Write the profile here, not into the store."),
    ] = None,
    context_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each context.")] = 2048,
    num_samples: Annotated[int, typer.Option(min=1, help="Contexts of each kind.")] = 8,
    *,
    text: SourceText,
    settings: Settings,
) -> None:
    """Measure how much a model needs each kv head, once, for `recommended` to find."""
    from .calibrate import Calibration
    from .calibrated import calibrate_model

    calibration = Calibration(
        context_tokens=context_tokens,
        num_samples=num_samples,
        seed=settings.config.seed,
        haystack=text.haystack,
        split=text.half,
    )
    if out is not None:
        check_output_file(out, "out")
    typer.echo(calibrate_model(calibration, settings.config, out))


@evaluation.command()
@eval_settings
def report(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Results, pictures and report.html; resumed.")
    ],
    tasks: Annotated[
        str, typer.Option(metavar="A,B,...", help="Which tasks.")
    ] = "needle,ruler,perplexity,agreement",
    length: Annotated[int, typer.Option(min=1, help="Prompt length in tokens.")] = 2048,
    num_samples: NumSamples = 10,
    num_needles: Annotated[
        int | None, typer.Option(min=1, help="Prompts per needle depth. [default: num-samples]")
    ] = None,
    *,
    compared: Compared,
    text: SourceText = REPORTED_TEXT,
    settings: Settings,
) -> None:
    """Run several tasks and write one page with tables and pictures; again resumes."""
    from saqqara.cluster.cli.tables import print_table
    from saqqara.evaluation.figures.summary import tables

    from .report import ReportPlan, run_report

    seed = settings.config.seed
    plan = ReportPlan(
        names(tasks, "tasks"), length, num_samples, num_needles, seed, text.haystack, text.half
    )
    check_output_folder(out, "out")
    grid = compared.retentions(default_budgets="10%,25%,50%")
    results, page = run_report(settings.config, grid, plan, out)
    for result in results:
        for table in tables(result):
            print_table(table)
    typer.echo(page)


def _evaluate(settings: Settings, compared: Compared, task: "Task", files: OutputFiles) -> None:
    """Run a task, write its outcomes and picture, and print its tables."""
    from saqqara.cluster.cli.tables import print_table
    from saqqara.evaluation.figures import plots
    from saqqara.evaluation.figures.summary import tables
    from saqqara.evaluation.tasks.task import evaluate

    files.check()
    result = evaluate(settings.config, compared.retentions(), task)
    if files.json_file is not None:
        result.write(files.json_file)
    if files.plot is not None:
        plots.save(plots.plot(result), files.plot)
    for table in tables(result):
        print_table(table)
