"""Draws a snapshot as lines that fit a terminal: what has no room is left out, not cut in two.

The pyramid stands as it is built: layer 0 at its foot, each layer's bar as wide as what it keeps.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

from saqqara.cluster.live.snapshot import LiveStats, RankState

from .numbers import count, share, size, span

_LABEL = 10  # columns before what a line says
_LEAST_BAR = 8
_MOST_BAR = 100
_LEAST_PYRAMID = 3  # layers
_WHOLE_STEP = "total"  # beside the phases that it is made of


@dataclass(frozen=True, slots=True)
class Look:
    """What there is to draw on.

    Attributes:
        width: columns.
        height: lines; None: as many as there is to say.
        plain: draw with ASCII.
    """

    width: int
    height: int | None = None
    plain: bool = False

    @property
    def filled(self) -> str:
        """A column of a bar."""
        return "#" if self.plain else "█"

    @property
    def empty(self) -> str:
        """A column of a bar that is not reached."""
        return "." if self.plain else "░"


def draw(
    stats: LiveStats,
    look: Look,
    *,
    before: LiveStats | None = None,
    notice: str | None = None,
    now: float | None = None,
) -> list[Text]:
    """The lines of a snapshot, at most `look.height`, each at most `look.width` columns.

    Args:
        stats: what is drawn.
        look: where.
        before: an earlier snapshot of the same replica; shares of time are those since then.
        notice: said first: why this is not what is so now.
        now: Unix time; default: that of the snapshot.
    """
    head = [_head(stats, look, stats.time if now is None else now)]
    if notice is not None:
        head.append(Text(notice, style="bold red"))
    head += [_throughput(stats, look), _queue(stats, look), *_kv_cache(stats, look)]
    ranks = _ranks(stats, look, before)
    layers = stats.pyramid.kept_tokens
    if look.height is None:
        found = [*head, *_pyramid(stats, look, len(layers)), *ranks]
    else:
        left = look.height - len(head)
        for_ranks = min(len(ranks), max(left - 1 - min(len(layers), _LEAST_PYRAMID), left // 3, 0))
        for_layers = min(len(layers), max(left - for_ranks - 1, 0))
        for_ranks = min(len(ranks), left - for_layers - 1 if for_layers else left)
        found = [*head, *_pyramid(stats, look, for_layers), *_first(ranks, for_ranks)]
        found = found[: look.height]
    return [_ready(line, look.width) for line in found]


def _ready(line: Text, width: int) -> Text:
    """A line as a terminal gets it: without codes that a name may have in it, and no longer."""
    if not line.plain.isprintable():
        line = Text("".join(c if c.isprintable() else "?" for c in line.plain))
    line.no_wrap = True
    line.truncate(width)
    return line


def waiting(text: str, look: Look) -> list[Text]:
    """The lines while nothing has answered yet."""
    lines = textwrap.wrap(text, max(look.width, 1))[: look.height]
    return [Text(line, style="yellow", no_wrap=True) for line in lines]


def _head(stats: LiveStats, look: Look, now: float) -> Text:
    state = ("ready", "bold green") if stats.is_ready else ("recovering", "bold red")
    parts = [
        Text(stats.model, style="bold"),
        Text(*state),
        Text(stats.retention, style="cyan"),
        Text(f"up {span(now - stats.replica.started)}"),
        Text(f"replica {stats.replica.id}", style="dim"),
    ]
    return _fitting(parts, look.width)


def _throughput(stats: LiveStats, look: Look) -> Text:
    found = stats.throughput
    parts = [
        _label("tokens/s"),
        Text(f"in {count(found.prompt_tokens_per_second):>6}", style="bold"),
        Text(f"out {count(found.generation_tokens_per_second):>6}", style="bold"),
        Text(f"in all {count(found.prompt_tokens)} in, {count(found.generation_tokens)} out"),
    ]
    return _fitting(parts, look.width)


def _queue(stats: LiveStats, look: Look) -> Text:
    queue = stats.queue
    finished = [f"{count(number)} {reason}" for reason, number in sorted(queue.finished.items())]
    parts = [
        _label("requests"),
        Text(f"running {count(queue.running)}", style="bold"),
        Text(f"waiting {count(queue.waiting)}", style="bold yellow" if queue.waiting else ""),
        Text(f"ended {', '.join(finished) or 'none'}"),
        Text(f"preempted {count(queue.preemptions)}"),
    ]
    return _fitting(parts, look.width)


def _kv_cache(stats: LiveStats, look: Look) -> list[Text]:
    kv = stats.kv_cache
    local = f" + {size(kv.local_bytes)} local" if kv.local_bytes else ""
    told = f"{size(kv.kept_bytes)} of {size(kv.full_bytes)} full{local}"
    part = kv.kept_bytes / kv.full_bytes if kv.full_bytes else 0.0
    bar = min(look.width - _LABEL - len(told) - 12, _MOST_BAR // 2)
    first = [_label("KV kept")]
    if bar >= _LEAST_BAR:
        reached = min(round(part * bar), bar)
        first.append(
            Text.assemble(
                (look.filled * reached, "green"), (look.empty * (bar - reached), "bright_black")
            )
        )
    first.append(Text(f"{share(kv.kept_bytes, kv.full_bytes):>6}", style="bold"))
    first.append(Text(told))
    used = kv.num_pages - kv.pages_free
    second = [
        _label("pages"),
        Text(f"{count(used)} of {count(kv.num_pages)} used", style="bold"),
        Text(f"{kv.usage:.1%} on the fullest rank"),
        Text(f"context {count(kv.kept_tokens)} of {count(kv.full_tokens)} tokens kept"),
    ]
    lines = [_fitting(first, look.width), _fitting(second, look.width)]
    prefixes = stats.prefixes
    if prefixes.hit_tokens or prefixes.num_blocks:
        asked, hit = prefixes.query_tokens, prefixes.hit_tokens
        third = [
            _label("prefixes"),
            Text(f"{share(hit, asked)} of {count(asked)} prompt tokens", style="bold"),
            Text(f"{size(prefixes.num_bytes)} in {count(prefixes.num_blocks)} blocks"),
            Text(f"{count(prefixes.blocks_evicted)} evicted"),
        ]
        lines.append(_fitting(third, look.width))
    return lines


def _pyramid(stats: LiveStats, look: Look, num_lines: int) -> list[Text]:
    """A title and so many lines of bars; layers that have no line of their own share one."""
    pyramid = stats.pyramid
    if num_lines < 1 or not pyramid.kept_tokens:
        return []
    whose = f"{pyramid.num_sequences} running" if pyramid.is_live else "the last prompt"
    if not pyramid.is_live and pyramid.num_sequences == 0:
        whose = "nothing has run yet"
    title = _fitting(
        [
            _label("layers"),
            Text(f"tokens kept of {count(pyramid.full_tokens)}"),
            Text(f"mean of {whose}" if pyramid.is_live else whose, style="dim"),
        ],
        look.width,
    )
    groups = grouped(pyramid.kept_tokens, num_lines)
    widest = max(kept for _, kept in groups)
    bar = min(look.width - _LABEL - 17, _MOST_BAR)
    lines = [title]
    for name, kept in reversed(groups):
        parts = [Text(f"{name:>{_LABEL - 2}}", style="dim")]
        if bar >= _LEAST_BAR:
            reached = round(kept / widest * bar) if widest else 0
            parts.append(Text((look.filled * reached).center(bar), style="yellow"))
        told = f"{count(kept):>6} {share(kept, pyramid.full_tokens):>6}"
        parts.append(Text(told))
        lines.append(_fitting(parts, look.width))
    return lines


def grouped(kept: Sequence[float], num_groups: int) -> list[tuple[str, float]]:
    """Layers, the lowest first, in at most so many groups of neighbours, each with its mean."""
    num_groups = min(num_groups, len(kept))
    edges = [round(i * len(kept) / num_groups) for i in range(num_groups + 1)]
    found = []
    for start, stop in pairwise(edges):
        name = f"{start}" if stop - start == 1 else f"{start}-{stop - 1}"
        found.append((name, sum(kept[start:stop]) / (stop - start)))
    return found


def _ranks(stats: LiveStats, look: Look, before: LiveStats | None) -> list[Text]:
    lost = stats.recoveries
    times = sum(lost.by_cause.values())
    causes = ", ".join(f"{number} {cause}" for cause, number in sorted(lost.by_cause.items()))
    alive = sum(rank.is_alive for rank in stats.ranks)
    told = f"recovered {times} times ({causes}), {span(lost.down_seconds)} down" if times else ""
    style = "bold" if alive == len(stats.ranks) else "bold red"
    title = [_label("ranks"), Text(f"{alive} of {len(stats.ranks)} alive", style=style), Text(told)]
    earlier = {} if before is None else {rank.rank: rank for rank in before.ranks}
    seconds = 0.0 if before is None else stats.time - before.time
    hosts = max((len(rank.hostname) for rank in stats.ranks), default=0)
    return [
        _fitting(title, look.width),
        *(_rank(r, look, hosts, earlier.get(r.rank), seconds) for r in stats.ranks),
    ]


def _rank(
    rank: RankState, look: Look, hosts: int, earlier: RankState | None, seconds: float
) -> Text:
    layers = "-".join(str(layer) for layer in (rank.layers[0], rank.layers[1] - 1))
    state = ("alive", "green") if rank.is_alive else ("gone", "bold red")
    parts = [
        Text(f"{rank.rank:>{_LABEL - 2}}", style="dim"),
        Text(f"{state[0]:<5}", style=state[1]),
        Text(f"{rank.hostname:<{hosts}}"),
        Text(f"layers {layers:<5}"),
        Text(f"pages {share(rank.num_pages - rank.pages_free, rank.num_pages):>6}"),
        Text(f"lost {rank.times_lost} times" if rank.times_lost else "", style="red"),
        *_phases(rank, earlier, seconds),
        Text(f"{rank.device}, {size(rank.resident_bytes)}", style="dim"),
    ]
    return _fitting(parts, look.width)


def _phases(rank: RankState, earlier: RankState | None, seconds: float) -> list[Text]:
    """What a rank spent its time on: shares of the time since the earlier snapshot, or seconds.

    The whole step stands first, then its phases, the longest of all time first.
    """
    if earlier is None or seconds <= 0:
        told = {name: span(spent) for name, spent in rank.seconds.items()}
    else:
        spent = {n: max(s - earlier.seconds.get(n, 0.0), 0.0) for n, s in rank.seconds.items()}
        told = {name: f"{min(s / seconds, 1):.0%}" for name, s in spent.items()}
    names = sorted(told, key=lambda name: (name != _WHOLE_STEP, -rank.seconds[name], name))
    words = {_WHOLE_STEP: "busy"}
    return [Text(f"{words.get(name, name)} {told[name]:>4}") for name in names]


def _first(lines: Sequence[Text], number: int) -> list[Text]:
    """So many lines; the last says how many more there are, if it has to."""
    if number >= len(lines) or number < 2:
        return list(lines[: max(number, 0)])
    more = len(lines) - number + 1
    return [*lines[: number - 1], Text(f"{' ' * _LABEL}and {more} more", style="dim")]


def _label(text: str) -> Text:
    return Text(f"{text:<{_LABEL - 2}}", style="dim")


def _fitting(parts: Sequence[Text], width: int) -> Text:
    """As many parts, two columns apart, as there is room for; the first in any case."""
    parts = [part for part in parts if part.plain]
    line = Text().append_text(parts[0])  # its style is not that of the others
    for part in parts[1:]:
        if line.cell_len + 2 + part.cell_len > width:
            break
        line.append("  ").append_text(part)
    return line
