"""The small base model of the package: tokenizer, texts, training."""
