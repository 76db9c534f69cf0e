"""Steps of a continual task in mmsegmentation's own pipelines: ``CSSPascalVOC`` and ``CSSADE20K`` in its DATASETS.

In a configuration of mmsegmentation::

    custom_imports = dict(imports=["css.data.mmseg_datasets"])
    train_dataloader = dict(dataset=dict(type="CSSPascalVOC", data_root="VOC2012", task="15-1", step=1, pipeline=...))

Needs the extra ``polymodal-css[mmseg]``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from css.data.ade import ADE20K
from css.data.base import SegData
from css.data.files import palette
from css.data.split_files import step_indices
from css.data.voc import VOC
from css.models.mmseg_ import import_mmseg
from css.task import BACKGROUND, IGNORE, Task

import_mmseg("mmseg.datasets")
from mmengine.registry import DefaultScope  # noqa: E402  # its notes must be silenced first
from mmseg.datasets import BaseSegDataset  # noqa: E402
from mmseg.registry import DATASETS  # noqa: E402

__all__ = ["CSSADE20K", "CSSPascalVOC", "ContinualDataset"]


class ContinualDataset(BaseSegDataset):
    """Pictures of one step of a continual task, with the labels of that step, for any pipeline of mmsegmentation.

    The usual ``LoadAnnotations`` reads the masks; its ``label_map`` turns raw ids into channels (see ``css.task``).
    Classes are the background and all classes seen up to the step, in learning order.

    Args:
        data_root: folder of the data set in its official layout.
        task: ``"15-1"``, ``"offline"``, ...
        setting: ``overlap``, ``disjoint``, ``sequential`` or ``partitioned``.
        step: continual step, from 0.
        split: ``train``, ``val`` or ``test`` (the official val set).
        order: raw ids in learning order; default 1..K.
        seed: of the setting ``partitioned``.
        keep_old: training labels keep classes of earlier steps, as they do in the setting ``sequential``.
        unseen_as: label of classes not learnt yet in val and test pictures, 0 or 255.
        reader: further options of the reader, such as ``val_share``.
        options: those of ``BaseSegDataset``: ``pipeline``, ``test_mode``, ``indices``, ...

    Raises:
        UserError: what the reader and the task refuse.
    """

    reader_class: ClassVar[type[SegData]]

    def __init__(
        self,
        data_root: str | Path,
        *,
        task: str,
        setting: str = "overlap",
        step: int = 0,
        split: str = "train",
        order: tuple[int, ...] = (),
        seed: int = 0,
        keep_old: bool = False,
        unseen_as: int = BACKGROUND,
        reader: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.data = self.reader_class(root=Path(data_root), **(reader or {}))
        names = self.data.class_names()
        self.task = Task(task, len(names), tuple(order))
        self.setting, self.step, self.split, self.seed = setting, step, split, seed
        # Read the pictures of the step first: an unknown step or setting is a line, not an index error below.
        self._chosen = step_indices(self.data, self.task, setting, step, split, seed=seed)
        if split == "train":
            lut = self.task.train_lut(step, keep_old or setting == "sequential")
        else:
            lut = self.task.test_lut(step, unseen_as)
        self._map = {raw: int(lut[raw]) for raw in range(1, len(names) + 1) if lut[raw] != raw}
        seen = self.task.seen(step)
        colors = palette()
        metainfo = {
            "classes": ("background", *(names[raw - 1] for raw in seen)),
            "palette": [colors[raw].tolist() for raw in (BACKGROUND, *seen)],
        }
        with _scope():
            super().__init__(
                data_root=str(data_root),
                metainfo=metainfo,
                ignore_index=IGNORE,
                reduce_zero_label=False,  # 0 is a class of its own here: the background
                **options,
            )

    def load_data_list(self) -> list[dict[str, Any]]:
        """Pictures of the step with their masks and the table from raw ids to channels."""
        items = self.data.items(self.split)
        return [
            {
                "img_path": str(items[index].image),
                "seg_map_path": str(items[index].mask),
                "label_map": self._map or None,
                "reduce_zero_label": False,
                "seg_fields": [],
            }
            for index in self._chosen
        ]


def _scope() -> AbstractContextManager[None]:
    """Transforms are looked up in mmsegmentation where no runner has chosen a scope."""
    chosen = DefaultScope.get_current_instance()
    scope: AbstractContextManager[None] = DefaultScope.overwrite_default_scope(None if chosen else "mmseg")
    return scope


@DATASETS.register_module(force=True)  # a second import of this file, by path, is no error
class CSSPascalVOC(ContinualDataset):
    """PASCAL VOC 2012 by continual steps."""

    reader_class = VOC


@DATASETS.register_module(force=True)
class CSSADE20K(ContinualDataset):
    """ADE20K by continual steps; id 0 is the background, not ignored as in mmsegmentation's own ADE20K."""

    reader_class = ADE20K
