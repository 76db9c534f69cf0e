"""Panels of federated runs: what the W&B workspace and the HTML report show first, in this order."""

from polymodal.dashboards import Panel, Section

__all__ = ["SECTIONS", "STEP_NAME"]

STEP_NAME = "round"
"""what a training step is here"""

SECTIONS = (
    Section(
        "Accuracy by round",
        (
            Panel("Test accuracy", ("test/accuracy",), x="round"),
            Panel("Validation accuracy", ("val/accuracy",), x="round"),
            Panel("Test loss", ("test/loss",), x="round"),
        ),
    ),
    Section(
        "At the end",
        (
            Panel("Test accuracy", ("test/accuracy",), kind="bar"),
            Panel("Mean test accuracy of the last 10 evaluations", ("test/accuracy_mean10",), kind="bar"),
            Panel("Rounds to the target accuracy", ("test/rounds_to_target",), kind="bar"),
            Panel("Accuracy by client: least, median", ("client/accuracy_min", "client/accuracy_median"), kind="bar"),
            Panel("Largest Hessian eigenvalue", ("landscape/hessian",), kind="bar"),
            Panel("Sharpness", ("landscape/sharpness",), kind="bar"),
        ),
    ),
    Section("Clients", (Panel("Metrics by client", ("client/metrics",), kind="table"),)),
    Section(
        "Communication",
        (
            Panel("Bytes up a round", ("comm/up_bytes",), x="round"),
            Panel("Bytes down a round", ("comm/down_bytes",), x="round"),
        ),
    ),
    Section("Privacy", (Panel("Epsilon spent", ("privacy/epsilon",), x="round"),)),
    Section(
        "Local training",
        (
            Panel("Clients that reported", ("train/clients",), x="round"),
            Panel("Local steps a round", ("train/local_steps",), x="round"),
        ),
    ),
)
