"""Caches on disk: decoded frames at one size, and the features of a frozen backbone.

Both are :class:`polymodal.data.ArrayCache` folders with one array a clip. An array's key is a hash of everything its
content depends on (clip, source, transform, weights), so a stale entry is never used: it is not found, and the error
says which command builds it.

- Frames: ``(T, S, S, 3)`` uint8, S = 256, memory-mapped. The whole frame is resized, as the loader does before its
  crop, so evaluation is the same as without the cache. Training differs in one point: rotation and shift act on the
  resized frame instead of the original one. 256 x 256 takes 192 KiB a frame, about 18 GiB for 100,000 frames.
- Features: ``(T, D)`` float16 of the evaluation transform. Only right for a frozen backbone and frames that no
  augmentation changes; ``slt-train`` refuses them together with augmentation.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from polymodal.data import ArrayCache, ArrayCacheWriter
from polymodal.errors import UserError

from slt.data.base import SPLITS, Item, SLTData

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["CachedReader", "build_feature_cache", "build_frame_cache", "clip_key", "weights_hash"]
__all__ += ["with_feature_cache", "with_frame_cache"]

Progress = Callable[[int, int], None]


def clip_key(item: Item, settings: Mapping[str, Any]) -> str:
    """Key of a clip's array: its id, what its source looks like, and the settings that made the array.

    The source counts as unchanged while the number of frames and the names and sizes of the first, middle and last
    file are; reading all of a data set's files for their hash would take as long as decoding them.
    """
    state: list[Any] = [item.id, item.num_frames]
    for source in item.source:
        path = Path(source)
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        files = [path / names[i] for i in sorted({0, len(names) // 2, len(names) - 1})] if names else [path]
        state += [[file.name, file.stat().st_size if file.is_file() else -1] for file in files]
    text = json.dumps([state, dict(settings)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def weights_hash(module: nn.Module) -> str:
    """sha256 over names, shapes and values of all parameters and buffers."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def build_frame_cache(
    reader: SLTData,
    folder: Path,
    *,
    size: int = 256,
    splits: Iterable[str] = SPLITS,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Decode, resize and store all clips.

    Args:
        reader: a reader of frames.
        folder: the cache to write; it appears when it is complete.
        size: height and width in pixels; training must use ``loader.resize`` of the same value.
        splits: which splits.
        workers: decoding threads.
        overwrite: replace an existing cache.
        progress: called with (clips done, clips in all).

    Returns:
        ``{"clips", "frames", "bytes"}``.

    Raises:
        UserError: not a reader of frames, a broken clip, a folder that exists, or too little free space.
    """
    if reader.modality != "frames":
        raise UserError(
            f"a frame cache is for frames; {reader.name} gives {reader.modality}, which loads fast as it is"
        )
    if size < 1 or workers < 1:
        raise UserError(f"size={size}, workers={workers}; both must be at least 1")
    items = [item for split in splits for item in reader.items(split)]
    _check_space(folder, sum(item.num_frames for item in items) * size * size * 3)
    from slt.data.transforms import ClipTransform

    transform = ClipTransform(size)

    def make(item: Item) -> np.ndarray:
        frames = transform(reader.load(item, range(item.num_frames)))
        return frames.permute(0, 2, 3, 1).contiguous().numpy()

    about = {"kind": "frames", "data": reader.name}
    return _write(folder, about, _frame_settings(size), items, make, workers, overwrite, progress)


def build_feature_cache(
    reader: SLTData,
    backbone: nn.Module,
    folder: Path,
    *,
    frame_size: int = 224,
    resize: int | None = 256,
    max_pass: int = 256,
    device: str = "cpu",
    splits: Iterable[str] = SPLITS,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a frozen backbone over all clips and store its features.

    Args:
        reader: a reader of frames, cached or not.
        backbone: maps ``(N, 3, H, W)`` uint8 to ``(N, D)``; put into evaluation mode.
        folder: the cache to write; it appears when it is complete.
        frame_size: height and width that the backbone sees, pixels.
        resize: height and width before the centre crop, pixels; None: no crop.
        max_pass: frames in one call.
        device: where the backbone runs.
        splits: which splits.
        overwrite: replace an existing cache.
        progress: called with (clips done, clips in all).

    Returns:
        ``{"clips", "frames", "bytes"}``.

    Raises:
        UserError: not a reader of frames, a broken clip, a folder that exists, or features beyond float16.
    """
    import torch

    from slt.data.transforms import ClipTransform

    if reader.modality != "frames":
        raise UserError(f"a feature cache is for frames; {reader.name} gives {reader.modality}")
    settings = _feature_settings(weights_hash(backbone), frame_size, resize)
    transform = ClipTransform(frame_size, resize)
    backbone = backbone.to(device).eval()

    def make(item: Item) -> np.ndarray:
        frames: Tensor = transform(reader.load(item, range(item.num_frames)))
        with torch.inference_mode():
            rows = [backbone(part.to(device)).float().cpu() for part in torch.split(frames, max_pass)]
        features: np.ndarray = torch.cat(rows).half().numpy()
        if not np.isfinite(features).all():
            raise UserError(f"features of clip {item.id} do not fit into float16; is the backbone trained?")
        return features

    items = [item for split in splits for item in reader.items(split)]
    about = {"kind": "features", "data": reader.name}
    return _write(folder, about, settings, items, make, 1, overwrite, progress)


class CachedReader:
    """A reader whose clips come from a cache; everything else is the reader's.

    Args:
        reader: the reader that the cache was built from.
        folder: the cache.
        settings: what the arrays must have been made with.
        modality: what ``load`` gives: ``frames`` or ``features``.
        command: how a missing cache is built, for messages.
    """

    def __init__(self, reader: SLTData, folder: Path, settings: Mapping[str, Any], modality: str, command: str) -> None:
        self.reader, self.settings, self.modality, self.command = reader, dict(settings), modality, command
        self.cache = ArrayCache(folder)
        self._keys: dict[str, str] = {}
        wanted = {k: v for k, v in self.settings.items() if self.cache.meta.get(k) != v}
        if wanted:
            stored = {k: self.cache.meta.get(k) for k in wanted}
            raise UserError(f"cache {folder} was made with {stored}, wanted is {wanted}; build another one: {command}")

    def __getattr__(self, name: str) -> Any:
        if name == "reader":  # while unpickling, before the attributes are back
            raise AttributeError(name)
        return getattr(self.reader, name)

    def load(self, item: Item, indices: Sequence[int]) -> np.ndarray:
        """Rows of the clip's cached array; the clip's source is looked at the first time only.

        Raises:
            UserError: the clip is not in the cache, or its source changed since.
        """
        key = self._keys.get(item.id)
        if key is None:  # listing the folder of frames in every epoch would cost what the cache is to save
            key = clip_key(item, self.settings)
            if key not in self.cache:
                raise UserError(
                    f"cache {self.cache.folder} has no clip {item.id} as it is now (new, or its files changed); "
                    f"build it again: {self.command}"
                )
            self._keys[item.id] = key
        return self.cache[key][list(indices)]


def with_frame_cache(reader: SLTData, folder: Path, size: int = 256) -> SLTData:
    """``reader`` with frames from a cache.

    Raises:
        UserError: no cache there, or one of another size.
    """
    command = f"slt-data cache --data {reader.name} --size {size} --out {folder}"
    return cast(SLTData, CachedReader(reader, folder, _frame_settings(size), "frames", command))


def with_feature_cache(
    reader: SLTData,
    folder: Path,
    backbone: nn.Module,
    *,
    frame_size: int = 224,
    resize: int | None = 256,
) -> SLTData:
    """``reader`` with features in place of frames; right only where no augmentation changes the frames.

    Args:
        reader: the reader that the cache was built from.
        folder: the cache.
        backbone: the frozen backbone; its weights must be those of the cache.
        frame_size: as for :func:`build_feature_cache`.
        resize: as for :func:`build_feature_cache`.

    Raises:
        UserError: no cache there, or one of other weights or another transform.
    """
    settings = _feature_settings(weights_hash(backbone), frame_size, resize)
    command = f"slt-data cache --what features --data {reader.name} --weights FILE --out {folder}"
    return cast(SLTData, CachedReader(reader, folder, settings, "features", command))


def _frame_settings(size: int) -> dict[str, Any]:
    return {"transform": f"resize {size}x{size} antialias", "version": 1}


def _feature_settings(weights: str, frame_size: int, resize: int | None) -> dict[str, Any]:
    return {"transform": f"resize {resize or frame_size}, centre crop {frame_size}", "weights": weights, "version": 1}


def _write(
    folder: Path,
    about: dict[str, Any],
    settings: dict[str, Any],
    items: list[Item],
    make: Callable[[Item], np.ndarray],
    workers: int,
    overwrite: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    total = {"clips": 0, "frames": 0, "bytes": 0}
    with ArrayCacheWriter(folder, about | settings, overwrite=overwrite) as writer:
        for item, array in _parallel(items, make, workers):
            writer.add(clip_key(item, settings), array)
            total["clips"] += 1
            total["frames"] += len(array)
            total["bytes"] += array.nbytes
            if progress is not None:
                progress(total["clips"], len(items))
    return total


def _parallel(items: list[Item], make: Callable[[Item], np.ndarray], workers: int) -> Iterator[tuple[Item, np.ndarray]]:
    """Arrays in order; a few clips ahead at most, so that memory stays bounded."""
    if workers == 1:
        yield from ((item, make(item)) for item in items)
        return
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(items), 2 * workers):
            part = items[start : start + 2 * workers]
            yield from zip(part, pool.map(make, part), strict=True)


def _check_space(folder: Path, need: int) -> None:
    existing = next((p for p in (folder, *folder.absolute().parents) if p.is_dir()), None)
    free = shutil.disk_usage(existing).free if existing is not None else need
    if free < need:
        raise UserError(
            f"the cache needs {need / 2**30:.1f} GiB, {existing} has {free / 2**30:.1f} GiB free; choose another "
            f"folder with --out or smaller frames with --size"
        )
