"""Tools and thoughts of a chat: what requests say, and what answers have. Imports the formats."""
