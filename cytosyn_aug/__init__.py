"""Synthetic H&E inside a training loop."""
