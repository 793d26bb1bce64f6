"""Which stored tokens stay when rows are compacted while a sequence decodes.

Shapes: R rows of one layer, n stored tokens of each, w window tokens.
"""

from torch import Tensor

from .observation import Observation
from .registry import score_method
from .retention import Retention
from .select import kept_positions


def select_stored(retention: Retention, observation: Observation, keep: int) -> Tensor:
    """Choose which stored tokens of some rows stay at a compaction, by the score of the prefill.

    The observation is that of a prompt, with the stored tokens for its tokens: they lie in the
    order of the text, the first are the sinks, and the last w are the last w tokens of the text,
    because every compaction keeps these. So each score means what it means at prefill: the window
    scores look at what the last w queries attend to among the stored keys, `streaming` keeps the
    most recent, `knorm` the keys of least norm. `random` draws anew at each compaction, by the
    place in storage and `observation.compaction`, because the original positions are not known.

    Args:
        retention: with a decode stage.
        observation: R rows of n stored tokens each, as `heads`; all of one sequence, and all its
            local heads in order, where the score's scope is more than a head.
        keep: tokens that stay in each row, at least `window + sinks`.

    Returns:
        int64 [R, keep], places in storage, ascending in each row.
    """
    assert retention.score is not None
    scores = score_method(retention.score).function(observation, retention)
    return kept_positions(scores, keep, retention.window, retention.sinks)
