"""What is kept of earlier steps: instances or whole pictures, in an inspectable folder."""
