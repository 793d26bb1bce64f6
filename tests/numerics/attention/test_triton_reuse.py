"""Memory that is used again under the Triton backend, in Triton's interpreter.

Cached prefixes, conversations' turns and sequences that made room say what they say under torch's
backend, where nothing is recorded on a device and no second step is in flight.
"""

import importlib.util
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("for Triton's interpreter", allow_module_level=True)

from support.byte_llama import save_tiny_llama
from support.tiny import save_tiny

from saqqara import LLM, SamplingParams
from saqqara.cluster.engine import engine
from saqqara.cluster.engine.model_fit import scheduler_of

PAGE, NUM_NEW, MORE = 4, 2, 6
SHARED = [(7 * n) % 190 + 5 for n in range(24)]
SNAPKV: dict[str, Any] = {"method": "snapkv", "window": 4, "budget": 12}
ADAKV = {**SNAPKV, "method": "adakv"}  # its rows differ in length
PAGE_GIB = PAGE * 2 * 16 * 4 / 1024**3  # a row's key and value, head_dim 16, fp32
PAGES = 92  # two prompts of 47 tokens fit, not both of their answers


def run(folder: Path, attention: str) -> tuple[list[tuple[int, ...]], list[int], Any]:
    """Answers, how many tokens of each prompt were not computed, and what the engine did."""
    llm = LLM(
        str(folder),
        dtype="float32",
        device="cpu",
        page_tokens=PAGE,
        max_num_seqs=4,
        max_model_len=64,
        warmup=False,
        check_integrity=True,
        attention_backend=attention,
        conversation_gib=PAGES * PAGE_GIB,
        host_kv_gib=PAGES * PAGE_GIB,
        kv_memory_gib=(2 * PAGES + 0.5) * PAGE_GIB,
    )

    def ask(*prompts: list[int], num_new: int = NUM_NEW, **more: Any) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
        outputs.extend(
            llm.generate(
                prompt_token_ids=list(prompts), sampling_params=sampling, use_tqdm=False, **more
            )
        )

    outputs: list[Any] = []
    with llm:
        first = ([*SHARED, 40 + n, 9, 41, 7 + n, 3] for n in range(3))
        ask(*first, retention=["full", SNAPKV, "full"])
        turns: Any = {"session": ["a", "b"], "retention": ["full", ADAKV]}
        ask(SHARED[:18], SHARED[:18], **turns)
        said = [output.outputs[0].token_ids for output in outputs[-2:]]
        ask(*([*SHARED[:18], *of_one, 60, 61, 62] for of_one in said), **turns)
        ask(*([number, *reversed(SHARED), *SHARED[2:]] for number in (3, 4)), num_new=MORE)
        report = llm.report()
    return (
        [output.outputs[0].token_ids for output in outputs],
        [output.num_cached_tokens for output in outputs],
        report,
    )


def test_answers_are_those_of_the_torch_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_llama(tmp_path)  # for its tokenizer
    save_tiny("gemma2", tmp_path, num_layers=2)  # one of them has a window
    expected, cached, _ = run(tmp_path, "torch")
    ahead = partial(scheduler_of, lookahead=2)  # as on a GPU
    monkeypatch.setattr(engine, "scheduler_of", lambda *given: ahead(*given[:3]))
    answers, cached_too, report = run(tmp_path, "triton")
    assert answers == expected
    assert cached_too == cached == [0, 24, 24, 16, 12, 19, 19, 0, 0]
    assert report.num_preemptions == 1
    assert report.phase_seconds["park"] > 0 < report.phase_seconds["resume"]
    assert report.pages_leaked == 0
