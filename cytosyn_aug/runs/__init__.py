"""Data sets as resumable runs: list inputs, plan, execute, record."""
