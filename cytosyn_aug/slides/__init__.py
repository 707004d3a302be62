"""Whole slides: one slide in, one pyramid out."""
