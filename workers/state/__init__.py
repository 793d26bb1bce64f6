"""What a worker remembers of each slot's sequence; imports pages and plans, never a pass."""
