"""Engines and servers on a Ray cluster. Imports `server`, `engine`; the only folder with Ray."""
