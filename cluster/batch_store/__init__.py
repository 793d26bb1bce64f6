"""Files and batches of a server, in a folder and SQLite that replicas share. Imports `openai`."""
