"""Batch inference over files. Imports `openai`, `engine` and the launch of an engine."""
