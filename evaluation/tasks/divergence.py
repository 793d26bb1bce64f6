"""How far one next-token distribution is from another, as far as their best tokens tell it."""

import math
from collections.abc import Mapping

TOP_TOKENS = 20
"""Most likely tokens that are asked for in each place: the most that the engine gives."""
LEAST_REST = 1e-6  # fp32 log-probabilities know no smaller rest


def divergence(full: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Kullback-Leibler divergence of `other` from `full`, as far as their best tokens tell it.

    The tokens that both list are told apart, all others count as one outcome. Outcomes taken
    together never diverge more than apart, so this is a lower bound.

    Args:
        full: log-probabilities of the most likely tokens, by token id.
        other: likewise.
    """
    shared = full.keys() & other.keys()
    rest_full = max(1 - math.fsum(math.exp(full[token]) for token in shared), LEAST_REST)
    rest_other = max(1 - math.fsum(math.exp(other[token]) for token in shared), LEAST_REST)
    told_apart = math.fsum(math.exp(full[token]) * (full[token] - other[token]) for token in shared)
    return max(told_apart + rest_full * math.log(rest_full / rest_other), 0.0)
