"""The roofline: what a step must read, compute and exchange, counted here once more by hand."""

from dataclasses import replace

import pytest

from saqqara.cluster.planning.cost_model import CostModel, Factors
from saqqara.cluster.planning.devices import DEVICES, Device
from saqqara.cluster.planning.models import model_of
from saqqara.cluster.planning.planner import DTYPES
from saqqara.cluster.planning.workload import Workload
from saqqara.compression.retention import Retention
from saqqara.workers.footprint import Footprint
from saqqara.workers.mesh.layout import MeshLayout

IDEAL = Factors(1.0, 1.0, 1.0, 1.0, 1.0, layer_seconds=0.0, step_seconds=0.0)
GPU = Device("ideal", 80, bandwidth=1e12, flops=1e14, link_bandwidth=1e11, link_seconds=1e-5)
LLAMA = model_of("llama-3-8b")
E, V, F, LAYERS, Q, KV, D = 4096, 128256, 14336, 32, 32, 8, 128


def ranks(tensor: int = 1, pipeline: int = 1) -> tuple[Footprint, ...]:
    return Footprint.of_ranks(LLAMA.spec, DTYPES["bfloat16"], MeshLayout(tensor, pipeline))


def test_a_decode_step_of_one_sequence_reads_every_weight_and_what_is_kept() -> None:
    [rank] = ranks()
    cost = CostModel(LLAMA, GPU, IDEAL)
    layer = 2 * Q * D * E + 2 * KV * D * E + 3 * E * F + 2 * E  # and its norms
    weights = LAYERS * layer + V * E
    rows = LAYERS * KV
    assert cost.decode_seconds(rank, 1, 0) == pytest.approx(2 * weights / 1e12)
    kept = cost.decode_seconds(rank, 1, 1000 * rows) - cost.decode_seconds(rank, 1, 0)
    assert kept == pytest.approx(1000 * rows * 2 * D * 2 / 1e12)


def test_large_batches_are_bound_by_arithmetic() -> None:
    [rank] = ranks()
    cost = CostModel(LLAMA, GPU, IDEAL)
    small, large = cost.decode_seconds(rank, 1, 0), cost.decode_seconds(rank, 1000, 0)
    assert cost.decode_seconds(rank, 90, 0) == small  # 1e14 / 1e12 = 100 products a byte
    assert large == pytest.approx(10 * small)


def test_prefill_counts_each_token_and_each_pair() -> None:
    [rank] = ranks()
    cost = CostModel(LLAMA, GPU, IDEAL)
    tokens = 8192
    front, rest = (Q + 2 * KV) * D * E, Q * D * E + 3 * E * F + 2 * E
    linear = 2 * tokens * (LAYERS - 1) * (front + rest) + 2 * (tokens * front + rest)
    # Queries times keys and weights times values, causal: half of all pairs; one query at the end.
    pairs = (LAYERS - 1) * tokens**2 / 2 + tokens
    products = linear + 4 * pairs * Q * D
    head = 2 * V * E / 1e12  # for one token it is read rather than computed with
    seconds = cost.prefill_seconds(rank, (tokens,) * LAYERS, tokens)
    assert seconds == pytest.approx(products / 1e14 + head, rel=1e-9)


def test_dropped_tokens_save_prefill() -> None:
    [rank] = ranks()
    cost = CostModel(LLAMA, GPU, IDEAL)
    shrinking = Workload(4096, 1, Retention.parse("pyramidinfer")).entering_tokens(LLAMA.spec)
    assert shrinking[0] == 4096 > shrinking[-1]
    saved = cost.prefill_seconds(rank, shrinking, 4096)
    assert saved < 0.9 * cost.prefill_seconds(rank, (4096,) * LAYERS, 4096)


def test_tensor_ranks_reduce_twice_in_every_layer() -> None:
    """A ring of 4 sends 3/4 of all bytes twice; the embedding once, the logits are gathered."""
    free = replace(GPU, link_bandwidth=1e21, link_seconds=0.0)
    for device, exchanged in ((free, 0.0), (replace(GPU, link_seconds=1e-30), 1.0)):
        cost = CostModel(LLAMA, device, IDEAL)
        for rank in ranks(4):
            num_bytes = (2 * LAYERS + 1) * 16 * E * 2 * 2 * 3 / 4 + 3 / 4 * 16 * V * 2
            terms = cost.decode_terms(rank, 16, 0)
            assert terms.exchange == pytest.approx(exchanged * num_bytes / 1e11, abs=1e-12)
    waits = CostModel(LLAMA, GPU, IDEAL).decode_terms(ranks(4)[0], 16, 0).exchange_waits
    assert waits == pytest.approx((4 * LAYERS + 1) * 1e-5)


def test_stages_hand_hidden_states_on() -> None:
    near = CostModel(LLAMA, GPU, IDEAL)
    far = replace(near, hops_between_nodes=True)
    first, last = ranks(pipeline=2)
    assert near.decode_terms(first, 16, 0).exchange == pytest.approx(16 * E * 2 / 1e11)
    assert far.decode_terms(first, 16, 0).exchange == pytest.approx(16 * E * 2 / 50e9)
    assert near.decode_terms(last, 16, 0).exchange == 0


def test_the_host_launches_what_no_graph_replays() -> None:
    slow = replace(IDEAL, layer_seconds=1.0)
    cost = CostModel(LLAMA, GPU, slow)
    assert cost.decode_seconds(ranks()[0], 1, 0) < 1
    assert cost.decode_seconds(ranks(2)[0], 1, 0) == pytest.approx(LAYERS)
    host = CostModel(LLAMA, replace(GPU, kind="cpu"), slow)
    assert host.decode_seconds(ranks()[0], 1, 0) > LAYERS


def test_ranks_share_the_cores_of_a_host_but_not_gpus() -> None:
    [rank] = ranks()
    for kind, times in (("cpu", 2), ("cuda", 1)):
        alone = CostModel(LLAMA, replace(GPU, kind=kind), IDEAL)
        shared = replace(alone, ranks_on_node=2)
        assert shared.decode_seconds(rank, 1, 0) == times * alone.decode_seconds(rank, 1, 0)


def test_what_ranks_reach_together_is_divided_among_them() -> None:
    """Where the threads of one wait for each other, two of fewer threads reach more."""
    host = replace(GPU, kind="cpu", together=1.25)
    assert [host.share_of(number) for number in (1, 2, 4)] == [1.0, 1.25 / 2, 1.25 / 4]
    assert replace(GPU, together=1.25).share_of(2) == 1.0


def test_a_product_that_copies_its_weights_takes_in_few_at_a_time_and_then_multiplies() -> None:
    """But not of one row: that is read through."""
    [rank] = ranks()
    plain = CostModel(LLAMA, replace(GPU, kind="cpu"), IDEAL)
    copying = replace(plain, device=replace(plain.device, product_bandwidth=5e11))
    one, two, ten = (copying.decode_seconds(rank, rows, 0) for rows in (1, 2, 10))
    assert one == plain.decode_seconds(rank, 1, 0)
    weights = LAYERS * (rank.attention_numbers + rank.plain_mlp_numbers) + rank.head_numbers
    assert two == pytest.approx(2 * weights / 5e11 + 2 * 2 * weights / 1e14)
    assert ten - two == pytest.approx(2 * 8 * weights / 1e14)
    # Half of the sequences at once is far from half of the time, unless it is one of two.
    assert one / two < 0.5 < 0.9 < copying.decode_seconds(rank, 5, 0) / ten


def test_experts_are_read_as_tokens_choose_them() -> None:
    mixtral = model_of("mixtral-8x7b")
    [rank] = Footprint.of_ranks(mixtral.spec, DTYPES["bfloat16"], MeshLayout())
    cost = CostModel(mixtral, replace(GPU, flops=1e21), IDEAL)
    around = LAYERS * (rank.attention_numbers + 8 * E) + rank.head_numbers  # with the router
    for num_seqs, experts in ((1, 2), (2, 8 * (1 - (3 / 4) ** 2)), (1000, 8)):
        read = around + LAYERS * experts * 3 * E * F
        assert cost.decode_seconds(rank, num_seqs, 0) == pytest.approx(2 * read / 1e12)


def test_a_row_is_read_as_long_as_it_is_on_average() -> None:
    spec = LLAMA.spec
    full = Workload(100, 11, Retention.parse(None)).attended_tokens(spec, 16)
    assert (full == 105.5).all()  # 101 to 110: the new token is among what it attends to
    bounded = Retention.parse({"method": "streaming", "budget": 64, "decode": {"slack_pages": 1}})
    kept = Workload(1000, 321, bounded).attended_tokens(spec, 16)
    assert (kept == 64 + 8.5).all()
    trimmed = Retention.parse({"method": "pyramidinfer", "decode": {"trigger": "published"}})
    assert Workload(400, 241, trimmed).attended_tokens(spec, 16).mean() < 300


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_no_gpu_is_nearer_to_another_node_than_to_its_own(device: Device) -> None:
    assert device.node_bandwidth <= device.link_bandwidth
    assert device.node_seconds >= device.link_seconds


@pytest.mark.parametrize("prompt_tokens", [64, 128, 256])
def test_a_group_is_launched_and_awaited_once_whatever_it_consists_of(prompt_tokens: int) -> None:
    rank = ranks(tensor=4)[0]
    cost = CostModel(LLAMA, replace(GPU, link_seconds=1e-4), IDEAL)
    prompt, num_prompts = (prompt_tokens,) * LAYERS, 2048 // prompt_tokens
    many = cost.group_seconds(rank, [prompt], num_prompts)
    assert many == pytest.approx(cost.group_seconds(rank, [prompt] * num_prompts))
    assert many < 1.2 * cost.group_seconds(rank, [(2048,) * LAYERS])
