"""Sizes of a deployment on paper. Imports `scheduling` and the sizes of `workers`; no torch, no Ray."""
