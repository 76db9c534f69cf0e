"""Models of timm and transformers: local, with the same logits as the libraries give."""

import builtins

import pytest
import torch
from fedcore.data.glue import SST2
from fedcore.models import build
from polymodal.errors import UserError
from polymodal.weights import load_tensors
from safetensors.torch import save_file

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture
def bert(tmp_path):
    """Folder with an encoder's weights, its configuration and a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, **SIZES)
    transformers.BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def glue_folder(folder):
    (folder / "SST-2").mkdir()
    for split in ("train", "dev"):
        (folder / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\na good film\t1\nbad\t0\n")
    return folder


def test_texts_reach_the_model_as_its_tokenizer_makes_them(bert, tmp_path):
    import transformers

    data = SST2(root=glue_folder(tmp_path))
    data.fit_to_model(f"hf:{bert}")
    assert data.vocabulary == 9
    found = data.load("train")
    assert found.inputs.tolist() == [[3, 5, 6, 8, 4], [3, 7, 4, 0, 0]]  # the tokenizer's ids, one higher
    model = build(f"hf:{bert}", num_classes=2, input_shape=found.input_shape, vocabulary=data.vocabulary).eval()
    coded = transformers.AutoTokenizer.from_pretrained(bert)(["a good film", "bad"], padding=True, return_tensors="pt")
    torch.testing.assert_close(model(found.batch(torch.arange(2))[0]), model.model(**coded).logits)
    alone = model(found.batch(torch.tensor([1]))[0])
    torch.testing.assert_close(alone[0], model(found.inputs)[1], rtol=1e-5, atol=1e-6)


def test_the_second_text_of_a_pair_has_its_own_type(bert):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    pairs = [["a good film", "bad"], ["bad", "a film"]]
    coded = tokenizer(pairs, padding=True, return_tensors="pt", return_token_type_ids=True)
    assert coded["token_type_ids"].sum() > 0
    model = build(f"hf:{bert}", num_classes=3, input_shape=(9,)).eval()
    stored = torch.where(coded["attention_mask"] == 1, coded["input_ids"] + 1, 0)
    torch.testing.assert_close(model(stored), model.model(**coded).logits)


def test_weights_come_from_the_folder_and_the_classifier_is_new(bert):
    import transformers

    encoder = transformers.BertModel.from_pretrained(bert)
    model = build(f"hf:{bert}", num_classes=5, input_shape=(9,), hidden_dropout_prob=0.3)
    own = model.state_dict()
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(own[f"model.bert.{name}"], value)
    assert own["model.classifier.weight"].shape == (5, 16)
    assert model.training
    assert model.model.config.hidden_dropout_prob == 0.3


def test_padding_of_another_id_is_put_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(vocab_size=20, max_position_embeddings=24, pad_token_id=1, **SIZES)
    config.save_pretrained(tmp_path)
    model = build(f"hf:{tmp_path}", num_classes=2, input_shape=(6,), vocabulary=21).eval()
    ids = torch.tensor([[0, 7, 2, 1, 1], [0, 5, 6, 9, 2]])
    mask = (ids != 1).long()
    expected = model.model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(model(torch.where(mask == 1, ids + 1, 0).int()), expected)


def test_picture_models_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ViTConfig(image_size=32, patch_size=8, **SIZES).save_pretrained(tmp_path)
    model = build(f"hf:{tmp_path}", num_classes=7, input_shape=(3, 32, 32)).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), model.model(pixel_values=images).logits)
    with pytest.raises(UserError, match=r"does not take inputs of shape \(3, 16, 16\)"):
        build(f"hf:{tmp_path}", num_classes=7, input_shape=(3, 16, 16))


def test_folders_that_are_no_model_are_refused(bert, tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing; give a local folder"):
        build(f"hf:{tmp_path / 'nothing'}", num_classes=2, input_shape=(9,))
    with pytest.raises(UserError, match=r"knows 8 token ids, the data has 9; give its tokenizer: --data\.tokenizer"):
        build(f"hf:{bert}", num_classes=2, input_shape=(9,), vocabulary=10)
    with pytest.raises(UserError, match="its configuration has no hidden_dropout"):
        build(f"hf:{bert}", num_classes=2, input_shape=(9,), hidden_dropout=0.3)
    tensors = load_tensors(bert / "model.safetensors")
    tensors.pop("encoder.layer.0.attention.self.query.weight")
    save_file(tensors, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not those of its config\.json: 1 tensors .*query\.weight"):
        build(f"hf:{bert}", num_classes=2, input_shape=(9,))
    (bert / "config.json").write_text("no json")
    with pytest.raises(UserError, match="transformers cannot build a classifier"):
        build(f"hf:{bert}", num_classes=2, input_shape=(9,))


def test_tokenizers_that_cannot_be_used_are_refused(bert, tmp_path):
    data = SST2(root=glue_folder(tmp_path), tokenizer=tmp_path / "nothing")
    with pytest.raises(UserError, match=r"does not exist; give a local folder with tokenizer\.json"):
        data.load("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        SST2(root=tmp_path, tokenizer=tmp_path / "empty").load("train")


# ------------------------------------------------------------------ timm


def test_models_of_timm_fit_the_pictures(tmp_path):
    timm = pytest.importorskip("timm")
    model = build("timm:test_vit", num_classes=5, input_shape=(1, 32, 32)).eval()
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    other = timm.create_model("test_vit", num_classes=3, in_chans=1, img_size=32)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    loaded = build("timm:test_vit", num_classes=5, input_shape=(1, 32, 32), weights=tmp_path / "w.safetensors")
    same, theirs = loaded.state_dict(), other.state_dict()
    for name, value in theirs.items():
        if not name.startswith("head."):
            torch.testing.assert_close(same[name], value)
    assert same["head.weight"].shape[0] == 5
    with pytest.raises(UserError, match=r"weights .* are not those of the model: "):
        build("timm:test_resnet", num_classes=5, input_shape=(1, 32, 32), weights=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("timm:resnt18", {}, r"timm has no model 'resnt18'; did you mean resnet18"),
        ("timm:test_vit", {"pretrained": True}, "pretrained=True would download"),
        ("timm:test_vit", {"nonsense": 1}, "timm cannot build test_vit"),
        ("timm:test_vit", {"weights": "/nowhere/w.pth"}, r"w\.pth does not exist"),
    ],
)
def test_what_timm_does_not_have_is_refused(name, options, said):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=said):
        build(name, num_classes=5, input_shape=(3, 32, 32), **options)


# ------------------------------------------------------------------ absent extras, files of weights


@pytest.mark.parametrize(("name", "package", "extra"), [("timm:a", "timm", "timm"), ("hf:", "transformers", "hf")])
def test_an_absent_extra_is_named(monkeypatch, tmp_path, name, package, extra):
    original = builtins.__import__

    def absent(wanted, *arguments, **options):
        if wanted == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return original(wanted, *arguments, **options)

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'polymodal-fedcore\[{extra}\]'"):
        build(name if extra == "timm" else f"hf:{tmp_path}", num_classes=2, input_shape=(3, 8, 8))
