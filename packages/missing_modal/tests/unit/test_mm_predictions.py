"""What is said of single samples: probabilities at the pattern's temperature, classes that no temperature changes."""

import numpy as np
import pytest
from missing_modal.calibration import Temperatures
from missing_modal.predictions import predictions

NAMES = ["a", "b", "c"]


def meta(task, names=NAMES):
    return {"task": task, "class_names": names, "modalities": ["image", "text"]}


def test_softmax_at_the_temperature_of_the_pattern():
    logits, masks = np.random.default_rng(0).normal(size=(4, 3)), [3, 1, 2, 1]
    degrees = {3: 0.5, 1: 2.0}
    found = predictions(["w", "x", "y", "z"], logits, masks, meta("multiclass"), Temperatures(degrees, 4.0))
    for one, z, mask in zip(found, logits, masks, strict=True):
        scaled = np.exp(z / degrees.get(mask, 4.0))
        np.testing.assert_allclose(list(one.probabilities.values()), scaled / scaled.sum(), rtol=1e-12)
        assert one.classes == (NAMES[int(z.argmax())],)
        assert one.temperature == degrees.get(mask, 4.0)
    assert [one.pattern for one in found] == ["complete", "image", "text", "image"]
    assert [one.present for one in found] == [("image", "text"), ("image",), ("text",), ("image",)]
    assert [one.id for one in found] == ["w", "x", "y", "z"]


def test_several_labels_are_those_of_one_half_or_more_at_any_temperature():
    logits = np.array([[0.0, -0.1, 3.0], [-1.0, -2.0, -3.0]])
    plain = predictions(["x", "y"], logits, [3, 2], meta("multilabel"), None)
    warm = predictions(["x", "y"], logits, [3, 2], meta("multilabel"), Temperatures({3: 9.0, 2: 0.1}))
    assert [one.classes for one in plain] == [one.classes for one in warm] == [("a", "c"), ()]
    assert list(plain[0].probabilities.values()) == pytest.approx(1 / (1 + np.exp(-logits[0])))
    assert list(warm[1].probabilities.values()) == pytest.approx(1 / (1 + np.exp(-logits[1] / 0.1)))
    assert plain[0].temperature is None
    assert predictions([], np.zeros((0, 3)), [], meta("multilabel"), None) == []


def test_a_line_names_the_most_probable_first():
    (one,) = predictions(["r1"], [[0.0, np.log(3.0)]], [1], meta("binary", ["no", "yes"]), None)
    assert one.line(1) == "r1\timage\tyes 75.0 %"
    assert one.line(5) == "r1\timage\tyes 75.0 %, no 25.0 %"
    assert one.to_json()["probabilities"] == {"no": 0.25, "yes": 0.75}
