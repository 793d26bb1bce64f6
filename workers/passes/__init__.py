"""The ways through a shard's layers, and the head; imports `retain`, the shard and its parts."""
