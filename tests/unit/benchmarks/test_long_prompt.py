"""`benchmarks/long_prompt.py`: a deeper model takes more for its weights and kept pages alone."""

from long_prompt import measure, summary

from saqqara.compression.retention import Retention

TOKENS, BUDGET, PAGE, ROW_TOKEN_BYTES, HEADS = 300, 64, 16, 2 * 64 * 2, 1


def test_a_deeper_model_takes_more_weights_and_kept_pages() -> None:
    retention = Retention.parse("snapkv", budget=BUDGET)
    shallow, deep = (measure(layers, TOKENS, retention) for layers in (2, 5))
    kept = BUDGET // PAGE * PAGE * HEADS * ROW_TOKEN_BYTES
    assert (shallow.kept_pages, deep.kept_pages) == (2 * kept, 5 * kept)
    fresh = TOKENS * HEADS * ROW_TOKEN_BYTES
    assert (shallow.prefill_kv, deep.prefill_kv) == (2 * kept + fresh, 5 * kept + fresh)
    assert shallow.activations == deep.activations
    found = summary(shallow, deep)
    assert found["explained"] == found["more"]["weights"] + 3 * kept
