"""Every counter, gauge and histogram of an engine, in one table.

`METRICS` is plain data, so any number of sinks can be built from it: Prometheus in
`engine/metrics.py`, Ray's own metrics in `on_ray/`. Names that start with `vllm:` mean what they
mean in vLLM, so its dashboards work; what only Saqqara has starts with `saqqara:`.
`docs/metrics.md` says what each is, and where it differs from vLLM's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from saqqara.cluster.errors import Cause

Kind = Literal["counter", "gauge", "histogram"]

MODEL_LABEL = "model_name"

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_NEXT_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1.0, *(float(2**power) for power in range(3, 15)))
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)
_LENGTH = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric; every metric also has the label `model_name`.

    `first_values` are values of its (only) label whose series exist, at zero, from the start.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    first_values: tuple[str, ...] = ()


METRICS: tuple[MetricSpec, ...] = (
    MetricSpec("vllm:num_requests_running", "gauge", "Sequences in prefill or decode."),
    MetricSpec("vllm:num_requests_waiting", "gauge", "Sequences waiting for a slot."),
    MetricSpec(
        "vllm:num_requests_waiting_by_reason",
        "gauge",
        "Waiting for room, or held back while another runs alone.",
        labels=("reason",),
        first_values=("capacity", "deferred"),
    ),
    MetricSpec(
        "vllm:kv_cache_usage_perc",
        "gauge",
        "Share of the KV pages that sequences need, 1 = all, of the worker with the least free.",
    ),
    MetricSpec("vllm:prompt_tokens", "counter", "Prompt tokens prefilled, each request once."),
    MetricSpec("vllm:generation_tokens", "counter", "Tokens generated."),
    MetricSpec(
        "vllm:time_to_first_token_seconds",
        "histogram",
        "From arrival to the first token.",
        buckets=_FIRST_TOKEN,
    ),
    MetricSpec(
        "vllm:inter_token_latency_seconds",
        "histogram",
        "Between two tokens of one sequence.",
        buckets=_NEXT_TOKEN,
    ),
    MetricSpec(
        "vllm:e2e_request_latency_seconds",
        "histogram",
        "From arrival to the last token.",
        buckets=_REQUEST,
    ),
    MetricSpec(
        "vllm:request_success",
        "counter",
        "Finished requests by reason.",
        labels=("finished_reason",),
        first_values=("stop", "length", "abort", "error"),
    ),
    MetricSpec(
        "vllm:request_queue_time_seconds",
        "histogram",
        "From arrival until the first of a request's sequences has a slot.",
        buckets=_REQUEST,
    ),
    MetricSpec(
        "vllm:request_inference_time_seconds",
        "histogram",
        "From the first slot to the last token.",
        buckets=_REQUEST,
    ),
    MetricSpec(
        "vllm:request_prefill_time_seconds",
        "histogram",
        "From the first slot to the first token.",
        buckets=_REQUEST,
    ),
    MetricSpec(
        "vllm:request_decode_time_seconds",
        "histogram",
        "From the first token to the last.",
        buckets=_REQUEST,
    ),
    MetricSpec(
        "vllm:request_time_per_output_token_seconds",
        "histogram",
        "Decode time of a request by its tokens after the first.",
        buckets=_NEXT_TOKEN,
    ),
    MetricSpec(
        "vllm:request_prompt_tokens",
        "histogram",
        "Prompt tokens of a finished request.",
        buckets=_LENGTH,
    ),
    MetricSpec(
        "vllm:request_generation_tokens",
        "histogram",
        "Tokens generated for a finished request, all its choices together.",
        buckets=_LENGTH,
    ),
    MetricSpec(
        "vllm:request_max_num_generation_tokens",
        "histogram",
        "Tokens of the longest choice of a finished request.",
        buckets=_LENGTH,
    ),
    MetricSpec(
        "vllm:request_params_n", "histogram", "Choices that a request asked for.", buckets=_CHOICES
    ),
    MetricSpec(
        "vllm:request_params_max_tokens",
        "histogram",
        "Most tokens that a choice of a request might have had.",
        buckets=_LENGTH,
    ),
    MetricSpec(
        "vllm:iteration_tokens_total",
        "histogram",
        "Tokens of a step: prompts whose prefill ended in it, and tokens generated.",
        buckets=_STEP_TOKENS,
    ),
    MetricSpec(
        "vllm:prefix_cache_queries",
        "counter",
        "Prompt tokens of sequences that started.",
    ),
    MetricSpec(
        "vllm:prefix_cache_hits",
        "counter",
        "Those of them that were cached, or computed once for several sequences.",
    ),
    MetricSpec(
        "vllm:cache_config_info",
        "gauge",
        "1; its labels say how the KV cache is made.",
        labels=(
            *("block_size", "cache_dtype", "enable_prefix_caching"),
            *("gpu_memory_utilization", "num_gpu_blocks"),
        ),
    ),
    MetricSpec("vllm:num_preemptions", "counter", "Sequences that lost their slot for a while."),
    MetricSpec(
        "saqqara:num_refusals", "counter", "Sequences that a worker had no pages for in a step."
    ),
    MetricSpec(
        "saqqara:parked_sequences", "gauge", "Preempted sequences that wait in host memory."
    ),
    MetricSpec("saqqara:parked_bytes", "gauge", "Host memory that they take, at most."),
    MetricSpec(
        "saqqara:parkings",
        "counter",
        "Preempted sequences that were copied to host memory, put back, or dropped there.",
        labels=("outcome",),
    ),
    MetricSpec("saqqara:parked_copied_bytes", "counter", "Bytes copied to host memory, and back."),
    MetricSpec("saqqara:conversations", "gauge", "Conversations that wait for their next turn."),
    MetricSpec("saqqara:conversation_bytes", "gauge", "Bytes of keys and values that they keep."),
    MetricSpec(
        "saqqara:conversations_on_host", "gauge", "Of them, those that wait in host memory."
    ),
    MetricSpec("saqqara:conversation_host_bytes", "gauge", "Host memory that these take, at most."),
    MetricSpec(
        "saqqara:conversation_moves",
        "counter",
        "Conversations that moved from pages to host memory, or resumed from there.",
        labels=("outcome",),
    ),
    MetricSpec(
        "saqqara:conversation_turns",
        "counter",
        "Turns after the first: resumed, or why they were computed anew.",
        labels=("outcome",),
    ),
    MetricSpec(
        "saqqara:conversation_resumed_tokens",
        "counter",
        "Prompt tokens of turns that were not computed, because earlier turns were.",
    ),
    MetricSpec(
        "saqqara:conversations_gone",
        "counter",
        "Conversations that are kept no more: expired, dropped to make room, or ended.",
        labels=("cause",),
    ),
    MetricSpec("saqqara:scored_tokens", "counter", "Continuation tokens scored."),
    MetricSpec(
        "saqqara:kept_tokens",
        "counter",
        "Prompt tokens kept after prefill, summed over kv heads.",
        labels=("layer", "method"),
    ),
    MetricSpec(
        "saqqara:dropped_tokens",
        "counter",
        "Prompt tokens dropped after prefill, summed over kv heads.",
        labels=("layer", "method"),
    ),
    MetricSpec(
        "saqqara:local_tokens",
        "counter",
        "Prompt tokens in the windows of local layers after prefill, summed over kv heads.",
        labels=("layer",),
    ),
    MetricSpec("saqqara:kv_kept_bytes", "gauge", "Bytes of KV pages that sequences hold."),
    MetricSpec("saqqara:kv_full_bytes", "gauge", "Bytes they would hold under full retention."),
    MetricSpec(
        "saqqara:kv_local_bytes", "gauge", "Bytes of KV pages that local layers hold besides."
    ),
    MetricSpec("saqqara:kv_kept_bytes_peak", "gauge", "Most bytes of KV pages held at once."),
    MetricSpec(
        "saqqara:kv_full_bytes_peak", "gauge", "What full retention would have held at that moment."
    ),
    MetricSpec("saqqara:prefix_blocks", "gauge", "Blocks of cached prefixes."),
    MetricSpec("saqqara:prefix_bytes", "gauge", "Bytes of KV pages that these blocks have."),
    MetricSpec("saqqara:prefix_blocks_stored", "counter", "Blocks that prefills began to fill."),
    MetricSpec("saqqara:prefix_blocks_evicted", "counter", "Blocks that were given up."),
    MetricSpec("saqqara:num_pages", "gauge", "KV pages of the pool.", labels=("worker",)),
    MetricSpec("saqqara:pages_free", "gauge", "Free KV pages.", labels=("worker",)),
    MetricSpec(
        "saqqara:pages_leaked",
        "gauge",
        "Pages not free, nor kept for later prompts, when nothing was left to do; always 0.",
    ),
    MetricSpec(
        "saqqara:step_seconds",
        "histogram",
        "Time of a step on its slowest worker, by phase.",
        labels=("phase",),
        buckets=_STEP,
    ),
    MetricSpec(
        "saqqara:worker_memory_bytes",
        "gauge",
        "Bytes on a worker: weights, pool, parked activations, query rings, peaks, resident.",
        labels=("worker", "kind"),
    ),
    MetricSpec(
        "saqqara:recoveries",
        "counter",
        "Times that lost workers were started again, by how they were lost.",
        labels=("cause",),
        first_values=get_args(Cause),
    ),
    MetricSpec("saqqara:down_seconds", "counter", "Seconds without workers until they were back."),
    MetricSpec("saqqara:ready", "gauge", "1: there are workers; 0: they are started again."),
    MetricSpec("saqqara:workers", "gauge", "Workers that the engine runs on."),
    MetricSpec("saqqara:workers_alive", "gauge", "Workers that are there now; lost ones are not."),
    MetricSpec(
        "saqqara:workers_lost",
        "counter",
        "Losses of workers by the one that was the cause (-1: nobody knows) and how.",
        labels=("worker", "cause"),
    ),
    MetricSpec(
        "saqqara:worker_seconds",
        "counter",
        "Seconds of steps on each worker, by phase.",
        labels=("worker", "phase"),
    ),
    MetricSpec(
        "saqqara:worker_info",
        "gauge",
        "1: the worker is there now; its labels say where, and its part of the model.",
        labels=("worker", "hostname", "device", "layers", "kv_heads"),
    ),
    MetricSpec("saqqara:batch_rows", "gauge", "Rows of the batch job's input; 0: no batch job."),
    MetricSpec("saqqara:batch_rows_left", "gauge", "Rows of the batch job without a record."),
    MetricSpec(
        "saqqara:batch_rows_done",
        "counter",
        "Records that batch jobs wrote, by outcome.",
        labels=("outcome",),
        first_values=("answered", "error"),
    ),
)

SPECS: Mapping[str, MetricSpec] = {spec.name: spec for spec in METRICS}
