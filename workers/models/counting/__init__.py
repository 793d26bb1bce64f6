"""How many weights a rank has, by arithmetic alone; imports `models` and `mesh`."""
