"""Readers of data sets and what they return."""
