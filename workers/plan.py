"""The wire format between scheduler and workers: small, frozen, picklable, no tensors.

A `StepPlan` says what all workers of a replica do in one step, in the order *drop, park, free,
evict, offload, new, prefill, decode*. A `StepResult` is what one worker reports back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from saqqara.compression.layers import Layers
from saqqara.compression.retention import Retention

FaultCode = Literal["computation_failed", "constraint_failed"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer has to match, token by token.

    Attributes:
        text: the grammar as llguidance writes it, a text of JSON.
        eos_token_ids: the tokens that may follow an answer that is complete.
        ignore_eos: one of these only where nothing else can follow.
    """

    text: str
    eos_token_ids: tuple[int, ...]
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """The part of the sampling parameters that the last stage needs.

    `seed` is always set (the engine derives one where the request has none): random numbers are a
    function of (seed, position), so a resumed sequence goes on exactly as it would have.
    `blocked_token_ids` cannot be sampled before `min_tokens` tokens are generated.
    `allowed_token_ids` are int32 bytes of the only ids that can be sampled (empty: all can); the
    last id of each of `bad_words` cannot where the output ends with the ids before it.
    `logit_bias` are (token id, what is added to its logit).
    `num_logprobs` is None for none, 0 for the sampled token's only, k for the k best as well (and
    of a scored sequence, k for the k best at each scored position). `num_prompt_logprobs` asks the
    same of the prompt's tokens, where its prefill ends. With a `grammar`, no token is sampled that
    it does not allow, and with `complete_within` the answer is complete after so many tokens, if
    an ending is found that fits.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    blocked_token_ids: tuple[int, ...] = ()
    allowed_token_ids: bytes = b""
    bad_words: tuple[tuple[int, ...], ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None
    grammar: Grammar | None = None
    num_prompt_logprobs: int | None = None
    complete_within: int | None = None


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What a prompt has to do with blocks: full keys and values of its first tokens.

    A block has those of `page_tokens` adjacent tokens before retention, on each worker one page for
    each of its rows, local layers' too. Ids are given by the scheduler; the prompt's first tokens
    are those of `cached`, block after block, and after them come those of `stored`. Tokens of
    `cached` are not computed: prefill begins behind them. `stored` are filled by this prefill, take
    their pages when the sequence takes its slot, and can be used by later plans once its prefill
    has ended.

    With `is_shared` rows of layers that see all tokens keep the whole prompt, and hold the pages of
    `cached` themselves instead of copies of them.
    """

    cached: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class Parking:
    """A slot's sequence leaves it, and what its rows hold stays, as `parked_id`.

    All that is remembered of it stays, too: rings, sums, and how often its rows were cut. With
    `to_host` that is in the host's memory, and its pages are free; else in its pages.
    """

    slot: int
    parked_id: int
    to_host: bool = True


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that takes a slot.

    `token_ids` are int32 bytes: the prompt (`prompt_tokens` of them, prefilled and retained), then
    tokens that are already known (generated before a preemption, or the continuation to score),
    which later `DecodeItem`s replay through `extend`. With `score`, every known token after the
    prompt gets its log-probability and nothing is sampled.

    With `shares_prefill_with` the sequence has the same prompt, and the same propagation, as the
    sequence of that slot, its leader, which precedes it among the new ones and in its prefill
    group. It is not computed again, but retained by its own method: it takes pages only.

    With `resumes` its rows begin as those of that parked id, which is no more then, with
    `resumed_tokens` of its tokens fed. If these are fewer than the prompt's, the rest of the prompt
    goes through a prefill group, over what the rows hold, and retention chooses again among both;
    else its next tokens are fed by decode items. It has no `prefix` then, and shares no prefill.
    """

    slot: int
    token_ids: bytes
    prompt_tokens: int
    sampling: SamplingSpec
    retention: Retention
    score: bool = False
    shares_prefill_with: int | None = None
    prefix: CachedPrefix | None = None
    resumes: int | None = None
    resumed_tokens: int = 0

    def tokens(self) -> np.ndarray:
        """The known tokens, int32 [n]."""
        return np.frombuffer(self.token_ids, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class PrefillGroup:
    """Prompts that go through the layers `[start_layer, stop_layer)` together in this step.

    Layer numbers are those of the whole model. A group keeps its slots (and their order) from its
    first range, which starts at layer 0, to its last, which stops at the model's last layer; there
    each sequence without known tokens after its prompt is sampled. Sequences that share a prefill
    follow their leader.
    """

    slots: tuple[int, ...]
    start_layer: int
    stop_layer: int


@dataclass(frozen=True, slots=True)
class DecodeItem:
    """`num_tokens` known tokens of a slot, fed from `position` on through all layers.

    One token is a decode step; more are an extension (resume or scoring). `sample` asks for the
    next token after the last one.
    """

    slot: int
    position: int
    num_tokens: int = 1
    sample: bool = True


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of a replica; the same object goes to every worker.

    `evict` are blocks, `drop` parked ids whose pages or memory are given up; a worker that has none
    of that id, because it refused the slot that it was to come from, passes over it. `offload` are
    parked ids that move from their pages to the host's memory. What is dropped makes room there for
    what is parked in the same plan, what is moved makes pages for those that take slots.
    """

    step: int
    drop: tuple[int, ...] = ()
    park: tuple[Parking, ...] = ()
    free: tuple[int, ...] = ()
    evict: tuple[int, ...] = ()
    offload: tuple[int, ...] = ()
    new: tuple[NewSequence, ...] = ()
    prefill: tuple[PrefillGroup, ...] = ()
    decode: tuple[DecodeItem, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen token's, its rank (1 = best), and the best."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of a slot; `position` is the token's own position in the sequence.

    With `is_last` the sequence's grammar allows nothing after it. With `is_cut` it was not sampled,
    but chosen so that the answer is complete within its tokens.
    """

    slot: int
    position: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    is_last: bool = False
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Log-probabilities of known tokens from `position` on; `ranks` has 1 where greedy agrees.

    `top_ids` and `top_logprobs` have the best tokens at each position, as many as the sequence's
    `num_logprobs`; they are empty where it asks for none.
    """

    slot: int
    position: int
    logprobs: tuple[float, ...]
    ranks: tuple[int, ...]
    top_ids: tuple[tuple[int, ...], ...] = ()
    top_logprobs: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of a prompt's n tokens but the first, each given all tokens before it.

    They are computed in prefill, before retention. `logprobs` are float32 and `ranks` int32 bytes
    [n - 1], `top_logprobs` and `top_ids` the same [n - 1, k], with k the sequence's
    `num_prompt_logprobs` (or the vocabulary, if that is smaller).
    """

    slot: int
    logprobs: bytes
    ranks: bytes
    top_ids: bytes = b""
    top_logprobs: bytes = b""


@dataclass(frozen=True, slots=True)
class KeptCounts:
    """Kept tokens per row of one slot whose prefill ended on this worker, int32 bytes [L, H]."""

    slot: int
    counts: bytes


@dataclass(frozen=True, slots=True)
class Fault:
    """Why the sequence of a slot cannot go on: its own fault, which costs no other sequence.

    Its `code` says whether what was computed is broken, or what its request asks of the answer
    leaves no token.
    """

    slot: int
    message: str
    code: FaultCode = "computation_failed"


@dataclass(frozen=True, slots=True)
class WorkerMemory:
    """Bytes on one worker. Peaks are since start-up.

    `prefill_kv_bytes` counts the pages of prompts in prefill plus the fresh keys and values of the
    layer being computed; `prefill_activation_bytes` everything else that prefill holds
    (hidden states in flight and parked, queries, attention output, MLP chunk). `ring_bytes` are the
    queries, and `mass_bytes` the sums of attention, remembered for compactions while decoding.
    `table_bytes` are of page tables, lengths, rotary angles, and what a device that samples knows
    of slots. On a GPU the pool leaves room for the temporaries of the largest step, recorded
    graphs, and rings and sums of every slot: `temporary_bytes`, `graph_bytes` and
    `remembered_bytes`; 0 on a CPU.
    """

    weight_bytes: int = 0
    pool_bytes: int = 0
    parked_activation_bytes: int = 0
    ring_bytes: int = 0
    mass_bytes: int = 0
    prefill_kv_bytes_peak: int = 0
    prefill_activation_bytes_peak: int = 0
    resident_bytes: int = 0
    resident_bytes_peak: int = 0
    table_bytes: int = 0
    temporary_bytes: int = 0
    graph_bytes: int = 0
    remembered_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one worker did in one step.

    `sampled`, `scored` and `prompts` come from tensor rank 0 of the last stage only. `refused`
    names slots whose keys and values did not fit: this worker wrote nothing for them and holds
    nothing of them.
    `faults` says of which of the refused slots the sequence has to end, and why; it need not be the
    same on every worker.
    `prefill_layer_tokens` counts the tokens that prefill took through each of this worker's layers,
    summed over the layers.
    """

    step: int
    rank: int
    sampled: tuple[SampledToken, ...] = ()
    scored: tuple[ScoredTokens, ...] = ()
    prompts: tuple[PromptScores, ...] = ()
    kept: tuple[KeptCounts, ...] = ()
    refused: tuple[int, ...] = ()
    faults: tuple[Fault, ...] = ()
    pages_free: int = 0
    prefill_layer_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    memory: WorkerMemory = field(default_factory=WorkerMemory)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What one worker is once it has started: its shard and what fits into it.

    Layers are `[start_layer, stop_layer)`, kv heads `[start_head, stop_head)` of the whole model.
    `ring_query_bytes` and `ring_normaliser_bytes` are those of one token whose queries (and their
    normalisers) are remembered for cuts while decoding, in all of its layers; how many tokens that
    is depends on `max_model_len`, too. The two after them are what the worker was sized for.
    `windows` are those of all layers of the model, as `Layers` has them; () if none has one.
    `host_kv_bytes` of the host's memory are for sequences that are parked there. The worker's page
    tables hold `most_shared_entries` of pages that other rows hold, too; None: any number.
    `hidden_bytes` are those of one token's hidden state.
    """

    rank: int
    pipeline_rank: int
    tensor_rank: int
    start_layer: int
    stop_layer: int
    start_head: int
    stop_head: int
    num_pages: int
    page_tokens: int
    page_bytes: int
    device: str
    dtype: str
    attention_backend: str
    attention_reason: str
    linear_backend: str
    linear_reason: str
    dtype_reason: str
    memory: WorkerMemory
    hostname: str
    pid: int
    log_file: str | None = None
    max_model_len: int = 0
    ring_query_bytes: int = 0
    ring_normaliser_bytes: int = 0
    max_num_seqs: int = 64
    max_prefill_tokens: int = 2048
    windows: tuple[int, ...] = ()
    host_kv_bytes: int = 0
    most_shared_entries: int | None = None
    hidden_bytes: int = 0


def layers_of(workers: Sequence[WorkerInfo]) -> Layers:
    """All layers of the model that these workers hold, by what they see."""
    return Layers(workers[0].windows or (0,) * max(worker.stop_layer for worker in workers))
