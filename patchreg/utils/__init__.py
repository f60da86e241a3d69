"""Helpers without registries: errors, keyed randomness, weights, environment."""
