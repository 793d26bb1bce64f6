"""Models: their sizes, families, weights and the one decoder."""
