"""Flags that change what clients may ask and see: names, templates, the tokenizer's settings."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import NotFoundError, OpenAI
from support.byte_llama import save_tiny_llama
from support.local_server import engine_app, listening
from support.server import Answer, fetch

from saqqara.cluster.chat import read_template

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ mood }}"
ENGINE: dict[str, Any] = {
    "load_format": "dummy",
    "dtype": "float32",
    "device": "cpu",
    "max_num_seqs": 4,
    "kv_memory_gib": 0.1,
}
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_llama(folder, max_position=8192)
    return folder


@pytest.fixture(scope="module")
def plain(model: Path) -> Iterator[str]:
    """The address of a server with the defaults."""
    with listening(engine_app(model, engine_kwargs=ENGINE)) as url:
        yield url


@pytest.fixture(scope="module")
def opened(model: Path) -> Iterator[str]:
    """The address of a server that has the flags of this file, and a key."""
    template = model.parent / "chat.jinja"
    template.write_text(TEMPLATE)
    app = engine_app(
        model,
        ["key"],
        engine_kwargs=ENGINE,
        model_aliases=["gpt-4o-mini", "org/tiny"],
        chat_template=str(template),
        trust_request_chat_template=True,
        enable_tokenizer_info_endpoint=True,
    )
    with listening(app) as url:
        yield url


def ask(url: str, path: str, key: str = "key", **body: Any) -> Answer:
    headers = {"Authorization": f"Bearer {key}"}
    return fetch(url + path, "POST" if body else "GET", headers, body or None)


def read(url: str, path: str, **body: Any) -> Any:
    answer = ask(url, path, **body)
    assert answer.status == 200, answer.text
    return json.loads(answer.text)


def text_of(url: str, **body: Any) -> str:
    """A conversation as the server writes it."""
    tokens = read(url, "/tokenize", messages=USER, **body)["tokens"]
    return str(read(url, "/detokenize", tokens=tokens)["prompt"])


def test_a_model_has_several_names_and_answers_have_the_first(opened: str) -> None:
    client = OpenAI(base_url=f"{opened}/v1", api_key="key", max_retries=0)
    assert [card.id for card in client.models.list()] == ["tiny", "gpt-4o-mini", "org/tiny"]
    assert client.models.retrieve("org/tiny").id == "org/tiny"
    for name in ("tiny", "gpt-4o-mini", "org/tiny"):
        reply = client.completions.create(model=name, prompt="x", max_tokens=1)
        assert reply.model == "tiny"
    with pytest.raises(NotFoundError, match="'tiny' or 'gpt-4o-mini' or 'org/tiny'"):
        client.completions.create(model="gpt-4", prompt="x")


def test_a_file_replaces_the_models_template(opened: str, plain: str) -> None:
    assert text_of(opened) == "<user>hi"
    assert text_of(opened, chat_template_kwargs={"mood": "!"}) == "<user>hi!"
    assert text_of(plain) != "<user>hi"


def test_only_who_trusts_clients_takes_their_templates(opened: str, plain: str) -> None:
    assert text_of(opened, chat_template="{{ messages[0].content }}?") == "hi?"
    for path in ("/tokenize", "/v1/chat/completions"):
        reply = ask(plain, path, model="tiny", messages=USER, chat_template="x")
        assert reply.status == 400
        error = json.loads(reply.text)["error"]
        assert error["param"] == "chat_template"
        assert "--trust-request-chat-template" in error["message"]
    endless = "{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}"
    reply = ask(opened, "/tokenize", messages=USER, chat_template=endless)
    assert (reply.status, json.loads(reply.text)["error"]["param"]) == (400, "messages")


def test_tokenize_shows_tokens_and_takes_options_of_the_template(plain: str) -> None:
    reply = read(plain, "/tokenize", prompt="ab", return_token_strs=True)
    assert len(reply["token_strs"]) == reply["count"] == len(reply["tokens"])
    assert reply["token_strs"][-2:] == ["a", "b"]
    bare = read(plain, "/tokenize", prompt="ab", add_special_tokens=False)
    assert bare["tokens"] == reply["tokens"][-2:]
    assert "token_strs" not in bare
    whole = text_of(plain)
    headless = text_of(plain, add_generation_prompt=False)
    assert whole.startswith(headless)
    assert len(whole) > len(headless)


def test_the_tokenizers_settings_are_shown_where_that_is_allowed(opened: str, plain: str) -> None:
    info = read(opened, "/tokenizer_info")
    assert info["chat_template"] == TEMPLATE
    assert {"tokenizer_class", "bos_token", "eos_token", "pad_token"} <= {*info}
    assert ask(opened, "/tokenizer_info", key="other").status == 401
    assert "/tokenizer_info" in read(opened, "/openapi.json")["paths"]
    assert ask(plain, "/tokenizer_info").status == 404
    assert "/tokenizer_info" not in read(plain, "/openapi.json")["paths"]


def test_the_load_is_what_is_in_the_server(plain: str) -> None:
    assert read(plain, "/load") == {"server_load": 0}
    client = OpenAI(base_url=f"{plain}/v1", api_key="key", max_retries=0)
    body: Any = {"model": "tiny", "prompt": "x", "max_tokens": 8000, "stream": True}
    with client.completions.create(**body, extra_body={"ignore_eos": True}) as stream:
        next(iter(stream))
        assert read(plain, "/load") == {"server_load": 1}


def test_a_template_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^chat_template: .*gone.* cannot be read"):
        read_template(str(tmp_path / "gone"))
    (tmp_path / "bad").write_text("one\n{% for %}")
    with pytest.raises(ValueError, match=r"^chat_template: .*bad:2: "):
        read_template(str(tmp_path / "bad"))
