"""The tasks: prompts with known answers, and their scores. Imports `prompts` and `session`."""
