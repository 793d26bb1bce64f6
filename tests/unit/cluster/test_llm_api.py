"""`LLM`, the Python front door: vLLM's names, results in order, errors that name the prompt."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_client import FakeClient
from support.tiny import save_tiny

from saqqara import LLM, Retention, SamplingParams
from saqqara.cluster import llm as llm_module
from saqqara.cluster.chat import ChatOptions
from saqqara.cluster.long_wait import LongWait
from saqqara.configs.schema import EngineConfig

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client() -> FakeClient:
    return FakeClient(max_prompt_tokens=20, per_poll=2)


@pytest.fixture
def fake(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """An `LLM` whose engine is a fake, which answers the newest request first."""

    def launch(config: EngineConfig) -> FakeClient:
        client.config = config
        return client

    monkeypatch.setattr(llm_module, "launch", launch)
    return LLM("fake")


def texts(outputs: Any) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_results_come_in_the_order_of_the_prompts(fake: LLM) -> None:
    prompts = [f"prompt {i}" for i in range(9)]
    outputs = fake.generate(prompts, SamplingParams(max_tokens=1))
    assert texts(outputs) == [str(i) for i in range(9)]
    assert [output.prompt for output in outputs] == prompts


def test_prompts_come_in_all_of_vllms_forms(fake: LLM) -> None:
    assert texts(fake.generate("ab")) == ["ba"]
    assert texts(fake.generate([97, 98])) == ["ba"]
    assert texts(fake.generate({"prompt_token_ids": [97, 98]})) == ["ba"]
    mixed: list[Any] = ["ab", [97, 99], {"prompt": "ad"}, {"prompt_token_ids": [97, 101]}]
    assert texts(fake.generate(mixed)) == ["ba", "ca", "da", "ea"]
    assert texts(fake.generate(prompt_token_ids=[[97, 98], [97, 99]])) == ["ba", "ca"]
    assert texts(fake.generate(prompt_token_ids=[97, 98])) == ["ba"]
    assert fake.generate([]) == []


def test_settings_are_for_all_prompts_or_one_each(fake: LLM, client: FakeClient) -> None:
    params = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)]
    outputs = fake.generate(["abc", "abc"], params, retention=["full", None], budget="50%")
    assert texts(outputs) == ["c", "cb"]
    assert [request.retention for request in client.submitted] == ["full", None]
    assert [request.budget for request in client.submitted] == ["50%", "50%"]


def test_a_wrong_setting_is_no_prompts_fault(fake: LLM, client: FakeClient) -> None:
    wrong: list[tuple[Any, str]] = [
        ("snapk", "^method: unknown 'snapk'"),
        (
            [None, 5],
            r"^retention\[1\]: must be a string or a mapping or a Retention or None, not 5",
        ),
    ]
    for retention, said in wrong:
        with pytest.raises(ValueError, match=said):
            fake.generate(["abc", "abc"], retention=retention)
    assert client.submitted == []


def test_chat_takes_one_conversation_or_several(fake: LLM) -> None:
    assert texts(fake.chat(CHAT)) == ["ih"]
    assert texts(fake.chat([CHAT, [{"role": "user", "content": "ho"}]])) == ["ih", "oh"]


def test_chat_says_how_conversations_are_written(fake: LLM, client: FakeClient) -> None:
    given: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    fake.chat(CHAT, **given, chat_template="{{ x }}", chat_template_kwargs={"x": 1})
    options = ChatOptions(**given, chat_template="{{ x }}", template_args={"x": 1})
    assert client.submitted[0].chat_options == options
    with pytest.raises(ValueError, match="continue_final_message: the answer either goes on"):
        fake.chat(CHAT, continue_final_message=True)
    with pytest.raises(ValueError, match="'messages' is no variable"):
        fake.chat(CHAT, chat_template_kwargs={"messages": []})


def test_score_takes_one_pair_or_lists(fake: LLM) -> None:
    assert fake.score("a", "\x01\x02").sum == -3.0
    assert fake.score([97], [5]).logprobs == (-5.0,)
    several = fake.score(["a", "b"], ["\x01", "\x02"])
    assert [one.sum for one in several] == [-1.0, -2.0]
    assert [one.sum for one in fake.score([[97]], [[5]])] == [-5.0]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda llm: llm.generate(), "prompts or prompt_token_ids"),
        (lambda llm: llm.generate("a", prompt_token_ids=[1]), "not both"),
        (lambda llm: llm.generate(["a", 7]), r"prompts\[1\] must be text or a list of token ids"),
        (lambda llm: llm.generate(["a", {"promt": "b"}]), r"prompts\[1\].*did you mean 'prompt'"),
        (lambda llm: llm.generate(["a", {}]), r"prompts\[1\] needs either"),
        (lambda llm: llm.generate(7), "prompts must be"),
        (lambda llm: llm.generate(b"abc"), "prompts must be.*not b'abc'"),
        (lambda llm: llm.generate([b"abc"]), r"prompts\[0\] must be"),
        (lambda llm: llm.generate([[True, False]]), r"prompts\[0\] must be"),
        (lambda llm: llm.generate(text for text in "ab"), "prompts must be.*generator"),
        (lambda llm: llm.generate(["a", "b"], [SamplingParams()]), "sampling_params must be"),
        (lambda llm: llm.generate(["a"], ["greedy"]), r"sampling_params\[0\]"),
        (lambda llm: llm.generate("a", retention=3), "retention must be"),
        (lambda llm: llm.generate(["a", "b"], budget=[1]), "budget must be"),
        (lambda llm: llm.chat([CHAT, [{"role": "user"}]]), r"messages\[1\]: .*content"),
        (lambda llm: llm.chat(None), "messages must be a list of messages.*not NoneType"),
        (lambda llm: llm.chat({"role": "user", "content": "a"}), "messages must be .*not dict"),
        (lambda llm: llm.chat(iter([{}])), "messages must be a list of messages"),
        (lambda llm: llm.chat("hi"), "messages must be a list of messages.*not str 'hi'"),
        (lambda llm: llm.score("a", "b", top_logprobs="x"), "top_logprobs: .*not 'x'"),
        (lambda llm: llm.score("a", "b", top_logprobs=True), "top_logprobs: .*not True"),
        (lambda llm: llm.generate("a", budget=1j), "budget must be one value.*not complex"),
        (lambda llm: llm.generate("a", budget=0.25), "budget: .*25%"),
        (lambda llm: llm.score(["a"], ["b", "c"]), "one for each"),
        (lambda llm: llm.score("a", 5), "continuation must be"),
    ],
)
def test_wrong_arguments_run_nothing(fake: LLM, client: FakeClient, call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(fake)
    assert client.submitted == []


def test_a_prompt_that_the_engine_refuses_ends_the_call(fake: LLM, client: FakeClient) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt has 30 tokens; at most 20 fit"):
        fake.generate(["ab", "x" * 30, "cd"])
    assert client.answered == 0
    assert client.waiting == []
    assert texts(fake.generate("ok")) == ["ko"]


def test_a_call_that_is_refused_leaves_the_ids_of_later_ones(fake: LLM) -> None:
    """Seeds come from ids: what a later call samples must not depend on mistakes before it."""
    for mistake in (["a", 5], [object()]):
        with pytest.raises(ValueError, match="prompts"):
            fake.generate(mistake)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sampling_params"):
        fake.generate(["a", "b"], [SamplingParams()])
    assert [output.request_id for output in fake.generate(["a", "b"])] == ["0", "1"]


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'max_seqs'; did you mean 'max_num_seqs'"):
        LLM("m", max_seqs=3)
    with pytest.raises(ValueError, match="dtype: "):
        LLM("m", dtype="int4")
    with pytest.raises(ValueError, match="needs executor='ray'"):
        LLM("m", tensor_parallel_size=2)


def test_settings_reach_the_engine(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "launch", lambda config: client)
    retention = Retention.parse("snapkv", "25%")
    with LLM("m", max_num_seqs=3, retention=retention, page_tokens=8) as llm:
        assert (llm.config.max_num_seqs, llm.config.page_tokens) == (3, 8)
        assert Retention.parse(llm.config.retention, llm.config.budget) == retention
        assert llm.report().model == "fake"
    assert client.closed


# With a real engine, on a tiny random model -------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("llama-gqa", folder, tokenizer_of=demo_model)
    settings: dict[str, Any] = {"kv_memory_gib": 0.1, "check_integrity": True, "max_num_seqs": 4}
    with LLM(str(folder), dtype="float32", **settings) as llm:
        yield llm


def test_the_tokenizer_is_hugging_faces(tiny: LLM) -> None:
    tokenizer = tiny.get_tokenizer()
    assert tokenizer is tiny.get_tokenizer()
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    params = SamplingParams(temperature=0.0, max_tokens=4)
    ids = tokenizer.encode(text)
    [chat] = tiny.chat(CHAT, params)
    assert chat.prompt_token_ids == tuple(ids)
    [written] = tiny.generate([ids], params)
    assert chat.outputs[0].token_ids == written.outputs[0].token_ids


def test_log_probabilities_of_any_tokens_have_names_and_bytes(tiny: LLM) -> None:
    """A random model writes parts of characters; its best tokens stay five, apart by name."""
    parts = tuple(dict.fromkeys(tiny.get_tokenizer().encode("🐫🏜️ 日本語のテキスト")))
    params = SamplingParams(max_tokens=40, seed=1, logprobs=5, allowed_token_ids=parts)
    answers = [output.outputs[0] for output in tiny.generate(["日本語", "the"] * 2, params)]
    names = []
    for answer in answers:
        assert answer.logprobs is not None
        for token_id, entry in zip(answer.token_ids, answer.logprobs, strict=True):
            assert {1, 2, 3, 4, 5} <= {one.rank for one in entry.values()}
            assert len({one.decoded_token for one in entry.values()}) == len(entry)
            names.append(entry[token_id].decoded_token)
        chosen = (entry[i] for i, entry in zip(answer.token_ids, answer.logprobs, strict=True))
        data = b"".join(token.token_bytes for token in chosen)
        assert data.decode(errors="replace") == answer.text
    assert any(str(name).startswith("bytes:") for name in names)


def test_a_conversation_goes_through_another_template(tiny: LLM) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}{{ mark }}]{% endfor %}"
    begun = [*CHAT, {"role": "assistant", "content": "Well"}]
    [output] = tiny.chat(
        begun,
        SamplingParams(max_tokens=1),
        chat_template=template,
        chat_template_kwargs={"mark": "!"},
        add_generation_prompt=False,
    )
    assert tiny.get_tokenizer().decode(output.prompt_token_ids) == "[hi!][Well!]"


def test_a_real_engine_answers_alone_as_together(tiny: LLM) -> None:
    prompts = ["Call me Ishmael.", "It was the best of times, it was", "def main():"] * 3
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    together = tiny.generate(prompts, params)
    assert [len(output.outputs[0].token_ids) for output in together] == [8] * 9
    for i in range(3):
        (alone,) = tiny.generate(prompts[i], params)
        assert alone.outputs[0].token_ids == together[i].outputs[0].token_ids
        assert alone.outputs[0].token_ids == together[i + 3].outputs[0].token_ids
    report = tiny.report()
    assert report.pages_leaked in (0, None)
    assert report.num_requests >= 12


def test_a_real_engine_scores_and_refuses(tiny: LLM) -> None:
    score = tiny.score("Call me", " Ishmael")
    assert len(score.logprobs) == len(score.token_ids) > 0
    assert score.sum < 0
    too_long: list[Any] = ["short", [5] * 5000]
    with pytest.raises(ValueError, match=r"prompts\[1\]: .*max_model_len"):
        tiny.generate(too_long)
    (output,) = tiny.generate("still there", SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 2
    many = list(range(5, 105))
    (output,) = tiny.generate(many, SamplingParams(max_tokens=4), retention="knorm", budget="25%")
    assert output.prompt_token_ids == tuple(many)


def test_progress_is_logged_where_there_is_no_terminal(
    fake: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    class Wait(LongWait):
        """Logs nothing; says at its end what it would have."""

        def __init__(self, what: Callable[[], str]) -> None:
            super().__init__(what)
            self.what = what

        def __exit__(self, *error: Any) -> None:
            lines.append(self.what())
            super().__exit__(*error)

    monkeypatch.setattr(llm_module, "LongWait", Wait)
    fake.generate(["one", "two", "three"])
    fake.generate("one", use_tqdm=False)
    fake.score("context", "continuation")
    assert lines == ["3 of 3 requests have ended", "1 of 1 requests have ended"]
