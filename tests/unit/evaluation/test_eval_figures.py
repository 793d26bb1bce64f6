"""Quality figures: grids of settings, intervals, metrics and tables, by hand-computed values."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny import CONFIGS

from saqqara.compression.retention import Retention
from saqqara.evaluation.figures.interval import bootstrapped, proportion
from saqqara.evaluation.figures.plots import distinct_colours
from saqqara.evaluation.figures.summary import group_cells, overall_cells, summarise
from saqqara.evaluation.grid import (
    full_bytes,
    kept_share,
    local_bytes,
    parse_grid,
    parse_setting,
    with_full,
)
from saqqara.evaluation.result import Outcome, Result
from saqqara.evaluation.tasks import text_metrics as metrics
from saqqara.workers.models.spec import load_spec


def test_settings_are_written_as_reports_name_them() -> None:
    found = parse_grid("full,snapkv,{method: pyramidkv, beta: 5}", "10%,64")
    assert [one.label for one in with_full(found)] == [
        "full",
        "snapkv@10%",
        "snapkv@64",
        "pyramidkv@10%,beta=5",
        "pyramidkv@64,beta=5",
    ]
    assert parse_setting("pyramidkv@25%") == Retention.parse("pyramidkv", "25%")
    json_text = '{"method": "knorm", "budget": 99, "window": 8}'
    same = {"method": "knorm", "budget": 99, "window": 8}
    assert parse_setting(json_text) == Retention.parse(same)
    assert parse_setting("full") == Retention()


def test_full_comes_first_and_each_setting_once() -> None:
    one = Retention.parse("snapkv", "25%")
    assert with_full([one, Retention(), one]) == (Retention(), one)


@pytest.mark.parametrize(
    ("methods", "budgets", "said"),
    [
        ("", "25%", "methods: '' is no list"),
        ("snapkv", "", "budgets: '' is no list"),
        ("[snapkv", "25%", "methods: "),
        ("snapkv,3", "25%", "methods: 3 is neither"),
        ("snapkw", "25%", "unknown 'snapkw'"),
        ("snapkv", "a lot", "budget: must be tokens or a share"),
    ],
)
def test_a_wrong_grid_is_named(methods: str, budgets: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        parse_grid(methods, budgets)


def test_a_wrong_setting_is_named() -> None:
    with pytest.raises(ValueError, match="no YAML or JSON"):
        parse_setting("{method: ")
    with pytest.raises(ValueError, match="needs one"):
        parse_setting("snapkv")


def test_kept_shares_are_those_of_the_budgets(tmp_path: Path) -> None:
    CONFIGS["llama-gqa"].save_pretrained(tmp_path)
    spec = load_spec(str(tmp_path))
    assert kept_share(Retention(), [100, 300], spec) == 1.0
    # 25% of 100 is raised to the window, the sinks and one more: 37; 25% of 300 is 75.
    assert kept_share(Retention.parse("pyramidkv", "25%"), [100, 300], spec) == 112 / 400
    assert full_bytes(10, spec, "float32") == 2 * 10 * 3 * 3 * 16 * 4
    windowed = replace(spec, windows=(6, 0, 6))
    assert kept_share(Retention.parse("pyramidkv", "25%"), [100, 300], windowed) == 112 / 400
    assert full_bytes(10, windowed, "float32") == 2 * 10 * 1 * 3 * 16 * 4
    assert local_bytes(10, windowed, "float32") == 2 * 6 * 2 * 3 * 16 * 4
    assert full_bytes(10, spec, "bfloat16") == 2 * 10 * 3 * 3 * 16 * 2


def test_wilsons_interval() -> None:
    # 8 of 10, by the textbook formula with z = 1.96: centre 0.7168, half width 0.2268.
    found = proportion([1.0] * 8 + [0.0] * 2)
    assert found.value == 0.8
    assert found.low == pytest.approx(0.4901, abs=1e-3)
    assert found.high == pytest.approx(0.9434, abs=1e-3)
    nothing = proportion([0.0] * 10)
    assert nothing.low == 0.0
    z2 = 1.959963984540054**2
    assert nothing.high == pytest.approx(z2 / (10 + z2))
    assert proportion([1.0] * 10).low == pytest.approx(10 / (10 + z2))
    with pytest.raises(ValueError, match="at least one score"):
        proportion([])
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        proportion([1.5])


def test_bootstrap_intervals_are_those_of_a_normal_mean_where_there_is_much_data() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 4000)
    found = bootstrapped(values.tolist())
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(4000)
    # 2000 resamples put the quantiles within some 5% of their place.
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    again = bootstrapped(values.tolist(), np.exp)
    assert again.value == pytest.approx(math.exp(values.mean()))
    assert again.low < again.value < again.high
    assert bootstrapped([0.0, 0.0]).text(".1f") == "0.0 [0.0, 0.0]"
    assert bootstrapped([0.5]).text(".1f") == "0.5 [one prompt]"
    with pytest.raises(ValueError, match="at least one value"):
        bootstrapped([])


def test_qa_f1_counts_common_words() -> None:
    assert metrics.qa_f1("The Cat, sat.", "cat sat") == 1.0
    # cat and sat of 3 and 4 words.
    assert metrics.qa_f1("cat sat down", "black cat sat quietly") == pytest.approx(4 / 7)
    assert metrics.qa_f1("dog", "cat") == 0.0
    assert metrics.qa_f1("cat cat", "cat") == pytest.approx(2 / 3)
    assert metrics.qa_f1_zh("北京。", "北京市") == pytest.approx(4 / 5)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    assert metrics.longest_common("ABCBDAB", "BDCABA") == 4
    assert metrics.longest_common("", "AB") == 0
    # police the gunman: the gunman stays in order, 4 and 4 words.
    assert metrics.rouge_l("police kill the gunman", "the gunman kill police") == 0.5
    assert metrics.rouge_l("", "a") == 0.0
    assert metrics.rouge_l_zh("今天下雨", "今天, 雨") == pytest.approx(6 / 7)


def test_classes_numbers_and_code() -> None:
    classes = ["City", "Other city", "Person"]
    assert metrics.classification("Other city", "Other city", classes) == 1.0
    assert metrics.classification("Person or City", "City", classes) == 0.5
    assert metrics.classification("nothing", "City", classes) == 0.0
    assert metrics.retrieval("Paragraph 12", "Paragraph 12") == 1.0
    assert metrics.retrieval("Paragraph 1 or 12", "Paragraph 12") == 0.5
    assert metrics.retrieval("none", "Paragraph 12") == 0.0
    with pytest.raises(ValueError, match="names no paragraph"):
        metrics.retrieval("1", "none")
    assert metrics.count("There are 7, so 7", "7") == 1.0
    assert metrics.count("7 of 9", "9") == 0.5
    assert metrics.code_similarity("# a comment\nreturn x\nmore", "return x") == 1.0
    assert metrics.code_similarity("abcd", "bcde") == 0.75


def outcomes(scores: dict[str, list[float]], task: str) -> Result:
    """A result with one prompt of 10 tokens for each score, the last in a group of its own."""
    found = []
    for label, values in scores.items():
        for sample, score in enumerate(values):
            group = "b" if sample == len(values) - 1 else "a"
            details = {
                "divergence": 1 - score,
                "logprob_difference": -score,
                "identical": score == 1,
            }
            found.append(Outcome(label, sample, group, 10, score, details))
    settings = {"full": Retention(), "snapkv@64": Retention.parse("snapkv", 64)}
    return Result(
        task=task,
        model="m",
        settings={"seed": 1},
        retentions={label: settings[label].to_dict() for label in scores},
        kept_shares={"full": 1.0, "snapkv@64": 0.5},
        full_kv_bytes=4 * 2**20,
        outcomes=tuple(found),
    )


def test_a_result_reads_back_as_it_was_written(tmp_path: Path) -> None:
    result = outcomes({"full": [1.0, 0.0], "snapkv@64": [0.0, 0.0]}, "needle")
    file = tmp_path / "deep" / "result.json"
    result.write(file)
    again = Result.read(file)
    assert again.outcomes == result.outcomes
    assert again.kept_shares == result.kept_shares
    assert again.retention("snapkv@64") == Retention.parse("snapkv", 64)
    file.write_text("{}")
    with pytest.raises(ValueError, match="not the result"):
        Result.read(file)


def test_tables_split_by_group_and_sum_up() -> None:
    result = outcomes({"full": [1.0, 1.0, 0.0], "snapkv@64": [1.0, 0.0, 0.0]}, "needle")
    assert result.groups == ["a", "b"]
    header, full, snapkv = overall_cells(result)
    assert header == ["retention", "kept", "KV per prompt", "prompts", "score"]
    assert full[:4] == ["full", "100.0%", "4.0 MiB", "3"]
    assert full[4].startswith("66.7% [")
    assert snapkv[:4] == ["snapkv@64", "50.0%", "2.0 MiB", "3"]
    windowed = replace(result, local_kv_bytes=3 * 2**20)  # what local layers hold stands beside
    assert overall_cells(windowed)[2][1:3] == ["50.0%", "2.0 + 3.0 MiB"]
    cells = group_cells(result)
    assert cells[0] == ["retention", "a", "b"]
    assert [cell.split()[0] for cell in cells[2]] == ["snapkv@64", "50.0%", "0.0%"]


def test_perplexity_ratios_are_paired_with_full() -> None:
    # Windows differ much, the setting costs exactly 0.1 nats on each: so the ratio is certain.
    result = outcomes({"full": [1.0, 5.0, 3.0], "snapkv@64": [1.1, 5.1, 3.1]}, "perplexity")
    full, row = summarise(result)
    ratio = row.figures["ratio to full"][0]
    assert ratio.value == pytest.approx(math.exp(0.1))
    assert (ratio.low, ratio.high) == pytest.approx((ratio.value, ratio.value))
    assert full.figures["perplexity"][0].value == pytest.approx(math.exp(3.0))
    assert full.figures["ratio to full"][0].value == 1.0


def test_agreement_names_what_it_has() -> None:
    result = outcomes({"full": [1.0, 1.0], "snapkv@64": [0.5, 1.0]}, "agreement")
    row = summarise(result)[1]
    assert row.figures["top-1 agreement"][0].value == 0.75
    assert row.figures["logprob of full's token - full's"][0].value == -0.75
    assert row.figures["greedy answers identical"][0].value == 0.5


@pytest.mark.parametrize("count", [0, 1, 10, 11, 20, 21, 60])
def test_no_colour_comes_twice_in_a_picture(count: int) -> None:
    colours = distinct_colours(count)
    assert len(set(colours)) == len(colours) == count
