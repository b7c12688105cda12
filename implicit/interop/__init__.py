"""Bridges to other libraries of implicit layers; each is imported by itself, where it is wanted."""
