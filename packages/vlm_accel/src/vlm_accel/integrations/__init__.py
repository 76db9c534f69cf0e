"""Other libraries that can be used with accelerate."""
