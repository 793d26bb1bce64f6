"""What each retention method computes, word by word, as loops over lists.

Nothing here comes from `compression/`: budgets, scores, cuts and propagation are written anew. A
`Rules` puts a score, a spread of the budget and a cut together; `slow_llama.py` runs it.

Names: n prompt tokens, B budget, w window, s sinks, m tokens in a row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor

from .slow_llama import Cuts, Stored

Score = Callable[[Stored, int], list[float]]
"""(what is stored, kv head) -> a number for each place before the window, or for all."""

Spread = Callable[["Rules", int, int, int], list[list[Fraction]]]
"""(rules, n, layers, heads) -> real-valued tokens of [layer][head], which sum to the budget."""

PassOn = Callable[[int, Tensor, int, int, int, Cuts], list[int]]
"""(layer, attention [Hq, m, m], n, layers, kv heads, cuts) -> places that leave the layer."""


# Scores -------------------------------------------------------------------------------------------


def recency(stored: Stored, head: int) -> list[float]:
    """StreamingLLM."""
    return [float(j) for j in range(len(stored.rows[head]))]


def window_attention(window: int, kernel: int, pooling: str) -> Score:
    """SnapKV: the mean over the last w queries and the group, pooled over the context."""

    def score(stored: Stored, head: int) -> list[float]:
        heads = range(head * stored.group, (head + 1) * stored.group)
        raw = [0.0] * (len(stored.rows[head]) - window)
        num_queries = min(window, len(stored.queries))  # fewer in a short turn
        for query_head in heads:
            for back in range(1, num_queries + 1):
                weights = stored.attention(query_head, back)
                for j in range(len(raw)):
                    raw[j] += weights[j] / (num_queries * len(heads))
        return pooled(raw, kernel, pooling)

    return score


def pooled(raw: list[float], kernel: int, pooling: str) -> list[float]:
    """Over `kernel` neighbours; beyond the edges `max` sees nothing and `avg` zeros."""
    reach = kernel // 2
    near = [raw[max(0, j - reach) : j + reach + 1] for j in range(len(raw))]
    return [max(part) if pooling == "max" else sum(part) / kernel for part in near]


def last_query(stored: Stored, head: int) -> list[float]:
    """TOVA: what the last query attends to, the mean of all heads of the layer."""
    num_heads = len(stored.rows) * stored.group
    mean = [0.0] * len(stored.rows[head])
    for query_head in range(num_heads):
        for j, weight in enumerate(stored.attention(query_head, 1)):
            mean[j] += weight / num_heads
    return mean


def heavy_hitters(stored: Stored, head: int) -> list[float]:
    """H2O: all attention that a token ever got."""
    return [entry.mass for entry in stored.rows[head]]


def small_keys(stored: Stored, head: int) -> list[float]:
    """Minus the L2 norm of the key."""
    return [-math.sqrt(sum(float(x) ** 2 for x in entry.key)) for entry in stored.rows[head]]


def noise(seed: int = 0) -> Score:
    """A hash of seed, layer, head and place (and of the compaction, if it is one)."""

    def scramble(x: int) -> int:  # MurmurHash3's 32-bit finaliser
        x = x % 2**32
        x = (x ^ x // 2**16) * 0x85EBCA6B % 2**32
        x = (x ^ x // 2**13) * 0xC2B2AE35 % 2**32
        return x ^ x // 2**16

    def score(stored: Stored, head: int) -> list[float]:
        key = scramble(scramble(scramble(seed // 2**32) ^ seed) ^ stored.layer)
        if stored.compaction:
            key = scramble(key ^ stored.compaction)
        places = range(len(stored.rows[head]))
        return [scramble(scramble(head ^ key) ^ scramble(j + 1)) // 2**8 / 2**24 for j in places]

    return score


SCORE_DEFINITIONS: dict[str, Callable[[dict[str, Any]], Score]] = {
    "streaming": lambda settings: recency,
    "snapkv": lambda settings: window_attention(
        settings["window"], settings["kernel_size"], settings["pooling"]
    ),
    "tova": lambda settings: last_query,
    "h2o": lambda settings: heavy_hitters,
    "knorm": lambda settings: small_keys,
    "random": lambda settings: noise(settings["seed"]),
}
"""Every score by its name, made from the settings that it reads."""


# How the budget spreads ---------------------------------------------------------------------------


def evenly(rules: "Rules", n: int, num_layers: int, num_heads: int) -> list[list[Fraction]]:
    """Every row the same."""
    return [[Fraction(rules.budget)] * num_heads] * num_layers


def _ends(rules: "Rules", n: int) -> tuple[Fraction, Fraction]:
    """PyramidKV's context tokens at the bottom and at the top; beta is 20."""
    mean = rules.budget - rules.window
    low = max(Fraction(rules.sinks), Fraction(mean, 20))
    high = 2 * mean - low
    if high > n - rules.window:
        high = Fraction(n - rules.window)
        low = 2 * mean - high
    return high, low


def pyramid(rules: "Rules", n: int, num_layers: int, num_heads: int) -> list[list[Fraction]]:
    """PyramidKV: linear in the layer; one layer has its budget."""
    if num_layers == 1:
        return evenly(rules, n, num_layers, num_heads)
    high, low = _ends(rules, n)
    parts = [Fraction(layer, num_layers - 1) for layer in range(num_layers)]
    return [[rules.window + high - part * (high - low)] * num_heads for part in parts]


def half_cosine(rules: "Rules", n: int, num_layers: int, num_heads: int) -> list[list[Fraction]]:
    """From the same ends along half a cosine."""
    high, low = _ends(rules, n)
    angles = [math.pi * layer / (num_layers - 1) for layer in range(num_layers)]
    parts = [Fraction(str(round((math.cos(angle) + 1) / 2, 9))) for angle in angles]
    return [[rules.window + low + part * (high - low)] * num_heads for part in parts]


def by_profile(profile: dict[str, list[float]], beta: str) -> Spread:
    """HeadKV: b (1 - 1/beta) for each, and its share of the b/beta of all; b = B - w."""

    def spread(rules: "Rules", n: int, num_layers: int, num_heads: int) -> list[list[Fraction]]:
        group = len(profile) // (num_layers * num_heads)
        zero = Fraction(0)
        weights = [
            [
                sum(
                    (Fraction(profile[f"{layer}-{head * group + g}"][0]) for g in range(group)),
                    zero,
                )
                for head in range(num_heads)
            ]
            for layer in range(num_layers)
        ]
        everyone = sum((weight for row in weights for weight in row), zero)
        b, steep = rules.budget - rules.window, Fraction(beta)
        rows = [
            [
                rules.window
                + b * (1 - 1 / steep)
                + w / everyone * b / steep * num_layers * num_heads
                for w in row
            ]
            for row in weights
        ]
        # Bounds would have to be redistributed: keep clear of them.
        assert all(rules.window + rules.sinks <= x <= n for row in rows for x in row)
        return rows

    return spread


# Propagation --------------------------------------------------------------------------------------


def all_go_on(
    layer: int, attention: Tensor, n: int, num_layers: int, num_heads: int, cuts: Cuts
) -> list[int]:
    """No propagation."""
    return list(range(attention.shape[2]))


def pyramidinfer(settings: dict[str, Any]) -> PassOn:
    """PyramidInfer's prefill: a little in every layer; settings as in `propagate`."""

    def pass_on(
        layer: int, attention: Tensor, n: int, num_layers: int, num_heads: int, cuts: Cuts
    ) -> list[int]:
        m, recent = attention.shape[2], int(Fraction(str(settings["recent_ratio"])) * n)
        context = m - 1 - recent
        rho = settings["rho"]
        ratio = rho + (1 - rho) * (math.cos(math.pi * layer / num_layers) + 1) / 2
        keep = int(round(ratio * context, 9))
        if layer % settings["interval"] != 0 or keep <= settings["min_context"]:
            return list(range(m))
        scores = []
        for j in range(context):
            total = 0.0
            for i in range(1 + recent):
                far = settings["distance_weight"] - 1
                weight = 1 + far * i / recent if recent else 1.0
                for head in range(len(attention)):
                    total += weight * float(attention[head, m - 1 - recent + i, j])
            scores.append(total / (len(attention) * (1 + recent)))
        return [*best(scores, keep, settings["sinks"], cuts), *range(context, m)]

    return pass_on


def once(settings: dict[str, Any]) -> PassOn:
    """FastKV: one layer keeps what SnapKV's score, as a mean over kv heads, selects."""

    def pass_on(
        layer: int, attention: Tensor, n: int, num_layers: int, num_heads: int, cuts: Cuts
    ) -> list[int]:
        m, window, sinks = attention.shape[2], settings["window"], settings["sinks"]
        keep = max(int(Fraction(str(settings["keep"])) * n), window + sinks)
        if layer != settings["layer"] or keep >= m:
            return list(range(m))
        group = len(attention) // num_heads
        scores = [0.0] * (m - window)
        for head in range(num_heads):
            raw = [0.0] * (m - window)
            for query_head in range(head * group, (head + 1) * group):
                for i in range(m - window, m):
                    for j in range(m - window):
                        raw[j] += float(attention[query_head, i, j]) / (window * group)
            for j, x in enumerate(pooled(raw, settings["kernel_size"], settings["pooling"])):
                scores[j] += x / num_heads
        return [*best(scores, keep - window, sinks, cuts), *range(m - window, m)]

    return pass_on


# Generation stage ---------------------------------------------------------------------------------


def trimmed_share(layer: int, num_layers: int) -> float:
    """What a layer keeps of what it looks at."""
    return 0.9 * (0.1 + 0.9 * (math.cos(math.pi * layer / num_layers) + 1) / 2)


@dataclass(frozen=True)
class Trimming:
    """PyramidInfer's generation stage with our trigger, which counts what is stored."""

    exceed: int
    recent_part: Fraction
    sinks: int

    def places(
        self, stored: Stored, seen: int, lowest: int, mark: int, num_layers: int, cuts: Cuts
    ) -> tuple[list[int], int] | None:
        """What stays of a layer's rows, and the mark; None where it does not fire."""
        m = len(stored.rows[0])
        first = m - 1 - int(self.recent_part * lowest) - self.exceed
        if m - mark < self.exceed or first < self.sinks:
            return None
        share = trimmed_share(stored.layer, num_layers)
        keep = max(int(round(share * self.exceed, 9)), 1)
        scores = last_query(stored, 0)[first : first + self.exceed]
        stay = [first + j for j in best(scores, keep, 0, cuts)]
        places = [*range(first), *stay, *range(first + self.exceed, m)]
        return places, len(places)


@dataclass(frozen=True)
class PublishedTrimming:
    """PyramidInfer's generation stage as its release computes it, but for its weights.

    (There they are multiplied into the remembered rows, anew at each firing.)
    """

    exceed: int
    recent_part: Fraction
    distance_weight: float

    def places(
        self, stored: Stored, seen: int, lowest: int, mark: int, num_layers: int, cuts: Cuts
    ) -> tuple[list[int], int] | None:
        """What stays of a layer's rows, and the mark; None where it does not fire.

        `lowest` is what layer 0 stored and the step's own token.
        """
        r = int(self.recent_part * lowest)
        if seen - r - mark < self.exceed:
            return None
        entries = stored.rows[0]
        before = range(len(entries))[: len(entries) - (1 + r)]
        candidates = before[-self.exceed :]
        scores = []
        for place in candidates:
            total = 0.0
            for i, row in enumerate(stored.seen_by[-(1 + r) :]):
                weight = 1 + (self.distance_weight - 1) * i / r if r else 1.0
                total += weight * row[entries[place].position]
            scores.append(total / (1 + r))
        share = trimmed_share(stored.layer, num_layers)
        keep = max(int(round(len(candidates) * share, 9)), 1)
        stay = [candidates[j] for j in best(scores, keep, 0, cuts)]
        after = range(len(before), len(entries))
        places = [*before[: len(before) - len(candidates)], *stay, *after]
        return places, len(places) - r


# Cuts ---------------------------------------------------------------------------------------------


def best(scores: list[float], keep: int, sinks: int, cuts: Cuts) -> list[int]:
    """The sinks and the best of the others, `keep` in all; of equal ones the later."""
    free = sorted(range(sinks, len(scores)), key=lambda j: (scores[j], j), reverse=True)
    free_slots = keep - sinks
    if 0 < free_slots < len(free):
        cuts.between(scores[free[free_slots - 1]], scores[free[free_slots]])
    return sorted([*range(sinks), *free[:free_slots]])


def competing(
    scores: list[list[float]], floor: int, slots: int, sinks: int, cuts: Cuts
) -> list[list[int]]:
    """Ada-KV: each head's best up to the floor, then the best of all; sinks are the best.

    Rows end together, so places are told from their ends.
    """
    order = [  # (score, place, minus head), so that the largest is the best
        (math.inf if j < sinks else score, j - len(row), -head)
        for head, row in enumerate(scores)
        for j, score in enumerate(row)
    ]
    order.sort(reverse=True)
    kept: list[list[int]] = []
    for head in range(len(scores)):
        mine = [(score, j) for score, j, minus_head in order if -minus_head == head]
        kept.append([j for _, j in mine[:floor]])
        if 0 < floor < len(mine):
            cuts.between(mine[floor - 1][0], mine[floor][0])
    rest = [(x, j, minus) for x, j, minus in order if j not in kept[-minus]]
    free_slots = slots - sum(map(len, kept))
    if 0 < free_slots < len(rest):
        cuts.between(rest[free_slots - 1][0], rest[free_slots][0])
    for _, j, minus_head in rest[:free_slots]:
        kept[-minus_head].append(j)
    return [sorted(len(scores[head]) + j for j in row) for head, row in enumerate(kept)]


@dataclass(frozen=True)
class Rules:
    """A method by its definition (`slow_llama.Definition`).

    `score` None keeps all that enters. Rows keep the last `window` tokens, or `recent_part` of
    what they keep where that is given. With `compete` the heads of a layer share what it has, and
    `floor` of its mean is safe for each. `trimming` drops tokens of whole layers while decoding.
    """

    score: Score | None
    spread: Spread = evenly
    window: int = 0
    sinks: int = 0
    budget: int = 0
    recent_part: Fraction | None = None
    compete: bool = False
    floor: Fraction = Fraction(1, 5)
    propagate: PassOn = all_go_on
    trimming: Trimming | PublishedTrimming | None = None
    num_heads: int = 3

    def counts(self, num_tokens: int, num_layers: int, num_heads: int) -> list[list[int]] | None:
        """Rounded down; what is missing goes, one each, to the lowest layers (rows, by profile)."""
        if self.score is None or num_tokens <= self.budget:
            return None
        real = self.spread(self, num_tokens, num_layers, num_heads)
        counts = [[int(x) for x in row] for row in real]
        missing = num_layers * num_heads * self.budget - sum(map(sum, counts))
        if all(len(set(row)) == 1 for row in real):
            assert missing % num_heads == 0
            for layer in range(missing // num_heads):
                counts[layer] = [count + 1 for count in counts[layer]]
        else:
            for number in range(missing):
                counts[number // num_heads][number % num_heads] += 1
        return counts

    def grown_target(self, num_tokens: int) -> int:
        """A prompt that was kept whole may first grow up to the budget."""
        return max(self.budget, num_tokens)

    def cut(self, stored: Stored, keep: list[int], cuts: Cuts) -> list[list[int]]:
        """Sinks, the recent tokens, and the best of the others."""
        assert self.score is not None
        lengths = [len(row) for row in stored.rows]
        if not self.compete:
            keep = [min(count, length) for count, length in zip(keep, lengths, strict=True)]
        recent = [self._recent(count) for count in keep]
        scores = [
            self.score(stored, head)[: lengths[head] - recent[head]] for head in range(len(keep))
        ]
        if self.compete and not stored.compaction:
            floor = int(self.floor * (keep[0] - recent[0]))
            slots = sum(keep) - sum(recent)
            chosen = competing(scores, floor, slots, self.sinks, cuts)
        else:
            chosen = [
                best(row, count - last, self.sinks, cuts)
                for row, count, last in zip(scores, keep, recent, strict=True)
            ]
        return [
            [*row, *range(length - last, length)]
            for row, length, last in zip(chosen, lengths, recent, strict=True)
        ]

    def pass_on(
        self, layer: int, attention: Tensor, num_tokens: int, num_layers: int, cuts: Cuts
    ) -> list[int]:
        """Places of the tokens that leave the layer."""
        return self.propagate(layer, attention, num_tokens, num_layers, self.num_heads, cuts)

    def trim(
        self, stored: Stored, seen: int, lowest: int, mark: int, num_layers: int, cuts: Cuts
    ) -> tuple[list[int], int] | None:
        """Places that stay in all rows of a layer after a decode step, and its mark; None: all."""
        if self.trimming is None:
            return None
        return self.trimming.places(stored, seen, lowest, mark, num_layers, cuts)

    def _recent(self, keep: int) -> int:
        if self.recent_part is None:
            return self.window
        return min(int(self.recent_part * keep), keep - self.sinks)
