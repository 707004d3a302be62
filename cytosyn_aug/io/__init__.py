"""Image files, tar shards, slides and tissue: from disk to arrays."""
