"""Models in GGUF files: how they are written, what such a file says of a model, and llama.cpp as what computes them."""
