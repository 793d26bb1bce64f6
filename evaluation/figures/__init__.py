"""Intervals, tables, plots and pages of results. Imports `result` alone."""
