"""Arithmetic on a recipe: memory and time of a training; loads no model."""
