"""Panels of ``vlm-bench`` runs: what the W&B workspace and the HTML report show first, in this order."""

from polymodal.dashboards import Panel, Section

__all__ = ["SECTIONS"]

SECTIONS = (
    Section(
        "Methods",
        (
            Panel("All rows", ("bench/rows",), kind="table"),
            Panel("Quality against cost", ("bench/pareto",), kind="images"),
        ),
    ),
    Section(
        "Quality by row",
        (
            Panel("Accuracy", ("test/accuracy",), x="row"),
            Panel("Mean over tasks of the unmodified model's score (%)", ("test/retained",), x="row"),
            Panel("KL to the unmodified model (nats)", ("fidelity/kl",), x="row"),
            Panel("Same most likely token (share)", ("fidelity/agreement",), x="row"),
        ),
    ),
    Section(
        "Cost by row",
        (
            Panel("Image tokens left after the last step (share)", ("tokens/left_share",), x="row"),
            Panel("Image tokens, mean over layers (share)", ("tokens/mean_share",), x="row"),
            Panel("MACs of vision and prefill", ("macs/total",), x="row"),
            Panel("Cache (bytes)", ("kv/bytes",), x="row"),
        ),
    ),
    Section(
        "Times by row",
        (
            Panel("Vision (ms)", ("time/vision_ms",), x="row"),
            Panel("Prefill (ms)", ("time/prefill_ms",), x="row"),
            Panel("A token (ms)", ("time/token_ms",), x="row"),
            Panel("Measured speed-up", ("speedup/vision", "speedup/prefill", "speedup/token"), x="row"),
        ),
    ),
    Section(
        "Training of the built-in model",
        (
            Panel("Validation accuracy", ("val/accuracy",)),
            Panel("Loss terms", ("train/answer", "train/cls")),
        ),
    ),
)
