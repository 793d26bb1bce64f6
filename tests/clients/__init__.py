"""Existing clients, each in an environment of its own, against a running server: `make clients`.

`run.py` starts all of it; the other files run in the clients' environments and import nothing of
ours but `checks.py`.
"""
