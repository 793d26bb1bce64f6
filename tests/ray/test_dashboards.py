"""A real Prometheus with our configuration has an answer to every query of every dashboard.

Two workers on Ray run a batch job that is too large for their pools, so that sequences are
preempted; Prometheus scrapes the engine and Ray's agent, and evaluates our rules.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from support.byte_llama import save_tiny_llama
from support.prometheus import query, running, wait_for

from saqqara.cluster.batch.job import BatchJob, run_batch
from saqqara.cluster.batch.summary import BatchSummary
from saqqara.cluster.on_ray.controller import ControllerClient, start_controller
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.schema import EngineConfig

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
NUM_ROWS = 40
# What Grafana would put in for a choice of one engine and the last five minutes.
VARIABLES = {"$__rate_interval": "1m", "$__range": "5m", "$job": "saqqara", "$model": ".*"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """An engine of its own name: Ray's agent goes on to show what the other tests' engines did."""
    model = tmp_path_factory.mktemp("dashboards-llama")
    save_tiny_llama(model)
    return EngineConfig(
        model=str(model),
        load_format="dummy",
        dtype="float32",
        device="cpu",
        executor="ray",
        pipeline_parallel_size=2,
        max_model_len=256,
        max_num_seqs=8,
        kv_memory_gib=0.0007,  # half of what eight sequences come to hold
        num_threads=1,
        retention="pyramidkv",
        budget=48,
        metrics_port=0,
        log_dir=str(tmp_path_factory.mktemp("logs")),
    )


@pytest.fixture(scope="module")
def client(ray_cluster: None, config: EngineConfig) -> Iterator[ControllerClient]:
    client = start_controller(config)
    yield client
    client.shutdown()


@pytest.fixture(scope="module")
def prometheus(client: ControllerClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with our configuration, but its own targets and a short interval."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / "rules.yaml")]
    engines, agents = config["scrape_configs"]
    engines["static_configs"][0]["targets"] = [client.metrics_address()]
    # The dashboard would write this file, and tests run without one.
    [node] = [node for node in ray.nodes() if node["Alive"]]
    target = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    found = folder / "prom_metrics_service_discovery.json"
    found.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": [target]}]))
    agents["file_sd_configs"][0]["files"] = [str(found)]
    # Its agent takes longer to answer than the engine.
    agents |= {"scrape_interval": "5s", "scrape_timeout": "5s"}
    with running(config, folder, num_targets=2) as address:
        yield address


@pytest.fixture(scope="module")
def job(
    client: ControllerClient,
    config: EngineConfig,
    prometheus: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> BatchSummary:
    """What became of a batch job, once Prometheus has seen its end."""
    folder = tmp_path_factory.mktemp("job")
    rows = [json.dumps({"prompt": f"row {i} " * 20}) for i in range(NUM_ROWS - 1)]
    (folder / "in.jsonl").write_text("\n".join([*rows, "not a request"]) + "\n")
    sampling = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    summary = run_batch(
        BatchJob(folder / "in.jsonl", folder / "out.jsonl", config, sampling), client
    )
    assert summary.report is not None
    assert (summary.answered, summary.errors) == (NUM_ROWS - 1, 1)
    assert summary.report.num_preemptions > 0
    done = 'sum(saqqara:batch_rows_done_total{job="saqqara"})'
    wait_for(lambda: value(prometheus, done) == NUM_ROWS)
    return summary


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Panels with queries, those in collapsed rows, too."""
    for panel in board["panels"]:
        yield from panels(panel) if panel.get("panels") else [panel]


def value(address: str, expression: str) -> float | None:
    """The value of the only series that an expression has, or None."""
    found = query(address, expression)
    return float(found[0]["value"][1]) if len(found) == 1 else None


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_every_panel_has_data(file: Path, job: BatchSummary, prometheus: str) -> None:
    board = json.loads(file.read_text())
    instance = query(prometheus, 'up{job="saqqara"}')[0]["metric"]["instance"]
    num_queries = 0
    for panel in panels(board):
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, chosen in (VARIABLES | {"$instance": instance}).items():
                expression = expression.replace(name, chosen)
            assert "$" not in expression
            found = query(prometheus, expression)
            assert found, f"{panel['title']}: no data for {expression}"
            for series in found:
                number = float(series["value"][1])
                assert math.isfinite(number), f"{panel['title']}: {number} for {expression}"
            num_queries += 1
    assert num_queries >= 10


def test_the_panels_tell_what_the_job_did(job: BatchSummary, prometheus: str) -> None:
    assert job.report is not None
    shown = {}
    for file in DASHBOARDS:
        for panel in panels(json.loads(file.read_text())):
            if panel["type"] == "stat":
                expression = panel["targets"][0]["expr"]
                for name, chosen in (VARIABLES | {"$instance": ".*"}).items():
                    expression = expression.replace(name, chosen)
                shown[file.stem, panel["title"]] = float(
                    query(prometheus, expression)[0]["value"][1]
                )
    report = job.report
    assert shown["batch", "Rows"] == NUM_ROWS
    assert shown["batch", "Left"] == 0
    assert shown["batch", "Done"] == 1
    assert shown["batch", "Errors"] == 1
    assert shown["batch", "Time left"] == 0
    assert shown["memory", "Preemptions"] == report.num_preemptions
    assert shown["memory", "Leaked pages"] == report.pages_leaked == 0
    assert shown["memory", "KV held"] == 0
    assert shown["memory", "KV kept of full"] == pytest.approx(
        report.kv_kept_bytes_peak / report.kv_full_bytes_peak, rel=1e-9
    )
    assert shown["overview", "Tokens/s out"] > 0
    assert shown["cluster", "Ranks"] == shown["cluster", "Alive"] == 2
    assert shown["cluster", "Engines ready"] == shown["cluster", "Nodes"] == 1
    assert shown["cluster", "Recoveries"] == shown["cluster", "Time down"] == 0


def test_rays_agent_gives_the_same_names(
    job: BatchSummary, config: EngineConfig, prometheus: str
) -> None:
    assert job.report is not None
    ours = f'{{model_name="{config.model}"}}'
    for metric, expected in (
        (f"sum by (job) (saqqara:batch_rows_done_total{ours})", NUM_ROWS),
        (f"max by (job) (saqqara:batch_rows{ours})", NUM_ROWS),
        (f"sum by (job) (vllm:num_preemptions_total{ours})", job.report.num_preemptions),
        (f"count by (job) (count by (job, worker) (saqqara:num_pages{ours}))", 2),
        (f"sum by (job) (vllm:request_prompt_tokens_count{ours})", NUM_ROWS - 1),
        (f"sum by (job) (vllm:request_queue_time_seconds_count{ours})", NUM_ROWS - 1),
        (f"count by (job) (vllm:iteration_tokens_total_count{ours} > 0)", 1),
        (f"max by (job) (vllm:cache_config_info{ours})", 1),
        (f"sum by (job) (saqqara:worker_info{ours})", 2),
    ):
        # Actors report to Ray's agent every few seconds.
        wait_for(
            lambda metric=metric, expected=expected: (  # type: ignore[misc]
                {s["metric"]["job"]: float(s["value"][1]) for s in query(prometheus, metric)}
                == {"saqqara": expected, "ray": expected}
            )
        )
    assert not query(prometheus, '{__name__=~"ray_(vllm|saqqara).*"}')


def test_the_rules_are_evaluated_and_a_good_run_alarms_nobody(
    job: BatchSummary, prometheus: str
) -> None:
    recorded = [
        rule["record"]
        for group in yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    ]
    # The share of KV kept is of what is held, and now nothing is.
    for name in sorted(set(recorded) - {"service:saqqara_kv_kept_of_full:ratio"}):
        wait_for(lambda name=name: bool(query(prometheus, f'{name}{{job="saqqara"}}')))  # type: ignore[misc]
    # A pool this small does preempt, but a job of some seconds is too short to alarm anybody.
    assert not query(prometheus, 'ALERTS{alertstate="firing"}')
