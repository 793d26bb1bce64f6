"""Pages of keys and values, and the rows that own them; imports `kernels`."""
