"""Where a model is: folders and hub ids, and what is said where there is none."""

from pathlib import Path

import pytest

from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.workers.models import source
from saqqara.workers.models.source import described_folder, hub_parts, local_folder, whole_folder
from saqqara.workers.models.spec import load_spec


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tests run with HF_HUB_OFFLINE=1; here the cache is empty, too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    source._fetched.cache_clear()


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == described_folder(tmp_path) == tmp_path
    assert local_folder("org/name") is None
    assert hub_parts("org/name@v1") == ("org/name", "v1")
    assert hub_parts("org/name") == ("org/name", None)


@pytest.mark.parametrize("model", ["/no/such/folder", "./no/folder", "a/b/c", "no folder"])
def test_a_folder_that_is_not_there_is_said(model: str) -> None:
    for find in (described_folder, whole_folder, load_spec):
        with pytest.raises(
            ValueError, match=r"^model: there is no folder '.*', and it is no hub id"
        ) as found:
            find(model)
        assert model in str(found.value)


def test_a_revision_is_for_hub_ids() -> None:
    with pytest.raises(ValueError, match="a revision is for hub ids only"):
        local_folder("/a/folder@main")


@pytest.mark.parametrize("model", ["nobody/nothing", "nobody/nothing@v1", "gpt2"])
def test_a_hub_that_cannot_be_reached_says_how_to_get_the_model(model: str) -> None:
    command = f"hf download {hub_parts(model)[0]} --local-dir FOLDER"
    for find in (described_folder, whole_folder, load_spec):
        with pytest.raises(
            ValueError, match=r"^model: there is no folder .*cannot be fetched"
        ) as e:
            find(model)
        assert command in str(e.value)
        assert "HF_HUB_OFFLINE is set" in str(e.value)
    with pytest.raises(ValueError, match=r"^tokenizer: there is no folder .*cannot be fetched"):
        Tokenizer.load(model)


def test_what_is_in_the_cache_needs_no_hub(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--name"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for name in ("main", "v1"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    assert described_folder("org/name") == described_folder("org/name@v1") == folder
