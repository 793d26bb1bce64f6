"""Sizes a deployment on paper. Imports `scheduling` and the shared words; no torch, no Ray."""
