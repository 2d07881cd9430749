"""Modes beyond `direct` and `reason`."""
