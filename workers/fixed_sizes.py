"""Sizes on which what computes and what counts its bytes must agree; no torch."""

SPLIT_TOKENS = 512  # attention cuts a row into parts of so many, until it has the most parts
MAX_SPLITS = 32
SAMPLED_LOGITS = 1 << 23  # that are drawn from at once, whole rows, where the host decides how
SAMPLED_ROWS = 32  # that are drawn from at once, where the device decides
LEAST_ROOM = 8  # entries of a row that has any
_ENTRIES_A_PAGE = 3  # 2 for rooms that are half used, 1 to use up before all rows move


def most_splits(max_length: int, split_tokens: int) -> int:
    """Parts of the longest row."""
    return min(MAX_SPLITS, max(1, -(-max_length // split_tokens)))


def num_entries(num_pages: int, num_rows: int, pages_per_row: int) -> int:
    """Entries that suffice for rows that share no page; never more than all rows' longest.

    Args:
        num_pages: of the pool.
        num_rows: of all slots.
        pages_per_row: of the longest row.
    """
    most = _ENTRIES_A_PAGE * num_pages + 2 * LEAST_ROOM * num_rows
    return min(num_rows * pages_per_row, most)


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
