"""What a Hugging Face config says of a model, read and checked field by field; imports nothing."""
