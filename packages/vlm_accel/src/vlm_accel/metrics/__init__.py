"""Scores of answers: small pure functions, one benchmark family each; ``tasks`` says which task has which. No torch."""
