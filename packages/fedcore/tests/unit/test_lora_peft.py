"""Adapters of PEFT in and out: the same logits, the same files, and one line where something does not fit."""

import builtins
import copy
import json

import pytest
import torch
from fedcore.adapters import find_adapters
from fedcore.lora import export_plain, from_peft, inject, to_peft
from fedcore.lora.adapter import load_adapter, merged_state, read_adapter, save_adapter
from fedcore.lora.linear import LoraLinear
from fedcore.models.hf import HFText
from polymodal.errors import UserError
from safetensors.torch import load_file
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 3, 9, 2], [1, 1, 7, 8]])
SAME = {"rtol": 1e-5, "atol": 1e-5}


def bert(seed=0, hidden=16):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=16, num_labels=3, pad_token_id=0
    )
    return transformers.GPT2ForSequenceClassification(config).eval()


MODELS = {"bert": (bert, ["query", "value"], ["classifier"]), "gpt2": (gpt2, ["c_attn"], ["score"])}


def theirs(kind, rank=3, seed=0, **options):
    """A PEFT model whose adapters do something."""
    make, targets, head = MODELS[kind]
    config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=targets, modules_to_save=head, **options)
    if kind == "gpt2":
        config.fan_in_fan_out = True
    torch.manual_seed(seed + 1)
    model = peft.get_peft_model(make(seed), config).eval()
    shake(model)
    return model


@torch.no_grad()
def shake(model, seed=5, size=0.2):
    """Move all that is trained."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=draw) * size)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


# ------------------------------------------------------------------ models in and out


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_peft_come_in_with_the_same_logits(kind):
    model = theirs(kind)
    ours = from_peft(model)
    torch.testing.assert_close(logits(ours), logits(model), **SAME)
    kinds = {type(ours.get_submodule(info.layer)) for info in find_adapters(ours)}
    assert kinds == {LoraLinear}
    assert "peft" not in {type(layer).__module__.partition(".")[0] for layer in ours.modules()}
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name.startswith(MODELS[kind][2][0]) for name in trained)
    assert any(name.startswith(MODELS[kind][2][0]) for name in trained)
    shake(ours)
    assert not torch.allclose(logits(ours), logits(model), atol=1e-3), "a copy: theirs stays"


@pytest.mark.parametrize("kind", MODELS)
def test_and_go_out_to_their_files(kind, tmp_path):
    make, targets, head = MODELS[kind]
    ours = inject(make(), 3, targets=targets, head=head, scaling=1.5, seed=2)
    shake(ours)
    model = to_peft(ours)
    assert isinstance(model, peft.PeftModel)
    torch.testing.assert_close(logits(model), logits(ours.eval()), **SAME)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(ours), **SAME)
    torch.testing.assert_close(logits(from_peft(again)), logits(ours), **SAME)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("init", ["qr", "qr_scaled"])
def test_a_split_base_goes_out_as_plain_adapters_of_twice_the_rank(kind, init, tmp_path):
    make, targets, head = MODELS[kind]
    original = make()
    ours = inject(original, 3, targets=targets, head=head, scaling=1.5, init=init).eval()
    shake(ours)
    plain = export_plain(ours, original)
    assert {item.rank for item in plain.values()} == {6}
    save_adapter(tmp_path, ours, plain, "some/base")
    again = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(ours), **SAME)
    torch.testing.assert_close(logits(to_peft(ours, original)), logits(ours), **SAME)
    torch.testing.assert_close(logits(to_peft(ours)), logits(ours), **SAME)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (6, 9, "some/base")


def test_a_base_as_it_was_goes_out_with_its_own_rank():
    original = bert()
    ours = inject(original, {"query": 2, "value": 4}, scaling=2.0)
    shake(ours)
    plain = export_plain(ours, original)
    assert {name.rpartition(".")[2]: item.rank for name, item in plain.items()} == {"query": 2, "value": 4}
    torch.testing.assert_close(logits(to_peft(ours, original).eval()), logits(ours.eval()), **SAME)


def move(module, rank, seed=3):
    """Add a product of some rank to each base."""
    draw = torch.Generator().manual_seed(seed)
    for info in find_adapters(module):
        left, right = torch.randn(16, rank, generator=draw), torch.randn(rank, 16, generator=draw)
        with torch.no_grad():
            module.get_parameter(info.base).add_(left @ right * 0.1)


def test_a_base_that_moved_goes_out_with_the_rank_of_its_move_or_merged(tmp_path):
    original = bert()
    ours = inject(original, 2, targets=["query"], init="qr_scaled").eval()
    shake(ours)
    move(ours, 3)
    plain = export_plain(ours, original)
    assert {item.rank for item in plain.values()} == {2 + 5}
    torch.testing.assert_close(logits(to_peft(ours, original).eval()), logits(ours), **SAME)
    move(ours, 16)
    assert export_plain(ours, original) is None
    with pytest.raises(UserError, match="moved its base too far"):
        to_peft(ours, original)
    plain_model = bert(7)
    plain_model.load_state_dict(merged_state(ours))
    torch.testing.assert_close(logits(plain_model), logits(ours), **SAME)


def test_names_are_those_of_the_model_inside_our_wrappers(tmp_path):
    wrapped = HFText(bert(), padding=0, separator=None)
    ours = inject(wrapped, 2).eval()
    shake(ours)
    save_adapter(tmp_path, ours, export_plain(ours, wrapped))
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")
    again = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    with torch.no_grad():
        expected = ours(IDS + 1)
    torch.testing.assert_close(logits(again), expected, **SAME)
    torch.testing.assert_close(logits(to_peft(ours)), expected, **SAME)
    fresh = inject(HFText(bert(), padding=0, separator=None), 2, seed=9).eval()
    load_adapter(fresh, read_adapter(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(fresh(IDS + 1), expected, **SAME)
    merged = merged_state(ours)
    assert merged.keys() == bert().state_dict().keys()


# ------------------------------------------------------------------ folders


@pytest.mark.parametrize("rank", [3, 5, 8])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"value": 2}}])
def test_a_folder_of_peft_is_where_adapters_start_at_its_rank_or_a_larger_one(rank, options, tmp_path):
    model = theirs("bert", **options)
    model.save_pretrained(tmp_path)
    folder = read_adapter(tmp_path)
    assert folder.common_rank() == 3
    ours = inject(bert(), rank, targets=list(folder.layers), scaling=0.7).eval()
    folder.check(bert())
    load_adapter(ours, folder)
    torch.testing.assert_close(logits(ours), logits(model), **SAME)
    for info in find_adapters(ours):
        assert not (ours.get_parameter(info.b) == 0).all(dim=0).any(), "each direction can be trained"


def test_a_smaller_rank_has_the_best_approximation(tmp_path):
    model = theirs("bert")
    model.save_pretrained(tmp_path)
    folder = read_adapter(tmp_path)
    ours = inject(bert(), 2, targets=list(folder.layers))
    load_adapter(ours, folder)
    for info in find_adapters(ours):
        item = folder.layers[info.layer]
        whole = item.scaling * item.b @ item.a
        cut = info.scaling * ours.get_parameter(info.b) @ ours.get_parameter(info.a)
        _, s, _ = torch.linalg.svd(whole)
        torch.testing.assert_close(torch.linalg.matrix_norm(whole - cut), s[2:].norm(), rtol=1e-4, atol=1e-5)


def test_another_head_stays_new(tmp_path, caplog):
    theirs("bert").save_pretrained(tmp_path)
    other = bert()
    other.classifier = nn.Linear(16, 7)
    ours = inject(other, 3)
    before = ours.classifier.weight.clone()
    load_adapter(ours, read_adapter(tmp_path))
    assert torch.equal(ours.classifier.weight, before)
    assert "classifier.weight is not of this model's shape and stays new" in caplog.text


def test_an_adapter_of_another_base_is_refused(tmp_path):
    theirs("bert").save_pretrained(tmp_path)
    folder = read_adapter(tmp_path)
    with pytest.raises(UserError, match=r"another base: bert\.encoder.*query has a weight of 16x16 there, 32x32 here"):
        folder.check(bert(hidden=32))
    with pytest.raises(UserError, match=r"another base: this model has no layer bert\.encoder"):
        folder.check(gpt2())


def broken(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "IA3"}, "is of kind IA3; only LORA can be read"),
        ({"use_dora": True}, "is DoRA"),
        ({"bias": "all"}, "also trains biases"),
        ({"init_lora_weights": "olora"}, "began with olora, which changes the base"),
        ({"r": "many"}, r"adapter_config\.json cannot be read"),
    ],
)
def test_what_is_no_plain_lora_is_refused(values, said, tmp_path):
    theirs("bert").save_pretrained(tmp_path)
    broken(tmp_path, **values)
    with pytest.raises(UserError, match=said):
        read_adapter(tmp_path)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"adapter_config\.json is missing; give a folder that save_pretrained wrote"):
        read_adapter(tmp_path)
    theirs("bert").save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot read weights from .*; give a folder that save_pretrained wrote"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        read_adapter(tmp_path)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no pair of matrices"):
        read_adapter(tmp_path)


# ------------------------------------------------------------------ models that cannot be taken over


def test_models_that_cannot_be_taken_over_are_refused():
    with pytest.raises(UserError, match="has no adapter of PEFT"):
        from_peft(bert())
    with pytest.raises(UserError, match="is no plain LoRA"):
        from_peft(theirs("bert", use_dora=True))
    with pytest.raises(UserError, match="has a bias"):
        from_peft(theirs("bert", lora_bias=True))
    merged = theirs("bert")
    merged.merge_adapter()
    with pytest.raises(UserError, match="is merged into its base"):
        from_peft(merged)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UserError, match="0 is adapted by PEFT's Conv2d; only LoRA of linear layers"):
        from_peft(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])))
    with pytest.raises(UserError, match="has no adapters"):
        to_peft(bert())


def test_names_that_end_in_others_are_told_apart(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.block = nn.Linear(6, 6), nn.ModuleDict({"proj": nn.Linear(6, 6)})
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.block["proj"](self.proj(x)))

    torch.manual_seed(0)
    original = Nested()
    ours = inject(original, 2, targets=["block.proj"])
    shake(ours)
    lone = copy.deepcopy(ours)
    x = torch.randn(4, 6)
    torch.testing.assert_close(to_peft(ours)(x), ours(x), **SAME)
    outer = inject(original, {"proj": 2}, targets=["block.proj"])
    assert len(find_adapters(outer)) == len(find_adapters(lone)) == 1
    save_adapter(tmp_path, ours, export_plain(ours, original))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)
    torch.testing.assert_close(again(x), ours(x), **SAME)


def test_a_missing_extra_is_named(monkeypatch):
    original = builtins.__import__

    def absent(wanted, *arguments, **options):
        if wanted == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        return original(wanted, *arguments, **options)

    ours = inject(bert(), 2)
    monkeypatch.setattr(builtins, "__import__", absent)
    for call in (lambda: to_peft(ours), lambda: from_peft(ours)):
        with pytest.raises(UserError, match=r"needs peft: pip install 'polymodal-fedcore\[peft\]'"):
            call()
