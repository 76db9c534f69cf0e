"""Some pictures of a split with truth and prediction, to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from polymodal.run import Run
    from torch import Tensor

    from css.data.datamodule import CSSDataModule
    from css.methods.base import Method
    from css.models.network import CSSNet
    from css.task import Task

__all__ = ["Shown", "choose_pictures", "displayed", "log_picture", "raw_lut", "segment_some"]


@dataclass(frozen=True)
class Shown:
    """One column of the picture grid.

    Args:
        image: (H, W, 3) uint8.
        truth: (H, W) raw ids, 0 background, 255 ignored; None where it is not known.
        prediction: (H, W) raw ids; None to show the data alone.
        title: stands above, usually the picture's id.
    """

    image: np.ndarray
    truth: np.ndarray | None = None
    prediction: np.ndarray | None = None
    title: str = ""


def segment_some(
    net: CSSNet, method: Method, data: CSSDataModule, split: str, task: Task, count: int = 6
) -> list[Shown]:
    """Pictures of a split with truth and prediction, so chosen that every class occurs where ``count`` allows it.

    Args:
        net: the network; its mode is left as it was.
        method: its prediction rule.
        data: loaders of the step; pictures and labels are those of its evaluation.
        split: ``train``, ``val`` or ``test``.
        task: whose channels the network has.
        count: number of pictures.

    Returns:
        Raw ids in truth and prediction. The choice depends on the split's class sets alone.
    """
    import torch

    dataset: Any = data.loader(split, shard=False).dataset
    sets = dict(zip((i.id for i in data.reader.items(split)), data.reader.class_sets(split), strict=True))
    chosen = choose_pictures([sets[item.id] for item in dataset.items], task.seen(data.step), count)
    table = raw_lut(task)
    device = next(net.parameters()).device
    training = net.training
    shown = []
    net.eval()
    with torch.inference_mode():
        for index in chosen:
            sample = dataset[index]
            guess = method.predict(net.full_logits(sample.image[None].to(device)))[0].cpu().numpy()
            shown.append(Shown(displayed(sample.image), table[sample.label.numpy()], table[guess], sample.id))
    net.train(training)
    return shown


def raw_lut(task: Task) -> np.ndarray:
    """Table channel -> raw id, (256,) uint8; 0 and 255 stay."""
    table = np.arange(256, dtype=np.uint8)
    table[1 : task.num_classes + 1] = task.order
    return table


def choose_pictures(class_sets: Sequence[Sequence[int]], seen: Sequence[int], count: int) -> list[int]:
    """Indices of up to ``count`` pictures that show as many of the ``seen`` raw ids as possible, in file order.

    Each next picture brings most classes that were not shown yet (newest class first, then file order); where all are
    shown, a new round starts.
    """
    left = list(range(len(class_sets)))
    weight = {raw: 1 + place / (len(seen) + 1) / len(seen) for place, raw in enumerate(seen)}
    missing: set[int] = set()
    chosen: list[int] = []
    while left and len(chosen) < count:
        missing = missing or set(weight)
        best = max(left, key=lambda index: (sum(weight[c] for c in class_sets[index] if c in missing), -index))
        found = missing & set(class_sets[best])
        if not found and missing == set(weight):  # no picture left has any class
            return sorted([*chosen, *left[: count - len(chosen)]])
        missing = missing - found if found else set()
        if found:
            chosen.append(best)
            left.remove(best)
    return sorted(chosen)


def displayed(image: Tensor) -> np.ndarray:
    """A normalised picture (3, H, W) as (H, W, 3) uint8."""
    import torch

    from css.data.transforms import MEAN, STD

    values = image.detach().cpu().permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)
    return (values * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def log_picture(run: Run, key: str, path: Path, step: int) -> None:
    """Show a picture file of a continual step in W&B, where the run is logged there.

    Args:
        run: the run.
        key: name of the panel, e.g. ``test/predictions``.
        path: the file.
        step: continual step, the x-axis.
    """
    from polymodal.logs import WandbLog

    for logger in run.loggers:
        if isinstance(logger, WandbLog):
            import wandb

            logger.run.log({key: wandb.Image(str(path)), "task": step})
