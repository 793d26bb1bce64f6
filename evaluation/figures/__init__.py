"""Intervals, tables, plots and pages. Imports results and what names settings; no task."""
