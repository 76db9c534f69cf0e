"""Pure functions of sign language translation: tensors and lists in, tensors and lists out; no state, no trainer."""
