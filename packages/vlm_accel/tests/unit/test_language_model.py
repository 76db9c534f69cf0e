"""Language models from folders and GGUF files: the same logits as what was saved, clear refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import vlm_tiny as tiny
from polymodal.errors import UserError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from vlm_accel.data import language_model
from vlm_accel.data.language_model import load_language_model

TEXT = "The cache keeps what the last queries look at. A picture is many tokens, a question is few."


@pytest.fixture(scope="module")
def vocabulary():
    """A byte-level BPE learned from real text: this package's own documentation strings."""
    source = Path(language_model.__file__).parent.parent
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    files = ("schedule.py", "budget.py", "methods/base.py")
    tokenizer.train_from_iterator([(source / file).read_text() for file in files], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return tiny.build("llama", vocab_size=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, vocabulary):
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory, model, vocabulary):
    path = tmp_path_factory.mktemp("gguf")
    write_gguf(path / "tiny.gguf", model, vocabulary)
    return path


def write_gguf(file, model, vocabulary):
    """A llama in llama.cpp's layout: its names, and the rows of q and k in its order of the rotary halves."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    saved = json.loads(vocabulary.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(sorted(saved["vocab"], key=saved["vocab"].get))
    writer.add_token_types([3, 3] + [1] * (len(saved["vocab"]) - 2))
    writer.add_token_merges([" ".join(pair) for pair in saved["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    ends = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy().astype(np.float32)
        target = ends.get(name)
        if target is None:
            _, _, block, *rest = name.split(".")
            short = names[".".join(rest[:-1])]
            if short in heads:
                array = array.reshape(heads[short], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            target = f"blk.{block}.{short}.weight"
        writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_same(loaded, tokenizer, model):
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    assert ids.shape[1] > 20
    assert tokenizer.decode(ids[0]) == TEXT
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token is not None
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_folder(folder, model):
    loaded, tokenizer = load_language_model(folder, device="cpu")
    check_same(loaded, tokenizer, model)
    assert load_language_model(str(folder), dtype="bfloat16", attn="eager")[0].dtype == torch.bfloat16


def test_gguf_file(gguf_folder, model):
    loaded, tokenizer = load_language_model(gguf_folder)
    assert loaded.dtype == torch.float32
    check_same(loaded, tokenizer, model)
    again, _ = load_language_model(gguf_folder / "tiny.gguf")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_folder_without_tokenizer(tmp_path):
    tiny.build("qwen2").save_pretrained(tmp_path)
    loaded, tokenizer = load_language_model(tmp_path)
    assert tokenizer is None
    assert loaded.config.model_type == "qwen2"


def refused(match, *args, **kwargs):
    with pytest.raises(UserError, match=match) as error:
        load_language_model(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_nothing_there(tmp_path):
    refused("no such folder", tmp_path / "absent")
    refused("neither config.json nor a .gguf", tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    refused("not a .gguf file", tmp_path / "notes.txt")
    refused("use one of", tmp_path, dtype="int8")


def test_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    refused("2 .gguf files", tmp_path)


def test_damaged(tmp_path, gguf_folder, folder):
    (tmp_path / "x.gguf").write_bytes(b"<!DOCTYPE html>")
    refused("not a GGUF file", tmp_path)
    (tmp_path / "x.gguf").write_bytes((gguf_folder / "tiny.gguf").read_bytes()[:20000])
    refused("cannot be loaded", tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused("cannot be read as", tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    refused("no .safetensors", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    refused("cannot be loaded", tmp_path)


@pytest.mark.parametrize("kind", ["qwen2_vl", "llma"])
def test_other_models(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    refused("known: llama", tmp_path)


def test_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(language_model.importlib.util, "find_spec", lambda name: None)
    refused(r"polymodal-vlm-accel\[gguf\]", tmp_path)
