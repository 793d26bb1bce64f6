"""The start-up log: what runs where, and how much fits."""

from typing import Any

from support.fake_replica import make_workers

from saqqara.cluster.engine.client import EngineDescription
from saqqara.cluster.launch import sequences_that_fit, start_lines
from saqqara.configs.schema import EngineConfig


def describe(num_pages: int, **settings: Any) -> EngineDescription:
    """An engine of 2 stages with 2 layers of 2 kv heads each."""
    windows = settings.pop("windows", ())
    config = EngineConfig(model="m", max_model_len=64, **settings)
    workers = tuple(make_workers(num_pages, stages=(2, 2), windows=windows))
    return EngineDescription(config, workers, "/logs", "127.0.0.1:1234", 1.5)


def test_the_tightest_worker_says_how_many_sequences_fit() -> None:
    page_tokens = describe(1).workers[0].page_tokens
    pages_each = 2 * 2 * -(-64 // page_tokens)  # layers x kv heads x pages of a row
    assert sequences_that_fit(describe(pages_each * 5 - 1), 64) == 4
    assert sequences_that_fit(describe(pages_each * 5), 64) == 5
    half = describe(pages_each * 5, retention={"method": "streaming", "window": 8}, budget=32)
    assert sequences_that_fit(half, 64) == 10


def test_the_start_up_log_names_every_rank() -> None:
    text = "\n".join(start_lines(describe(100)))
    assert "rank 0 on" in text
    assert "layers 2 to 3" in text
    assert "attention" in text
    assert "100 pages" in text
    assert "prompts of 64 tokens at once" in text
    assert "http://127.0.0.1:1234/metrics" in text


def test_windows_of_local_layers_are_told_beside_the_budget() -> None:
    text = "\n".join(start_lines(describe(10_000, windows=(10, 10, 10, 0))))
    # 3 layers x 2 kv heads x 3 pages of 4 tokens, of 1 KiB each
    assert "of the 1 layers that see all tokens; the other 3 hold a window of 10 tokens" in text
    assert f"at most {18 * 1024 / 2**20:.1f} MiB a sequence" in text
    assert "window of" not in "\n".join(start_lines(describe(100)))
