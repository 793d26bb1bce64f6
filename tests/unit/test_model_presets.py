"""A preset that needs a profile finds the model's by its weights, or says what to do."""

import json
import logging
from pathlib import Path

import pytest

from saqqara.cluster.presets import ModelPresets, with_profile
from saqqara.compression.profiles.fingerprint import weights_digest
from saqqara.compression.profiles.head_profile import HeadProfile
from saqqara.compression.profiles.store import ProfileStore
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig

PROFILE = HeadProfile(((0.75, 0.25), (0.5, 0.125)), propagate_layer=0)
RECOMMENDED = Retention.parse("recommended", "25%")
FAST = Retention.parse("recommended-fast", "25%")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with weights, as far as a fingerprint looks."""
    folder = tmp_path / "model"
    folder.mkdir()
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(range(16))
    (folder / "model.safetensors").write_bytes(data)
    return folder


@pytest.fixture
def store(tmp_path: Path, model: Path) -> ProfileStore:
    """A store that has the model's profile."""
    found = ProfileStore(tmp_path / "store")
    found.write(weights_digest(model), PROFILE, {"model": "model", "seconds": 3.5})
    return found


def presets(model: Path, store: ProfileStore) -> ModelPresets:
    return ModelPresets(str(model), profile_dir=str(store.folder))


def test_what_is_stored_is_filled_in(model: Path, store: ProfileStore) -> None:
    found = presets(model, store).resolve(RECOMMENDED)
    assert found.profile == PROFILE
    assert found.label == RECOMMENDED.label == "recommended@25%"
    assert found.row_tokens(400, 2, 1).sum() == 200
    again = Retention.parse(json.loads(json.dumps(found.to_dict())))
    assert (again, again.label) == (found, found.label)
    other = Retention.parse("recommended", 100)
    assert presets(model, store).resolve(other).budget == 100


def test_the_fast_preset_takes_its_layer_from_the_profile(model: Path, store: ProfileStore) -> None:
    found = presets(model, store).resolve(FAST)
    assert found.entering_tokens(400, 2) == (400, 100)
    assert found.label == "recommended-fast@25%"
    with pytest.raises(ValueError, match=r"propagate.layer: 'auto' stands for"):
        FAST.entering_tokens(400, 2)
    with pytest.raises(ValueError, match="profile: 'auto' stands for"):
        RECOMMENDED.row_tokens(400, 2, 1)


@pytest.mark.parametrize("retention", [RECOMMENDED, FAST])
def test_without_a_profile_it_is_adaptive_and_one_warning_names_the_command(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, retention: Retention
) -> None:
    without = ModelPresets(str(model), profile_dir=str(tmp_path / "nothing"))
    with caplog.at_level(logging.WARNING):
        assert without.resolve(retention) == Retention.parse("recommended-adaptive", "25%")
        without.resolve(retention)
    [warning] = [record.getMessage() for record in caplog.records]
    assert f"`saqqara eval calibrate --model {model}`" in warning
    assert not (tmp_path / "nothing").exists()


def test_what_was_set_by_hand_stays_or_is_refused(model: Path, tmp_path: Path) -> None:
    without = ModelPresets(str(model), profile_dir=str(tmp_path / "nothing"))
    mine = {"method": "recommended", "budget": 64, "window": 8, "decode": {"slack_pages": 2}}
    instead = Retention.parse({**mine, "method": "recommended-adaptive"})
    assert without.resolve(Retention.parse(mine)) == instead
    steep = Retention.parse({"method": "recommended", "budget": 64, "head_beta": 3})
    with pytest.raises(ValueError, match=r"head_beta: is about recommended with .* calibrate"):
        without.resolve(steep)
    asked = Retention.parse({"method": "headkv", "budget": 64, "profile": "auto"})
    with pytest.raises(ValueError, match=r"profile: the profile store has none .*headkv needs one"):
        without.resolve(asked)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"profile": 3}', '{"0-0": [-1]}', "\xff"])
def test_a_damaged_entry_costs_a_warning_that_names_it(
    model: Path, store: ProfileStore, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    file = store.path(weights_digest(model))
    file.write_bytes(damage.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        found = presets(model, store).resolve(RECOMMENDED)
    assert found.method == "recommended-adaptive"
    assert f"its entry is damaged: profile: {file}" in caplog.text


def test_an_entry_of_another_shape_is_damaged_too(
    model: Path, store: ProfileStore, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 2}
    (model / "config.json").write_text(json.dumps(config))
    assert presets(model, store).resolve(RECOMMENDED).profile == PROFILE
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with caplog.at_level(logging.WARNING):
        assert presets(model, store).resolve(RECOMMENDED).method == "recommended-adaptive"
    assert "its entry is damaged: profile: has 2 layers of 2 query heads" in caplog.text


def test_a_profile_by_its_path_counts_and_brings_its_layer(
    model: Path, store: ProfileStore, tmp_path: Path
) -> None:
    file = store.path(weights_digest(model))
    other = ModelPresets(str(tmp_path / "other"), profile_dir=str(tmp_path / "nothing"))
    fast = Retention.parse({**FAST.to_dict(), "profile": str(file)})
    assert other.resolve(fast).entering_tokens(400, 2) == (400, 100)
    plain = Retention.parse({**RECOMMENDED.to_dict(), "profile": {"0-0": [1.0]}})
    assert other.resolve(plain) is plain


def test_dummy_weights_have_no_profile(model: Path, store: ProfileStore) -> None:
    dummy = ModelPresets(str(model), "dummy", str(store.folder))
    assert dummy.resolve(RECOMMENDED).method == "recommended-adaptive"


def test_an_engine_has_the_profile_in_its_settings(model: Path, store: ProfileStore) -> None:
    """So every rank reads the same numbers, whatever lies on its machine."""
    config = EngineConfig(
        model=str(model), retention="recommended", budget="25%", profile_dir=str(store.folder)
    )
    resolved = with_profile(config)
    assert Retention.parse(resolved.for_worker().retention).profile == PROFILE
    assert with_profile(resolved) is resolved
    full = EngineConfig(model=str(model))
    assert with_profile(full) is full


def test_a_fingerprint_is_of_the_weights_alone(model: Path, tmp_path: Path) -> None:
    before = weights_digest(model)
    (model / "config.json").write_text("{}")
    assert weights_digest(model) == before
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert weights_digest(model) != before
