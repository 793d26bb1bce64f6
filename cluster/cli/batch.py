"""What `saqqara batch` does once its settings are checked."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from saqqara.cluster.batch.answers import AnswerSettings
from saqqara.cluster.batch.compare import compare_results, result_tokens
from saqqara.cluster.batch.files import write_json
from saqqara.cluster.batch.job import BatchJob, run_batch
from saqqara.cluster.batch.parts.cutting import PARQUET
from saqqara.cluster.batch.parts.folder import SUMMARY, OutputFolder
from saqqara.cluster.batch.parts.job import PART_ROWS, PartsJob, run_parts
from saqqara.cluster.batch.stop import Stopped
from saqqara.cluster.batch.summary import BatchSummary, all_there, summary_table
from saqqara.cluster.planning.models import model_of
from saqqara.workers.models.source import local_folder
from saqqara.workers.models.spec import ModelSpec

from .tables import print_table

ERRORS_EXIT = 3  # `batch --fail-on-errors`, when a row has an error record


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What `saqqara batch` was told, besides what answers come from."""

    inputs: tuple[str, ...]
    output: str
    overwrite: bool = False
    replicas: int = 1
    output_format: str | None = None
    part_rows: int | None = None
    prompt_column: str | None = None
    mix_settings: bool = False
    retry_errors: bool = False
    gpu_hour_price: float | None = None
    compare: Path | None = None
    summary: Path | None = None
    fail_on_errors: bool = False

    @property
    def of_parts(self) -> dict[str, Any]:
        """The options that only a job over many files has, of those that were given."""
        named = {
            "output-format": self.output_format,
            "part-rows": self.part_rows,
            "prompt-column": self.prompt_column,
            "replicas": self.replicas if self.replicas > 1 else None,
        }
        return {name: value for name, value in named.items() if value is not None}


def run_batch_command(options: BatchOptions, answers: AnswerSettings) -> int:
    """Run the job that the options describe, over one plain file or over many.

    Returns:
        The exit code, see `run_and_summarise`.

    Raises:
        ValueError: an option is wrong, or does not go with the others.
    """
    _check_not_empty(options, answers)
    _check_sampling(answers)
    common = {
        "overwrite": options.overwrite,
        "mix_settings": options.mix_settings,
        "retry_errors": options.retry_errors,
        "gpu_hour_price": options.gpu_hour_price,
    }
    if not options.of_parts and is_one_plain_file(options.inputs, options.output):
        job = BatchJob(
            input=Path(options.inputs[0]),
            output=Path(options.output),
            **common,  # type: ignore[arg-type]
            **{f.name: getattr(answers, f.name) for f in fields(answers)},
        )
        return run_and_summarise(
            job, options.summary, options.compare, fail_on_errors=options.fail_on_errors
        )
    if options.compare is not None:
        raise ValueError("compare: only results of one file of JSON lines can be compared")
    if options.output_format not in (None, "jsonl", "parquet"):
        raise ValueError(
            f"output-format must be 'jsonl' or 'parquet', not {options.output_format!r}"
        )
    parts_job = PartsJob(
        inputs=options.inputs,
        output=options.output,
        answers=answers,
        output_kind="parquet" if options.output_format == "parquet" else "jsonl",
        num_replicas=options.replicas,
        part_rows=options.part_rows or PART_ROWS,
        prompt_column=options.prompt_column,
        **common,  # type: ignore[arg-type]
    )
    return run_parts_and_summarise(
        parts_job, options.summary, fail_on_errors=options.fail_on_errors
    )


def run_and_summarise(
    job: BatchJob, summary_file: Path | None, compare: Path | None, *, fail_on_errors: bool = False
) -> int:
    """Run a batch job, print its summary and write it as JSON.

    Returns:
        The exit code: 0, 1 if a row has no record, 3 with `fail_on_errors` if one has an error, 128
        + n if signal n has ended the job.

    Raises:
        ValueError: a file or setting is wrong.
        RuntimeError: the engine has failed, or a file cannot be written.
    """
    if compare is not None:
        result_tokens(compare)  # an error in it before hours of work, not after
    summary_file = summary_file or job.output.with_name(job.output.name + ".summary.json")
    _check_summary_file(summary_file, job)
    try:
        summary = run_batch(job)
    except Stopped as stopped:
        return stopped.exit_code
    data: dict[str, Any] = summary.model_dump(mode="json")
    cells: list[tuple[str, list[str]]] = []
    problem: ValueError | None = None
    if compare is not None:
        try:
            agreement = compare_results(job.output, compare)
            data["agreement"] = {"with": str(compare), **agreement.to_dict()}
            cells = agreement.cells()
        except ValueError as error:  # costs the summary nothing
            problem = error
    if summary.report is not None or not summary_file.exists():
        write_json(summary_file, data)
    if summary.report is None:
        sys.stdout.write(all_there(summary) + "\n")
    if summary.report is not None or cells:
        print_table(summary_table([summary], cells))
    if problem is not None:
        raise problem
    return exit_code(summary, fail_on_errors)


def run_parts_and_summarise(
    job: PartsJob, summary_file: Path | None, *, fail_on_errors: bool = False
) -> int:
    """Run a job over many files, print its summary and write it as JSON.

    Without `summary_file` it is `_summary.json` in the output folder. Returns and raises what
    `run_and_summarise` does.
    """
    if summary_file is not None:
        _check_place(summary_file)
    try:
        summary = run_parts(job)
    except Stopped as stopped:
        return stopped.exit_code
    data: dict[str, Any] = summary.model_dump(mode="json")
    if summary.report is None:
        sys.stdout.write(all_there(summary) + "\n")
    else:
        if summary_file is not None:
            write_json(summary_file, data)
        else:
            OutputFolder(job.output, job.output_kind).write_json(SUMMARY, data)
        print_table(summary_table([summary]))
    return exit_code(summary, fail_on_errors)


def is_one_plain_file(inputs: Sequence[str], output: str) -> bool:
    """Whether a job is one local file, or a pipe, of JSON lines to one file."""
    if len(inputs) != 1 or "://" in inputs[0] or "://" in output or output.endswith("/"):
        return False
    path = Path(inputs[0])
    if Path(output).is_dir() or (not path.exists() and any(sign in inputs[0] for sign in "*?[")):
        return False
    if not path.is_file():  # a pipe, or what is an error there
        return True
    with path.open("rb") as file:
        return file.read(len(PARQUET)) != PARQUET


def exit_code(summary: BatchSummary, fail_on_errors: bool) -> int:
    """What a batch command that has run to its end exits with."""
    if not summary.complete:
        return 1
    return ERRORS_EXIT if fail_on_errors and summary.all_errors else 0


def _check_not_empty(options: BatchOptions, answers: AnswerSettings) -> None:
    named: list[tuple[str, str | None]] = [("input", name) for name in options.inputs]
    named += [("output", options.output), ("prompt-column", options.prompt_column)]
    named.append(("served-model-name", answers.served_model_name))
    for what, name in named:
        if name == "":
            raise ValueError(f"{what}: the name is empty")


def _check_sampling(answers: AnswerSettings) -> None:
    """Refuse what every row would be refused for, where the model is known on this machine."""
    config, wanted = answers.config, answers.sampling.max_tokens
    most = config.max_model_len
    if local_folder(config.model) is not None and (spec := _light_spec(config.model)) is not None:
        answers.sampling.check_vocabulary(spec.vocab_size)
        most = most or spec.max_position
    if wanted is not None and most is not None and wanted >= most:
        raise ValueError(
            f"max_tokens={wanted} leaves no room for a prompt in max_model_len={most}; "
            f"it can be at most {most - 1}"
        )


def _light_spec(model: str) -> ModelSpec | None:
    """A model's sizes, read without torch, which a driver of replicas has no use for.

    None where its config leaves out what transformers fills in: the engine will know.
    """
    try:
        return model_of(model).spec
    except ValueError:
        return None


def _check_place(file: Path, output: Path | None = None) -> None:
    """Refuse a summary that cannot be written, before hours of work."""
    if file.is_dir():
        raise ValueError(f"summary: {file} is a folder; it must be a file")
    if output is not None and file.parent == output.parent:  # where it says itself what is wrong
        return
    above = next(folder for folder in file.absolute().parents if os.path.lexists(folder))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"summary: cannot write {file}: {above} is no folder that can be written")


def _check_summary_file(file: Path, job: BatchJob) -> None:
    """Refuse a summary that cannot be written, or would replace a file of the job."""
    sidecar = job.output.with_name(job.output.name + ".job.json")
    _check_place(file, job.output)
    for name, taken in [("input", job.input), ("output", job.output), ("settings", sidecar)]:
        if os.path.realpath(file) == os.path.realpath(taken):
            raise ValueError(f"summary: {file} is the job's {name}; choose another file")
