"""Backbones, neck, queries, decoders, and the detector made of them."""
