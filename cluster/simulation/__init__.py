"""Runs a deployment on a simulated clock: the real scheduler, steps that take what `planning` says.

Imports `planning`, `scheduling`, `recovery`, `configs` and the shared words; no torch, no Ray.
"""
