"""Which tokens a grammar allows next, for the rank that samples.

Imports plans, transfers and where a model's files are.
"""
