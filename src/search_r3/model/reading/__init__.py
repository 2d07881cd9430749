"""Reading a tokenizer and a causal LM from a model's files."""
