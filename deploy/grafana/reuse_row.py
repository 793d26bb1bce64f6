"""The panels of memory that is used again: cached prefixes, conversations, preempted sequences."""

from typing import Any

from panels import Query, graph, or_zero, rate, total


def used_again() -> tuple[str, list[Any]]:
    """A row of the memory dashboard."""
    return (
        "Used again",
        [
            graph(
                "Prompt tokens",
                "Per second: of sequences at their first start; of them, those that were not "
                "computed because a prefix was cached; and those that earlier turns had computed.",
                "none",
                Query(or_zero(rate("vllm:prefix_cache_queries_total")), "asked for"),
                Query(or_zero(rate("vllm:prefix_cache_hits_total")), "cached"),
                Query(_of("saqqara:conversation_resumed_tokens_total"), "of earlier turns"),
            ),
            graph(
                "Bytes kept",
                "Cached prefixes and conversations, in pages; conversations and preempted "
                "sequences in host memory.",
                "bytes",
                Query(or_zero(total("saqqara:prefix_bytes")), "prefixes"),
                Query(or_zero(total("saqqara:conversation_bytes")), "conversations"),
                Query(or_zero(total("saqqara:conversation_host_bytes")), "of them on the host"),
                Query(or_zero(total("saqqara:parked_bytes")), "preempted, on the host"),
            ),
            graph(
                "Kept",
                "Blocks of cached prefixes, conversations that wait for a turn, and preempted "
                "sequences in host memory.",
                "none",
                Query(or_zero(total("saqqara:prefix_blocks")), "blocks"),
                Query(or_zero(total("saqqara:conversations")), "conversations"),
                Query(or_zero(total("saqqara:parked_sequences")), "preempted"),
            ),
            graph(
                "Come and gone",
                "Per second. Blocks that are evicted soon after they were stored, and sequences "
                "that are dropped, want more room.",
                "ops",
                Query(_of("saqqara:prefix_blocks_stored_total"), "blocks stored"),
                Query(_of("saqqara:prefix_blocks_evicted_total"), "blocks evicted"),
                Query(_of("saqqara:parkings_total", 'outcome="parked"'), "sequences parked"),
                Query(_of("saqqara:parkings_total", 'outcome="resumed"'), "sequences resumed"),
                Query(_of("saqqara:parkings_total", 'outcome="dropped"'), "sequences dropped"),
                Query(
                    _of("saqqara:conversations_gone_total", 'cause="dropped"'),
                    "conversations dropped",
                ),
            ),
        ],
    )


def _of(metric: str, matchers: str = "") -> str:
    return or_zero(rate(metric, matchers=matchers))
