"""OpenAI's API, the one dialect of server and batch lines. Imports no other room; no torch."""
