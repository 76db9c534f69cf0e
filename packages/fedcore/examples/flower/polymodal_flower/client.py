"""Client app: trains the clients of this node's partition."""

from fedcore.flower.app import client_app

app = client_app()
