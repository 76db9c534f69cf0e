"""Models of the published comparisons, by name."""
