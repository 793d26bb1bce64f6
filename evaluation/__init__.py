"""Measures speed, memory and quality. Imports everything, and nothing imports it."""
