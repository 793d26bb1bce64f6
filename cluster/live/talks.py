"""What the metrics say of conversations, and of preempted sequences that wait on the host."""

from collections import Counter
from collections.abc import Iterator

from saqqara.cluster.reuse.conversations import Conversations
from saqqara.cluster.reuse.parked import HostMemory

Labels = tuple[str, ...]


class ConversationCounts:
    """Turns counts that only grow into what was added since they were last told."""

    def __init__(self) -> None:
        self._told: Counter[tuple[str, Labels]] = Counter()

    def gauges(self, conversations: Conversations, host: HostMemory) -> dict[str, float]:
        """What there is now, by the names of metrics."""
        return {
            "saqqara:conversations": len(conversations),
            "saqqara:conversation_bytes": conversations.num_bytes,
            "saqqara:conversations_on_host": host.num_quiet,
            "saqqara:conversation_host_bytes": host.quiet_bytes,
            "saqqara:parked_sequences": host.num_parked,
            "saqqara:parked_bytes": host.used_bytes,
        }

    def added(
        self, conversations: Conversations, host: HostMemory
    ) -> Iterator[tuple[str, int, Labels]]:
        """Names of counters, what is added to each, and its labels."""
        counts = conversations.counts
        now: Counter[tuple[str, Labels]] = Counter()
        now["saqqara:conversation_turns", ("resumed",)] = counts.resumed
        for reason, num in counts.anew.items():
            now["saqqara:conversation_turns", (reason,)] = num
        now["saqqara:conversation_resumed_tokens", ()] = counts.resumed_tokens
        for cause in ("expired", "dropped", "ended"):
            now["saqqara:conversations_gone", (cause,)] = getattr(counts, cause)
        now["saqqara:conversation_moves", ("offloaded",)] = counts.offloaded
        now["saqqara:conversation_moves", ("resumed",)] = counts.brought_back
        for outcome in ("parked", "resumed", "dropped"):
            now["saqqara:parkings", (outcome,)] = getattr(host.counts, outcome)
        now["saqqara:parked_copied_bytes", ()] = host.counts.copied_bytes
        for (name, labels), num in now.items():
            if num > self._told[name, labels]:
                yield name, num - self._told[name, labels], labels
        self._told = now
