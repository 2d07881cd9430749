"""Queries, negatives and reasoning traces that a language model writes."""
