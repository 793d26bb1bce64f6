"""What `saqqara batch` does once its settings are checked."""

import sys
from pathlib import Path
from typing import Any

from saqqara.cluster.batch.compare import compare_results, result_tokens
from saqqara.cluster.batch.files import write_json
from saqqara.cluster.batch.job import BatchJob, run_batch
from saqqara.cluster.batch.stop import Stopped
from saqqara.cluster.batch.summary import BatchSummary, all_there, summary_table

from .tables import print_table

ERRORS_EXIT = 3  # `batch --fail-on-errors`, when a row has an error record


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


def exit_code(summary: BatchSummary, fail_on_errors: bool) -> int:
    """What a batch command that has run to its end exits with."""
    if not summary.complete:
        return 1
    return ERRORS_EXIT if fail_on_errors and summary.all_errors else 0


def _check_summary_file(file: Path, job: BatchJob) -> None:
    """Refuse a summary that would replace a file of the job."""
    sidecar = job.output.with_name(job.output.name + ".job.json")
    if file.is_dir():
        raise ValueError(f"summary: {file} is a folder; it must be a file")
    for name, taken in [("input", job.input), ("output", job.output), ("settings", sidecar)]:
        if file.resolve() == taken.resolve():
            raise ValueError(f"summary: {file} is the job's {name}; choose another file")
