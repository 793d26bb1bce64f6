"""What the metrics say of conversations."""

from collections import Counter
from collections.abc import Iterator

from saqqara.cluster.reuse.conversations import Conversations

Labels = tuple[str, ...]


class ConversationCounts:
    """Turns counts that only grow into what was added since they were last told."""

    def __init__(self) -> None:
        self._told: Counter[tuple[str, Labels]] = Counter()

    def gauges(self, conversations: Conversations) -> dict[str, float]:
        """What there is now, by the names of metrics."""
        return {
            "saqqara:conversations": len(conversations),
            "saqqara:conversation_bytes": conversations.num_bytes,
        }

    def added(self, conversations: Conversations) -> Iterator[tuple[str, int, Labels]]:
        """Names of counters, what is added to each, and its labels."""
        counts = conversations.counts
        now: Counter[tuple[str, Labels]] = Counter()
        now["saqqara:conversation_turns", ("resumed",)] = counts.resumed
        for reason, num in counts.anew.items():
            now["saqqara:conversation_turns", (reason,)] = num
        now["saqqara:conversation_resumed_tokens", ()] = counts.resumed_tokens
        for cause in ("expired", "dropped", "ended"):
            now["saqqara:conversations_gone", (cause,)] = getattr(counts, cause)
        for (name, labels), num in now.items():
            if num > self._told[name, labels]:
                yield name, num - self._told[name, labels], labels
        self._told = now
