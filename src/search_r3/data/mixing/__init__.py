"""Public sources, read, cleaned and mixed into one training collection."""
