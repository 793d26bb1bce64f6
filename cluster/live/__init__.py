"""What a running engine shows of itself while it runs: a snapshot, and the door that serves it.

Imports nothing but the words that all rooms share.
"""
