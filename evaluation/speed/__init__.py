"""Throughput, where a step's time goes, checks of kernels. Imports engine, workers, `prompts`."""
