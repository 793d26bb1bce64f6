"""What we write as JSON can be read by any reader: it has no bare NaN or infinity."""

import ast
import json
import math
from pathlib import Path

import pytest

from saqqara.cluster.batch.files import write_json
from saqqara.configs.json_text import DoubledKeyError, NotFiniteError, json_text, parse_json
from saqqara.evaluation.result import Outcome, Result

ROOT = Path(__file__).resolve().parents[3]
FIGURES = {"a": math.nan, "b": [1.5, (math.inf, -math.inf)], "c": {"d": "NaN"}, "e": True}


def strictly(text: str) -> object:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_no_finite_number_is_null(tmp_path: Path) -> None:
    expected = {"a": None, "b": [1.5, [None, None]], "c": {"d": "NaN"}, "e": True}
    assert strictly(json_text(FIGURES)) == expected
    write_json(tmp_path / "summary.json", FIGURES)
    assert strictly((tmp_path / "summary.json").read_text()) == expected


def test_the_result_of_an_evaluation_is_read_back(tmp_path: Path) -> None:
    outcomes = (Outcome("full", 0, "g", 5, math.nan), Outcome("full", 1, "g", 5, 0.5))
    result = Result("task", "model", {}, {"full": {}}, {"full": 1.0}, 9.0, outcomes)
    file = tmp_path / "result.json"
    result.write(file)
    strictly(file.read_text())
    first, second = Result.read(file).outcomes
    assert math.isnan(first.score)
    assert second == outcomes[1]


def test_json_that_leaves_the_process_is_written_strictly() -> None:
    """Every `json.dumps` whose text is written to a file or sent refuses what JSON lacks.

    Error messages and the page of the API show single values as text.
    """
    loose = []
    for folder in ("cluster", "evaluation"):
        for source in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(source.read_text(encoding="utf-8"))
            within_loads = {
                id(call.args[0])
                for call in ast.walk(tree)
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "json.loads"
            }
            loose += [
                f"{source.relative_to(ROOT)}:{call.lineno}"
                for call in ast.walk(tree)
                if isinstance(call, ast.Call)
                and ast.unparse(call.func) in ("json.dump", "json.dumps")
                and id(call) not in within_loads
                and source.name not in ("fields.py", "docs.py")
                and not any(keyword.arg == "allow_nan" for keyword in call.keywords)
            ]
    assert loose == [], "use configs.json_text, or allow_nan=False"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"a": 1, "a": 1}', "a"),
        (b'{"b": [{"a": {"x": 1, "y": 2, "x": 3}}]}', "x"),
        ('{"\\u0061": null, "a": 2}', "a"),
        ('{"": 1, "": 2}', ""),
    ],
)
def test_a_key_that_is_there_twice_is_an_error(text: str | bytes, key: str) -> None:
    with pytest.raises(DoubledKeyError, match=f"^'{key}' is there twice$"):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "path", "said"),
    [
        ('{"a": 1, "b": NaN}', "b", "NaN"),
        (b'{"a": {"b": [1, {"c": -Infinity}]}}', "a.b[1].c", "-Infinity"),
        ('{"a": [0.5, 1e999, NaN]}', "a[1]", "Infinity"),
        ("-1" + "0" * 400 + ".0", "", "-Infinity"),
    ],
)
def test_a_number_that_is_not_finite_is_an_error(text: str | bytes, path: str, said: str) -> None:
    message = f"JSON has finite numbers alone, not {said}"
    with pytest.raises(NotFiniteError) as caught:
        parse_json(text)
    assert (caught.value.field, str(caught.value)) == (path, f"{path}: {message}".lstrip(": "))


@pytest.mark.parametrize(
    "text",
    [
        '{"NaN": "Infinity", "a": 1e-999}',
        '{"a": {"b": [1, 2.5, -1e300]}, "b": {"a": null}}',
        '[{"a": 1}, {"a": "a"}]',
        " 1 ",
        '"\\t"',
    ],
)
def test_other_json_is_read_as_it_is(text: str) -> None:
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5000, "{", '"\\ud800"', "1" * 5000, ""])
def test_what_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=" at line 1 column "):
        parse_json(text)
