"""What is in the text of a chat's answer: thoughts, content, tool calls. Imports words alone."""
