"""The layers without gradients: forward passes, decoding with continuous batching, sampling, rollouts."""
