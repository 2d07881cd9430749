"""Metrics, vector indexes, BM25."""
