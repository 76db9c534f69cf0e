"""Panels of runs with missing modalities: what the W&B workspace and the HTML report show first, in this order."""

from polymodal.dashboards import Panel, Section

__all__ = ["SECTIONS"]


def _by_pattern(split: str, name: str) -> tuple[str, ...]:
    """Of two modalities; runs with more show their overall scores here, and all patterns in the closing table."""
    return (f"{split}/{name}", *(f"{split}/{name}/{pattern}" for pattern in ("complete", "image", "text")))


SECTIONS = (
    Section(
        "Test, by what is present",
        (
            Panel("Accuracy", _by_pattern("test", "accuracy"), kind="bar"),
            Panel("F1, mean of the classes", _by_pattern("test", "f1_macro"), kind="bar"),
            Panel("AUROC", _by_pattern("test", "auroc"), kind="bar"),
        ),
    ),
    Section(
        "Calibration",
        (
            Panel("Calibration error, before and after", ("test/ece", "test/ece_calibrated"), kind="bar"),
            Panel("Negative log-likelihood, before and after", ("test/nll", "test/nll_calibrated"), kind="bar"),
        ),
    ),
    Section(
        "Validation, by what is present",
        (
            Panel("Accuracy", _by_pattern("val", "accuracy")),
            Panel("F1, mean of the classes", _by_pattern("val", "f1_macro")),
            Panel("AUROC", _by_pattern("val", "auroc")),
            Panel("Negative log-likelihood", _by_pattern("val", "nll")),
            Panel("Calibration error", _by_pattern("val", "ece")),
        ),
    ),
    Section(
        "Loss terms",
        (
            Panel("Cross-entropy", ("train/ce", "train/bce")),
            Panel("Similarity of modality prompts (MSP)", ("train/orthogonality",)),
        ),
    ),
    Section("Samples", (Panel("Predictions of each pattern", ("test/predictions",), kind="table"),)),
)
