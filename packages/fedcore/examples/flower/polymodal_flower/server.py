"""Server app: runs ``fed-train`` with the run configuration's options on the nodes that are connected."""

from fedcore.flower.app import server_app

app = server_app()
