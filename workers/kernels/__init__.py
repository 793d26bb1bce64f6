"""Triton kernels for GPUs, one piece of work in each file; imports no other room."""
