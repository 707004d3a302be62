"""The loop that trains any stage: steps, checkpoints, processes."""
