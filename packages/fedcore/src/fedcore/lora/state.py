"""What is trained in an adapted model, under the names of PEFT's adapter files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from polymodal.errors import UserError
from torch import Tensor, nn

from fedcore.adapters import find_adapters

__all__ = ["PREFIX", "adapter_state", "load_adapter_state", "state_names"]

PREFIX = "base_model.model."
"""what PEFT's wrappers put before the names of the model"""


def state_names(module: nn.Module) -> dict[str, str]:
    """Name in a PEFT file -> name of the parameter, of all that is trained, in the module's order.

    Factors are called ``base_model.model.<layer>.lora_A.weight`` (r, k) and ``.lora_B.weight`` (d, r), without the
    adapter's name; head layers go by their own, as PEFT writes ``modules_to_save``.
    """
    factors: dict[str, str] = {}
    for item in find_adapters(module):
        at = f"{item.layer}." if item.layer else ""
        factors |= {item.a: f"{at}lora_A.weight", item.b: f"{at}lora_B.weight"}
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return {PREFIX + factors.get(name, name): name for name in trained}


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all that is trained in an adapted module (``inject``), under PEFT's names.

    Args:
        module: with ``LoraLinear`` layers.

    Returns:
        Tensors by name, see ``state_names``; safetensors can hold them as they are.
    """
    return {key: module.get_parameter(name).detach().clone() for key, name in state_names(module).items()}


@torch.no_grad()
def load_adapter_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what ``adapter_state`` gave into a module of the same layout; nothing is changed where it does not fit.

    Raises:
        UserError: tensors are missing, unknown, or of another shape (adapters of another rank or base).
    """
    names = state_names(module)
    for what, keys in (("lacks", names.keys() - state.keys()), ("has no place for", state.keys() - names.keys())):
        if keys:
            subject, there = ("the adapter state", "the model's") if what == "lacks" else ("the model", "the state's")
            raise UserError(
                f"{subject} {what} {min(keys)} ({len(keys)} of {there} tensors); "
                "use the base, targets and head that the adapters were trained with"
            )
    for key, name in names.items():
        own = module.get_parameter(name)
        if state[key].shape != own.shape:
            raise UserError(
                f"{key} is {tuple(state[key].shape)} in the adapter state and {tuple(own.shape)} in the model; "
                "use the base and the rank that the adapters were trained with"
            )
    for key, name in names.items():
        module.get_parameter(name).copy_(state[key])
