"""What a retention allows of prefix reuse: how much of a prompt has to be computed all the same."""

from collections.abc import Iterable, Sequence

from saqqara.compression.growth import ring_size, sums_mass
from saqqara.compression.retention import Retention
from saqqara.workers.plan import WorkerInfo


def why_not_reused(retention: Retention) -> str | None:
    """Why prompts under this retention neither use cached prefixes nor store them; None: they do.

    Queries exist only for tokens that are computed, and hidden states only where nothing is cached.
    """
    if retention.propagate is not None:
        return "it drops hidden states on their way through the layers"
    looks_at_all = retention.score is not None and retention.score.observes == "all"
    if looks_at_all or sums_mass(retention):
        return "it looks at the attention of all queries of a prompt"
    return None


def least_computed_tokens(retention: Retention, prompt_tokens: int, max_tokens: int) -> int:
    """Last tokens of a prompt that are computed even where all of it is cached.

    They are those whose queries retention looks at when the prompt is through its layers, and those
    that are remembered for cuts while decoding; and the last token, from which the next is sampled.

    Args:
        retention: one that reuses prefixes (see `why_not_reused`).
        prompt_tokens: length of the prompt.
        max_tokens: of prompt and output together.
    """
    seen = retention.num_window_queries(prompt_tokens)
    remembered = ring_size(retention, prompt_tokens, max_tokens)
    return min(max(1, seen, remembered), prompt_tokens)


def keeps_whole_prompt(retention: Retention, prompt_tokens: int) -> bool:
    """Whether rows of layers that see all tokens keep all of such a prompt and are never cut.

    Then they hold the pages of cached blocks themselves, instead of copies of what they have.
    """
    is_cut = retention.propagate is not None or retention.decode is not None
    return not is_cut and not retention.drops(prompt_tokens)


def most_shared_blocks(workers: Sequence[WorkerInfo], rows_W: Iterable[int]) -> int | None:
    """Blocks whose pages rows may hold, counted once for each sequence; None: any number.

    Args:
        workers: of a replica.
        rows_W: rows that a sequence has on each.
    """
    limits = zip((w.most_shared_entries for w in workers), rows_W, strict=True)
    return min((most // rows for most, rows in limits if most is not None), default=None)
