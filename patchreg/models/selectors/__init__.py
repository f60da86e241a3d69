"""Choosing patches: soft ranks, rankers, selection."""
