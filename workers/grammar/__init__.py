"""Which tokens a grammar allows next, for the rank that samples; imports plans and the model's folder."""
