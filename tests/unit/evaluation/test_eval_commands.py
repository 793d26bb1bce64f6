"""`saqqara eval`: what the commands run and write, on a fake engine, and how mistakes are told."""

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_client import FakeClient
from support.tiny import save_tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from saqqara.cli import app
from saqqara.cluster import llm as llm_module
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.attention_map import attention_maps, draw
from saqqara.evaluation.figures.plots import png
from saqqara.evaluation.kept_positions import kept_positions
from saqqara.evaluation.report import ReportPlan, merge
from saqqara.evaluation.result import Outcome, Result
from saqqara.evaluation.session import Session
from saqqara.evaluation.tasks.ruler import RulerTask
from saqqara.evaluation.tasks.ruler_tasks import TASKS

runner = CliRunner()
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """The command line sets up logging; tests after it should not notice."""
    root, ours = logging.getLogger(), logging.getLogger("saqqara")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeClient]:
    """The fake engines that were started."""
    started: list[FakeClient] = []

    def launch(config: EngineConfig) -> FakeClient:
        started.append(FakeClient(config, max_prompt_tokens=4000))
        return started[-1]

    monkeypatch.setattr(llm_module, "launch", launch)
    return started


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["needle", "--lengths", "many"], "lengths: must be numbers such as"),
        (["needle", "--lengths", "0"], "lengths: must be numbers over 0"),
        (["needle", "--lengths", "64,64"], "lengths: '64' is there twice"),
        (["needle", "--lengths", "1" * 5000], "lengths: must be numbers such as"),
        (["needle", "--depths", "0.5,0.50"], "depths: 0.5 is there twice"),
        (["needle", "--methods", ""], "methods: '' is no list"),
        (["needle", "--budgets", ""], "budgets: '' is no list"),
        (["needle", "--retention", "{method: snapkv, budget: 64, budget: 32}"], "is there twice"),
        (["needle", "--retention", "{method: snapkv"], "is no YAML or JSON"),
        (["needle", "--json", ""], "json: '.' is a folder"),
        (["needle", "--json", "/dev/null/x"], "json: '/dev/null/x' cannot be written"),
        (["needle", "--plot", "/dev/null/x.png"], "plot: '/dev/null/x.png' cannot be written"),
        (["calibrate", "--out", "/"], "out: '/' is a folder"),
        (["ruler", "--tasks", ""], "tasks: must be names with commas"),
        (["ruler", "--tasks", "vt,vt"], "tasks: 'vt' is there twice"),
        (["report", "--out", "/dev/null"], "out: '/dev/null' cannot be written"),
        (["needle", "--depths", "deep"], "depths: must be numbers"),
        (["needle", "--depths", "2"], "depths: must lie in [0, 1]"),
        (["needle", "--split", "test"], "split: must be tune or report"),
        (["needle", "--methods", "snapkw"], "method: unknown 'snapkw'"),
        (["needle", "--retention", "snapkv"], "budget: 'snapkv' needs one"),
        (["needle", "--plot", "out.jpeg2"], "plot: out.jpeg2 must end in .png"),
        (["ruler", "--tasks", "niah"], "tasks: unknown 'niah'"),
        (["report", "--out", "x", "--tasks", "speed"], "tasks: unknown 'speed'"),
        (["attention", "--plot", "x.png", "--layers", "a"], "layers: must be numbers"),
        (["perplexity", "--context-tokens", "9999999"], "context_tokens: a window of"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, demo_model: Path, engines: list[FakeClient]
) -> None:
    result = runner.invoke(app, ["eval", *arguments, "--model", str(demo_model)])
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    # A slow machine says meanwhile that it is still at work.
    assert sum("so far" not in line for line in result.stderr.splitlines()) == 1
    assert engines == []


def test_settings_of_the_engine_are_flags_but_for_retention() -> None:
    text = runner.invoke(app, ["eval", "needle", "--help"]).output
    assert "--max-num-seqs" in text
    assert "--budgets" in text
    assert "--budget " not in text
    assert "--temperature" not in text


def test_equal_prompts_are_submitted_side_by_side(
    demo_model: Path, engines: list[FakeClient]
) -> None:
    snapkv = Retention.parse("snapkv", "25%")
    with Session(EngineConfig(model=str(demo_model)), [snapkv]) as session:
        assert session.answers([[1, 2], [3, 4]], [1, 2])[1][0].prompt_token_ids == (3, 4)
        session.scores([[5], [6]], [[7], [8, 9]])
    submitted = [(r.prompt, r.retention) for r in engines[0].submitted]
    assert submitted == [
        (prompt, retention)
        for prompt in [(1, 2), (3, 4), (5,), (6,)]
        for retention in [Retention(), snapkv]
    ]
    limits = [request.sampling_params.max_tokens for request in engines[0].submitted[:4]]
    assert limits == [1, 1, 2, 2]
    assert all(r.sampling_params.temperature == 0 for r in engines[0].submitted[:4])
    assert not any(r.sampling_params.ignore_eos for r in engines[0].submitted)
    assert engines[0].closed


def test_needle_writes_outcomes_and_a_picture(
    demo_model: Path, engines: list[FakeClient], tmp_path: Path
) -> None:
    config = tmp_path / "engine.yaml"
    config.write_text(f"model: {demo_model}\nretention: {{method: knorm, budget: 50%}}\nseed: 3\n")
    arguments = ["eval", "needle", "--config", str(config), "--lengths", "200,300"]
    arguments += ["--depths", "0,1", "--num-samples", "2", "--retention", "snapkv@25%"]
    arguments += ["--json", str(tmp_path / "a" / "out.json"), "--plot", str(tmp_path / "out.png")]
    run = runner.invoke(app, arguments)
    assert run.exit_code == 0, run.output
    result = Result.read(tmp_path / "a" / "out.json")
    assert result.labels == ["full", "knorm@50%", "snapkv@25%"]
    assert len(result.outcomes) == 2 * 2 * 2 * 3
    assert result.settings["seed"] == 3
    assert {o.prompt_tokens for o in result.outcomes} == {200, 300}
    assert (tmp_path / "out.png").read_bytes().startswith(PNG)
    assert all(label in run.stdout for label in result.labels)
    assert len(engines) == 1


def test_longbench_from_a_folder(
    demo_model: Path, engines: list[FakeClient], tmp_path: Path
) -> None:
    record = {"input": "q", "context": "c", "answers": ["a"], "all_classes": None, "_id": "1"}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(record))
    arguments = ["eval", "longbench", "--data", str(tmp_path), "--model", str(demo_model)]
    out = tmp_path / "out.json"
    arguments += ["--methods", "snapkv,random", "--budgets", "64,50%", "--json", str(out)]
    run = runner.invoke(app, arguments)
    assert run.exit_code == 0, run.output
    labels = ["full", "snapkv@64", "snapkv@50%", "random@64", "random@50%"]
    assert Result.read(out).labels == labels


def test_a_report_goes_on_where_it_was(
    demo_model: Path, engines: list[FakeClient], tmp_path: Path
) -> None:
    def report(*more: str) -> str:
        arguments = ["eval", "report", "--out", str(tmp_path), "--model", str(demo_model)]
        arguments += ["--tasks", "needle,agreement", "--length", "300"]
        run = runner.invoke(app, [*arguments, "--num-samples", "1", *more])
        assert run.exit_code in (0, 2), run.output
        return run.stderr if run.exit_code else run.stdout

    grid = ("--retention", "snapkv@25%")
    assert "report.html" in report(*grid)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # a curve, maps, a curve, the pyramid
    assert 'src="http' not in page
    assert "<link" not in page
    assert all(label in page for label in ("full", "snapkv@25%"))
    assert sorted(file.stem for file in tmp_path.glob("*.json")) == ["agreement", "needle"]
    assert len(engines) == 1
    report(*grid)
    assert len(engines) == 1  # nothing was missing, so no engine was started

    (tmp_path / "needle.json").unlink()
    report(*grid)
    assert len(engines) == 2
    assert len(engines[1].submitted) == 5 * 2  # a prompt at each depth under two settings
    assert (tmp_path / "report.html").read_text() == page

    said = report(*grid, "--seed", "1")
    assert "was made with other settings" in said
    assert len(engines) == 2

    # A setting that is added is run alone, with full, which it is compared with.
    both = Result.read(tmp_path / "needle.json")
    report("--retention", "knorm@25%")
    assert len(engines) == 3
    retentions = [one.retention for one in engines[2].submitted]
    assert {str(getattr(one, "label", one)) for one in retentions} == {"full", "knorm@25%"}
    more = Result.read(tmp_path / "needle.json")
    assert more.only(both.labels) == both
    assert more.labels == [*both.labels, "knorm@25%"]
    assert len(more.of("knorm@25%")) == 5
    assert (tmp_path / "report.html").read_text() != page
    report(*grid)
    assert (tmp_path / "report.html").read_text() == page

    changed = (tmp_path / "needle.json").read_text().replace('"window": 32', '"window": 16')
    (tmp_path / "needle.json").write_text(changed)
    assert "was made with other retentions" in report(*grid)


def test_a_report_has_a_cell_for_each_kind_of_question() -> None:
    cells = ReportPlan(length=512, num_samples=3, seed=7).cells()
    assert [*cells] == ["needle", *(f"ruler-{name}" for name in TASKS), "perplexity", "agreement"]
    assert cells["ruler-niah_single"] == RulerTask(
        ("niah_single",), (512,), 3, seed=7, split="report"
    )


def test_merged_cells_count_every_prompt_once() -> None:
    def part(group: str, tokens: int, kept: float, scores: list[float]) -> Result:
        outcomes = tuple(
            Outcome("full", sample, group, tokens, score) for sample, score in enumerate(scores)
        )
        full = {"full": Retention().to_dict()}
        return Result("ruler", "m", {}, full, {"full": kept}, tokens * 10.0, outcomes)

    one, two = part("a", 100, 0.5, [1.0, 0.0]), part("b", 300, 1.0, [1.0, 1.0])
    merged = merge([one, two])
    assert [(o.sample, o.group) for o in merged.outcomes] == [
        (0, "a"),
        (1, "a"),
        (2, "b"),
        (3, "b"),
    ]
    assert merged.kept_shares["full"] == (200 * 0.5 + 600) / 800
    assert merged.full_kv_bytes == 2000.0
    assert merge([one]) is one


# Attention, on a tiny random model ----------------------------------------------------------------


def test_kept_positions_are_those_of_the_definition(tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    config = EngineConfig(model=str(tmp_path))
    prompt = [3 + (7 * i * i + i) % 190 for i in range(80)]
    settings = [
        Retention.parse({"method": "streaming", "budget": 24, "window": 8}),
        Retention.parse({"method": "pyramidkv", "budget": 24, "window": 8}),
        Retention(),
    ]
    streaming, pyramid, full = kept_positions(config, prompt, settings)
    assert full == (((*range(80),),) * 3,) * 3
    assert streaming == (((0, 1, 2, 3, *range(60, 80)),) * 3,) * 3
    counts = [[len(head) for head in layer] for layer in pyramid]
    assert counts == settings[1].row_tokens(80, 3, 3).tolist()
    for layer in pyramid:
        for head in layer:
            assert head[:4] == (0, 1, 2, 3)
            assert head[-8:] == tuple(range(72, 80))


def test_kept_positions_where_hidden_states_are_dropped(tmp_path: Path) -> None:
    """No key of the upper layers is one of the whole prompt's: the worker has to know."""
    save_tiny("llama-gqa", tmp_path)
    dropping = {"rho": 0.4, "min_context": 4}
    cut_too = {"method": "pyramidkv", "budget": 24, "window": 8}
    settings = [
        Retention.parse({"method": "pyramidinfer", **dropping}),
        Retention.parse({**cut_too, "propagate": {"kind": "pyramidinfer", **dropping}}),
    ]
    prompt = [3 + (7 * i * i + i) % 190 for i in range(80)]
    entered, cut = kept_positions(EngineConfig(model=str(tmp_path)), prompt, settings)
    assert [len(layer[0]) for layer in entered] == list(settings[0].entering_tokens(80, 3))
    for below, rows in itertools.pairwise(entered):
        assert set(rows) == {rows[0]}, "heads of a layer differ"
        assert set(rows[0]) <= set(below[0])
        assert rows[0][:4] == (0, 1, 2, 3)
        assert rows[0][-17:] == tuple(range(63, 80))
    counts = [[len(head) for head in layer] for layer in cut]
    assert counts == settings[1].row_tokens(80, 3, 3).tolist()
    for rows, whole in zip(cut, entered, strict=True):
        assert all(set(head) <= set(whole[0]) for head in rows)


def test_attention_maps_are_causal_shares_of_the_chosen_layers(tmp_path: Path) -> None:
    save_tiny("llama-gqa", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.num_hidden_layers == 3
    config = EngineConfig(model=str(tmp_path))
    setting = Retention.parse({"method": "snapkv", "budget": 24, "window": 8})
    dropping = Retention.parse({"method": "pyramidinfer", "rho": 0.4, "min_context": 4})
    prompt = list(range(3, 63))
    found = attention_maps(config, prompt, [setting, dropping], layers=[0, 2])
    assert found.maps.shape == (2, 3, 60, 60)
    assert found.maps.sum(axis=-1) == pytest.approx(1.0, abs=1e-5)
    assert found.maps[..., 0, 1:].max() == 0.0
    assert [len(found.kept[one.label]) for one in (setting, dropping)] == [3, 3]
    assert png(draw(found)).startswith(PNG)
    with pytest.raises(ValueError, match="layers: must be of 0 to 2"):
        attention_maps(config, prompt, [setting], layers=[3])
    with pytest.raises(ValueError, match="maps take 1 to 1024"):
        attention_maps(config, prompt * 20, [setting])
