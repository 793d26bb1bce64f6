"""Settings of the engine, their presets, and the folders they live in. Imports no other room."""
