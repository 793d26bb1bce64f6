"""What settings are called, stored as, counted as and refused with stays what it was."""

import pytest
from support.retention_cases import digests, line, lines, names, stored_digests


def test_each_name_has_its_digests() -> None:
    """A new preset needs its line: see `support/retention_cases.py`."""
    assert list(stored_digests()) == names()


@pytest.mark.parametrize("name", names())
def test_labels_mappings_counts_and_errors_stay(name: str) -> None:
    stored = stored_digests()[name]
    for setting, digest in digests(name).items():
        now = "\n".join(lines(name, setting))
        assert digest == stored[setting], f"{name}, {setting}; what is said now:\n{now}"


def test_a_line_tells_label_mapping_and_counts_apart() -> None:
    """So a digest of it changes with any of them."""
    plain = line({"method": "snapkv", "budget": "25%"})
    assert plain.split(" = ")[1].startswith("snapkv@25% ")
    wider = line({"method": "snapkv", "budget": "25%", "kernel_size": 9})
    assert "snapkv@25%,kernel_size=9" in wider
    assert plain.split()[-1] != wider.split()[-1]
    assert line({"method": "snapkv", "budget": 1}).split(" ! ")[1].startswith("budget: 1 tokens")
