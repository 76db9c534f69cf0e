"""The loader of DINOv2 from ONNX: a small file written here byte by byte, and what is wrong with broken ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import vlm_tiny as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from polymodal.errors import UserError
from vlm_accel.data.dinov2_onnx import load_dinov2_onnx
from vlm_accel.data.onnx_file import read_onnx

OLD = (
    ("attention.q_proj.", "attention.attention.query."),
    ("attention.k_proj.", "attention.attention.key."),
    ("attention.v_proj.", "attention.attention.value."),
    ("attention.o_proj.", "attention.output.dense."),
)


def varint(value):
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def piece(number, content):
    """A protobuf field: a whole number, or bytes with their length."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    content = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name, array, packed=True):
    array = np.asarray(array, dtype="<f4")
    if packed:
        shape = piece(1, b"".join(varint(size) for size in array.shape))
    else:
        shape = b"".join(piece(1, size) for size in array.shape)
    return piece(5, shape + piece(2, 1) + piece(8, name) + piece(9, array.tobytes()))


def node(name, kind, *inputs):
    return piece(1, b"".join(piece(1, one) for one in inputs) + piece(2, "out") + piece(3, name) + piece(4, kind))


def export(model, prefix="backbone."):
    """``model`` as such exporters write it: numbered, transposed matrices; the position embedding in two parts."""
    graph, number = b"", 100
    folder = "/" + prefix.replace(".", "/")
    for name, value in model.state_dict().items():
        for new, old in OLD:
            name = name.replace(new, old)
        array = value.numpy()
        if name.endswith("position_embeddings"):
            graph += tensor("onnx::Concat_7", array[:, :1], packed=False) + tensor("onnx::Reshape_8", array[:, 1:])
            graph += node(f"{folder}embeddings/Reshape_1", "Reshape", "onnx::Reshape_8", "shape")
            graph += node(f"{folder}embeddings/Concat_6", "Concat", "onnx::Concat_7", "resized")
        elif name.startswith("encoder.") and array.ndim == 2:
            number += 3
            graph += tensor(f"onnx::MatMul_{number}", array.T)
            place = name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            graph += node(f"{folder}{place}/MatMul", "MatMul", "x", f"onnx::MatMul_{number}")
        else:
            graph += tensor(prefix + name, array)
    graph += tensor("decoder.final.bias", np.ones(3)) + piece(5, piece(1, 1) + piece(2, 7) + piece(8, "whole"))
    graph += node("/decoder/MatMul", "MatMul", "x", "decoder.final.bias") + piece(2, "a graph")
    return piece(1, 7) + piece(7, graph) + piece(8, piece(2, 14))


@pytest.fixture(scope="module")
def source():
    model = tiny.build("dinov2")
    return type(model)(type(model.config).from_dict(model.config.to_dict() | {"use_mask_token": False})).eval()


@pytest.fixture(scope="module")
def file(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    path.write_bytes(export(source))
    return path


def test_the_loaded_encoder_is_the_written_one(source, file):
    loaded = load_dinov2_onnx(file, heads=source.config.num_attention_heads)
    assert not loaded.training
    assert loaded.config.patch_size == source.config.patch_size
    x = torch.randn(2, 3, 56, 84)
    with torch.no_grad():
        assert torch.equal(loaded(x).last_hidden_state, source(x).last_hidden_state)


def test_weights_and_nodes_are_read_as_written(file, source):
    graph = read_onnx(file)
    assert graph.weights["decoder.final.bias"].tolist() == [1, 1, 1]
    assert "whole" not in graph.weights
    name = "backbone.embeddings.cls_token"
    assert np.array_equal(graph.weights[name], source.state_dict()["embeddings.cls_token"].numpy())
    assert graph.nodes[-1] == type(graph.nodes[-1])("/decoder/MatMul", "MatMul", ("x", "decoder.final.bias"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[: len(content) // 2], "ends too early|bytes"),
        (lambda content: b"", "no float32 weights"),
        (lambda content: b"\x00" * 40, "field 0"),
        (lambda content: b"PK\x03\x04" + content, "no complete ONNX file"),
        (lambda content: content.replace(b"embeddings.cls_token", b"embeddings.cls_tokem"), "no DINOv2 encoder"),
        (lambda content: content.replace(b"layernorm.bias", b"layernorm.bios"), "the first is layernorm.bias"),
        (lambda content: content.replace(b"onnx::Concat_7", b"onnx::Concat_9", 1), "two parts"),
    ],
)
def test_broken_files_are_refused_in_one_line(file, tmp_path, change, message):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        load_dinov2_onnx(broken, heads=4)
    assert "\n" not in str(caught.value)


def test_wrong_heads_weights_elsewhere_and_no_file(file, tmp_path):
    with pytest.raises(UserError, match="give heads"):
        load_dinov2_onnx(file, heads=5)
    with pytest.raises(UserError, match="cannot be read"):
        load_dinov2_onnx(tmp_path / "none.onnx")
    outside = tmp_path / "outside.onnx"
    outside.write_bytes(piece(7, piece(5, piece(1, 2) + piece(2, 1) + piece(8, "a") + piece(14, 1))))
    with pytest.raises(UserError, match="another file"):
        read_onnx(outside)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_error_of_the_user(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_onnx(path)
