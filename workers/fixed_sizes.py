"""Sizes on which what computes and what counts its bytes must agree; no torch."""

SPLIT_TOKENS = 512  # attention cuts a row into parts of so many, until it has the most parts
MAX_SPLITS = 32
SAMPLED_LOGITS = 1 << 23  # that are drawn from at once, whole rows, where the host decides how
SAMPLED_ROWS = 32  # that are drawn from at once, where the device decides
# Of a logit while it is sampled from: a copy and its log-probability; what is drawn from, sorted
# and with its noise, in 4 to 8 bytes each; the counts that penalties go by, beside a known token's.
_FLOAT_BYTES = 4
_LOGPROB_BYTES = 4 + 4
_DRAWN_BYTES = 76 + 2 * (8 + 8)  # where the host decides; and as a GPU sorts, keys and places again
DEVICE_DRAWN_BYTES = 62
_PENALIZED_BYTES = 35
_COUNTED_BYTES = 28
_LARGEST_GRAPH = 512
LEAST_ROOM = 8  # entries of a row that has any
_SHARED_A_PAGE = 4  # entries of pages that other rows hold, too, for each page of the pool
# 2 for rooms that are half used, 1 to use up before all rows move.
_ENTRIES_A_PAGE = 2 * (1 + _SHARED_A_PAGE) + 1


def most_splits(max_length: int, split_tokens: int) -> int:
    """Parts of the longest row."""
    return min(MAX_SPLITS, max(1, -(-max_length // split_tokens)))


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes to record graphs for: fine steps where padding costs most, then coarser ones."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, _LARGEST_GRAPH + 1, 64)]
    top = min(max_num_seqs, _LARGEST_GRAPH)
    return (*(size for size in sizes if size < top), top)


def num_entries(num_pages: int, num_rows: int, pages_per_row: int) -> int:
    """Entries that suffice for rows that share `most_shared_entries`, at most all rows' longest.

    Args:
        num_pages: of the pool.
        num_rows: of all slots.
        pages_per_row: of the longest row.
    """
    most = _ENTRIES_A_PAGE * num_pages + 2 * LEAST_ROOM * num_rows
    return min(num_rows * pages_per_row, most)


def most_shared_entries(num_pages: int, num_rows: int, pages_per_row: int) -> int | None:
    """Entries that rows may have of pages that others hold, too; None: all that they can have.

    The arguments are those of `num_entries`.
    """
    if num_entries(num_pages, num_rows, pages_per_row) == num_rows * pages_per_row:
        return None
    return _SHARED_A_PAGE * num_pages


def pages_beside_tables(
    num_bytes: float, page_bytes: int, entry_bytes: int, num_rows: int, pages_per_row: int
) -> int:
    """The most pages that fit into some bytes together with the entries that they need."""
    whole = entry_bytes * num_rows * pages_per_row
    least = entry_bytes * 2 * LEAST_ROOM * num_rows
    # `num_entries` is the smaller of two, so what fits with either fits.
    beside_whole = (num_bytes - whole) // page_bytes
    growing = (num_bytes - least) // (page_bytes + _ENTRIES_A_PAGE * entry_bytes)
    return int(max(beside_whole, growing))


def sampling_bytes(num_seqs: int, vocab_size: int, max_model_len: int, *, on_device: bool) -> int:
    """Bytes of logits and of all that is made of them while rows are sampled at once.

    Args:
        num_seqs: rows.
        vocab_size: logits of a row.
        max_model_len: tokens that penalties look back on.
        on_device: the device decides how rows are drawn from, not the host.
    """
    logits, logprobs = (num_seqs * vocab_size * size for size in (_FLOAT_BYTES, _LOGPROB_BYTES))
    if not on_device:
        drawn = min(num_seqs, max(1, SAMPLED_LOGITS // vocab_size)) * vocab_size
        return 2 * logits + max(logprobs, drawn * _DRAWN_BYTES)
    some = min(num_seqs, SAMPLED_ROWS)
    penalties = logits + some * (vocab_size * _PENALIZED_BYTES + max_model_len * _COUNTED_BYTES)
    return 2 * logits + max(logprobs, penalties, some * vocab_size * DEVICE_DRAWN_BYTES)
