"""The commands that run an engine. Imports every other room of `cluster`."""
