"""Structured output: what an answer must look like, and requests that wait until workers know it.

Imports plans and settings, and of the workers what says how much a grammar may cost.
"""
