"""Readers of benchmarks and of models from folders."""
