"""Panels of continual runs: what the W&B workspace and the HTML report show first, in this order."""

from polymodal.dashboards import Panel, Section

__all__ = ["SECTIONS"]

SECTIONS = (
    Section(
        "After each step",
        (
            Panel("mIoU of all classes seen (%)", ("test/miou_all",), x="task"),
            Panel("mIoU of background and base classes (%)", ("test/miou_old",), x="task"),
            Panel("mIoU of classes learnt later (%)", ("test/miou_new",), x="task"),
            Panel("Harmonic mean of old and new (%)", ("test/miou_harmonic",), x="task"),
            Panel("Forgetting (points of IoU)", ("test/forgetting",), x="task"),
            Panel("mIoU of all, mean over steps so far (%)", ("test/miou_avg",), x="task"),
        ),
    ),
    Section(
        "At the end",
        (
            Panel("mIoU of all classes (%)", ("test/miou_all",), kind="bar"),
            Panel("Old and new classes (%)", ("test/miou_old", "test/miou_new"), kind="bar"),
            Panel("Forgetting (points of IoU)", ("test/forgetting",), kind="bar"),
        ),
    ),
    Section("Samples", (Panel("Image, truth, prediction", ("test/predictions",), kind="images"),)),
    Section(
        "Validation",
        (
            Panel("mIoU of all classes seen (%)", ("val/miou_all",)),
            Panel("Old and new classes (%)", ("val/miou_old", "val/miou_new")),
        ),
    ),
    Section(
        "Loss terms",
        (
            Panel("Segmentation", ("train/bce", "train/ce")),
            Panel("Distillation", ("train/kd", "train/pod")),
            Panel("Decomposed distillation", ("train/pos", "train/neg", "train/ac")),
            Panel("Pasted instances a picture", ("train/pasted",)),
        ),
    ),
)
