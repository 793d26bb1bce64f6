"""What the device samples without asking the host is what the host samples, row by row."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from saqqara.compression.retention import Retention
from saqqara.workers.grammar.masks import TokenMasks
from saqqara.workers.plan import NewSequence, SamplingSpec
from saqqara.workers.sampling import device_sampler
from saqqara.workers.sampling.device_sampler import Kind, SampledRow, adjusted, check_ids
from saqqara.workers.sampling.sampler import TokenHistory, sample
from saqqara.workers.state.device_slots import DeviceSlots

VOCAB = 700
PLAIN = [
    SamplingSpec(temperature=0.0),
    SamplingSpec(temperature=0.7, seed=-5),
    SamplingSpec(temperature=2.0, seed=2**63 + 1, top_k=40),
    SamplingSpec(seed=3, top_p=0.4),
    SamplingSpec(seed=3, min_p=0.2, top_k=5, top_p=0.9),
    SamplingSpec(temperature=5.0, seed=11, top_p=0.999),
    SamplingSpec(temperature=1e-9, top_k=2),
    SamplingSpec(seed=8, top_k=VOCAB + 5),
]
ALLOWED = np.arange(5, 600, 7, dtype=np.int32).tobytes()
WANTING = [
    SamplingSpec(temperature=0.0, repetition_penalty=1.6, frequency_penalty=0.7),
    SamplingSpec(temperature=0.0, presence_penalty=-1.5, frequency_penalty=-0.3),
    SamplingSpec(seed=4, repetition_penalty=0.5, top_p=0.6),
    SamplingSpec(temperature=0.0, logit_bias=((7, 9.0), (8, -100.0), (7, 1.5))),
    SamplingSpec(seed=9, allowed_token_ids=ALLOWED, logit_bias=((12, 3.0),)),
    SamplingSpec(temperature=0.0, min_tokens=50, blocked_token_ids=tuple(range(100, 400))),
    SamplingSpec(temperature=0.0, bad_words=((1,), (650, 651, 2), (3, 3, 3, 3), (9, 10))),
    SamplingSpec(temperature=0.0),
]


def slots_of(specs: Sequence[SamplingSpec], known: Sequence[np.ndarray]) -> DeviceSlots:
    slots = DeviceSlots(len(specs), 64, VOCAB, torch.device("cpu"))
    for slot, (spec, tokens) in enumerate(zip(specs, known, strict=True)):
        slots.open(NewSequence(slot, tokens.tobytes(), 4, spec, Retention()))
    return slots


@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_settings_as_numbers_give_the_same_tokens(spread: float) -> None:
    """Ties are among the rows: their logits are rounded to quarters."""
    specs = PLAIN * 6  # more rows than are taken at a time
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(specs), VOCAB, generator=generator) * spread
    logits[:: len(PLAIN) - 1] = (logits[:: len(PLAIN) - 1] * 4).round() / 4
    positions = list(range(17, 17 + len(specs)))
    nothing = TokenHistory(np.zeros(0, np.int32), np.zeros(0, np.int32))
    expected = [d.token_id for d in sample(logits, specs, positions, [nothing] * len(specs))]
    slots = slots_of(specs, [np.zeros(4, np.int32)] * len(specs))
    kind = Kind.of(specs, VOCAB)
    assert kind is Kind.FILTERED
    at = torch.tensor(positions)
    tokens, may_take, is_sound = device_sampler.draw(
        logits, logits, slots.seeds[:-1], slots.filters[:-1], at, kind
    ).tolist()
    assert tokens == expected
    assert may_take == is_sound == [1] * len(specs)
    for least, some in ((Kind.GREEDY, specs[:1]), (Kind.RANDOM, specs[:2])):
        assert Kind.of(some, VOCAB) is least
        n = len(some)
        drawn = device_sampler.draw(
            logits[:n], logits[:n], slots.seeds[:n], slots.filters[:n], at[:n], least
        )
        assert drawn[0].tolist() == expected[:n]


def test_what_rows_want_besides_follows_from_what_the_device_has() -> None:
    rng = np.random.default_rng(3)
    known = [rng.integers(0, VOCAB, 12).astype(np.int32) for _ in WANTING]
    known[6][-2:] = 650, 651
    known[0][4:] = [5, 5, 5, 6, 6, 7, 8, 9]
    logits = torch.from_numpy(rng.normal(size=(len(WANTING), VOCAB)).astype(np.float32) * 2)
    logits[6, [1, 2, 3]] = torch.tensor([30.0, 20.0, 10.0])
    logits[0, [5, 6]] = 6.0
    masks = TokenMasks((7,), rng.integers(-(2**31), 2**31, (1, -(-VOCAB // 32))).astype(np.int32))
    history = [TokenHistory(tokens[:4], tokens[4:]) for tokens in known]
    before = logits.clone()
    expected = [d.token_id for d in sample(logits, WANTING, [12] * 8, history, masks)]
    assert expected[6] == 3, "one bad word's end was there, the other's is not"
    slots = slots_of(WANTING, known)
    rows = [SampledRow(slot, 12, 4, spec) for slot, spec in enumerate(WANTING)]
    assert [row.is_plain for row in rows] == [False] * 7 + [True]
    assert not replace(rows[7], spec=replace(rows[7].spec, grammar=object())).is_plain  # type: ignore[arg-type]
    found = adjusted(logits, rows, masks, slots)
    drawn = device_sampler.draw(
        logits, found, slots.seeds[:-1], slots.filters[:-1], torch.full((8,), 12), Kind.FILTERED
    )
    assert drawn[0].tolist() == expected
    assert torch.equal(logits, before)


def test_rows_without_a_token_say_why() -> None:
    logits = torch.randn(4, VOCAB)
    logits[0, 3] = torch.nan
    logits[1, 3] = torch.inf
    found = logits.clone()
    found[2] = -torch.inf
    slots = slots_of(PLAIN[:4], [np.zeros(4, np.int32)] * 4)
    args = (slots.seeds[:-1], slots.filters[:-1], torch.arange(4), Kind.FILTERED)
    tokens, may_take, is_sound = device_sampler.draw(logits, found, *args).tolist()
    assert tokens[:3] == [0, 0, 0]
    assert (may_take, is_sound) == ([0, 0, 0, 1], [0, 0, 1, 1])


def test_tokens_that_the_model_lacks_are_named_before_the_device_sees_them() -> None:
    wrong = SamplingSpec(logit_bias=((VOCAB, 1.0),))
    with pytest.raises(IndexError, match="token 700 is out of range of 700 tokens"):
        check_ids(SampledRow(0, 9, 4, wrong), VOCAB)
    for spec in WANTING:
        check_ids(SampledRow(0, 9, 4, spec), VOCAB)
