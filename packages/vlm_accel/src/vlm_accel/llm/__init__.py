"""The decoder engine: hooks, tracked cache, eviction."""
