"""open_clip and transformers: our loop equals their encoders, both agree, wrong weights and models are refused."""

import json

import pytest
import torch
from missing_modal.backbones.base import state_hash
from missing_modal.backbones.load import load_towers
from missing_modal.backbones.open_clip import read_open_clip
from missing_modal.batch import Batch
from missing_modal.classifier import Classifier
from missing_modal.methods import create
from polymodal.errors import UserError
from torch import nn

open_clip = pytest.importorskip("open_clip")

CONFIG = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2},
}
IDS = torch.tensor([[58, 3, 59, 0, 0, 0, 0, 0, 0, 0, 0, 0], [58, 1, 2, 4, 5, 6, 7, 59, 0, 0, 0, 0]])


def _model(**changes):
    torch.manual_seed(0)
    model = open_clip.CLIP(**{**CONFIG, **changes})
    with torch.no_grad():  # norms and biases that hide no mistake
        for value in model.parameters():
            value.add_(0.02 * torch.randn_like(value))
    return model.eval()


def _features(tower, x, cut=False):
    """The loop without prompts: (b, e)."""
    h = tower.embed(x)
    h = h[:, : tower.length(x)] if cut else h
    mask = tower.mask(h.shape[1], h)
    for index in range(tower.spec.depth):
        h = tower.block(index, h, mask)
    row = h[torch.arange(len(h)), tower.pool_rows(x)]
    row = nn.functional.layer_norm(
        row, row.shape[-1:], tower.spec.norm_weight, tower.spec.norm_bias, tower.spec.norm_eps
    )
    return row if tower.spec.projection is None else row @ tower.spec.projection


@pytest.fixture
def named(tmp_path):
    """Two built-in names with our small configuration, with and without QuickGELU."""
    for name, quick in (("mm-tiny-quickgelu", True), ("mm-tiny", False)):
        (tmp_path / f"{name}.json").write_text(json.dumps({**CONFIG, "quick_gelu": quick}))
    open_clip.add_model_config(tmp_path)
    return tmp_path


@pytest.mark.parametrize("quick", [True, False])
@torch.no_grad()
def test_open_clip_without_prompts_is_open_clip(quick):
    model, images = _model(quick_gelu=quick), torch.randn(2, 3, 32, 32)
    image, text = read_open_clip(model, "open_clip:tiny")
    torch.testing.assert_close(_features(image, images), model.encode_image(images), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(_features(text, IDS), model.encode_text(IDS), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(_features(text, IDS, cut=True), model.encode_text(IDS), atol=1e-6, rtol=1e-6)
    assert (image.spec.width, image.spec.depth, image.spec.features, image.spec.heads) == (64, 3, 24, 4)
    assert image.spec.train_projection
    assert not text.spec.train_projection
    assert text.placeholder(1).tolist() == [[58, 59] + [0] * 10]


def _through_the_classifier(towers, images, options=None):
    """(b, 2e): the features that the head gets, of complete samples."""
    model = Classifier(towers, create("dcp", **(options or {"length": 0, "depth": 2})), 3).eval()
    at = torch.arange(len(IDS))
    batch = Batch(["a", "b"], [3, 3], {"image": images, "text": IDS}, {"image": at, "text": at})
    return model.features(batch)[0]


@pytest.mark.parametrize("quick", [True, False])
@torch.no_grad()
def test_classifier_without_prompts_gives_both_encoders_of_either_library(tmp_path, quick):
    """The loop that prompts go through, with none: encode_image and encode_text (DCP 3.8, 8)."""
    images = torch.randn(2, 3, 32, 32)
    model = _model(quick_gelu=quick)
    want = torch.cat([model.encode_image(images), model.encode_text(IDS)], dim=1)
    found = _through_the_classifier(read_open_clip(model, "open_clip:tiny"), images)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)
    none = {"length": 6, "depth": 2, "correlated": False, "common": False, "dynamic": False}
    assert torch.equal(_through_the_classifier(read_open_clip(model, "x"), images, none), found)
    if quick:
        other = _hugging_face(model, tmp_path)
        want = [other.get_image_features(images), other.get_text_features(IDS)]
        want = torch.cat([getattr(value, "pooler_output", value) for value in want], dim=1)
        found = _through_the_classifier(load_towers(f"hf_clip:{tmp_path}"), images)
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_both_layouts_give_the_same_tower():
    model = _model()
    turned = open_clip.CLIP(**CONFIG).eval()
    turned.load_state_dict(model.state_dict())
    turned.transformer.batch_first = turned.visual.transformer.batch_first = False
    for block in [*turned.transformer.resblocks, *turned.visual.transformer.resblocks]:
        block.attn.batch_first = False
    torch.testing.assert_close(turned.encode_text(IDS), model.encode_text(IDS), atol=1e-6, rtol=1e-6)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(turned.encode_image(images), model.encode_image(images), atol=1e-6, rtol=1e-6)
    towers = read_open_clip(turned, "open_clip:tiny")
    torch.testing.assert_close(_features(towers[0], images), turned.encode_image(images), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(_features(towers[1], IDS), turned.encode_text(IDS), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_projection_as_a_layer():
    model = _model()
    layer = nn.Linear(32, 24, bias=False)
    layer.weight.copy_(model.text_projection.T)
    want = model.encode_text(IDS)
    del model.text_projection
    model.text_projection = layer
    torch.testing.assert_close(_features(read_open_clip(model, "x")[1], IDS), want, atol=1e-6, rtol=1e-6)


def _hugging_face(model, folder=None, eos=59):
    """The same weights in transformers' own model, by transformers' names."""
    transformers = pytest.importorskip("transformers")
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu"}
    text = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 60, "max_position_embeddings": 12, "hidden_act": "quick_gelu", "eos_token_id": eos}
    text |= {"bos_token_id": 58, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    other = transformers.CLIPModel(config).eval()
    state = other.state_dict()
    own = model.state_dict()
    blocks = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    blocks["self_attn.out_proj"] = "attn.out_proj"
    for there, here, depth in (("vision_model", "visual.", 3), ("text_model", "", 2)):
        for index in range(depth):
            to, source = f"{there}.encoder.layers.{index}", f"{here}transformer.resblocks.{index}"
            for kind in ("weight", "bias"):
                for part, value in zip("qkv", own[f"{source}.attn.in_proj_{kind}"].chunk(3), strict=True):
                    state[f"{to}.self_attn.{part}_proj.{kind}"] = value
                for name, known in blocks.items():
                    state[f"{to}.{name}.{kind}"] = own[f"{source}.{known}.{kind}"]
    for kind in ("weight", "bias"):
        state[f"vision_model.pre_layrnorm.{kind}"] = own[f"visual.ln_pre.{kind}"]
        state[f"vision_model.post_layernorm.{kind}"] = own[f"visual.ln_post.{kind}"]
        state[f"text_model.final_layer_norm.{kind}"] = own[f"ln_final.{kind}"]
    state["vision_model.embeddings.patch_embedding.weight"] = own["visual.conv1.weight"]
    state["vision_model.embeddings.class_embedding"] = own["visual.class_embedding"]
    state["vision_model.embeddings.position_embedding.weight"] = own["visual.positional_embedding"]
    state["text_model.embeddings.token_embedding.weight"] = own["token_embedding.weight"]
    state["text_model.embeddings.position_embedding.weight"] = own["positional_embedding"]
    state["visual_projection.weight"], state["text_projection.weight"] = own["visual.proj"].T, own["text_projection"].T
    other.load_state_dict({key: value.contiguous() for key, value in state.items()})
    if folder is not None:
        other.save_pretrained(folder)
    return other


@pytest.mark.parametrize("eos", [59, 2])
@torch.no_grad()
def test_hugging_face_without_prompts_is_itself_and_equals_open_clip(tmp_path, eos):
    model, images = _model(), torch.randn(2, 3, 32, 32)
    other = _hugging_face(model, tmp_path, eos)
    image, text = load_towers(f"hf_clip:{tmp_path}")
    want = other.get_image_features(images), other.get_text_features(IDS)
    want = [getattr(value, "pooler_output", value) for value in want]
    torch.testing.assert_close(_features(image, images), want[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(_features(text, IDS), want[1], atol=1e-6, rtol=1e-5)
    ours = read_open_clip(model, "open_clip:tiny")
    torch.testing.assert_close(_features(image, images), _features(ours[0], images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(_features(text, IDS), _features(ours[1], IDS), atol=1e-5, rtol=1e-5)
    assert [state_hash(tower) for tower in (image, text)] == [state_hash(tower) for tower in ours]


def test_weights_files(named):
    model = _model()
    want = [state_hash(tower) for tower in read_open_clip(model, "x")]
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, named / "a.pt")
    from safetensors.torch import save_file

    save_file(model.state_dict(), named / "b.safetensors")
    for file in ("a.pt", "b.safetensors"):
        towers = load_towers("open_clip:mm-tiny-quickgelu", named / file)
        assert [state_hash(tower) for tower in towers] == want
        assert towers[0].identity == "open_clip:mm-tiny-quickgelu"


@pytest.mark.filterwarnings("ignore")
def test_an_archive_of_openai_is_read_by_its_published_hash(named, monkeypatch):
    from missing_modal.backbones import open_clip as adapter
    from missing_modal.backbones.weights import file_hash

    model = _model()
    torch.jit.trace_module(model, {"encode_text": IDS}).save(named / "published.pt")
    with pytest.raises(UserError, match="OpenAI did not publish"):
        load_towers("open_clip:mm-tiny-quickgelu", named / "published.pt")
    published = [f"https://there/{file_hash(named / 'published.pt')}/ViT.pt"]
    monkeypatch.setattr(adapter, "_openai_urls", lambda library: published)
    towers = load_towers("open_clip:mm-tiny-quickgelu", named / "published.pt")
    assert [state_hash(tower) for tower in towers] == [state_hash(tower) for tower in read_open_clip(model, "x")]
    with pytest.raises(UserError, match="trained with QuickGELU"):
        load_towers("open_clip:mm-tiny", named / "published.pt")


def test_random_weights_are_seeded(named):
    hashes = {seed: state_hash(load_towers("open_clip:mm-tiny", "random", seed)[0]) for seed in (0, 1)}
    assert hashes[0] != hashes[1]
    assert hashes[0] == state_hash(load_towers("open_clip:mm-tiny", "random", 0)[0])


def test_quickgelu_must_fit(named):
    torch.save(_model().state_dict(), named / "ViT.openai.pt")
    load_towers("open_clip:mm-tiny-quickgelu", named / "ViT.openai.pt")
    with pytest.raises(UserError, match="trained with QuickGELU .* use open_clip:mm-tiny-quickgelu"):
        load_towers("open_clip:mm-tiny", named / "ViT.openai.pt")
    torch.save(_model().state_dict(), named / "plain.pt")
    (named / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**CONFIG, "quick_gelu": False}}))
    with pytest.raises(UserError, match="without QuickGELU .* use open_clip:mm-tiny$"):
        load_towers("open_clip:mm-tiny-quickgelu", named / "plain.pt")
    with pytest.raises(UserError, match="use open_clip:ViT-B-16-quickgelu"):
        load_towers("open_clip:ViT-B-16", "openai")


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14"])
def test_releases_that_do_not_mark_quickgelu_are_read_alike(name, monkeypatch):
    """2.26 marks no entry of its table: names must then tell what later releases mark."""
    from missing_modal.backbones.open_clip import _tag_wants_quick_gelu

    table = open_clip.pretrained
    tags = table.list_pretrained_tags_by_model(name)
    facts = {tag: table.get_pretrained_cfg(name, tag) for tag in tags}
    marked = {tag: _tag_wants_quick_gelu(open_clip, tag, one) for tag, one in facts.items()}
    assert tags
    bare = {tag: {key: value for key, value in one.items() if key != "quick_gelu"} for tag, one in facts.items()}
    monkeypatch.setattr(table, "get_pretrained_cfg", lambda model, tag: {})
    assert {tag: _tag_wants_quick_gelu(open_clip, tag, one) for tag, one in bare.items()} == marked
    if "openai" in tags:
        monkeypatch.setattr(table, "get_pretrained_cfg", lambda model, tag: bare["openai"])
        with pytest.raises(UserError, match=f"use open_clip:{name}-quickgelu"):
            load_towers(f"open_clip:{name}", "openai")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_wrong_weights_are_refused_in_one_line(named):
    torch.save(_model(embed_dim=32).state_dict(), named / "other.pt")
    torch.save([1, 2], named / "list.pt")
    (named / "broken.pt").write_bytes(b"nothing")
    (named / "broken.safetensors").write_bytes(b"nothing")
    scripted = torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1))
    scripted.save(named / "code.pt")
    cases = {
        "other.pt": "does not belong to mm-tiny",
        "list.pt": "state dict",
        "broken.pt": "cannot be read",
        "broken.safetensors": "cannot be read",
        "code.pt": "OpenAI did not publish",
        "missing.pt": "neither a file nor a tag",
    }
    for file, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            load_towers("open_clip:mm-tiny", named / file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-B-17", "no model"),
        ("open_clip:RN50", "no plain CLIP"),
        ("open_clip:coca_ViT-B-32", "no plain CLIP"),
        ("openclip:ViT-B-16", "open_clip"),
        ("hf_clip:nowhere", "no config.json"),
        ("towers:nowhere", "no such file"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        load_towers(name, None if name.startswith(("hf", "towers")) else "random")


def test_weights_must_be_named():
    with pytest.raises(UserError, match="needs weights"):
        load_towers("open_clip:ViT-B-16-quickgelu")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_cfg", {"pool_type": "avg"}, "class row"),
        ("vision_cfg", {"ls_init_value": 0.1}, "plain ones"),
        ("text_cfg", {"pool_type": "last"}, "at its end"),
        ("text_cfg", {"no_causal_mask": True}, "causal"),
        ("text_cfg", {"proj_bias": True}, "bias"),
    ],
)
def test_other_transformers_are_refused(part, change, message):
    with pytest.raises(UserError, match=message):
        read_open_clip(_model(**{part: {**CONFIG[part], **change}}), "open_clip:tiny")
