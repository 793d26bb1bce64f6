"""Files and batches of a server, in a folder and SQLite, shared by its replicas. Imports `openai`."""
