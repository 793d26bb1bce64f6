"""Whether a model can be cut as the settings say, and what else its config tells before a start."""

import logging
from collections.abc import Sequence

from saqqara.cluster.scheduling.scheduler import Scheduler
from saqqara.compression.retention import Retention
from saqqara.configs.quantum import prefill_quantum
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import head_shard, layer_split
from saqqara.workers.models.counting.rank_weights import check_channels
from saqqara.workers.models.source import local_folder
from saqqara.workers.models.spec import ModelSpec, load_spec
from saqqara.workers.plan import WorkerInfo

from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def check_fits(config: EngineConfig, spec: ModelSpec) -> None:
    """Raise a ValueError that names the setting which this model cannot meet."""
    tensor_size = config.tensor_parallel_size
    head_shard(spec.num_query_heads, spec.num_kv_heads, tensor_size, 0)
    check_channels(spec, tensor_size)
    layer_split(
        spec.num_layers,
        config.pipeline_parallel_size,
        spec.head_layers,
        config.layer_split,
    )
    if spec.layers.local_layers:  # what can be said before a profile is looked up
        try:
            Retention.parse(config.retention, config.budget).entering_tokens(1, spec.layers)
        except ValueError as error:
            raise ValueError(f"retention: {error}") from None
    if config.max_model_len is not None and config.max_model_len > spec.longest:
        raise ValueError(
            f"max_model_len={config.max_model_len} is more than the model's context of "
            f"{spec.longest} tokens"
        )


def check_fits_if_local(config: EngineConfig) -> None:
    """The same where the model's folder lies on this machine; another one checks it later."""
    try:
        is_local = local_folder(config.model) is not None
    except ValueError:
        return
    if is_local:
        check_fits(config, load_spec(config.model))


def scheduler_of(
    config: EngineConfig,
    spec: ModelSpec,
    workers: Sequence[WorkerInfo],
    lookahead: int | None = None,
) -> Scheduler:
    """The scheduler of an engine with these settings; see `Engine` for `lookahead`."""
    if lookahead is None:
        lookahead = 1 if all(w.device == "cpu" for w in workers) else 2
    return Scheduler(
        workers,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len or spec.max_position,
        max_prefill_tokens=config.max_prefill_tokens,
        prefill_quantum=prefill_quantum(
            config.prefill_quantum,
            workers[0].device,
            config.tensor_parallel_size,
            spec.layer_parameters,
        ),
        max_extend_tokens=config.max_extend_tokens,
        prefix_bytes=prefix_bytes(config),
        conversation_bytes=_bytes(config.conversation_gib),
        conversation_seconds=config.conversation_seconds,
        lookahead=lookahead,
    )


def prefix_bytes(config: EngineConfig) -> int | None:
    """Most bytes of cached prefixes; None: half the pool."""
    if not config.prefix_caching:
        return 0
    return _bytes(config.prefix_cache_gib)


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 2**30)


def known_eos(spec: ModelSpec, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text, of the model's configs and the tokenizer, ascending.

    Those that the model cannot write are left out with a warning.
    """
    given = {*spec.eos_token_ids, *tokenizer.eos_token_ids}
    known = tuple(sorted(token for token in given if 0 <= token < spec.vocab_size))
    if unknown := sorted(given.difference(known)):
        logger.warning(
            "end tokens %s are ignored: the model's tokens are 0 to %d",
            ", ".join(map(str, unknown)),
            spec.vocab_size - 1,
        )
    return known
