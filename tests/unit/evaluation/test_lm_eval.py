"""The adapter for lm-evaluation-harness: its three questions, asked of our engine.

Runs against the harness where it is installed, else against the two names that the adapter uses.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.fake_client import FakeClient

from saqqara.cluster import llm as llm_module
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.configs.schema import EngineConfig

ADAPTER = "saqqara.evaluation.lm_eval"


class HarnessLM:
    """What the adapter inherits from."""

    def __init__(self) -> None:
        self.started = True


def register_model(name: str) -> Callable[[type], type]:
    assert name == "saqqara"
    return lambda cls: cls


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    client = FakeClient(max_prompt_tokens=30)

    def launch(config: EngineConfig) -> FakeClient:
        client.config = config
        return client

    monkeypatch.setattr(llm_module, "launch", launch)
    return client


@pytest.fixture
def model(client: FakeClient, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    installed = importlib.util.find_spec("lm_eval") is not None
    if not installed:
        parts: dict[str, dict[str, Any]] = {
            "lm_eval": {},
            "lm_eval.api": {},
            "lm_eval.api.model": {"LM": HarnessLM},
        }
        parts["lm_eval.api.registry"] = {"register_model": register_model}
        for name, content in parts.items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
    adapter = importlib.import_module(ADAPTER)
    yield adapter.SaqqaraLM(
        model=str(demo_model), retention="snapkv", budget="25%", max_model_len=30, batch_size="auto"
    )
    if not installed:  # the harness itself registers a name only once
        sys.modules.pop(ADAPTER, None)


def asked(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


@pytest.fixture
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer.load(demo_model)


def test_settings_reach_the_engine(model: Any, client: FakeClient) -> None:
    assert (client.config.retention, client.config.budget) == ("snapkv", "25%")
    assert model.max_length == 30


def test_pairs_are_scored_with_the_space_at_the_continuation(
    model: Any, client: FakeClient, tokenizer: Tokenizer
) -> None:
    found = model.loglikelihood([asked("The capital of ", "France"), asked("", "One")])
    first, second = client.submitted
    assert first.prompt == tuple(tokenizer.encode("The capital of"))
    assert first.score_continuation == tuple(tokenizer.encode(" France"))
    assert second.prompt == (tokenizer.bos_token_id,)
    expected = -float(sum(tokenizer.encode(" France")))
    assert found[0] == (expected, True)


def test_long_contexts_lose_their_beginning(
    model: Any, client: FakeClient, tokenizer: Tokenizer
) -> None:
    text = "one two three four five " * 20
    model.loglikelihood([asked(text, "six seven")])
    context, rest = client.submitted[0].prompt, client.submitted[0].score_continuation
    assert context is not None
    assert rest is not None
    assert len(context) + len(rest) == 30
    assert [*context, *rest] == tokenizer.encode(text + "six seven")[-30:]
    with pytest.raises(ValueError, match=r"continuation: .* do not fit"):
        model.loglikelihood([asked("a", text)])


def test_rolling_windows_predict_every_token_once(
    model: Any, client: FakeClient, tokenizer: Tokenizer
) -> None:
    tokens = tokenizer.encode("one two three four five six " * 12)
    found = model.loglikelihood_rolling([asked(tokenizer.decode(tokens)), asked("One")])
    windows = [(r.prompt, r.score_continuation) for r in client.submitted]
    scored = [rest for _, rest in windows[:-1]]
    assert [token for rest in scored for token in rest] == tokens  # type: ignore[union-attr]
    assert windows[0][0] == (tokenizer.bos_token_id,)
    assert all(len(before) + len(rest) == 30 for before, rest in windows[:-1])  # type: ignore[arg-type]
    assert found == [-float(sum(tokens)), -float(sum(tokenizer.encode("One")))]


def test_generation_settings_are_ours(model: Any, client: FakeClient, tokenizer: Tokenizer) -> None:
    greedy = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False, "temperature": 0.7}
    sampled = {"until": "x", "max_gen_toks": 5, "do_sample": True, "temperature": 0.7, "top_k": 3}
    answers = model.generate_until([asked("one two", greedy), asked("three " * 50, sampled)])
    assert len(answers) == 2
    first, second = (request.sampling_params for request in client.submitted)
    assert (first.temperature, first.max_tokens, first.stop) == (0.0, 4, ("\n",))
    assert (second.temperature, second.top_k, second.stop) == (0.7, 3, ("x",))
    assert client.submitted[0].prompt == tuple(tokenizer.encode("one two"))
    assert len(client.submitted[1].prompt or ()) == 25
    with pytest.raises(ValueError, match="unknown key 'num_beams'"):
        model.generate_until([asked("a", {"num_beams": 4})])
    with pytest.raises(ValueError, match="max_gen_toks: must be below"):
        model.generate_until([asked("a", {"max_gen_toks": 30})])
