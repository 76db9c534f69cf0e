"""Frozen encoders behind one face, one file a library."""
