"""Triton kernels for GPUs: each file has those of one piece of work, and how to launch them."""
