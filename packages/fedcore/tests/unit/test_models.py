"""Models: sizes by hand, the same computation as torchvision and timm, what they refuse."""

import pytest
import torch
from fedcore.models import MODELS, build
from fedcore.spec import ParamSpec
from polymodal.errors import UserError
from torch import nn

PICTURE = (3, 32, 32)


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_lenet5_has_the_layers_of_the_specification():
    model = build("lenet5", num_classes=10, input_shape=PICTURE)
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim > 1]
    assert shapes == [(64, 3, 5, 5), (64, 64, 5, 5), (384, 1600), (192, 384), (10, 192)]
    assert model(torch.randn(2, *PICTURE)).shape == (2, 10)
    assert MODELS["cnn"] == MODELS["lenet5"]
    grey = build("lenet5", num_classes=10, input_shape=(1, 28, 28))
    assert grey(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_mlp_is_the_experiments():
    model = build("mlp", num_classes=10, input_shape=(1, 8, 8), hidden=[64])
    assert count(model) == 64 * 64 + 64 + 64 * 10 + 10
    assert build("mlp", num_classes=3, input_shape=(5,), hidden=[])(torch.randn(2, 5)).shape == (2, 3)
    assert count(build("mlp", num_classes=10, input_shape=(784,))) == 784 * 200 + 200 + 200 * 10 + 10


@pytest.mark.parametrize(("name", "blocks"), [("resnet10_gn", [1, 1, 1, 1]), ("resnet18_gn", [2, 2, 2, 2])])
@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_resnets_are_torchvisions_with_another_stem(name, blocks, norm):
    resnet = pytest.importorskip("torchvision.models.resnet")
    layer = (lambda channels: nn.GroupNorm(2, channels)) if norm == "gn" else nn.BatchNorm2d
    width = 8
    reference = resnet.ResNet(resnet.BasicBlock, blocks, num_classes=7, norm_layer=layer)
    reference.conv1, reference.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    reference.bn1 = nn.GroupNorm(2, 64)
    model = build(name, num_classes=7, input_shape=PICTURE, norm=norm)
    renamed = {}
    for key, value in model.state_dict().items():
        other = key.replace("norm", "bn").replace("shortcut", "downsample")
        for stage in range(4):
            other = other.replace(f"stages.{stage}.", f"layer{stage + 1}.")
        renamed[other] = value
    reference.load_state_dict(renamed)
    images = torch.randn(2, 3, width, width)
    torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-5)


def test_resnet34_is_larger_and_width_is_an_option():
    small = build("resnet34_gn", num_classes=5, input_shape=PICTURE, width=4)
    assert small(torch.randn(1, *PICTURE)).shape == (1, 5)
    assert len([m for m in small.modules() if isinstance(m, nn.Conv2d)]) == 1 + 2 * 16 + 3
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())


def test_deit_tiny_is_timms_vision_transformer():
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 10}
    reference = timm.models.VisionTransformer(**options)
    model = build("deit_tiny", num_classes=10, input_shape=PICTURE)
    names = {"patch_embed.": "patch_embed.proj.", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    renamed = {}
    for key, value in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        renamed[key] = value
    reference.load_state_dict(renamed)
    images = torch.randn(2, *PICTURE)
    torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-5)
    kinds = {item.name: (item.kind, item.heads) for item in ParamSpec.from_module(model)}
    assert kinds["blocks.0.attn.qkv.weight"] == ("qkv", 3)
    assert (kinds["head.weight"][0], kinds["pos_embed"][0], kinds["cls_token"][0]) == ("head", "position", "token")


def test_bag_ignores_padding_and_order():
    model = build("bag", num_classes=3, input_shape=(9,), vocabulary=20, hidden=4)
    ids = torch.tensor([[4, 7, 7, 0], [1, 0, 0, 0]], dtype=torch.int32)
    found = model(ids)
    torch.testing.assert_close(found, model(torch.tensor([[7, 0, 4, 7, 0, 0], [0, 1, 0, 0, 0, 0]])))
    torch.testing.assert_close(found[1], model.head(model.inner(model.embedding(torch.tensor(1)))))
    assert model(torch.zeros(1, 2, dtype=torch.int32)).isfinite().all()  # a text without words


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("mlp", "bag", "text_transformer")])
def test_every_picture_model_learns_one_batch_and_takes_other_shapes(name):
    torch.manual_seed(0)
    options = {"width": 8} if name.startswith("resnet") else {}
    model = build(name, num_classes=4, input_shape=(1, 16, 16), **options)
    images, labels = torch.randn(8, 1, 16, 16), torch.arange(8) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "resnet18"}, r"unknown model 'resnet18'; did you mean resnet18_gn.*timm:NAME, hf:FOLDER"),
        ({"name": "mlp", "hiden": [3]}, r"model mlp has no option 'hiden'; did you mean hidden\? options: hidden"),
        ({"name": "mlp", "hidden": [0]}, r"mlp: widths \[3072, 0, 10\]; expected at least 1 each"),
        ({"name": "mlp", "vocabulary": 9}, "model mlp does not take texts; choose bag"),
        (
            {"name": "lenet5", "input_shape": (1, 8, 8)},
            r"at least 16x16 pixels; inputs here are \(1, 8, 8\)",
        ),
        ({"name": "lenet5", "width": 0}, "width=0; expected at least 1"),
        ({"name": "resnet18_gn", "norm": "ln"}, r"norm='ln'; expected gn"),
        ({"name": "resnet18_gn", "groups": 3}, "64 channels in 3 groups"),
        ({"name": "resnet18_gn", "input_shape": (64,)}, r"inputs here are \(64,\)"),
        ({"name": "deit_tiny", "heads": 5}, r"dim=192, depth=6, heads=5; expected heads that divide dim"),
        ({"name": "deit_tiny", "patch": 5}, r"pictures of 32x32 and patch=5"),
        ({"name": "bag"}, r"model bag takes token ids \(length,\); inputs here are \(3, 32, 32\)"),
        ({"name": "bag", "input_shape": (9,), "dim": 0}, "dim=0"),
        ({"name": "keras:resnet"}, "model keras:resnet; adapters are timm:NAME and hf:FOLDER"),
        ({"name": "timm:"}, "adapters are timm:NAME and hf:FOLDER"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        build(**{"num_classes": 10, "input_shape": PICTURE, **options})
