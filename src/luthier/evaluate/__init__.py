"""Models and held-out examples → scores, comparisons and parity."""
