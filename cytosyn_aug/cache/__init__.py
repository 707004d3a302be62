"""Records found by the pixels of a tile."""
