"""Kernels in C++ for CPUs, compiled on first use (see `build`); imports no other room."""
