"""Merge rules as plain functions on tensors."""
