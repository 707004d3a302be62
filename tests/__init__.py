"""Tests of both packages; other distributions install a `tests` too, and this one is ours."""
