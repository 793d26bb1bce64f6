"""What a worker remembers of each slot's sequence; imports plans and settings, no other room."""
