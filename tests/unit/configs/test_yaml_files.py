"""Files of settings: what is wrong with one is an error that names the place."""

from pathlib import Path

import pytest

from saqqara.configs.yaml_files import CONFIG_DIR, load_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: x\nmax_num_seqs: 4\nmax_num_seqs: 5\n", "line 3 .*'max_num_seqs' is there twice"),
        ("retention:\n  {method: a, method: b}\n", "line 2 .*'method' is there twice"),
        ("model: !!python/object/apply:os.getcwd []\n", "line 1 is no YAML"),
        (BOMB, "has aliases .* that never end, or almost"),
        ("model: x\nretention: &r {method: *r}\n", "has aliases .* that never end, or almost"),
        ("model:\tx\n", "line 1 is no YAML"),
        ("- model\n", "must hold a mapping of settings, not list"),
        ("", "must hold a mapping of settings, not NoneType"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said) as caught:
        load_yaml(file)
    assert str(file) in str(caught.value)


def test_aliases_and_merged_mappings_are_read(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    text = "base: &base {a: 1, b: 2}\nown: &own {<<: *base, b: 3}\nthird: {<<: *own, a: *base}\n"
    file.write_text(text, encoding="utf-8")
    base = {"a": 1, "b": 2}
    assert load_yaml(file) == {"base": base, "own": {"a": 1, "b": 3}, "third": {"a": base, "b": 3}}


def test_every_preset_is_read() -> None:
    files = sorted(CONFIG_DIR.glob("*/*.yaml"))
    assert files
    for file in files:
        assert load_yaml(file)
