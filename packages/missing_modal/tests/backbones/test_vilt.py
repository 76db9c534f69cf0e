"""ViLT: our loop equals transformers' model, prompts accumulate as published, what is trained, what is refused."""

import pytest
import torch
from missing_modal.backbones.base import state_hash
from missing_modal.backbones.load import load_towers
from missing_modal.backbones.small import small_image, small_text
from missing_modal.backbones.vilt import ViltText, read_vilt
from missing_modal.batch import Batch
from missing_modal.classifier import Classifier
from missing_modal.fused import FusedClassifier, build_classifier
from missing_modal.methods import create
from missing_modal.methods.base import Method, Prompter
from polymodal.errors import UserError
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"vocab_size": 120, "max_position_embeddings": 8, "image_size": 32, "patch_size": 8, "pad_token_id": 0}
IDS = torch.tensor([[101, 5, 6, 102, 0, 0, 0, 0], [101, 7, 102, 0, 0, 0, 0, 0], [101, 9, 8, 7, 102, 0, 0, 0]])


class _Plain(Method):
    """No prompts."""

    fused = True

    def build(self, context):
        """The bare encoder."""
        return Prompter(context, train_out=False)


@pytest.fixture(scope="module")
def vilt():
    torch.manual_seed(0)
    model = transformers.ViltModel(transformers.ViltConfig(**SIZES)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model


def _batch(masks, images=None):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) if images is None else images
    inputs, rows = {}, {}
    for bit, (name, value) in enumerate((("image", images), ("text", IDS))):
        rows[name] = torch.tensor([i for i, mask in enumerate(masks) if mask >> bit & 1], dtype=torch.long)
        inputs[name] = value[rows[name]]
    return Batch([str(i) for i in range(len(masks))], masks, inputs, rows, torch.tensor([0, 1, 2][: len(masks)]))


@torch.no_grad()
def test_without_prompts_it_is_vilt(vilt):
    images = torch.randn(3, 3, 32, 32)
    want = vilt(input_ids=IDS, attention_mask=(IDS != 0).long(), pixel_values=images).pooler_output
    for cut in (True, False):
        model = FusedClassifier(read_vilt(vilt, "vilt:tiny"), _Plain(), 3, cut=cut)
        found, _ = model.features(_batch([3, 3, 3], images))
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_another_size_of_images_resizes_the_positions_as_vilt_does(vilt):
    images = torch.randn(3, 3, 48, 24)
    pixels = torch.ones(3, 48, 24)
    want = vilt(input_ids=IDS, attention_mask=(IDS != 0).long(), pixel_values=images, pixel_mask=pixels).pooler_output
    found, _ = FusedClassifier(read_vilt(vilt, "x"), _Plain(), 3).features(_batch([3, 3, 3], images))
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_rows_accumulate_over_the_layers_of_transformers(vilt):
    """Input level by transformers' own layers, sample by sample."""
    model = FusedClassifier(read_vilt(vilt, "x"), create("mmp_vilt", length=4, depth=2), 3)
    model.prompter.value.normal_(generator=torch.Generator().manual_seed(2))
    batch = _batch([3, 2, 1])
    found, _ = model.features(batch)
    place = {3: 0, 1: 1, 2: 2}
    image, text = torch.ones(3, 3, 32, 32), torch.zeros_like(IDS)
    text[:, 0], text[:, 1] = 101, 102
    image[batch.rows["image"]], text[batch.rows["text"]] = batch.inputs["image"], batch.inputs["text"]
    for sample, mask in enumerate(batch.masks):
        seen = text[sample : sample + 1, : int((text[sample] != 0).sum())]
        pixels = torch.ones(1, 32, 32)
        h, _ = vilt.embeddings(seen, torch.ones_like(seen), None, image[sample : sample + 1], pixels, None, None)
        for index, layer in enumerate(vilt.encoder.layer):
            if index < 2:
                h = torch.cat([model.prompter.value[place[mask], index][None], h], dim=1)
            h = layer(h)[0]
        want = vilt.pooler(vilt.layernorm(h)[:, 8:])
        torch.testing.assert_close(found[sample], want[0], atol=1e-6, rtol=1e-5)
    assert model.num_prefix_tokens == {"image": 0, "text": 8}


@pytest.mark.parametrize("level", ["input", "attention"])
def test_first_values_say_the_pattern(vilt, level):
    prompter = FusedClassifier(read_vilt(vilt, "x"), create("mmp_vilt", length=8, depth=2, level=level), 3).prompter
    table = prompter.tables([3, 2, 1])
    for place in range(3):  # complete 0, image missing 1, text missing 2
        rows = [place, 4 + place] if level == "attention" else [place]
        want = torch.zeros(2, 8, 16)
        want[:, rows] = 1
        assert torch.equal(table[place], want)


@pytest.mark.parametrize("level", ["input", "attention"])
def test_what_is_trained(vilt, level):
    towers = read_vilt(vilt, "x")
    before = [state_hash(tower) for tower in towers]
    model = FusedClassifier(towers, create("mmp_vilt", length=8, depth=2, level=level), 3)
    logits, tables = model.with_tables(_batch([3, 2, 1]))
    assert logits.shape == (3, 3)
    assert model.prompter.penalty(tables) == {}
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    used = {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None}
    assert used == {"prompter", "pooler", "head"}
    assert {name for name, v in model.prompter.named_parameters() if v.grad is not None} == {"value"}
    assert model.prompter.value.grad.flatten(2).abs().sum(-1).gt(0).all()
    with torch.no_grad():
        for value in model.parameters():
            value.sub_(0.1)
    assert [state_hash(tower) for tower in towers] == before
    assert torch.equal(model.pooler.weight, vilt.pooler.dense.weight - 0.1)


@torch.no_grad()
def test_samples_do_not_mix_and_lost_inputs_do_not_matter(vilt):
    model = FusedClassifier(read_vilt(vilt, "x"), create("mmp_vilt", length=4, depth=2), 3)
    model.prompter.value.normal_(generator=torch.Generator().manual_seed(2))
    whole = model(_batch([3, 2, 1]))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images[1] = 7.0  # not there: mask 2 is text only
    torch.testing.assert_close(model(_batch([3, 2, 1], images)), whole, atol=0, rtol=0)
    alone = _batch([3, 2, 1])
    one = Batch(["1"], [2], {"text": alone.inputs["text"][1:2]}, {"text": torch.tensor([0])})
    torch.testing.assert_close(model(one)[0], whole[1], atol=1e-6, rtol=1e-5)


def test_longer_texts_by_resized_positions(vilt):
    text = read_vilt(vilt, "x", length=15)[1]
    assert isinstance(text, ViltText)
    assert text.context == 15
    short, long = read_vilt(vilt, "x")[1].state()["position"], text.state()["position"]
    for row in range(15):  # the centre of a new row lies between the centres of two old ones
        place = min(max((row + 0.5) * 8 / 15 - 0.5, 0.0), 7.0)
        low, part = int(place), place - int(place)
        want = (1 - part) * short[low] + part * short[min(low + 1, 7)]
        torch.testing.assert_close(long[row], want, atol=1e-6, rtol=1e-5)


def test_folder_with_words(vilt, tmp_path):
    vilt.save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    image, text = load_towers(f"vilt:{tmp_path}", length=12)
    assert [state_hash(image), text.context] == [state_hash(read_vilt(vilt, "x")[0]), 12]
    assert text.tokenizer(["a dog", ""]).tolist() == [[2, 5, 6, 3] + [0] * 8, [2, 3] + [0] * 10]


def test_methods_and_towers_must_fit(vilt):
    towers, small = read_vilt(vilt, "vilt:tiny"), (small_image(16, 8), small_text())
    assert isinstance(build_classifier(towers, create("mmp_vilt", length=4, depth=2), 3), FusedClassifier)
    assert isinstance(build_classifier(small, create("head_only"), 3), Classifier)
    with pytest.raises(UserError, match="choose mmp_vilt"):
        build_classifier(towers, create("head_only"), 3)
    with pytest.raises(UserError, match="vilt:FOLDER"):
        build_classifier(small, create("mmp_vilt"), 3)
    for options, message in (
        ({"length": 2}, "3 or more"),
        ({"level": "x"}, "input or attention"),
        ({"depth": 9}, "1 to 3"),
    ):
        with pytest.raises(UserError, match=message):
            FusedClassifier(towers, create("mmp_vilt", **options), 3)
    with pytest.raises(UserError, match="even"):
        FusedClassifier(towers, create("mmp_vilt", length=7, level="attention"), 3)
    with pytest.raises(UserError, match="multiples of 8"):
        towers[0].embed(torch.zeros(1, 3, 30, 32))
    with pytest.raises(UserError, match=r"no config\.json"):
        load_towers("vilt:nowhere")
