"""Collections, the built-in atlas, training examples."""
