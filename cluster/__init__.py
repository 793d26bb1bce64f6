"""Decides what runs where and when. Its rooms import only rooms below; Ray is in `on_ray` only."""
