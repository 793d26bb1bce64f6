"""The HTTP API as an ASGI application. Imports `openai` and `engine`; no Ray."""
