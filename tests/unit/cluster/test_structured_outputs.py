"""What can be asked of an answer's form, and that answers have it: through a whole engine.

The model is a tiny random one of bytes, sampled at temperature 1: what it writes by itself is noise.
"""

import json
import re
from collections.abc import Iterator

import pytest
from support.byte_llama import save_tiny_llama

from saqqara import LLM, SamplingParams


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("bytes")
    save_tiny_llama(folder)
    settings = {"dtype": "float32", "kv_memory_gib": 0.05, "load_format": "dummy"}
    with LLM(str(folder), check_integrity=True, **settings) as llm:
        yield llm


def test_x(llm: LLM) -> None:
    kinds = [dict(regex="[a-c]{3}-[0-9]+x"), dict(choice=["yes","no"]), dict(json_object=True), dict(json={"type":"object","properties":{"a":{"type":"integer"},"b":{"enum":["x","y"]}},"required":["a","b"],"additionalProperties":False}), dict(grammar='start: "a" | "b" start')]
    ps = [SamplingParams(structured_outputs=k, max_tokens=60, seed=i) for i,k in enumerate(kinds)]+[SamplingParams(max_tokens=10)]
    for o in llm.generate(["hello"]*len(ps), ps):
        print(repr(o.outputs[0].text), o.outputs[0].finish_reason, o.error)
