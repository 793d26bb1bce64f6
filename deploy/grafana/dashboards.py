"""The Grafana dashboards as code; writes `overview.json` and the others here.

    .venv/bin/python deploy/grafana/dashboards.py [FOLDER]

The files are what Grafana loads, so a change here comes with the files that it makes. Their form
depends on the SDK's version, which `constraints.txt` pins.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from panels import (
    Query,
    bars_by_layer,
    dashboard,
    graph,
    number,
    or_zero,
    quantile,
    quantiles,
    rate,
    series,
    total,
)
from ranks_board import cluster
from reuse_row import used_again


def overview() -> Any:
    """Requests, tokens, latencies, queue and errors."""
    finished = "vllm:request_success_total"
    errors = rate(finished, matchers='finished_reason="error"')
    return dashboard(
        "overview",
        "Overview",
        "What the engines do, how fast they answer, and whether they fail.",
        [
            (
                "Now",
                [
                    number(
                        "Running",
                        "Sequences in prefill or decode.",
                        "none",
                        total("vllm:num_requests_running"),
                    ),
                    number(
                        "Waiting",
                        "Sequences without a slot.",
                        "none",
                        total("vllm:num_requests_waiting"),
                    ),
                    number(
                        "Tokens/s in",
                        "Prompt tokens prefilled per second.",
                        "none",
                        rate("vllm:prompt_tokens_total"),
                    ),
                    number(
                        "Tokens/s out",
                        "Tokens generated per second.",
                        "none",
                        rate("vllm:generation_tokens_total"),
                    ),
                    number(
                        "TTFT p99",
                        "Time to the first token, 99th percentile.",
                        "s",
                        quantile(0.99, "vllm:time_to_first_token_seconds"),
                    ),
                    number(
                        "Errors",
                        "Share of requests that ended with an error.",
                        "percentunit",
                        or_zero(f"{errors} / ({rate(finished)} > 0)"),
                    ),
                ],
            ),
            (
                "Load",
                [
                    graph(
                        "Requests finished",
                        "By reason: stop, length, abort (the client went away) and error.",
                        "reqps",
                        Query(rate(finished, "finished_reason"), "{{finished_reason}}"),
                    ),
                    graph(
                        "Queue",
                        "Sequences that run, and that wait for a slot or pages.",
                        "none",
                        Query(total("vllm:num_requests_running"), "running"),
                        Query(total("vllm:num_requests_waiting"), "waiting"),
                    ),
                    graph(
                        "Tokens per second",
                        "In: prompt tokens prefilled. Out: tokens generated.",
                        "none",
                        Query(rate("vllm:prompt_tokens_total"), "in"),
                        Query(rate("vllm:generation_tokens_total"), "out"),
                    ),
                    graph(
                        "Seconds of step per second",
                        "By phase, on the slowest worker of each step.",
                        "percentunit",
                        Query(rate("saqqara:step_seconds_sum", "phase"), "{{phase}}"),
                    ),
                ],
            ),
            (
                "Latency",
                [
                    graph(
                        "Time to first token",
                        "From arrival; includes the wait in the queue.",
                        "s",
                        *quantiles("vllm:time_to_first_token_seconds"),
                    ),
                    graph(
                        "Inter-token latency",
                        "Between two tokens of one sequence.",
                        "s",
                        *quantiles("vllm:inter_token_latency_seconds"),
                    ),
                    graph(
                        "Request latency",
                        "From arrival to the last token.",
                        "s",
                        *quantiles("vllm:e2e_request_latency_seconds"),
                    ),
                    graph(
                        "Errors and aborts",
                        "Requests that ended with an error, or because their client went away.",
                        "reqps",
                        Query(or_zero(errors), "error"),
                        Query(or_zero(rate(finished, matchers='finished_reason="abort"')), "abort"),
                    ),
                ],
            ),
            (
                "Workers",
                [
                    graph(
                        "Lost workers",
                        "Recoveries per second by how workers were lost: died, failed, hung or "
                        "unreachable.",
                        "ops",
                        Query(rate("saqqara:recoveries_total", "cause"), "{{cause}}"),
                    ),
                    graph(
                        "Time without workers",
                        "Share of the time in which lost workers were started again, summed over "
                        "engines; it counts when they are back.",
                        "percentunit",
                        Query(rate("saqqara:down_seconds_total"), "down"),
                    ),
                ],
            ),
        ],
    )


def memory() -> Any:
    """Where KV goes: kept against full, by layer, by worker; and what its want costs."""
    kept, dropped = "saqqara:kept_tokens_total", "saqqara:dropped_tokens_total"
    by_layer = (
        f"sum by (layer) (increase({series(kept)}[$__range])) / "
        f"(sum by (layer) (increase({series(kept)}[$__range])) + "
        f"sum by (layer) (increase({series(dropped)}[$__range])))"
    )
    by_worker = "instance, model_name, worker"
    worker = "{{model_name}} worker {{worker}}"
    used = f"{total('saqqara:num_pages', by_worker)} - {total('saqqara:pages_free', by_worker)}"
    return dashboard(
        "memory",
        "Memory",
        "How much of the KV cache is kept, where it lies, and whether pages run out.",
        [
            (
                "Now",
                [
                    number(
                        "KV kept of full",
                        "Bytes of pages held, of what full retention would hold, at the peak.",
                        "percentunit",
                        f"{total('saqqara:kv_kept_bytes_peak')} / "
                        f"({total('saqqara:kv_full_bytes_peak')} > 0)",
                    ),
                    number(
                        "KV held",
                        "Bytes of KV pages that sequences hold.",
                        "bytes",
                        total("saqqara:kv_kept_bytes"),
                    ),
                    number(
                        "Pages in use",
                        "On the worker with the least free.",
                        "percentunit",
                        f"max({series('vllm:kv_cache_usage_perc')})",
                    ),
                    number(
                        "Preemptions",
                        "Sequences that lost their slot for a while, since the start.",
                        "none",
                        or_zero(total("vllm:num_preemptions_total")),
                    ),
                    number(
                        "Refused",
                        "Sequences that a worker had no pages for, since the start.",
                        "none",
                        or_zero(total("saqqara:num_refusals_total")),
                    ),
                    number(
                        "Leaked pages",
                        "Pages that nobody held and that were not free; anything but 0 is a bug.",
                        "none",
                        total("saqqara:pages_leaked"),
                    ),
                ],
            ),
            (
                "The pyramid",
                [
                    bars_by_layer(
                        "Kept share by layer",
                        "Prompt tokens kept after prefill, of all, over the time range.",
                        "percentunit",
                        by_layer,
                    ),
                    graph(
                        "KV kept and full",
                        "Bytes of pages held, and what full retention would hold.",
                        "bytes",
                        Query(total("saqqara:kv_kept_bytes"), "kept"),
                        Query(total("saqqara:kv_full_bytes"), "full"),
                        Query(total("saqqara:kv_local_bytes"), "windows of local layers"),
                    ),
                    graph(
                        "Prompt tokens kept",
                        "Share of prompt tokens kept after prefill, by retention method.",
                        "percentunit",
                        Query(
                            f"{rate(kept, 'method')} / "
                            f"({rate(kept, 'method')} + {rate(dropped, 'method')})",
                            "{{method}}",
                        ),
                    ),
                ],
            ),
            (
                "Pages",
                [
                    graph(
                        "Pages used per worker",
                        "Of the worker's pool.",
                        "none",
                        Query(used, worker),
                    ),
                    graph(
                        "Pages free per worker",
                        "The worker with the least free decides what is admitted.",
                        "none",
                        Query(total("saqqara:pages_free", by_worker), worker),
                    ),
                    graph(
                        "Preempted and refused",
                        "Sequences per second that lost their slot, or that a worker had no pages "
                        "for.",
                        "ops",
                        Query(or_zero(rate("vllm:num_preemptions_total")), "preempted"),
                        Query(or_zero(rate("saqqara:num_refusals_total")), "refused"),
                    ),
                    graph(
                        "Memory of the workers",
                        "By what it is for, summed over workers; peaks since start-up.",
                        "bytes",
                        Query(total("saqqara:worker_memory_bytes", "kind"), "{{kind}}"),
                    ),
                ],
            ),
            used_again(),
        ],
    )


def batch() -> Any:
    """How far batch jobs are, and when they will end."""
    done, rows, left = (
        "saqqara:batch_rows_done_total",
        "saqqara:batch_rows",
        "saqqara:batch_rows_left",
    )
    speed = f"sum(rate({series(done)}[5m]))"
    errors = total(done, matchers='outcome="error"')
    return dashboard(
        "batch",
        "Batch jobs",
        "How far batch jobs are, how fast they go, and when they will end.",
        [
            (
                "Now",
                [
                    number("Rows", "Rows of the input.", "none", total(rows)),
                    number("Left", "Rows without a record yet.", "none", total(left)),
                    number(
                        "Done",
                        "Share of rows with a record, of earlier runs of the job, too.",
                        "percentunit",
                        f"1 - {total(left)} / ({total(rows)} > 0)",
                    ),
                    number("Errors", "Error records that this run wrote.", "none", or_zero(errors)),
                    number("Rows/s", "Over the last five minutes.", "none", speed),
                    number(
                        "Time left",
                        "At the speed of the last five minutes.",
                        "s",
                        f"{total(left)} / ({speed} > 0)",
                    ),
                ],
            ),
            (
                "Over time",
                [
                    graph(
                        "Rows left",
                        "Rows without a record yet, by engine.",
                        "none",
                        Query(total(left, "instance, model_name"), "{{model_name}} {{instance}}"),
                    ),
                    graph(
                        "Rows per second",
                        "Records written, by outcome.",
                        "none",
                        Query(rate(done, "outcome"), "{{outcome}}"),
                    ),
                    graph(
                        "Tokens per second",
                        "In: prompt tokens prefilled. Out: tokens generated.",
                        "none",
                        Query(rate("vllm:prompt_tokens_total"), "in"),
                        Query(rate("vllm:generation_tokens_total"), "out"),
                    ),
                    graph(
                        "Error records",
                        "That this run wrote.",
                        "none",
                        Query(or_zero(errors), "errors"),
                    ),
                ],
            ),
        ],
    )


DASHBOARDS: dict[str, Callable[[], Any]] = {
    "overview.json": overview,
    "memory.json": memory,
    "batch.json": batch,
    "cluster.json": cluster,
}


def write(folder: Path) -> None:
    """Write every dashboard into a folder."""
    for name, build in DASHBOARDS.items():
        text = JSONEncoder(sort_keys=True, indent=2).encode(build().build())
        (folder / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
