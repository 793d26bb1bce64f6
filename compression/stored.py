"""Which stored tokens stay when rows are cut while a sequence decodes.

Shapes: R rows of one layer, n stored tokens of each, w window tokens.
"""

import torch
from torch import Tensor

from .observation import Observation
from .registry import score_method
from .retention import Retention
from .select import kept_positions, topk_positions
from .trim import Trim


def select_stored(retention: Retention, observation: Observation, keep: int) -> Tensor:
    """Choose which stored tokens of some rows stay at a compaction, by the score of the prefill.

    The observation is that of a prompt, with the stored tokens for its tokens: they lie in the
    order of the text, the first are the sinks, and the last w are the last w tokens of the text,
    because every compaction keeps these. So each score means what it means at prefill: the window
    scores look at what the last w queries attend to among the stored keys, `streaming` keeps the
    most recent, `knorm` the keys of least norm, `h2o` those that all queries so far attended to
    the most (besides the recent part of the row). `random` draws anew at each compaction, by the
    place in storage and `observation.compaction`, because the original positions are not known.

    Args:
        retention: with a decode stage and a score.
        observation: R rows of n stored tokens each, as `heads`; all of one sequence, and all its
            local heads in order, where the score's scope is more than a head.
        keep: tokens that stay in each row. Where propagation left a row fewer than window and
            sinks, the sinks and as many of the last tokens stay.

    Returns:
        int64 [R, keep], places in storage, ascending in each row.
    """
    assert retention.score is not None
    num_rows, num_tokens = len(observation.heads), observation.prompt_tokens
    recent, sinks = retention.recent_tokens(keep), retention.sinks
    if keep <= recent + sinks:
        places = torch.arange(num_tokens, device=observation.keys.device)
        sinks = min(sinks, keep)
        stays = torch.cat([places[:sinks], places[num_tokens - keep + sinks :]])
        return stays.expand(num_rows, -1)
    scores = score_method(retention.score).function(observation, retention)
    return kept_positions(scores[:, : num_tokens - recent], keep, recent, sinks)


def select_trimmed(scores: Tensor, trim: Trim) -> Tensor:
    """Choose what stays of one layer of sequences that are trimmed; all its heads keep the same.

    Args:
        scores: of the tokens of each sequence that may be cut, [N, stop - start]: the attention
            that they get, as a mean over all query heads. With the published trigger that is
            PyramidInfer's own (arXiv 2405.12532): the mean over the last query and the recent
            ones, weighted from 1 for the oldest to `distance_weight`. With ours it is the last
            query's. Of equal scores the later token wins.
        trim: what is cut.

    Returns:
        int64 [N, stored - (stop - start) + keep], places in storage, ascending in each row.
    """
    chosen = topk_positions(scores, trim.keep) + trim.start
    places = torch.arange(trim.stored, device=scores.device).expand(len(scores), -1)
    return torch.cat([places[:, : trim.start], chosen, places[:, trim.stop :]], dim=1)
