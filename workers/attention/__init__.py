"""Attention backends; `base.get_backend` imports the one that is asked for."""
