"""One HTML file about a run or about normalised slides."""
