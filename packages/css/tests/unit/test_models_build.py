"""Networks by name, as the configuration gives them."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from css.models.base import FeatureExtractor, Features
from css.models.build import build_extractor, build_network
from css.models.probe import probe
from css.settings import NetworkConfig
from polymodal.errors import UserError
from torch import nn

PLAIN = SimpleNamespace(detach_background=True, head="linear", unknown=False)
SSUL = SimpleNamespace(detach_background=False, head="ssul", unknown=True)


def test_options_reach_the_network():
    net = build_network(NetworkConfig(name="tiny", width=7), (2, 1), method=SSUL)
    assert net.channels == (2, 1)
    assert net.extractor.out_channels == 14
    assert not net.detach_background
    assert net.unknown is not None
    assert isinstance(net.heads[0], nn.Sequential)
    net = build_network(NetworkConfig(name="deeplabv3_resnet50", output_stride=8, dropout=0.3), (2,), method=PLAIN)
    assert net.extractor.stride == 8
    assert net.extractor.neck.dropout.p == 0.3
    assert net.detach_background
    assert net.unknown is None


def test_same_seed_same_network():
    states = []
    for _ in range(2):
        torch.manual_seed(4)
        states.append(build_network(NetworkConfig(name="tiny"), (2,), method=PLAIN).state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tini", "did you mean tiny"),
        ("deeplabv3_resnet18", "BasicBlock cannot be dilated"),
        ("deeplabv3", "known: deeplabv3_resnet50"),
        ("timm:", "after the colon"),
        ("keras:resnet", "adapters are timm:NAME, hf:FOLDER, mmseg:CONFIG"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        build_extractor(NetworkConfig(name=name))


def test_tiny_takes_no_weights(tmp_path):
    with pytest.raises(UserError, match="takes no file of weights"):
        build_extractor(NetworkConfig(name="tiny", weights=tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("name", "module"), [("timm:resnet18", "timm"), ("mmseg:segformer_b0", "mmseg"), ("hf:FOLDER", "transformers")]
)
def test_a_missing_extra_is_one_line(name, module, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "segformer"}')
    for loaded in [key for key in sys.modules if key.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    extra = {"transformers": "hf"}.get(module, module)
    with pytest.raises(UserError, match=rf"pip install 'polymodal-css\[{extra}\]'"):
        build_extractor(NetworkConfig(name=name.replace("FOLDER", str(tmp_path))))


def test_own_networks_load_no_library_of_an_adapter():
    code = (
        "import sys; from css.models.build import *; from css.settings import NetworkConfig; from types import *;"
        "build_network(NetworkConfig(name='tiny'), (2,), method=SimpleNamespace("
        "detach_background=True, head='linear', unknown=False));"
        "loaded = {name.partition('.')[0] for name in sys.modules};"
        "print(sorted(loaded & {'timm', 'mmseg', 'mmcv', 'mmengine', 'transformers'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.home())
    assert result.stdout.strip() == "[]"


# --- probing ------------------------------------------------------------------------------------------------------


class Odd(FeatureExtractor):
    """Runs from ``smallest`` pixels on; one layer leads nowhere."""

    out_channels = 4

    def __init__(self, smallest=1, channels=4):
        super().__init__()
        self.smallest = smallest
        self.used = nn.Sequential(nn.Conv2d(3, channels, 3, stride=4), nn.BatchNorm2d(channels))
        self.idle = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        if x.shape[-1] < self.smallest:
            raise ValueError("too\nsmall.")
        return Features(self.used(x))

    def backbone_parameters(self):
        return self.parameters()

    def neck_parameters(self):
        return iter(())


@pytest.mark.parametrize(("smallest", "training"), [(1, True), (200, False)])
def test_probe_freezes_what_no_feature_needs_and_leaves_the_rest(smallest, training):
    extractor = Odd(smallest).train(training)
    before = {name: value.clone() for name, value in extractor.state_dict().items()}
    with torch.no_grad():
        assert probe(extractor, "odd") == 4
    assert extractor.training == training
    assert all(p.requires_grad for p in extractor.used.parameters())
    assert not any(p.requires_grad for p in extractor.idle.parameters())
    assert all(p.grad is None for p in extractor.parameters())
    assert all(torch.equal(value, before[name]) for name, value in extractor.state_dict().items())


def test_probe_refuses():
    with pytest.raises(UserError, match="odd does not run on pictures of 128 pixels: too;"):
        probe(Odd(smallest=4000), "odd")
    with pytest.raises(UserError, match=r"features of shape \(1, 5, 32, 32\); expected \(1, 4, h, w\)"):
        probe(Odd(channels=5), "odd")
