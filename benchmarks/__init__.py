"""Measurements of the package, and proofs about its code; each module is one command."""
