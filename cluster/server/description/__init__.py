"""What the paths of the API answer, for `/openapi.json`: nothing is left out of these models.

A reply is told by a model that forbids other fields, and `table.REPLIES` says which path gives
which reply with which status. Whoever adds a path or a field of a reply adds it here; the tests
compare these models with real replies. Imports `openai` and `live`.
"""
