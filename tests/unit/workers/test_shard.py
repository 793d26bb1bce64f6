"""A worker's parts are complete when their constructors return: none hands itself out before."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted(ROOT.glob("workers/**/*.py"))


def escapes(source: str) -> Iterator[str]:
    """Where the constructor of a class gives `self`, or a method of it, to somebody else."""
    for made in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]:
        functions = [node for node in made.body if isinstance(node, ast.FunctionDef)]
        methods = {f.name for f in functions if not f.decorator_list}
        for function in functions:
            if function.name != "__init__":
                continue
            nodes = list(ast.walk(function))
            owners = {id(n.value) for n in nodes if isinstance(n, ast.Attribute)}
            called = {id(n.func) for n in nodes if isinstance(n, ast.Call)}
            for node in nodes:
                if not isinstance(node, ast.Name | ast.Attribute):
                    continue
                bare = isinstance(node, ast.Name) and node.id == "self" and id(node) not in owners
                method = (
                    isinstance(node, ast.Attribute)
                    and ast.unparse(node.value) == "self"
                    and node.attr in methods
                    and id(node) not in called
                )
                if bare or method:
                    yield f"{made.name}: {ast.unparse(node)} in line {node.lineno}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_constructor_hands_itself_out(source: Path) -> None:
    assert list(escapes(source.read_text(encoding="utf-8"))) == []


def test_what_hands_itself_out_is_found() -> None:
    given = """
class Shard:
    def __init__(self, part):
        self.pages = measure(self)
        self.faults = Faults(self.give_up)
        self.kv = self.make_pool(part)
        self.free = self.kv.free
    def give_up(self, slot): ...
    def make_pool(self, part): ...
"""
    assert list(escapes(given)) == ["Shard: self in line 4", "Shard: self.give_up in line 5"]
