"""Notices that workers are lost, and decides what follows. Imports what all share; no Ray."""
