"""What a batch job did, in numbers: as JSON, and as one table that also compares several jobs."""

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from saqqara.cluster.engine.report import EngineReport

MIB = 2**20
SECONDS_PER_HOUR = 3600


class Cost(BaseModel):
    """What a job has cost, in the currency of the price.

    Attributes:
        gpu_hour_price: of one GPU, or of one rank where ranks have none.
        num_gpus: ranks of all replicas.
        gpu_hours: from the start of the engine to the last record, times `num_gpus`.
        total: price of these hours.
        per_million_tokens: of prompts and answers together; None where there were none.
        per_million_new_tokens: of answers alone; None where there were none.
    """

    model_config = ConfigDict(frozen=True)

    gpu_hour_price: float
    num_gpus: int
    gpu_hours: float
    total: float
    per_million_tokens: float | None
    per_million_new_tokens: float | None


def cost_of(
    gpu_hour_price: float | None, report: EngineReport | None, seconds: float
) -> Cost | None:
    """The cost of a run that took `seconds`; None without a price or where nothing ran."""
    if gpu_hour_price is None or report is None:
        return None
    num_gpus = len(report.workers)
    hours = num_gpus * seconds / SECONDS_PER_HOUR
    total = hours * gpu_hour_price

    def per_million(num_tokens: int) -> float | None:
        return total / num_tokens * 1e6 if num_tokens else None

    return Cost(
        gpu_hour_price=gpu_hour_price,
        num_gpus=num_gpus,
        gpu_hours=hours,
        total=total,
        per_million_tokens=per_million(report.prompt_tokens + report.generation_tokens),
        per_million_new_tokens=per_million(report.generation_tokens),
    )


class BatchSummary(BaseModel):
    """The outcome of one batch job.

    Attributes:
        rows: lines of the input that are not blank.
        answered, errors: records written by this run, with a result and with an error.
        resumed: records that an earlier run of the same job had already written.
        resumed_errors: how many of those are error records.
        wall_seconds: from the first request to the last record, without the engine's start.
        start_seconds: how long the engine took to start.
        integrity: `ok`, or what is wrong with the ownership of pages at the end.
        report: all measurements of the engine; None when every row was there already.
        num_replicas: engines that ran side by side; `report` is that of all of them.
        cost: None unless the job was told a price.
    """

    model_config = ConfigDict(frozen=True)

    input: str
    output: str
    model: str
    retention: str
    budget: int | str | None
    rows: int
    answered: int
    errors: int
    resumed: int
    resumed_errors: int = 0
    wall_seconds: float
    start_seconds: float
    integrity: str | None
    report: EngineReport | None
    num_replicas: int = 1
    cost: Cost | None = None

    @property
    def complete(self) -> bool:
        """Whether every row has a result or an error record."""
        return self.answered + self.errors + self.resumed == self.rows

    @property
    def all_errors(self) -> int:
        """Error records in the output, whoever wrote them."""
        return self.errors + self.resumed_errors

    @property
    def title(self) -> str:
        """Retention and budget, to tell jobs apart."""
        return self.retention if self.budget is None else f"{self.retention} {self.budget}"


def all_there(summary: BatchSummary) -> str:
    """One line for a job that an earlier run had finished."""
    errors = f", {summary.resumed_errors} of them errors" if summary.resumed_errors else ""
    return f"all {summary.rows} rows are there{errors}: {summary.output}"


def integrity_of(report: EngineReport, proved: bool) -> str:
    """The integrity check's outcome at the end of a job, in words.

    Args:
        report: taken when nothing was left to do.
        proved: whether the workers also proved who owns each page while the job ran.
    """
    if report.pages_leaked is None:
        return "unknown: still busy"
    if report.pages_leaked:
        return f"{report.pages_leaked} pages leaked"
    return "ok, owners proved" if proved else "ok, no page leaked"


def _of(cell: Callable[[EngineReport], str]) -> Callable[[BatchSummary], str]:
    return lambda summary: "-" if summary.report is None else cell(summary.report)


def _price(amount: float | None) -> str:
    return "-" if amount is None else f"{amount:,.4f}"


def _cost_rows(summary: BatchSummary) -> list[str]:
    cost = summary.cost
    if cost is None:
        return ["-"] * len(COST_ROWS)
    hours = f"{cost.gpu_hours:.3f} at {cost.gpu_hour_price:g}"
    return [hours, *map(_price, (cost.total, cost.per_million_tokens, cost.per_million_new_tokens))]


def _kept(report: EngineReport) -> str:
    kept, full = report.kv_kept_bytes_peak, report.kv_full_bytes_peak
    share = f" ({kept / full:.1%})" if full else ""
    local = report.kv_local_bytes_peak
    windows = f", and {local / MIB:.1f} MiB of local layers" if local else ""
    return f"{kept / MIB:.1f} of {full / MIB:.1f} MiB{share}{windows}"


def _recoveries(report: EngineReport) -> str:
    if not report.recoveries:
        return "none"
    causes = ", ".join(f"{count} {cause}" for cause, count in sorted(report.recoveries.items()))
    return f"{causes} ({report.down_seconds:.1f} s)"


COST_ROWS = ("GPU hours", "cost", "cost per million tokens", "cost per million tokens out")

ROWS: tuple[tuple[str, Callable[[BatchSummary], str]], ...] = (
    ("requests answered", lambda s: f"{s.answered} of {s.rows}"),
    ("error records", lambda s: str(s.errors)),
    ("from an earlier run", lambda s: str(s.resumed)),
    ("wall time", lambda s: f"{s.wall_seconds:.1f} s"),
    ("tokens in", _of(lambda r: f"{r.prompt_tokens:,}")),
    ("tokens out", _of(lambda r: f"{r.generation_tokens:,}")),
    ("tokens/s in", _of(lambda r: f"{r.prompt_tokens_per_second:,.1f}")),
    ("tokens/s out", _of(lambda r: f"{r.generation_tokens_per_second:,.1f}")),
    ("time to first token, p50", _of(lambda r: f"{r.time_to_first_token.p50:.3f} s")),
    ("time to first token, p99", _of(lambda r: f"{r.time_to_first_token.p99:.3f} s")),
    ("inter-token latency, p50", _of(lambda r: f"{r.inter_token_latency.p50:.3f} s")),
    ("inter-token latency, p99", _of(lambda r: f"{r.inter_token_latency.p99:.3f} s")),
    ("KV kept of full, at peak", _of(_kept)),
    ("sequences at once, at most", _of(lambda r: str(r.num_running_peak))),
    ("preemptions", _of(lambda r: str(r.num_preemptions))),
    ("lost workers", _of(_recoveries)),
    ("page integrity", lambda s: s.integrity or "-"),
)


def summary_table(
    summaries: Sequence[BatchSummary], extra: Sequence[tuple[str, Sequence[str]]] = ()
) -> Table:
    """One column per job; `extra` rows are (label, one cell per job)."""
    table = Table(title="Batch summary")
    table.add_column("")
    for summary in summaries:
        table.add_column(summary.title, justify="right")
    for label, cell in ROWS:
        table.add_row(label, *(cell(summary) for summary in summaries))
    if any(summary.cost is not None for summary in summaries):
        for label, costs in zip(
            COST_ROWS, zip(*map(_cost_rows, summaries), strict=True), strict=True
        ):
            table.add_row(label, *costs)
    for label, cells in extra:
        table.add_row(label, *cells)
    return table
