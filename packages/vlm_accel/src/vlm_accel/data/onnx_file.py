"""Reads weights and node names out of an ONNX file without the onnx package: a protobuf reader of one screen.

Only what a weight loader needs: the graph's initializers (float32, stored in the file) and its nodes. Field numbers are
those of ``onnx.proto`` (ONNX IR, proto3). The file is untrusted: every length is checked against the file before use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from polymodal.errors import UserError

__all__ = ["Graph", "Node", "read_onnx"]

_FLOAT = 1
_RAW_ELSEWHERE = 1


@dataclass(frozen=True)
class Node:
    """One operation: its name, its kind, the names of its inputs."""

    name: str
    kind: str
    inputs: tuple[str, ...]


@dataclass
class Graph:
    """What was read: ``weights`` (float32 arrays by name) and ``nodes`` in order."""

    weights: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)


def read_onnx(path: str | Path) -> Graph:
    """Float32 initializers and nodes of an ONNX file.

    Raises:
        UserError: no such file, no ONNX file, a truncated one, or one that keeps its weights in another file.
    """
    path = Path(path)
    try:
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of an ONNX file") from error
    graph = Graph()
    try:
        for number, value in _fields(content):
            if number == 7 and isinstance(value, memoryview):
                _read_graph(value, graph)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no complete ONNX file ({error}); copy it again") from error
    if not graph.weights:
        raise UserError(f"{path} holds no float32 weights; give an ONNX file with its weights inside")
    return graph


def _read_graph(content: memoryview, graph: Graph) -> None:
    for number, value in _fields(content):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            graph.nodes.append(_read_node(value))
        elif number == 5:
            found = _read_tensor(value)
            if found is not None:
                graph.weights[found[0]] = found[1]


def _read_node(content: memoryview) -> Node:
    name, kind, inputs = "", "", []
    for number, value in _fields(content):
        if isinstance(value, memoryview) and number in (1, 3, 4):
            text = bytes(value).decode()
            if number == 1:
                inputs.append(text)
            elif number == 3:
                name = text
            else:
                kind = text
    return Node(name, kind, tuple(inputs))


def _read_tensor(content: memoryview) -> tuple[str, NDArray[np.float32]] | None:
    """(name, array) of a float32 tensor; None for other types."""
    shape: list[int] = []
    name, kind, data = "", 0, None
    for number, value in _fields(content):
        if number == 1:
            shape += [value] if isinstance(value, int) else _varints(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif number in (4, 9) and isinstance(value, memoryview):
            data = value
        elif number == 14 and value == _RAW_ELSEWHERE:
            raise ValueError("its weights are in another file")
    if kind != _FLOAT:
        return None
    size = int(np.prod(shape, dtype=np.int64)) if shape else 1
    if data is None or len(data) != 4 * size:
        raise ValueError(f"weight {name!r} of shape {shape} has {0 if data is None else len(data)} bytes")
    return name, np.frombuffer(data, dtype="<f4").reshape(shape)


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a protobuf message: whole numbers, or the bytes of anything with a length."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise ValueError("field 0")
        if wire == 0:
            value, at = _varint(content, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(content, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(content):
            raise ValueError("it ends too early")
        yield number, content[at : at + length]
        at += length


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    """(whole number, place after it)."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            raise ValueError("it ends too early")
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")


def _varints(content: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(content):
        value, at = _varint(content, at)
        values.append(value)
    return values
