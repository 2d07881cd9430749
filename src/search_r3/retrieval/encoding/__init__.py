"""Encoding a corpus into an index folder: what was encoded, by which model, in which parts, on which machines."""
