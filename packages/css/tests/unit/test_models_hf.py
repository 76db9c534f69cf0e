"""SegFormer and UperNet of transformers, from local folders."""

import json

import pytest
import torch
from css.models.hf import HFExtractor
from polymodal.errors import UserError

transformers = pytest.importorskip("transformers")
SMALL = {"num_attention_heads": [1, 2, 2, 2], "depths": [1, 1, 1, 1], "decoder_hidden_size": 12, "num_labels": 3}


def segformer_config(last=20):
    return transformers.SegformerConfig(hidden_sizes=[8, 12, 16, last], **SMALL)


def upernet_config():
    stages = [f"stage{k}" for k in (1, 2, 3, 4)]
    swin = transformers.SwinConfig(embed_dim=12, depths=[1] * 4, num_heads=[1, 2, 2, 2], window_size=4)
    swin.out_features = stages
    return transformers.UperNetConfig(backbone_config=swin, hidden_size=12, auxiliary_in_channels=48, num_labels=3)


def varied(model):
    """Batch norms with statistics that show whether they were loaded."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_mean"):
                value.normal_(0, 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def segformer(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("segformer")
    model = varied(transformers.SegformerForSemanticSegmentation(segformer_config()))
    model.save_pretrained(folder)
    return folder, model


X = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_segformer_of_a_folder_is_the_model_before_its_classifier(segformer):
    folder, model = segformer
    net = HFExtractor(folder).eval()
    out = net(X)
    assert net.stride == 4
    assert net.out_channels == 12
    assert torch.equal(model.decode_head.classifier(out.feature), model(X).logits)
    assert [tuple(stage.shape[1:]) for stage in out.stages] == [(8, 16, 24), (12, 8, 12), (16, 4, 6), (20, 2, 3)]
    groups = [{id(p) for p in net.backbone_parameters()}, {id(p) for p in net.neck_parameters()}]
    assert groups[0] | groups[1] == {id(p) for p in net.parameters()}


@torch.no_grad()
def test_upernet_of_a_folder_is_the_model_before_its_classifier(tmp_path):
    torch.manual_seed(0)
    model = varied(transformers.UperNetForSemanticSegmentation(upernet_config()))
    model.save_pretrained(tmp_path)
    net = HFExtractor(tmp_path).eval()
    logits = model.decode_head.classifier(net(X).feature)
    logits = torch.nn.functional.interpolate(logits, size=X.shape[-2:], mode="bilinear", align_corners=False)
    assert torch.allclose(logits, model(X).logits, atol=1e-6)
    assert net.stride == 4
    assert not any("auxiliary" in name for name, _ in net.named_parameters())


@torch.no_grad()
def test_a_folder_without_weights_gives_random_ones_and_a_file_fills_them(segformer, tmp_path):
    folder, model = segformer
    segformer_config().save_pretrained(tmp_path)
    assert not torch.equal(HFExtractor(tmp_path).neck.linear_fuse.weight, model.decode_head.linear_fuse.weight)
    net = HFExtractor(tmp_path, weights=folder / "model.safetensors").eval()
    assert torch.equal(model.decode_head.classifier(net(X).feature), model(X).logits)


def test_weights_of_an_encoder_alone_leave_the_decode_head_random(tmp_path):
    model = transformers.SegformerForImageClassification(segformer_config())
    model.save_pretrained(tmp_path)
    net = HFExtractor(tmp_path)
    loaded = dict(net.backbone.named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in model.segformer.named_parameters())


def test_weights_that_do_not_fit_are_refused(segformer, tmp_path):
    folder, model = segformer
    segformer_config(last=24).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not the segformer of .*config\.json: \d+ of another shape"):
        HFExtractor(tmp_path, weights=folder / "model.safetensors")
    state = {name: value for name, value in model.state_dict().items() if "linear_fuse" not in name}
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"1 missing \(decode_head\.linear_fuse\.weight\)"):
        HFExtractor(folder, weights=tmp_path / "part.pth")
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"missing .* 1 unknown \(conv\.weight\)"):
        HFExtractor(folder, weights=tmp_path / "other.pth")


def test_nothing_is_said_while_it_loads(segformer, capfd):
    HFExtractor(segformer[0])
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ({"model_type": "bert"}, "expected segformer or upernet"),
        ([], "expected segformer or upernet"),
        ({"model_type": "upernet", "backbone": "microsoft/resnet-50"}, "takes its backbone from the internet"),
        ({"model_type": "upernet", "backbone_config": {"use_pretrained_backbone": True}}, "from the internet"),
        ({"model_type": "segformer", "hidden_sizes": [8, 8]}, "cannot build the segformer"),
        ({"model_type": "segformer", "depths": "many"}, "cannot build the segformer"),
    ],
)
def test_refuses_what_is_no_such_folder(tmp_path, settings, message):
    if settings is not None:
        (tmp_path / "config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    with pytest.raises(UserError, match=message) as caught:
        HFExtractor(tmp_path)
    assert "\n" not in str(caught.value)


def test_backward_reaches_every_trained_parameter(segformer):
    net = HFExtractor(segformer[0]).train()
    net(torch.randn(2, 3, 64, 64)).feature.mean().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
