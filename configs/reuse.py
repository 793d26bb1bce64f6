"""Settings of memory that is used again: prefixes, preempted sequences, conversations."""

from pydantic import BaseModel, Field


class ReuseConfig(BaseModel):
    """What of `EngineConfig` says which keys and values stay after the request that made them."""

    prefix_caching: bool = Field(
        True,
        description="Compute a prompt from behind its longest cached prefix; prefixes that came "
        "twice are stored, in pages that nobody needs.",
    )
    prefix_cache_gib: float | None = Field(
        None,
        gt=0,
        le=2**14,
        description="Most bytes of cached prefixes, all ranks together; default: half the KV pool.",
    )
    host_kv_gib: float | None = Field(
        None,
        ge=0,
        le=2**14,
        description="Host memory for the keys and values of preempted sequences and of "
        "conversations, all ranks together; on a CPU it is taken from the KV pool's. Default: 4 "
        "per GPU, none on a CPU.",
    )
    conversation_gib: float | None = Field(
        None,
        ge=0,
        le=2**14,
        description="Most bytes of conversations that wait for their next turn, in pages and in "
        "host memory; default: a quarter of the KV pool, and host_kv_gib.",
    )
    conversation_seconds: float = Field(
        600.0,
        gt=0,
        le=30 * 24 * 3600.0,
        description="A conversation without a turn for so long is forgotten.",
    )
