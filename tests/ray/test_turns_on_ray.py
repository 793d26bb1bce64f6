"""Turns of a conversation over ranks: they answer as whole prompts do, and compute little."""

from typing import Any

import pytest

from saqqara.cluster.on_ray.controller import ControllerClient, start_controller
from saqqara.cluster.request import Request, RequestOutput
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.schema import EngineConfig

pytestmark = pytest.mark.usefixtures("ray_cluster")

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
FIRST = [(7 * i) % 190 + 5 for i in range(60)]
BUDGET: dict[str, Any] = {  # rows of several lengths, which are cut once in each turn, too
    "retention": {"method": "adakv", "window": 8, "decode": {"slack_pages": 1}},
    "budget": "25%",
}


def ask(client: ControllerClient, request: Request) -> RequestOutput:
    [*rejections] = client.submit([request])
    assert rejections == []
    while True:
        for output in client.poll(60.0):
            assert isinstance(output, RequestOutput)
            return output


@pytest.mark.parametrize("ranks", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_five_turns_over_two_ranks(ranks: str, tiny_config: EngineConfig) -> None:
    settings = {ranks: 2, "prefix_caching": False, "check_integrity": True, "dtype": "float32"}
    client = start_controller(tiny_config.model_copy(update=settings))
    try:
        prompt, fed = FIRST, 0
        for turn in range(5):
            ours = ask(client, Request(f"a{turn}", prompt, GREEDY, conversation_id="a"))
            whole = ask(client, Request(f"w{turn}", prompt, GREEDY))
            assert ours.outputs[0].token_ids == whole.outputs[0].token_ids
            assert ours.num_cached_tokens == fed
            fed = len(prompt) + 5  # nothing follows the last of 6 tokens
            prompt = [*prompt, *ours.outputs[0].token_ids, 20 + turn, 30 + turn, 40 + turn]
        prompt = FIRST
        for turn in range(5):
            request = Request(f"b{turn}", prompt, GREEDY, conversation_id="b", **BUDGET)
            ours = ask(client, request)
            assert len(prompt) - ours.num_cached_tokens == (4 if turn else len(FIRST))
            prompt = [*prompt, *ours.outputs[0].token_ids, 20 + turn, 30 + turn, 40 + turn]
        assert client.end_conversation("a")
        assert client.end_conversation("b")
        assert not client.end_conversation("b")
        assert client.reset_prefix_cache()
        assert client.report().pages_leaked == 0
    finally:
        client.shutdown()
