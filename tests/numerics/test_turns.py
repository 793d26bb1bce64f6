"""Turns of a conversation over a real model: what is not computed again changes no answer.

With `full` retention an answer is that of the whole prompt. With a budget only new tokens are
computed, and retention chooses among what earlier turns kept.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.asgi_client import AsgiAnswer, call
from support.byte_llama import save_tiny_llama
from support.in_process import InProcessServer
from support.tiny import save_tiny

from saqqara import LLM, SamplingParams
from saqqara.cluster.request import RequestOutput
from saqqara.cluster.server.api_keys import KEYS_VARIABLE, ApiKeys

FIRST = [(7 * i) % 190 + 5 for i in range(60)]
NUM_NEW = 6
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW, ignore_eos=True)
SNAPKV: dict[str, Any] = {"retention": {"method": "snapkv", "window": 8}, "budget": "25%"}
ADAKV: dict[str, Any] = {  # cut once in each turn, too
    "retention": {"method": "adakv", "window": 8, "decode": {"slack_pages": 1}},
    "budget": "25%",
}


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_llama(folder)  # of bytes
    if request.param != "llama":
        save_tiny(request.param, folder)
    with LLM(
        str(folder),
        load_format="dummy" if request.param == "llama" else "safetensors",
        dtype="float32",
        device="cpu",
        page_tokens=4,
        max_num_seqs=2,
        kv_memory_gib=0.05,
        prefix_caching=False,
        check_integrity=True,
    ) as llm:
        yield llm


def ask(llm: LLM, prompt: list[int], session: str | None, **settings: Any) -> RequestOutput:
    [output] = llm.generate(
        prompt_token_ids=prompt,
        sampling_params=GREEDY,
        session=session,
        use_tqdm=False,
        **settings,
    )
    return output


def test_five_turns_answer_as_their_whole_prompts_do(llm: LLM) -> None:
    prompt, fed = FIRST, 0
    for turn in range(5):
        ours, whole = ask(llm, prompt, "a"), ask(llm, prompt, None)
        assert ours.outputs[0].token_ids == whole.outputs[0].token_ids
        assert ours.num_cached_tokens == fed
        fed = len(prompt) + NUM_NEW - 1  # nothing follows the last one
        prompt = [*prompt, *ours.outputs[0].token_ids, 20 + turn, 30 + turn, 40 + turn]
    assert llm.end_conversation("a")
    assert llm.report().pages_leaked in (0, None)


@pytest.mark.parametrize("settings", [SNAPKV, ADAKV], ids=["snapkv", "adakv"])
def test_with_a_budget_only_new_tokens_are_computed(llm: LLM, settings: dict[str, Any]) -> None:
    prompt, kept = FIRST, []
    for turn in range(5):
        ours = ask(llm, prompt, "b", **settings)
        assert len(prompt) - ours.num_cached_tokens == (4 if turn else len(FIRST))
        assert ours.kv_cache is not None
        kept.append(ours.kv_cache.kept_tokens / ours.kv_cache.full_tokens)
        prompt = [*prompt, *ours.outputs[0].token_ids, 20 + turn, 30 + turn, 40 + turn]
    assert max(kept) < 0.6
    assert llm.end_conversation("b")


def test_a_past_that_was_rewritten_is_computed_again(llm: LLM) -> None:
    ask(llm, FIRST, "c")
    for prompt in ([*FIRST[:30], 8, 9], FIRST[:20]):
        ours, whole = ask(llm, prompt, "c"), ask(llm, prompt, None)
        assert ours.outputs[0].token_ids == whole.outputs[0].token_ids
    first = ask(llm, FIRST, "d", **SNAPKV)
    rewritten = [*FIRST[:30], 8, 9]
    ours, whole = ask(llm, rewritten, "d", **SNAPKV), ask(llm, rewritten, None, **SNAPKV)
    assert (first.num_cached_tokens, ours.num_cached_tokens) == (0, 0)
    assert ours.outputs[0].token_ids == whole.outputs[0].token_ids


def test_a_chat_goes_on_by_its_session(llm: LLM) -> None:
    template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    messages = [{"role": "user", "content": "Where?"}]  # this model's tokens are few of the bytes
    common: dict[str, Any] = {"chat_template": template, "use_tqdm": False}
    llm.chat(messages, GREEDY, session="e", **common)
    messages += [{"role": "assistant", "content": "Saqqara"}, {"role": "user", "content": "And?"}]
    [ours] = llm.chat(messages, GREEDY, session="e", **common)
    [whole] = llm.chat(messages, GREEDY, **common)
    assert ours.outputs[0].token_ids == whole.outputs[0].token_ids
    with pytest.raises(ValueError, match="session: turns of one conversation"):
        llm.chat([messages, messages], GREEDY, session=["e", "e"], **common)
    with pytest.raises(ValueError, match=r"messages\[0\]: conversation_id: must be 1 to 128"):
        llm.chat(messages, GREEDY, session="a b", **common)


async def test_a_conversation_belongs_to_its_key(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    keys = ApiKeys.load(None, {KEYS_VARIABLE: "mine,yours"})
    server = InProcessServer(tmp_path, keys)

    async def ask_as(key: str, prompt: list[int], **more: Any) -> AsgiAnswer:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0, **more}
        body |= {"conversation_id": "talk", "ignore_eos": True, "return_token_ids": True}
        headers = {"Authorization": f"Bearer {key}"}
        return await call(server.app, "POST", "/v1/completions", body, headers)

    async def end_as(key: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        path = "/v1/conversations/talk"
        return (await call(server.app, "DELETE", path, headers=headers)).status

    def cached(answer: AsgiAnswer) -> int:
        assert answer.status == 200, answer.body
        return int(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"])

    async with server.app.router.lifespan_context(server.app):
        first = await ask_as("mine", FIRST)
        assert cached(first) == 0
        said = first.json["choices"][0]["token_ids"]
        assert await end_as("yours") == 404
        assert cached(await ask_as("yours", [*FIRST, *said, 9])) == 0  # another one of that name
        assert cached(await ask_as("mine", [*FIRST, *said, 9])) == len(FIRST) + 3
        assert await end_as("mine") == 200
        assert await end_as("mine") == 404
        assert cached(await ask_as("yours", [*FIRST, *said, 9, 9, 9, 9, 9, 9])) > 0
        two = await ask_as("mine", FIRST, n=2)
        assert (two.status, two.error["param"]) == (400, "n")
        two = await ask_as("mine", [FIRST, FIRST])  # type: ignore[list-item]
        assert (two.status, two.error["param"]) == (400, "prompt")
