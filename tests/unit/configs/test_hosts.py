"""A server without keys answers to names that nobody else can have lead to it."""

import pytest

from saqqara.configs.hosts import check_host_pattern, is_no_name, may_ask_as
from saqqara.configs.schema import ServeConfig


@pytest.mark.parametrize(
    ("asked", "allowed", "may"),
    [
        ("127.0.0.1:8000", (), True),
        ("localhost", (), True),
        ("LOCALHOST:8000", (), True),
        ("localhost.:8000", (), True),
        ("[::1]:8000", (), True),
        ("10.42.0.17:8000", (), True),  # how Kubernetes asks whether a pod lives
        (None, (), True),
        ("evil.com:8000", (), False),
        ("127.0.0.1.evil.com", (), False),
        ("localhost.evil.com", (), False),
        ("0x7f.1", (), False),
        ("", (), False),
        ("[", (), False),
        ("user@127.0.0.1", (), True),
        ("127.0.0.1@evil.com", (), False),
        ("engine:8000", ("engine",), True),
        ("Engine.", ("engine",), True),
        ("engine2", ("engine",), False),
        ("a.svc.cluster.local", ("*.svc.cluster.local",), True),
        ("svc.cluster.local", ("*.svc.cluster.local",), False),
        ("evilsvc.cluster.local", ("*.svc.cluster.local",), False),
        ("evil.com", ("*",), True),
    ],
)
def test_who_may_ask(asked: str | None, allowed: tuple[str, ...], may: bool) -> None:
    assert may_ask_as(asked, allowed) is may


def test_addresses_and_localhost_are_no_names() -> None:
    assert all(map(is_no_name, ("127.0.0.1", "::1", "localhost")))
    assert not is_no_name("example.com")


@pytest.mark.parametrize("wrong", ["", "http://a.com", "a.com:80", "a/b", "**.a", "a.*", "*."])
def test_a_pattern_that_is_none_is_an_error(wrong: str) -> None:
    loading = {"model_id": "x"}
    with pytest.raises(ValueError, match="is no name of a host; write it without"):
        ServeConfig.model_validate({"model_loading_config": loading, "allowed_hosts": [wrong]})


def test_patterns_are_in_lower_case() -> None:
    assert [check_host_pattern(p) for p in ("*.A.com.", "*", "B")] == ["*.a.com", "*", "b"]
