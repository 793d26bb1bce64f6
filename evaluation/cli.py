"""`saqqara eval ...`: what retention settings cost in quality, all beside full retention."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saqqara.cluster.cli.help import App
from saqqara.cluster.cli.options import Settings, with_settings

if TYPE_CHECKING:
    from saqqara.compression.retention import Retention

    from .haystack import Split
    from .task import Task

evaluation = App(help="Measure the quality of retention settings, beside full retention.")

eval_settings = with_settings(sampling=False, without=("retention", "budget"), watched=True)

Retentions = Annotated[
    list[str] | None,
    typer.Option(
        "--retention",
        metavar="NAME@BUDGET|YAML",
        help="A setting, such as snapkv@25% or '{method: pyramidkv, budget: 128}'; repeatable.",
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        help="Names or YAML mappings, each at every budget. "
        "[default: pyramidkv,snapkv,streaming,knorm,random, unless --retention is given]",
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        metavar="B,...", help="Tokens or shares for --methods. [default: 25%; report: 10%,25%,50%]"
    ),
]
NumSamples = Annotated[int, typer.Option(min=1, help="Prompts (of each kind).")]
HaystackFolder = Annotated[
    Path | None,
    typer.Option(
        "--haystack",
        metavar="DIR",
        exists=True,
        file_okay=False,
        help="Folder with .txt, .md or .rst files; default: the topics of Python's pydoc.",
    ),
]
SplitName = Annotated[
    str, typer.Option(help="Half of the text: tune methods on one, report on the other.")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="OUT", help="Write every outcome here.")
]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="OUT.png", help="Write a picture here.")
]
Lengths = Annotated[str, typer.Option(metavar="N,...", help="Prompt lengths in tokens.")]


@evaluation.command()
@eval_settings
def needle(
    lengths: Lengths = "1024,2048",
    depths: Annotated[
        str, typer.Option(metavar="D,...", help="Where the fact stands, 0 to 1.")
    ] = "0,0.25,0.5,0.75,1",
    num_samples: NumSamples = 5,
    retention: Retentions = None,
    methods: Methods = None,
    budgets: Budgets = None,
    haystack: HaystackFolder = None,
    split: SplitName = "tune",
    json_file: JsonFile = None,
    plot: PlotFile = None,
    *,
    settings: Settings,
) -> None:
    """Find one fact in a long text, by prompt length and depth."""
    from .needle import NeedleTask

    task = NeedleTask(
        lengths=_integers(lengths, "lengths"),
        depths=_numbers(depths, "depths"),
        num_samples=num_samples,
        seed=settings.config.seed,
        haystack=haystack,
        split=_split(split),
    )
    _evaluate(settings, _retentions(retention, methods, budgets), task, json_file, plot)


@evaluation.command()
@eval_settings
def ruler(
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Which tasks; default: all.")
    ] = None,
    lengths: Lengths = "2048",
    num_samples: NumSamples = 5,
    retention: Retentions = None,
    methods: Methods = None,
    budgets: Budgets = None,
    haystack: HaystackFolder = None,
    split: SplitName = "tune",
    json_file: JsonFile = None,
    plot: PlotFile = None,
    *,
    settings: Settings,
) -> None:
    """Run generated tasks in the style of RULER: needles, variables, word counts."""
    from .ruler import RulerTask
    from .ruler_tasks import TASKS

    task = RulerTask(
        tasks=tuple(TASKS) if tasks is None else _names(tasks),
        lengths=_integers(lengths, "lengths"),
        num_samples=num_samples,
        seed=settings.config.seed,
        haystack=haystack,
        split=_split(split),
    )
    _evaluate(settings, _retentions(retention, methods, budgets), task, json_file, plot)


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
    retention: Retentions = None,
    methods: Methods = None,
    budgets: Budgets = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    *,
    settings: Settings,
) -> None:
    """Run LongBench from its JSONL files, with prompts in our own words."""
    from .longbench import LongBenchTask

    task = LongBenchTask(
        data=data,
        datasets=None if datasets is None else _names(datasets),
        prompts=prompts,
        max_prompt_tokens=max_prompt_tokens,
        num_samples=num_samples,
    )
    _evaluate(settings, _retentions(retention, methods, budgets), task, json_file, plot)


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
    retention: Retentions = None,
    methods: Methods = None,
    budgets: Budgets = None,
    haystack: HaystackFolder = None,
    split: SplitName = "tune",
    json_file: JsonFile = None,
    plot: PlotFile = None,
    *,
    settings: Settings,
) -> None:
    """Score real text after a context that went through retention."""
    from .perplexity import PerplexityTask

    task = PerplexityTask(
        context_tokens=context_tokens,
        continuation_tokens=continuation_tokens,
        stride=stride,
        num_samples=num_samples,
        haystack=haystack,
        split=_split(split),
    )
    _evaluate(settings, _retentions(retention, methods, budgets), task, json_file, plot)


@evaluation.command()
@eval_settings
def agreement(
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of full's answers.")] = 64,
    num_samples: NumSamples = 10,
    retention: Retentions = None,
    methods: Methods = None,
    budgets: Budgets = None,
    haystack: HaystackFolder = None,
    split: SplitName = "tune",
    json_file: JsonFile = None,
    plot: PlotFile = None,
    *,
    settings: Settings,
) -> None:
    """Follow full's greedy answers token by token, and count where a setting agrees."""
    from .forced_agreement import AgreementTask

    task = AgreementTask(
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        num_samples=num_samples,
        seed=settings.config.seed,
        haystack=haystack,
        split=_split(split),
    )
    _evaluate(settings, _retentions(retention, methods, budgets), task, json_file, plot)


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
    retention: Retentions = None,
    methods: Methods = None,
    budgets: Budgets = None,
    haystack: HaystackFolder = None,
    split: SplitName = "tune",
    *,
    settings: Settings,
) -> None:
    """Draw one prompt's attention by layer and head, and what each setting keeps of it."""
    from saqqara.cluster.engine.tokenizer import Tokenizer

    from . import plots
    from .attention_map import attention_maps, draw
    from .needle import NeedleTask

    plots.check_plot_file(plot)
    config = settings.config
    tokenizer = Tokenizer.load(config.tokenizer or config.model)
    if prompt is None:
        half = _split(split)
        task = NeedleTask((prompt_tokens,), (0.5,), 1, config.seed, haystack, half)
        token_ids = list(task.questions(tokenizer)[0].token_ids)
    elif tokenizer.has_chat_template:
        token_ids = tokenizer.apply_chat([{"role": "user", "content": prompt}])
    else:
        token_ids = tokenizer.encode(prompt)
    shown = None if layers is None else _layers(layers)
    compared = _retentions(retention, methods, budgets)
    plots.save(draw(attention_maps(config, token_ids, compared, shown)), plot)
    typer.echo(plot)


@evaluation.command()
@eval_settings
def calibrate(
    out: Annotated[Path, typer.Option(metavar="PROFILE.json", help="Write the profile here.")],
    context_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each context.")] = 2048,
    num_samples: Annotated[int, typer.Option(min=1, help="Contexts of each kind.")] = 8,
    haystack: HaystackFolder = None,
    split: SplitName = "tune",
    *,
    settings: Settings,
) -> None:
    """Measure how much a model needs each kv head, for budgets by head (`recommended`)."""
    from .calibrate import Calibration, write_profile

    calibration = Calibration(
        context_tokens=context_tokens,
        num_samples=num_samples,
        seed=settings.config.seed,
        haystack=haystack,
        split=_split(split),
    )
    write_profile(calibration.run(settings.config), out)
    typer.echo(out)


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
    retention: Retentions = None,
    methods: Methods = None,
    budgets: Budgets = None,
    haystack: HaystackFolder = None,
    split: SplitName = "report",
    *,
    settings: Settings,
) -> None:
    """Run several tasks and write one page with tables and pictures; again resumes."""
    from saqqara.cluster.cli.tables import print_table

    from .report import ReportPlan, run_report
    from .summary import tables

    seed = settings.config.seed
    plan = ReportPlan(
        _names(tasks), length, num_samples, num_needles, seed, haystack, _split(split)
    )
    compared = _retentions(retention, methods, budgets, default_budgets="10%,25%,50%")
    results, page = run_report(settings.config, compared, plan, out)
    for result in results:
        for table in tables(result):
            print_table(table)
    typer.echo(page)


def _evaluate(
    settings: Settings,
    retentions: list["Retention"],
    task: "Task",
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Run a task, write its outcomes and picture, and print its tables."""
    from saqqara.cluster.cli.tables import print_table

    from . import plots
    from .summary import tables
    from .task import evaluate

    if plot is not None:
        plots.check_plot_file(plot)
    result = evaluate(settings.config, retentions, task)
    if json_file is not None:
        result.write(json_file)
    if plot is not None:
        plots.save(plots.plot(result), plot)
    for table in tables(result):
        print_table(table)


def _retentions(
    settings: list[str] | None,
    methods: str | None,
    budgets: str | None,
    default_budgets: str = "25%",
) -> list["Retention"]:
    """The settings of `--retention`, and the grid where it was asked for or nothing else was."""
    from .grid import DEFAULT_METHODS, parse_grid, parse_setting

    found = [parse_setting(text) for text in settings or ()]
    if methods is not None or budgets is not None or not settings:
        found += parse_grid(methods or DEFAULT_METHODS, budgets or default_budgets)
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _integers(text: str, field: str) -> tuple[int, ...]:
    numbers = _names(text)
    if not numbers or not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(f"{field}: must be numbers of tokens such as 1024,2048, not {text!r}")
    return tuple(map(int, numbers))


def _layers(text: str) -> tuple[int, ...]:
    if not all(number.isdecimal() for number in _names(text)):
        raise ValueError(f"layers: must be numbers such as 0,10,29, not {text!r}")
    return tuple(map(int, _names(text)))


def _numbers(text: str, field: str) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, _names(text)))
    except ValueError:
        numbers = ()
    if not numbers:
        raise ValueError(f"{field}: must be numbers such as 0,0.5,1, not {text!r}")
    return numbers


def _split(text: str) -> "Split":
    if text == "tune":
        return "tune"
    if text == "report":
        return "report"
    raise ValueError(f"split: must be tune or report, not {text!r}")
