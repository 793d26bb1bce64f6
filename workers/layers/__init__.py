"""The layers of the decoder, and the sampler."""
