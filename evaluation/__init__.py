"""Measures the engine: speed, memory, and how far answers agree."""
