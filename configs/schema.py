"""Every setting of engine and server, with its default, unit and check. Unknown keys are errors."""

import os
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .autoscaling import AutoscalingConfig
from .hosts import check_host_pattern
from .reuse import ReuseConfig
from .shown import budget_mistake
from .step_limits import ON_CPU, OPEN, Limited
from .worker_settings import MAX_NUM_SEQS, WorkerSettings

MAX_TOKENS = 2**24
MAX_RANKS = 1024
MAX_TIMEOUT_SECONDS = 30 * 24 * 3600.0

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", re.IGNORECASE)


class EngineConfig(ReuseConfig):
    """Settings of one engine replica. Sizes are per replica unless the name says otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(
        description="Folder, GGUF file, or hub id (ORG/NAME or ORG/NAME@REVISION) of a model."
    )
    tokenizer: str | None = Field(None, description="Folder or hub id; default: the model's own.")
    load_format: Literal["safetensors", "dummy"] = Field(
        "safetensors", description="'dummy' makes random weights (benchmarks and tests)."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seeds requests that bring no seed of their own."
    )

    max_model_len: int | None = Field(
        None,
        ge=1,
        le=MAX_TOKENS,
        description="Prompt plus generated tokens; default: the model's context.",
    )
    max_num_seqs: int = Field(
        ON_CPU.max_num_seqs,
        ge=1,
        le=MAX_NUM_SEQS,
        description="Sequences that hold a slot at once; unset on a GPU: 128, of 70 GiB or more "
        "256, fewer where slots remember much.",
    )
    max_prefill_tokens: int = Field(
        ON_CPU.max_prefill_tokens,
        ge=1,
        le=MAX_TOKENS,
        description="Prompt tokens concatenated into one prefill group; unset on a GPU: 4096, of "
        "70 GiB or more 8192.",
    )
    prefill_quantum: Annotated[int, Field(ge=1, le=2**40)] | Literal["auto", "none"] | None = Field(
        "auto",
        description="Layers x tokens of prefill per step while others decode; 'auto': 32768 on a "
        "CPU, what takes a GPU about 0.1 s; none: no bound.",
    )
    max_extend_tokens: int = Field(
        1024, ge=1, le=MAX_TOKENS, description="Tokens replayed or scored per step in one `extend`."
    )
    linear_chunk_tokens: int = Field(
        2048,
        ge=1,
        le=MAX_TOKENS,
        description="Tokens per chunk in linear layers and MLP during prefill.",
    )

    page_tokens: int = Field(
        16, ge=1, le=1024, description="Tokens of one page (one row's K and V)."
    )
    kv_memory_gib: float | None = Field(
        None,
        gt=0,
        le=2**14,
        description="KV pool in GiB; default on CPU: min(4, 30% of available memory).",
    )
    memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of GPU memory the engine may use."
    )

    retention: str | dict[str, Any] = Field(
        "full", description="Retention method or preset name, or a mapping of its settings."
    )
    budget: int | str | None = Field(
        None, description="Mean kept tokens per layer and kv head, or a share such as '25%'."
    )
    profile_dir: str | None = Field(
        None, description="Profiles of `saqqara eval calibrate`; default: <cache>/profiles."
    )

    tool_call_parser: Literal["auto", "none", "hermes", "llama3_json", "mistral", "qwen3_coder"] = (
        Field(
            "auto",
            description="How the model writes tool calls; 'auto': as its chat template tells.",
        )
    )
    reasoning_parser: Literal["auto", "none", "deepseek_r1", "qwen3"] = Field(
        "auto", description="How the model writes thoughts; 'auto': as its chat template tells."
    )

    attention_backend: str = "auto"
    linear_backend: Literal["auto", "torch", "native"] = Field(
        "auto", description="'native': our own bf16 CPU kernels, compiled once per machine."
    )
    cuda_graphs: Literal["auto", "off"] = Field(
        "auto", description="'auto': replay recorded decode steps on a GPU; 'off': launch each."
    )
    tensor_parallel_size: int = Field(1, ge=1, le=MAX_RANKS)
    pipeline_parallel_size: int = Field(1, ge=1, le=MAX_RANKS)
    layer_split: tuple[int, ...] | None = Field(
        None,
        description="Layers per pipeline stage, e.g. [16, 14]; default: balanced by time and "
        "bytes, with what each layer keeps under the engine's retention.",
    )
    executor: Literal["local", "ray"] = "local"
    num_threads: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="CPU threads per worker; default: cores / ranks on the host.",
    )
    warmup: bool = Field(True, description="Run one small step before the first request.")
    check_integrity: bool = Field(False, description="Prove page ownership after every step.")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="Serve /metrics here (0: any free port); default: off."
    )
    log_dir: str | None = Field(
        None, description="Folder of the per-rank logs; default: <cache>/logs/<start time>."
    )

    @field_validator("model", "tokenizer", "retention", "log_dir", "profile_dir", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("is empty")
        return value

    @field_validator("budget", mode="before")
    @classmethod
    def _no_fraction(cls, value: Any) -> Any:
        if isinstance(value, float):
            raise ValueError(budget_mistake(value).removeprefix("budget: "))
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layer_split is not None:
            if len(self.layer_split) != self.pipeline_parallel_size:
                raise ValueError(
                    f"layer_split has {len(self.layer_split)} entries; it needs one per pipeline "
                    f"stage (pipeline_parallel_size={self.pipeline_parallel_size})"
                )
            if min(self.layer_split) < 1:
                raise ValueError("layer_split: every stage needs at least one layer")
        ranks = self.tensor_parallel_size * self.pipeline_parallel_size
        if self.executor == "local" and ranks > 1:
            raise ValueError(
                f"executor='local' runs one rank; tensor_parallel_size={self.tensor_parallel_size}"
                f" x pipeline_parallel_size={self.pipeline_parallel_size} needs executor='ray'"
            )
        return self

    def for_worker(self) -> WorkerSettings:
        """What a worker needs to know of this."""
        names = [field.name for field in fields(WorkerSettings) if field.name != "left_open"]
        given = {name: getattr(self, name) for name in names}
        return WorkerSettings(**given, left_open=self.left_open)

    @property
    def left_open(self) -> tuple[str, ...]:
        """Names of the settings that the device decides, because nobody has set them."""
        return tuple(name for name in OPEN if name not in self.model_fields_set)

    def settled(self, workers: Sequence[Limited]) -> "EngineConfig":
        """This with the least of what the workers have for what was left open."""
        if not workers:
            return self
        found = {name: min(getattr(w, name) for w in workers) for name in self.left_open}
        return self.model_copy(update=found)


class ModelLoadingConfig(BaseModel):
    """Which model a server has, and under which name it answers."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_id: str = Field(min_length=1, description="The name that clients send as `model`.")
    model_source: str | None = Field(
        None, description="Local folder or Hugging Face hub id; default: `model_id`."
    )


class DeploymentConfig(BaseModel):
    """How Ray Serve runs the replicas of a server; names and meaning are Serve's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_replicas: int = Field(1, ge=1, description="Engines, each with a model of its own.")
    autoscaling_config: AutoscalingConfig | None = Field(
        None, description="Instead of num_replicas: a number that follows the load."
    )
    max_surge_percent: int = Field(
        0, ge=0, le=100, description="Replicas beside num_replicas while settings are changed."
    )
    max_ongoing_requests: int | None = Field(
        None, ge=1, description="Open requests per replica; default: no bound but `limits`."
    )
    graceful_shutdown_timeout_s: float = Field(
        600.0, ge=0, description="Seconds a replica that is to end has to finish its requests."
    )
    health_check_period_s: float = Field(10.0, gt=0)
    health_check_timeout_s: float = Field(30.0, gt=0)
    ray_actor_options: dict[str, Any] = Field(
        default_factory=dict, description="Resources of a replica itself, such as num_cpus."
    )

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.autoscaling_config is not None and "num_replicas" in self.model_fields_set:
            raise ValueError("give num_replicas or autoscaling_config, not both")
        return self

    @property
    def first_replicas(self) -> int:
        """Replicas at the start."""
        scaling = self.autoscaling_config
        return self.num_replicas if scaling is None else scaling.first_replicas

    @property
    def most_replicas(self) -> int:
        """Replicas that there may ever be."""
        scaling = self.autoscaling_config
        return self.num_replicas if scaling is None else scaling.max_replicas


class PlacementGroupConfig(BaseModel):
    """Bundles that a replica with several ranks asks for, one per rank or one per stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: tuple[dict[str, float], ...] = Field(min_length=1)
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"


class ServerLimits(BaseModel):
    """What a replica accepts from its clients."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_queue: int = Field(
        256, ge=0, description="Sequences that may wait beyond max_num_seqs; more get status 429."
    )
    max_queue_share: float = Field(
        0.75, gt=0, le=1, description="Of the queue that one of several keys may take; else 429."
    )
    max_body_bytes: int = Field(4 * 2**20, ge=1, description="A larger body gets status 413.")
    body_timeout_seconds: float = Field(
        30.0, gt=0, description="A body that has not come within this time gets status 408."
    )
    max_n: int = Field(16, ge=1, le=128, description="Choices per prompt.")
    max_logprobs: int = Field(20, ge=0, le=20, description="Best tokens beside the sampled one.")
    max_stop: int = Field(16, ge=0, description="Stop strings of a request.")
    max_answer_logprobs: int = Field(
        1_000_000,
        ge=0,
        description="Log-probabilities that one request may be answered with, the best tokens and "
        "the prompt's included.",
    )
    max_prompts: int = Field(64, ge=1, description="Prompts of one completion request.")
    max_timeout_seconds: float = Field(
        86400.0, gt=0, le=MAX_TIMEOUT_SECONDS, description="Largest timeout_seconds of a request."
    )
    default_timeout_seconds: float | None = Field(
        None, gt=0, description="timeout_seconds of requests that say none; default: no end."
    )

    min_priority: int | None = Field(
        None, le=0, description="Lowest priority number that a request may give; default: any."
    )

    @model_validator(mode="after")
    def _check_timeouts(self) -> Self:
        if (self.default_timeout_seconds or 0) > self.max_timeout_seconds:
            raise ValueError(
                f"default_timeout_seconds={self.default_timeout_seconds:g} is more than "
                f"max_timeout_seconds={self.max_timeout_seconds:g}"
            )
        return self


class BatchLimits(BaseModel):
    """How much the files and batches of a server may be; `key`: an API key, or all without keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_file_bytes: int = Field(200 * 2**20, ge=1, description="A larger file gets status 413.")
    max_stored_bytes: int = Field(10 * 2**30, ge=1, description="All files of a key.")
    max_files: int = Field(10_000, ge=1, description="Files of a key.")
    max_active: int = Field(100, ge=1, description="Batches of a key that are not done.")
    max_batches: int = Field(
        10_000,
        ge=1,
        description="Batches of a key; beyond, the oldest that are done are forgotten.",
    )
    max_lines: int = Field(50_000, ge=1, description="Lines of a batch's input.")
    max_line_bytes: int = Field(4 * 2**20, ge=1, description="Bytes of one of them.")
    max_output_bytes: int = Field(
        2**30, ge=1, description="Answers of a batch; lines beyond are errors."
    )
    max_in_flight: int | None = Field(
        None,
        ge=1,
        description="Sequences of batches that a replica runs at once; default: 3/4 of "
        "max_num_seqs.",
    )
    lease_seconds: float = Field(
        30.0,
        ge=1,
        description="A replica that is silent for so long has lost its batches to others.",
    )


class ServeConfig(BaseModel):
    """Settings of a server; the names are those that users of `ray.serve.llm` know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_loading_config: ModelLoadingConfig
    engine_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Fields of EngineConfig but `model`."
    )
    deployment_config: DeploymentConfig = DeploymentConfig()
    placement_group_config: PlacementGroupConfig | None = None
    accelerator_type: str | None = Field(
        None, description="Ray's name of the GPU that every rank must have, such as H100."
    )
    api_key_file: str | None = Field(
        None, description="File with one key per line; also read: SAQQARA_API_KEYS (with commas)."
    )
    allowed_origins: tuple[str, ...] = Field(
        (), description="Origins whose web pages may use the server, such as https://example.com."
    )
    model_aliases: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="Other names of the model that requests may give."
    )
    chat_template: str | None = Field(
        None, description="File with a Jinja chat template instead of the model's own."
    )
    trust_request_chat_template: bool = Field(
        False, description="Take chat templates from clients: they are programs, in a sandbox."
    )
    enable_tokenizer_info_endpoint: bool = Field(
        False, description="Answer GET /tokenizer_info: the tokenizer's settings and template."
    )
    ui: bool = Field(True, description="Whether there is a page at `/`.")
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Names by which a server without keys may be asked, such as *.example.com; "
        "besides addresses and localhost.",
    )
    limits: ServerLimits = ServerLimits()
    batch_dir: str | None = Field(
        None,
        description="Folder of files and batches, shared by the replicas; default: there are none.",
    )
    batches: BatchLimits = BatchLimits()

    @field_validator("batch_dir")
    @classmethod
    def _absolute(cls, folder: str | None) -> str | None:
        """Replicas run elsewhere than where the setting was read."""
        if folder == "":
            raise ValueError("is empty")
        return None if folder is None else os.path.abspath(os.path.expanduser(folder))

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_host_pattern(host) for host in hosts)

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin; write scheme, host and port without a path, such as "
                    "https://example.com or http://localhost:3000, or '*' for all"
                )
        return tuple(origin.lower() for origin in origins)  # as browsers send them
