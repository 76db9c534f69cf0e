"""The pose front end: clips as landmarks of the signer, from ``.pose`` files (extra ``pose``) or canonical ``.npy``."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from polymodal.errors import UserError

from slt.data.base import Item
from slt.data.landmarks import BODY, COUNT, FACE, HAND, SECTIONS, local_hands, normalise_pose
from slt.data.manifest import Manifest

__all__ = ["Poses", "read_pose"]

_COMPONENTS = (
    ("POSE_LANDMARKS", BODY, "body"),
    ("LEFT_HAND_LANDMARKS", HAND, "left"),
    ("RIGHT_HAND_LANDMARKS", HAND, "right"),
    ("FACE_LANDMARKS", FACE, "face"),
)
_SUFFIXES = (".pose", ".npy")


@dataclass
class Poses(Manifest):
    """Clips as landmarks: ``<root>/{train,dev,test}.jsonl`` as for ``manifest``, ``video`` being one file or a list.

    Files are ``.pose`` of the sign-language-processing community (MediaPipe Holistic points, read with pose-format) or
    ``.npy`` with canonical landmarks; several are joined in time. `slt-data fingerspelling` makes such
    a folder from real recordings. Landmarks and normalisation: :mod:`slt.data.landmarks`.
    """

    face: bool = True
    """use 28 points of the face (lips, brows, eyes, outline)"""
    hands: str = "local"
    """local: hand points relative to the wrist in hand lengths; global: in shoulder widths like the body"""

    name: ClassVar[str] = "poses"
    modality: ClassVar[str] = "pose"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hands not in ("local", "global"):
            raise UserError(f"hands={self.hands!r}; expected local (relative to the wrist) or global")

    @property
    def landmarks(self) -> int:
        """Landmarks per frame."""
        return COUNT if self.face else SECTIONS["face"].start

    def _source(self, path: Path, number: int, video: Any) -> tuple[str, ...]:
        names = [video] if isinstance(video, str) else video
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
            raise UserError(f"{path}:{number}: video must be a path or a list of paths, got {video!r}")
        for name in names:
            if not name.endswith(_SUFFIXES):
                raise UserError(f"{path}:{number}: {name} is not a .pose or .npy file; for videos use --data manifest")
            if not (path.parent / name).is_file():
                raise UserError(
                    f"{path}:{number}: {path.parent / name} does not exist; paths are relative to {path.parent}"
                )
        return tuple(str(path.parent / name) for name in names)

    @staticmethod
    def clip_length(path: Path) -> int:
        """Frames of one file."""
        return len(_load(path))

    def load(self, item: Item, indices: Sequence[int]) -> np.ndarray:
        """Landmarks ``(T, P, 4)`` float32 of one clip: x, y, 0, valid."""
        clip = np.concatenate([self._shape(_load(Path(source))) for source in item.source])
        if len(clip) != item.num_frames:
            raise UserError(
                f"clip {item.source[0]} has {len(clip)} frames, {item.num_frames} when it was indexed; start again"
            )
        return clip[list(indices)]

    def _shape(self, points: np.ndarray) -> np.ndarray:
        points = local_hands(points) if self.hands == "local" else points
        return points[:, : self.landmarks]


def _load(path: Path) -> np.ndarray:
    if path.suffix == ".pose":
        return read_pose(path)
    try:
        points = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a readable .npy file ({error}); build the folder again") from error
    if points.ndim != 3 or points.shape[1:] != (COUNT, 4) or not len(points):
        raise UserError(
            f"{path} has shape {points.shape}; expected (frames, {COUNT}, 4) as slt-data fingerspelling writes it"
        )
    loaded: np.ndarray = points.astype(np.float32)
    return loaded


def read_pose(path: Path | str) -> np.ndarray:
    """Canonical landmarks of a ``.pose`` file; of several persons the one with the highest mean confidence.

    Args:
        path: file with MediaPipe Holistic components. The face may be missing or reduced: absent points are masked.

    Returns:
        ``(T, 77, 4)`` float32, see :mod:`slt.data.landmarks`.

    Raises:
        UserError: missing or broken file, other components, shoulders never visible, pose-format not installed.
    """
    path = Path(path)
    try:
        from pose_format import Pose
    except ImportError:
        raise UserError("reading .pose files needs the extra `pose`: pip install 'polymodal-slt[pose]'") from None
    if not path.is_file():
        raise UserError(f"{path} is missing; copy it again or remove its row")
    try:
        pose = Pose.read(path.read_bytes())
        data = np.ma.getdata(pose.body.data)
        confidence = np.asarray(pose.body.confidence)
        components = [(c.name, list(c.points)) for c in pose.header.components]
    except (struct.error, TypeError, ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(f"{path} is truncated or not a .pose file ({error}); copy it again") from error
    if not data.size:
        raise UserError(f"{path} has no frame; record it again or remove its row")
    person = int(confidence.mean(axis=(0, 2)).argmax())
    points = _select(path, data[:, person], confidence[:, person], components)
    try:
        return normalise_pose(points)
    except ValueError as error:
        raise UserError(f"{path}: {error}; the landmarks cannot be normalised: record it again") from error


def _select(
    path: Path, data: np.ndarray, confidence: np.ndarray, components: list[tuple[str, list[str]]]
) -> np.ndarray:
    out = np.zeros((len(data), COUNT, 4))
    starts: dict[str, tuple[int, list[str]]] = {}
    position = 0
    for name, names in components:
        starts[name] = (position, names)
        position += len(names)
    for component, wanted, section in _COMPONENTS:
        if component not in starts:
            if section == "face":
                continue
            raise UserError(
                f"{path} has components {', '.join(starts)} and no {component}; expected MediaPipe Holistic points"
            )
        start, names = starts[component]
        for row, name in enumerate(wanted, SECTIONS[section].start):
            if name in names:
                column = start + names.index(name)
                out[:, row, :2] = data[:, column, :2]
                out[:, row, 3] = confidence[:, column]
    return out
