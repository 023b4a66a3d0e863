"""The paper in miniature: its comparisons, with seeds and intervals."""
