"""Trainings of the modes beyond reasoning in words: reasoning distilled into one glance."""
