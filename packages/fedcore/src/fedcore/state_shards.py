"""Client states beside a checkpoint: one safetensors file a checkpoint, with the states that changed since the last."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from polymodal.callbacks import load_checkpoint
from polymodal.errors import UserError
from polymodal.files import write_bytes
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from fedcore.algorithm import Tree
from fedcore.store import ClientStore

__all__ = ["SCHEMA_VERSION", "StateShards"]

_SCHEMA = "fedcore.client_states"
SCHEMA_VERSION = 1
FOLDER = "clients"


class StateShards:
    """Files ``clients/round-<n>-<checksum>.safetensors`` in the checkpoint folder.

    A checkpoint says which file has the newest state of each client. Files appear whole (temporary file, rename) and
    before the checkpoint that names them; those that neither the new checkpoint nor the one before it names are
    deleted. Checkpoints with weights alone name none.

    Args:
        checkpoints: folder of ``last.ckpt``.
        key: entry of a checkpoint that holds what ``save`` returned.
    """

    def __init__(self, checkpoints: Path, key: str) -> None:
        self._checkpoints, self._key = checkpoints, key
        self.folder = checkpoints / FOLDER
        self._shard_of: dict[int, str] = {}
        self._checksums: dict[str, int] = {}
        self._named_by_last: set[str] = set()

    def save(self, store: ClientStore, round: int) -> dict[str, Any]:
        """Write what changed since the last call; returns the entry of the checkpoint, plain values.

        Raises:
            UserError: the disk is full.
        """
        changed = [client for client in sorted(store.changed) if client in store]
        if changed:
            name, checksum = self._write({client: store[client] for client in changed}, round)
            self._checksums[name] = checksum
            self._shard_of.update(dict.fromkeys(changed, name))
        store.changed.clear()
        used = set(self._shard_of.values())
        self._checksums = {name: value for name, value in self._checksums.items() if name in used}
        # last.ckpt has just become previous.ckpt, and stays until the file that names `used` takes its place.
        self._delete_others(used | self._named_by_last)
        self._named_by_last = used
        return {"schema_version": SCHEMA_VERSION, "shard_of": dict(self._shard_of), "checksums": dict(self._checksums)}

    def load(self, saved: Mapping[str, Any], store: ClientStore, device: torch.device) -> None:
        """Put the states that a checkpoint names into the store.

        Raises:
            UserError: a newer schema, or a file that is missing or damaged.
        """
        if saved["schema_version"] > SCHEMA_VERSION:
            raise UserError(f"client states of schema version {saved['schema_version']}; update polymodal-fedcore")
        self._shard_of = {int(client): str(name) for client, name in saved["shard_of"].items()}
        self._checksums = {str(name): int(value) for name, value in saved["checksums"].items()}
        for name, checksum in self._checksums.items():
            states = self._read(name, checksum)
            for client, shard in self._shard_of.items():
                if shard == name:
                    store.put(client, {key: value.to(device) for key, value in states[client].items()})
        store.changed.clear()
        self._named_by_last = self._names_of_last()

    def _write(self, states: Mapping[int, Tree], round: int) -> tuple[str, int]:
        tensors = {
            f"{c}/{name}": value.detach().cpu().contiguous() for c, s in states.items() for name, value in s.items()
        }
        facts = {"schema": _SCHEMA, "schema_version": str(SCHEMA_VERSION), "round": str(round)}
        content = to_bytes(tensors, facts)
        checksum = zlib.crc32(content)
        # Named by content: a round that is run again never changes a file that an older checkpoint names.
        name = f"round-{round:06d}-{checksum:08x}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.folder / name, content)
        return name, checksum

    def _read(self, name: str, checksum: int) -> dict[int, Tree]:
        path = self.folder / Path(name).name
        remedy = "the checkpoint cannot be used without it; start a new run"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"client states {path}: {error.strerror}; {remedy}") from error
        if zlib.crc32(content) != checksum:
            raise UserError(f"client states {path} are damaged; {remedy}")
        try:
            tensors = from_bytes(content)
        except SafetensorError as error:
            raise UserError(f"client states {path} are damaged ({error}); {remedy}") from error
        states: dict[int, Tree] = {}
        for key, value in tensors.items():
            client, _, field = key.partition("/")
            states.setdefault(int(client), {})[field] = value
        return states

    def _names_of_last(self) -> set[str]:
        """Files that ``last.ckpt`` on disk names: training may go on from another checkpoint."""
        try:
            saved = load_checkpoint(self._checkpoints / "last.ckpt").get(self._key, {}).get("client_states", {})
        except UserError:
            return set()
        return set(saved.get("checksums", {}))

    def _delete_others(self, keep: set[str]) -> None:
        for path in self.folder.glob("*.safetensors"):
            if path.name not in keep:
                path.unlink(missing_ok=True)
