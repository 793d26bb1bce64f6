"""Throughput, where a step's time goes, and checks of kernels. Imports `prompts` alone."""
