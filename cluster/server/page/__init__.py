"""The page at `/` of a server: a chat, its answers beside `full`'s, and what is kept by layer.

Three files that need no build step and nothing from elsewhere, and the paths that serve them.
Imports the methods' names of `compression`.
"""
