"""OpenAI's Responses API, stateless: its requests as chats, its answers and its events.

Imports `openai` and `openai/requests`.
"""
