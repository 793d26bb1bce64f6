"""The dashboard of ranks: who is there, who was lost, and what each spends its steps on."""

from typing import Any

from panels import Query, dashboard, graph, number, or_zero, rate, series, total

_BY_WORKER = "instance, model_name, worker"
_WORKER = "{{model_name}} worker {{worker}}"
_SECONDS = "saqqara:worker_seconds_total"
_WHOLE = 'phase="total"'


def cluster() -> Any:
    """Ranks, recoveries, and the phases of steps by rank."""
    alive, workers = total("saqqara:workers_alive"), total("saqqara:workers")
    lost, info = "saqqara:workers_lost_total", "saqqara:worker_info"
    slowest = f"max by (instance, model_name) ({rate(_SECONDS, _BY_WORKER, _WHOLE)})"
    return dashboard(
        "cluster",
        "Cluster",
        "Whether the ranks of the engines are there, and what each spends its time on.",
        [
            (
                "Now",
                [
                    number("Ranks", "That the engines run on.", "none", workers),
                    number("Alive", "Ranks that are there now.", "none", alive),
                    number(
                        "Engines ready",
                        "Share of the engines that can generate tokens now.",
                        "percentunit",
                        f"avg({series('saqqara:ready')})",
                    ),
                    number(
                        "Recoveries",
                        "Times that lost ranks were started again, since the start.",
                        "none",
                        or_zero(total("saqqara:recoveries_total")),
                    ),
                    number(
                        "Time down",
                        "Without ranks, since the start; it counts when they are back.",
                        "s",
                        or_zero(total("saqqara:down_seconds_total")),
                    ),
                    number(
                        "Nodes",
                        "Hosts that have a rank at work.",
                        "none",
                        f"count(count by (hostname) ({series(info)} == 1))",
                    ),
                ],
            ),
            (
                "Ranks",
                [
                    graph(
                        "Ranks alive",
                        "Of those that the engines run on. A lost rank takes its engine's others "
                        "with it until all are started again.",
                        "none",
                        Query(alive, "alive"),
                        Query(workers, "all"),
                    ),
                    graph(
                        "Ranks by node",
                        "Where the ranks are that are at work.",
                        "none",
                        Query(f"count by (hostname) ({series(info)} == 1)", "{{hostname}}"),
                    ),
                    graph(
                        "Ranks lost",
                        "Losses per second by the rank that was the cause, and how: died, failed, "
                        "hung or unreachable. Rank -1: nobody knows.",
                        "ops",
                        Query(
                            or_zero(rate(lost, "worker, cause")),
                            "worker {{worker}} {{cause}}",
                        ),
                    ),
                    graph(
                        "Recoveries",
                        "Times per second that lost ranks were started again, and share of the "
                        "time without ranks.",
                        "none",
                        Query(rate("saqqara:recoveries_total"), "recoveries per second"),
                        Query(rate("saqqara:down_seconds_total"), "share of time down"),
                    ),
                ],
            ),
            (
                "Steps",
                [
                    graph(
                        "Busy ranks",
                        "Seconds of step per second of each rank.",
                        "percentunit",
                        Query(rate(_SECONDS, _BY_WORKER, _WHOLE), _WORKER),
                    ),
                    graph(
                        "Behind the busiest",
                        "Seconds of step per second that a rank has less than the busiest rank of "
                        "its engine: what a better layer split would use.",
                        "percentunit",
                        Query(
                            f"{slowest} - on (instance, model_name) group_right () "
                            f"{rate(_SECONDS, _BY_WORKER, _WHOLE)}",
                            _WORKER,
                        ),
                    ),
                    graph(
                        "Prefill and decode by rank",
                        "Seconds per second of each rank in these phases.",
                        "percentunit",
                        Query(
                            rate(_SECONDS, f"{_BY_WORKER}, phase", 'phase=~"prefill|decode"'),
                            f"{_WORKER} {{{{phase}}}}",
                        ),
                    ),
                    graph(
                        "Phases of all ranks",
                        "Seconds per second by phase, summed over ranks.",
                        "none",
                        Query(rate(_SECONDS, "phase", 'phase!="total"'), "{{phase}}"),
                    ),
                ],
            ),
        ],
    )
