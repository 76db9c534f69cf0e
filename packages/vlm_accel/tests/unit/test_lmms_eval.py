"""The plug-in for lmms-eval: on a stub of its base class always, on its real classes where it is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import vlm_tiny as tiny
from polymodal.errors import UserError
from vlm_accel.integrations import lmms_eval as plugin


class Stub:
    """What every class of the harness has: a model, ``generate_until`` over requests, ``is_simple``."""

    is_simple = False

    def __init__(self, pretrained: str, batch_size: int = 1) -> None:
        self._model: Any = tiny.build(pretrained)
        self.batch_size = batch_size

    def generate_until(self, requests: list[dict[str, Any]]) -> list[list[int]]:
        with torch.no_grad():
            return [self._model.generate(**request, max_new_tokens=3).tolist() for request in requests]


def test_generates_accelerated_and_leaves_no_trace() -> None:
    cls = plugin.accelerated_class(Stub)
    harness = cls("llava", accel="lightvlm", accel_ratio="0.5", kv="uniform:12;sink=2;recent=4")
    batch = tiny.inputs("llava", harness._model, batch=2, pad=2)
    before = Stub.generate_until(harness, [batch])
    answers = harness.generate_until([batch])
    assert len(answers[0]) == 2
    assert harness.accel_stats["tokens/llm_05"] == 8
    assert harness.accel_stats["macs/prefill"] < harness.accel_stats["macs/prefill_plain"]
    assert Stub.generate_until(harness, [batch]) == before


def test_a_wrapped_model_is_found() -> None:
    harness = plugin.accelerated_class(Stub)("llava", accel="drop", accel_ratio=0.5)
    inner = harness._model
    harness._model = torch.nn.Module()
    harness._model.module = inner
    assert plugin._unwrapped(harness) is inner


def test_presets_by_name_bring_their_method_and_budget() -> None:
    method, settings = plugin._settings("keep3", None, None, None, 0)
    assert (method, settings["schedule"]) == ("lightvlm", "keep3")


@pytest.mark.parametrize("arguments", [{"accel": "keep36"}, {"kv": "half"}])
def test_bad_arguments_are_told_before_weights_are_loaded(arguments: dict[str, str]) -> None:
    class Costly(Stub):
        def __init__(self, *_: Any, **__: Any) -> None:
            raise AssertionError("loaded")

    with pytest.raises(UserError):
        plugin.accelerated_class(Costly)("llava", **arguments)


def test_loglikelihood_says_why_not() -> None:
    harness = plugin.accelerated_class(Stub)("llava")
    with pytest.raises(UserError, match="needs labels .*; use a generate_until task"):
        harness.loglikelihood([])


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = plugin.nothing_here


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_the_harness_takes_our_classes() -> None:
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.load_entrypoint_manifests()
    for name in plugin.BASES:
        cls = registry.get_model_class(name)
        assert cls.generate_until is not cls.__mro__[1].generate_until
