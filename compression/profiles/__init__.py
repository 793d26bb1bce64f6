"""Measured heads of models: what a profile is, where it is found; imports retention's bounds."""
