"""``fed-train`` as a Flower app."""
