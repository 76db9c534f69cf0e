"""Adapters of image encoders, one file a family."""
