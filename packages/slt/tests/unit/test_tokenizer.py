"""Word, character and pretrained tokenizers; trimming of a vocabulary."""

import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from polymodal.errors import UserError
from safetensors.torch import load_file, save_file
from slt.config import ModelConfig
from slt.models.translator import SLTModel
from slt.models.weights import load_folder
from slt.tokenizer import META_FILE, Tokenizer, trim_vocabulary
from transformers import MBartConfig, MBartForConditionalGeneration, MBartTokenizer

TEXTS = ["am tag scheint die sonne", "in der nacht regen", "regen am morgen"]


@pytest.fixture
def word() -> Tokenizer:
    return Tokenizer.build("word", TEXTS, "de_DE")


def test_encoder_form_and_round_trip(word):
    ids = word.encode("regen am tag")
    assert ids[-2:] == [word.eos_id, word.tag_id("de_DE")]
    assert len(ids) == 5
    assert word.decode(ids) == "regen am tag"
    assert word.decode([word.tag_id("de_DE"), *ids]) == "regen am tag"
    assert word.decode([*ids[:2], word.eos_id, ids[2]]) == "regen am"
    assert word.encode("") == [word.eos_id, word.tag_id("de_DE")]


def test_vocabulary_is_a_function_of_counts_not_of_order():
    one, two = Tokenizer.build("word", TEXTS, "de_DE"), Tokenizer.build("word", TEXTS[::-1], "de_DE")
    assert one.sha == two.sha
    assert one.encode("regen am tag") == two.encode("regen am tag")
    assert Tokenizer.build("word", TEXTS[:2], "de_DE").sha != one.sha
    assert Tokenizer.build("word", TEXTS, "en_XX").sha != one.sha
    assert one.vocab_size == len({w for t in TEXTS for w in t.split()}) + 6


def test_unknown_and_rare_words_become_unk(word):
    assert word.encode("hagel")[0] == word.unk_id
    assert word.decode([word.unk_id, *word.encode("tag")]) == "tag"
    rare = Tokenizer.build("word", TEXTS, "de_DE", min_count=2)
    assert rare.encode("regen sonne")[:2] == [rare.encode("regen")[0], rare.unk_id]


def test_control_words_in_texts_stay_text(word):
    tokens = word.encode("</s> de_DE <mask> <pad> tag")
    assert tokens[:4] == [word.unk_id] * 4
    built = Tokenizer.build("word", ["</s> de_DE <mask> wort"], "de_DE")
    assert built.vocab_size == 7
    assert built.encode("</s>")[0] == built.unk_id


def test_masked_words(word):
    ids = word.encode_words(["regen", "<mask>", "tag"], "word")
    assert ids == [word.encode("regen")[0], word.mask_id, word.encode("tag")[0], word.eos_id, word.tag_id("de_DE")]
    assert word.encode_words(["<mask>"], "word")[0] == word.mask_id
    assert word.encode_words([], "word") == word.encode("")


def test_characters():
    char = Tokenizer.build("char", ["今天 天气好", "明天下雨。"], "zh_CN")
    ids = char.encode("今天 下雨。")
    assert len(ids) == 7
    assert char.decode(ids) == "今天下雨。"
    assert char.encode_words(["今", "<mask>", "雨"], "char")[1] == char.mask_id
    assert len(char.encode_words(["今", "<mask>", "雨"], "char")) == 5


def test_vocab_info_names_every_special_token(word):
    info = word.vocab
    assert (info.size, info.pad_id, info.eos_id) == (word.vocab_size, word.pad_id, word.eos_id)
    assert {info.pad_id, info.eos_id, info.tag_id, word.mask_id, word.unk_id} < set(info.special_ids)
    assert not set(info.special_ids) & set(word.encode("regen am tag")[:-2])
    assert info.sha == word.sha


@pytest.mark.parametrize("kind", ["word", "char"])
def test_saved_and_pickled_tokenizers_are_the_same(kind, tmp_path):
    made = Tokenizer.build(kind, TEXTS, "de_DE")
    made.save(tmp_path)
    for other in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(made))):
        assert (other.sha, other.kind, other.language) == (made.sha, kind, "de_DE")
        assert other.encode("die sonne </s>") == made.encode("die sonne </s>")


def test_broken_folders_are_one_line_each(tmp_path, word):
    with pytest.raises(UserError, match=META_FILE):
        Tokenizer.load(tmp_path)
    word.save(tmp_path)
    meta = json.loads((tmp_path / META_FILE).read_text())
    (tmp_path / META_FILE).write_text(json.dumps({**meta, "schema_version": 99}))
    with pytest.raises(UserError, match="update polymodal-slt"):
        Tokenizer.load(tmp_path)
    (tmp_path / META_FILE).write_text(json.dumps(meta))
    other = Tokenizer.build("word", ["ganz andere wörter"], "de_DE")
    other.backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="was changed"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / META_FILE).write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path / "nowhere", "de_DE")


def test_wrong_options_say_what_there_is(word):
    with pytest.raises(UserError, match="known: word, char"):
        Tokenizer.build("piece", TEXTS, "de_DE")
    with pytest.raises(UserError, match="no text"):
        Tokenizer.build("word", ["", " "], "de_DE")
    with pytest.raises(UserError, match=r"no language tag 'fr_XX'.*de_DE"):
        word.tag_id("fr_XX")


PIECES = [
    "▁",
    "▁re",
    "gen",
    "▁regen",
    "▁am",
    "▁tag",
    "son",
    "ne",
    "▁son",
    "s",
    "o",
    "n",
    "e",
    "r",
    "g",
    "t",
    "a",
    "▁schnee",
]


@pytest.fixture
def mbart(tmp_path) -> Path:
    """A tiny mBART checkpoint with 18 sentence pieces, as transformers writes it."""
    folder = tmp_path / "mbart"
    vocabulary = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, -1.0 - 0.1 * i) for i, piece in enumerate(PIECES)]
    tokenizer = MBartTokenizer(vocab=vocabulary, src_lang="de_DE", tgt_lang="de_DE")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = MBartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=32,
        scale_embedding=True,
    )
    MBartForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_pretrained_tokenizer_is_that_of_transformers(mbart):
    ours = Tokenizer.from_pretrained(mbart, "de_DE")
    theirs = MBartTokenizer.from_pretrained(mbart, src_lang="de_DE")
    for text in ("regen am tag", "sonne", "schnee am regen"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == len(theirs)
    assert (ours.pad_id, ours.eos_id, ours.unk_id) == (1, 2, 3)
    assert ours.mask_id == theirs.mask_token_id
    assert ours.tag_id("en_XX") == theirs.convert_tokens_to_ids("en_XX")


def test_sentencepiece_models_are_converted(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, vocab_size=40, hard_vocab_limit=False, minloglevel=3
    )
    (tmp_path / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    ours = Tokenizer.from_pretrained(tmp_path, "de_DE")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in TEXTS:
        # mBART's ids are those of sentencepiece plus one: it inserts <pad>.
        assert ours.encode(text)[:-2] == [piece + 1 for piece in pieces.encode(text)]
        assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == pieces.get_piece_size() + 1 + 25 + 1


def test_pretrained_control_words_stay_text_after_pickling(mbart):
    ours = Tokenizer.from_pretrained(mbart, "de_DE")
    for tokenizer in (ours, pickle.loads(pickle.dumps(ours))):
        ids = tokenizer.encode("tag </s> de_DE")
        assert ids.count(tokenizer.eos_id) == 1
        assert ids.count(tokenizer.tag_id("de_DE")) == 1


def test_masks_between_pieces(mbart):
    ours = Tokenizer.from_pretrained(mbart, "de_DE")
    masked = ours.encode_words(["regen", "<mask>", "tag"], "word")
    assert masked == [*ours.encode("regen")[:-2], ours.mask_id, *ours.encode("tag")]
    assert ours.encode_words([*list("re"), "<mask>"], "char")[:-3] == ours.encode("re")[:-2]


def test_trimmed_checkpoint_reads_texts_as_before(mbart, tmp_path):
    out = tmp_path / "trimmed"
    full = Tokenizer.from_pretrained(mbart, "de_DE")
    trimmed = trim_vocabulary(mbart, ["regen am tag", "sonne"], out, "de_DE")
    kept = load_file(out / "vocabulary.safetensors")["kept_ids"].tolist()
    assert len(kept) == trimmed.vocab_size < full.vocab_size
    assert Tokenizer.load(out).sha == trimmed.sha
    for text in ("regen am tag", "sonne", "sonne am tag"):
        assert [kept[i] for i in trimmed.encode(text)] == full.encode(text)
        assert trimmed.decode(trimmed.encode(text)) == text
    assert trimmed.unk_id in trimmed.encode("schnee")
    assert {full.encode("regen")[0], *full.special_ids} <= set(kept)

    before = MBartForConditionalGeneration.from_pretrained(mbart).eval()
    after = MBartForConditionalGeneration.from_pretrained(out).eval()
    assert torch.equal(after.model.shared.weight, before.model.shared.weight[kept])
    ids, old = torch.tensor([trimmed.encode("regen am tag")]), torch.tensor([full.encode("regen am tag")])
    with torch.no_grad():
        logits, old_logits = after(input_ids=ids).logits, before(input_ids=old).logits
    torch.testing.assert_close(logits, old_logits[..., kept], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="already holds"):
        trim_vocabulary(mbart, ["sonne"], out, "de_DE")


def trimmed_config(folder, **changes) -> ModelConfig:
    settings = {
        "backbone": "tiny",
        "width": 16,
        "ffn": 32,
        "text_layers": 2,
        "text_heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "heads": 2,
        "activation": "gelu",
        "scale_embedding": True,
        "max_positions": 32,
        "pretrained_text": str(folder),
        "pretrained_translator": str(folder),
    }
    return ModelConfig(**{**settings, **changes})


def test_model_takes_a_trimmed_checkpoint(mbart, tmp_path):
    tokenizer = trim_vocabulary(mbart, ["regen am tag"], tmp_path / "trimmed", "de_DE")
    source = MBartForConditionalGeneration.from_pretrained(tmp_path / "trimmed").eval()
    model = SLTModel(trimmed_config(tmp_path / "trimmed"), tokenizer.vocab).eval()
    ids = torch.tensor([tokenizer.encode("regen am tag")])
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        states = model.encode_text(ids, mask)
        torch.testing.assert_close(states, source.model.encoder(input_ids=ids).last_hidden_state, rtol=0, atol=1e-6)
        logits = model.restore_logits(states, mask, ids)
        expected = source(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert model.text_encoder.embed_tokens.weight is model.translator.model.shared.weight


def test_checkpoints_that_do_not_fit_name_the_option(mbart, tmp_path):
    tokenizer = trim_vocabulary(mbart, ["regen am tag"], tmp_path / "trimmed", "de_DE")
    with pytest.raises(UserError, match="set text_scale_embedding=True"):
        SLTModel(trimmed_config(tmp_path / "trimmed", text_scale_embedding=False), tokenizer.vocab)
    with pytest.raises(UserError, match="set activation=gelu"):
        SLTModel(trimmed_config(tmp_path / "trimmed", activation="relu"), tokenizer.vocab)
    with pytest.raises(UserError, match="use the tokenizer of that folder"):
        SLTModel(trimmed_config(mbart), tokenizer.vocab)
    tensors = load_file(tmp_path / "trimmed" / "model.safetensors")
    tensors.pop("model.encoder.layers.1.fc1.weight")
    torch.save(tensors, tmp_path / "trimmed" / "pytorch_model.bin")
    (tmp_path / "trimmed" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of \d+ tensors, first layers\.1\.fc1\.weight"):
        SLTModel(trimmed_config(tmp_path / "trimmed"), tokenizer.vocab)
    (tmp_path / "trimmed" / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        SLTModel(trimmed_config(tmp_path / "trimmed"), tokenizer.vocab)


def test_a_checkpoint_in_several_files(mbart, tmp_path):
    trim_vocabulary(mbart, ["regen am tag"], tmp_path / "trimmed", "de_DE")
    whole = load_folder(tmp_path / "trimmed")
    (tmp_path / "trimmed" / "model.safetensors").unlink()
    index = tmp_path / "trimmed" / "model.safetensors.index.json"
    files = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(whole))}
    for part in set(files.values()):
        save_file({name: whole[name] for name, file in files.items() if file == part}, tmp_path / "trimmed" / part)
    index.write_text(json.dumps({"weight_map": files}))
    found = load_folder(tmp_path / "trimmed")
    assert found.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in found.items())
    for text, words in (
        ("{", "is not JSON"),
        ("[1]", "does not hold a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "names files outside its folder"),
        ('{"weight_map": {"a": "c.safetensors"}}', "c.safetensors does not exist"),
    ):
        index.write_text(text)
        with pytest.raises(UserError, match=words):
            load_folder(tmp_path / "trimmed")


def test_trimming_needs_pieces(tmp_path, word):
    word.save(tmp_path / "word")
    with pytest.raises(UserError, match="WordLevel"):
        trim_vocabulary(tmp_path / "word", TEXTS, tmp_path / "out", "de_DE")
