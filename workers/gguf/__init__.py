"""GGUF files, and models that come in packages as such, made into folders; imports `configs`."""
