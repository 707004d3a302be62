"""Networks, their weights on disk, samplers, and TileGenerator."""
