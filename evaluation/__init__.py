"""Measures the engine: speed, memory, and the quality of what retention settings keep."""
