"""Computes: one shard of the model and of its KV cache. Imports no Ray."""
