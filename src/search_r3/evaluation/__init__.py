"""Benchmark rows, reports, searching."""
