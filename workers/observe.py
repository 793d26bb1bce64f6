"""What a rank shows a retention method of one prompt in one layer.

Shapes: n prompt tokens, w window queries, Hq local query heads, H local kv heads, D head dim,
K kv heads of the model, m any columns.
"""

from torch import Tensor

from saqqara.compression.observation import Observation
from saqqara.compression.retention import Retention

from .models.layer import QKV
from .shard import Shard


class Observer:
    """Makes the observations of one rank; what needs other ranks is asked for over its mesh."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def all_mass(self, prompt: QKV, lse: Tensor | None) -> Tensor:
        """Attention [H, n] that each key of a prompt gets from all its queries, on this rank.

        `lse` is as for `observe`.
        """
        return self._shard.backend.mass(prompt.q, prompt.k, self._shard.scale, lse=lse)

    def observe(
        self,
        layer: int,
        prompt: QKV,
        lse: Tensor | None,
        retention: Retention,
        original_tokens: int,
        masses: Tensor | None = None,
    ) -> Observation:
        """The tokens of a prompt that entered one layer, for a retention that drops some of them.

        `lse` [n, Hq] is what prefill returned of all queries, None if it did not; `original_tokens`
        is the length of the whole prompt, and `masses` the `all_mass` of these tokens if known.
        """
        shard, num_tokens = self._shard, len(prompt.k)
        num_queries = min(retention.num_window_queries(original_tokens), num_tokens)

        def mass(queries: Tensor, keys: Tensor) -> Tensor:
            window = None if lse is None else lse[num_tokens - num_queries :]
            return shard.backend.mass(queries, keys, shard.scale, lse=window)

        return Observation(
            layer=layer,
            num_layers=shard.spec.num_layers,
            prompt_tokens=num_tokens,
            keys=prompt.k,
            values=prompt.v,
            queries=prompt.q[num_tokens - num_queries :] if num_queries else None,
            scale=shard.scale,
            heads=shard.heads.kv,
            num_heads=shard.spec.num_kv_heads,
            group_size=shard.spec.group_size,
            mass_fn=mass,
            reduce_fn=shard.mesh.reduce_replicas if shard.heads.replicated else None,
            gather_heads_fn=shard.gather_heads if shard.mesh.layout.tensor_size > 1 else None,
            dropped_tokens=original_tokens - num_tokens,
            masses=masses,
        )
