"""What the commands do once their settings are checked; imports the engine, which takes a while."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.agreement import compare_results, result_tokens
from saqqara.evaluation.profile import profile, profile_table, write_trace
from saqqara.evaluation.throughput import Workload, measure, throughput_table

from .batch_files import write_json
from .batch_summary import BatchSummary, all_there, summary_table
from .cli_options import Settings
from .client import EngineClient, EngineRequest
from .jobs import BatchJob, run_batch
from .launch import launch
from .request import RequestOutput
from .stop import Stopped
from .tables import print_table

POLL_SECONDS = 1.0
ERRORS_EXIT = 3  # `batch --fail-on-errors`, when a row has an error record


def generate_and_print(
    settings: Settings, prompts: Sequence[str], *, chat: bool, stream: bool
) -> None:
    """Answer prompts on standard output, in order; a single one while it is written.

    Raises:
        ValueError: the engine refused a prompt.
        RuntimeError: the engine failed, as a whole or on a prompt.
    """
    live = stream and len(prompts) == 1 and settings.sampling.n == 1
    requests = [
        EngineRequest(
            request_id=str(i),
            prompt=None if chat else prompt,
            messages=({"role": "user", "content": prompt},) if chat else None,
            sampling_params=settings.sampling,
            stream=live,
        )
        for i, prompt in enumerate(prompts)
    ]
    client = launch(settings.config)
    try:
        for rejection in client.submit(requests):
            raise ValueError(f"prompt {int(rejection.request_id) + 1}: {rejection.error}")
        _print_answers(client, len(requests))
    finally:
        client.shutdown()


def _print_answers(client: EngineClient, count: int) -> None:
    """Print outputs as they come, but whole answers only in the order of their prompts."""
    finished: dict[int, RequestOutput] = {}
    num_shown = num_printed = 0
    while num_printed < count:
        for output in client.poll(POLL_SECONDS):
            assert isinstance(output, RequestOutput)
            if output.error is not None:
                raise RuntimeError(output.error)
            if output.finished:
                finished[int(output.request_id)] = output
            else:
                num_shown = _print_more(output.outputs[0].text, num_shown)
        while num_printed in finished:
            for answer in finished[num_printed].outputs:
                num_shown = _print_more(answer.text, num_shown)
                sys.stdout.write("\n")
                num_shown = 0
            num_printed += 1


def _print_more(text: str, num_shown: int) -> int:
    sys.stdout.write(text[num_shown:])
    sys.stdout.flush()
    return len(text)


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


def bench_throughput(config: EngineConfig, workload: Workload, json_file: Path | None) -> None:
    """Run a throughput measurement, print it and write it as JSON."""
    result = measure(config, workload)
    print_table(throughput_table(result))
    if json_file is not None:
        write_json(json_file, result)


def bench_profile(config: EngineConfig, workload: Workload, trace: Path | None) -> None:
    """Profile an engine, print where the time goes, and write a trace."""
    rows, spans = profile(config, workload)
    print_table(profile_table(rows))
    if trace is not None:
        write_trace(spans, trace)
