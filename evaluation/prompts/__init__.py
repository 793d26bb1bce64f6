"""Real text, and prompts of an exact length made of it. Imports no other room of `evaluation`."""
