"""Models: their sizes, families, weights and the one decoder; imports `mesh` and `native`."""
