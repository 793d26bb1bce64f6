"""`/v1/files` and `/v1/batches`, and what runs the batches of a server. Imports `batch_store`."""
