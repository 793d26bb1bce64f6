"""Models: their sizes, weights and the one decoder; imports `reading`, `mesh` and `native`."""
