"""Quality against its price: which ways to think, and how often, are worth their tokens."""
