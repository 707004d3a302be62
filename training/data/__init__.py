"""From slides to batches: sources, splits, tiles, shards."""
