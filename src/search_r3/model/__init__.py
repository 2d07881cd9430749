"""Prompts, backbone, decoding, the encoder."""
