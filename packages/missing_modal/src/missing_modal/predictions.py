"""From logits to classes with probabilities, a record a sample. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from missing_modal.metrics import as_array, probabilities
from missing_modal.patterns import mask_name

if TYPE_CHECKING:
    from missing_modal.calibration import Temperatures

__all__ = ["Prediction", "predictions"]


@dataclass(frozen=True)
class Prediction:
    """What a model says of one sample.

    Args:
        id: of the sample.
        present: the modalities that it had.
        pattern: name of these.
        classes: found ones: one, or those of probability 0.5 and more where a sample may have several.
        probabilities: class name -> probability, in the order of the classes.
        temperature: that its logits were divided by; None: they were not.
    """

    id: str
    present: tuple[str, ...]
    pattern: str
    classes: tuple[str, ...]
    probabilities: dict[str, float]
    temperature: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a line of a JSONL file."""
        return {
            "id": self.id,
            "present": list(self.present),
            "predicted": list(self.classes),
            "probabilities": {name: round(value, 6) for name, value in self.probabilities.items()},
            "temperature": self.temperature,
        }

    def line(self, top: int) -> str:
        """For the terminal: id, what was there, the most probable classes in percent."""
        best = sorted(self.probabilities.items(), key=lambda pair: -pair[1])[:top]
        shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in best)
        return f"{self.id}\t{'+'.join(self.present)}\t{shown}"


def predictions(
    ids: Sequence[str],
    logits: Any,
    masks: Sequence[int] | Any,
    meta: Mapping[str, Any],
    temperatures: Temperatures | None,
) -> list[Prediction]:
    """Predictions of N samples.

    Args:
        ids: N.
        logits: (N, C).
        masks: (N,) patterns.
        meta: ``task``, ``class_names``, ``modalities`` of the model.
        temperatures: by pattern, or None. They change probabilities, never the found classes.
    """
    names, modalities, task = list(meta["class_names"]), list(meta["modalities"]), meta["task"]
    z, held = as_array(logits).astype(np.float64), [int(mask) for mask in as_array(masks)]
    if not len(z):
        return []
    degrees = None if temperatures is None else temperatures.of(held)
    shares = probabilities(z if temperatures is None else temperatures.scale(z, held), task)
    found = []
    for place, mask in enumerate(held):
        if task == "multilabel":
            classes = tuple(name for name, value in zip(names, z[place], strict=True) if value >= 0)
        else:
            classes = (names[int(z[place].argmax())],)
        found.append(
            Prediction(
                ids[place],
                tuple(name for bit, name in enumerate(modalities) if mask >> bit & 1),
                mask_name(mask, modalities),
                classes,
                dict(zip(names, (float(value) for value in shares[place]), strict=True)),
                None if degrees is None else float(degrees[place]),
            )
        )
    return found
