"""Transforms for torchvision v2: restain, resample, classical, cached and replayed."""
