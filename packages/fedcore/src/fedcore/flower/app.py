"""``fed-train`` on the nodes of a SuperLink: the two apps that a Flower project names.

Both read what is trained from the run configuration, ``options``, written as for ``fed-train``. Nodes may add options
of their own, such as the folder of the data, in their node configuration.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from polymodal.errors import UserError

from fedcore.engines.base import Federation
from fedcore.flower import client as client_side
from fedcore.flower import engine
from fedcore.flower.nodes import Nodes
from fedcore.settings import FedConfig

__all__ = ["client_app", "federation_of", "options_of", "server_app"]


def server_app() -> ServerApp:
    """A server app that runs ``fed-train`` with the run configuration's options on the nodes that are connected.

    Run configuration: ``options`` (as for ``fed-train``), ``nodes`` (how many to wait for, 1), ``wait`` (seconds for
    that, 600), ``timeout`` (seconds that a round waits for its nodes, 3600; 0: as long as it takes).
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from fedcore.train import train

        config = options_of(context.run_config)
        config.federation.engine = "flower"
        nodes = Nodes(grid)
        nodes.wait(_number(context.run_config, "nodes", 1), _number(context.run_config, "wait", 600))
        with engine.on(nodes, _number(context.run_config, "timeout", 3600) or None):
            train(config)

    return app


def client_app() -> ClientApp:
    """A client app whose nodes train their share of the clients of ``fed-train``."""
    return client_side.client_app(federation_of)


def federation_of(context: Context) -> Federation:
    """Models and data of a node, from the options of the run and, after them, the node's own."""
    options = [str(part.get("options", "")) for part in (context.run_config, context.node_config)]
    return _federation(" ".join(options))


@functools.lru_cache(maxsize=1)
def _federation(options: str) -> Federation:
    from polymodal.seeding import set_threads

    from fedcore.job import Job

    config = options_of({"options": options})
    set_threads(config.threads)
    job = Job(config)
    return job.simulation.federation


def options_of(run_config: Mapping[str, Any]) -> FedConfig:
    """The configuration in ``options``.

    Raises:
        UserError: options that ``fed-train`` does not take.
    """
    from polymodal import cli

    from fedcore import train

    arguments = [cli._spell(a, train.ALIASES) for a in shlex.split(str(run_config.get("options", "")))]
    arguments, presets = train._with_adapters(arguments)
    arguments = cli._with_default_preset(arguments, presets, "fedcore")
    config: FedConfig = cli.parse_config(
        FedConfig, arguments, prog="fedcore", presets="fedcore", choices={"data": train.READERS}
    )
    return config


def _number(run_config: Mapping[str, Any], name: str, default: int) -> int:
    value = run_config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise UserError(f"run configuration {name}={value!r}; expected a number of at least 0")
    return int(value)
