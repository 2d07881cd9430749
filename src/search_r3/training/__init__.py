"""Losses, the two stages, the run directory."""
