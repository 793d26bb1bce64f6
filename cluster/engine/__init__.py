"""One replica of the model: requests in, outputs out. Imports `scheduling`; no Ray."""
