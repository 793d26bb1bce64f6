"""Attention backends, each imported when asked for; imports `kv`, `kernels` and `native`."""
