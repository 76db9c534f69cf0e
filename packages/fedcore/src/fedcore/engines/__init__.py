"""How the clients of a round are computed: one after the other, in worker processes, or together."""
