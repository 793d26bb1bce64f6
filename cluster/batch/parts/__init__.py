"""Batch jobs over many files, part by part. Imports `batch`, `engine`; `on_ray` for replicas."""
