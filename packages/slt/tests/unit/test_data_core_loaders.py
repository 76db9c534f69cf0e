"""From a reader to batches: every draw depends on seed, epoch and video, on nothing else."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from polymodal.errors import UserError
from slt.data.base import Item, SLTData
from slt.data.collate import Batch, Collate, Sample, sentence_id
from slt.data.datamodule import SLTDataModule
from slt.data.dataset import SLTDataset
from slt.data.options import LoaderConfig
from slt.data.synthetic import Synthetic
from slt.tokenizer import Tokenizer

PLAIN = LoaderConfig(batch_size=4, eval_batch_size=4, frame_size=24, resize=None, augment="none", bucket=1)
PAPER = dataclasses.replace(PLAIN, augment="paper", resize=27, max_frames=15, corruption_rate=0.9, question_dropout=0.4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYMODAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        reader = Synthetic(root=tmp_path_factory.mktemp("worlds"), sizes=(12, 6, 6))
        reader.check()
        yield reader


@pytest.fixture(scope="module")
def tokenizer(world):
    texts = [text for item in world.items("train") for text in (item.sentence, item.question)]
    return Tokenizer.build("word", texts, world.language)


def make(world, tokenizer, config=PLAIN, seed=0, **options):
    return SLTDataModule(world, tokenizer, config, seed=seed, **options)


def epoch(loader, number=0):
    loader.batch_sampler.set_epoch(number)
    return list(loader)


def same(a, b):
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        for field in dataclasses.fields(Batch):
            x, y = getattr(left, field.name), getattr(right, field.name)
            if isinstance(x, torch.Tensor):
                assert x.dtype == y.dtype
                assert torch.equal(x, y), field.name
            else:
                assert x == y, field.name


def test_contents_of_a_batch(world, tokenizer):
    (batch,) = epoch(make(world, tokenizer, dataclasses.replace(PLAIN, eval_batch_size=9)).loader("test"))
    items = {item.id: item for item in world.items("test")}
    assert set(batch.ids) == set(items)
    assert len(batch) == 6
    assert batch.lengths.tolist() == [items[name].num_frames for name in batch.ids]
    assert batch.lengths.tolist() == sorted(batch.lengths.tolist(), reverse=True)
    assert batch.frames.shape == (sum(batch.lengths), 3, 24, 24)
    assert batch.frames.dtype == torch.uint8
    for row, clip in enumerate(batch.frames.split(batch.lengths.tolist())):
        item = items[batch.ids[row]]
        np.testing.assert_array_equal(clip.permute(0, 2, 3, 1).numpy(), world.load(item, range(item.num_frames)))
        assert batch.sentences[row] == item.sentence
        assert batch.questions[row] == item.question
        ids = batch.sentence_ids[row][batch.sentence_mask[row]].tolist()
        assert ids == tokenizer.encode(item.sentence)
        assert ids[-2:] == [tokenizer.eos_id, tokenizer.tag_id("de_DE")]
        assert batch.question_ids[row][batch.question_mask[row]].tolist() == tokenizer.encode(item.question)
    assert (batch.sentence_ids[~batch.sentence_mask] == tokenizer.pad_id).all()
    assert torch.equal(batch.masked_sentence_ids, batch.sentence_ids), "evaluation masks nothing"
    assert torch.equal(batch.masked_question_ids, batch.question_ids)


def test_evaluation_is_the_same_in_every_epoch(world, tokenizer):
    data = make(world, tokenizer, PAPER)
    same(epoch(data.val_dataloader(), 0), epoch(data.val_dataloader(), 5))
    assert all(batch.questions == [q for q in batch.questions if q] for batch in data.val_dataloader())


@pytest.mark.parametrize("config", [PLAIN, PAPER, dataclasses.replace(PAPER, batch_size=1, max_batch_frames=50)])
def test_worker_count_does_not_matter(world, tokenizer, config):
    """Also with worker processes that load in another order, and keep themselves over epochs."""
    loaders = [
        make(world, tokenizer, dataclasses.replace(config, num_workers=workers, cache_frames=workers == 0)).loader(
            "train", train=True
        )
        for workers in (0, 1, 2)
    ]
    for number in (0, 1):
        first, *others = (epoch(loader, number) for loader in loaders)
        for other in others:
            same(first, other)


def test_same_seed_same_batches_other_seed_other_batches(world, tokenizer):
    first = epoch(make(world, tokenizer, PAPER).train_dataloader(), 3)
    data = make(world, tokenizer, PAPER)
    loader = data.train_dataloader()
    epoch(loader, 1)  # what was drawn before does not matter
    torch.manual_seed(99)
    same(first, epoch(loader, 3))
    other = epoch(make(world, tokenizer, PAPER, seed=1).train_dataloader(), 3)
    assert [b.ids for b in other] != [b.ids for b in first]


def test_a_sample_changes_with_the_epoch_and_not_with_its_neighbours(world):
    dataset = SLTDataset(world, "train", PAPER, train=True, seed=0)
    a, b, again = dataset[2, 0], dataset[2, 1], dataset[2, 0]
    assert torch.equal(a.frames, again.frames)
    assert a.masked_sentence == again.masked_sentence
    assert not torch.equal(a.frames, b.frames)
    assert dataset[2].question == a.question


def test_resume_in_mid_epoch(world, tokenizer):
    whole = epoch(make(world, tokenizer, PAPER).train_dataloader(), 2)
    loader = make(world, tokenizer, dataclasses.replace(PAPER, num_workers=1)).train_dataloader()
    loader.batch_sampler.set_epoch(2)
    loader.batch_sampler.start_batch = 1
    same(whole[1:], list(loader))


def test_no_clip_is_in_two_splits(world, tokenizer):
    data = make(world, tokenizer)
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    ids = [{name for batch in loader for name in batch.ids} for loader in loaders]
    assert [len(names) for names in ids] == [12, 6, 6]
    assert len(set.union(*ids)) == 24


def test_frame_budget(world, tokenizer):
    config = dataclasses.replace(PLAIN, max_batch_frames=70)
    batches = epoch(make(world, tokenizer, config).train_dataloader())
    assert sum(len(batch) for batch in batches) == 12
    assert all(batch.lengths.sum() <= 70 for batch in batches)
    assert len(epoch(make(world, tokenizer, config).val_dataloader())) == 2, "evaluation goes by clips"


def test_long_clips_are_thinned(world):
    config = dataclasses.replace(PLAIN, max_frames=10)
    train = SLTDataset(world, "train", config, train=True)
    assert train.lengths == [10] * 12
    item = world.items("train")[0]
    every = torch.from_numpy(world.load(item, range(item.num_frames))).permute(0, 3, 1, 2)
    evaluated = SLTDataset(world, "train", config)[0]
    expected = [i * item.num_frames // 10 for i in range(10)]
    assert torch.equal(evaluated.frames, every[expected])
    drawn = [train[0, number].frames for number in range(2)]
    assert not torch.equal(*drawn)
    for frames in drawn:
        places = [next(i for i, whole in enumerate(every) if torch.equal(whole, frame)) for frame in frames]
        assert places == sorted(set(places))


def test_the_memory_cache_changes_nothing_and_decodes_once(world, monkeypatch):
    plain = SLTDataset(world, "train", PAPER, train=True)
    cached = SLTDataset(world, "train", PAPER, train=True, cache=True)
    calls = []
    load = Synthetic.load
    monkeypatch.setattr(Synthetic, "load", lambda self, item, chosen: calls.append(item.id) or load(self, item, chosen))
    for number in range(3):
        assert torch.equal(plain[5, number].frames, cached[5, number].frames)
    assert calls.count(world.items("train")[5].id) == 3 + 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, True), ({"cache_mib": 0}, False), ({"num_workers": 1}, False), ({"cache_frames": False}, False)],
)
def test_when_clips_are_kept_in_memory(world, tokenizer, options, expected):
    data = make(world, tokenizer, dataclasses.replace(PLAIN, **options))
    assert (data.dataset("train")._cache is not None) is expected


def test_without_frames_nothing_is_decoded(world, tokenizer, monkeypatch):
    monkeypatch.setattr(Synthetic, "load", lambda *_: pytest.fail("decoded"))
    data = make(world, tokenizer, PLAIN, load_frames=False)
    assert data.dataset("train")[0].frames.shape[0] == 0


def test_question_dropout_is_for_training_only(world):
    config = dataclasses.replace(PLAIN, question_dropout=0.25)
    train = SLTDataset(world, "train", config, train=True, cache=True)
    samples = [train[index, number] for index in range(12) for number in range(60)]
    assert np.mean([not s.question for s in samples]) == pytest.approx(0.25, abs=0.05)
    assert all(not s.masked_question for s in samples if not s.question)
    assert all(s.sentence and s.masked_sentence for s in samples)
    assert all(SLTDataset(world, "train", config)[index].question for index in range(12))
    none = SLTDataset(world, "train", dataclasses.replace(config, question_dropout=1.0), train=True)
    assert not any(none[index, 0].question for index in range(12))


@pytest.mark.parametrize("kind", ["omit_last", "omit", "span"])
def test_masked_words(world, kind):
    config = dataclasses.replace(PLAIN, corruption=kind, corruption_rate=0.8)
    dataset = SLTDataset(world, "train", config, train=True, cache=True)
    shares, pairs = [], []
    for index in range(12):
        for number in range(20):
            sample = dataset[index, number]
            words = sample.sentence.split()
            assert len(sample.masked_sentence) == len(words)
            assert all(m in ("<mask>", w) for m, w in zip(sample.masked_sentence, words, strict=True))
            masked = [i for i, m in enumerate(sample.masked_sentence) if m == "<mask>"]
            if kind == "omit_last":
                assert masked == list(range(len(words) - len(masked), len(words)))
            shares.append(len(masked) / len(words))
            pairs.append((len(masked), sample.masked_question.count("<mask>")))
    assert 0.4 < np.mean(shares) < 0.65
    assert abs(np.corrcoef(np.array(pairs).T)[0, 1]) < 0.25, "question and sentence draw apart"


def clip(name, question="wie wird das", sentence="regen im norden", frames=3, shape=(3, 4, 4), masked=None):
    return Sample(
        name,
        question,
        sentence,
        torch.zeros((frames, *shape), dtype=torch.uint8),
        tuple(question.split()),
        masked or tuple(sentence.split()),
    )


@pytest.fixture(scope="module")
def words():
    return Tokenizer.build("word", ["wie wird das regen im norden"], "de_DE")


def test_empty_questions(words):
    batch = Collate(words)([clip("a"), clip("b", question="")])
    assert batch.question_mask.sum(1).tolist() == [5, 0]
    assert (batch.question_ids[1] == words.pad_id).all()
    batch = Collate(words)([clip("a", question=""), clip("b", question="")])
    assert batch.question_ids.shape == batch.masked_question_mask.shape == (2, 0)


def test_masked_words_become_the_mask_token(words):
    batch = Collate(words)([clip("a", masked=("regen", "<mask>", "<mask>"))])
    plain, masked = batch.sentence_ids[0].tolist(), batch.masked_sentence_ids[0].tolist()
    assert masked == [plain[0], words.mask_id, words.mask_id, *plain[3:]]


def test_characters_are_the_units_of_chinese():
    tokenizer = Tokenizer.build("char", ["今天下雨"], "zh_CN")
    sample = dataclasses.replace(clip("a"), sentence="今天下雨", masked_sentence=("今", "天", "下", "<mask>"))
    batch = Collate(tokenizer, "char")([dataclasses.replace(sample, question="", masked_question=())])
    plain, masked = batch.sentence_ids[0].tolist(), batch.masked_sentence_ids[0].tolist()
    assert len(plain) == 6
    assert masked == [*plain[:3], tokenizer.mask_id, *plain[4:]]


def test_long_questions_lose_their_end_but_not_the_tag(words):
    batch = Collate(words, max_question_tokens=4)([clip("a", question="wie wird das das das")])
    expected = words.encode("wie wird das das das")
    assert batch.question_ids[0].tolist() == [*expected[:2], *expected[-2:]]
    assert batch.masked_question_ids[0].tolist() == batch.question_ids[0].tolist()
    with pytest.raises(UserError, match="max_question_tokens=2; expected at least 3"):
        Collate(words, max_question_tokens=2)


def test_a_sentence_longer_than_the_model(words):
    with pytest.raises(UserError, match="video long has 5 tokens, the model has 4 positions; shorten"):
        Collate(words, max_sentence_tokens=4)([clip("long")])


def test_clips_of_different_frame_size(words):
    with pytest.raises(UserError, match=r"clip b has frames of shape \(3, 5, 4\), clip a of \(3, 4, 4\)"):
        Collate(words)([clip("a"), clip("b", shape=(3, 5, 4))])


def test_equal_sentences_are_positives(words):
    batch = Collate(words)([clip("a"), clip("b", sentence="Regen  im NORDEN"), clip("c", sentence="regen im")])
    assert batch.positives[0] == batch.positives[1] != batch.positives[2]
    assert sentence_id("regen im norden") == 0x5B6B52905E55220E >> 1  # printf 'regen im norden' | b2sum -l 64
    assert 0 <= sentence_id("") < 2**63


def test_a_batch_moves_as_a_whole(words):
    batch = Collate(words)([clip("a")]).to("meta")
    tensors = [getattr(batch, f.name) for f in dataclasses.fields(batch)]
    assert {t.device.type for t in tensors if isinstance(t, torch.Tensor)} == {"meta"}
    assert batch.ids == ["a"]


class Points(SLTData):
    """Four pose clips."""

    name, modality = "points", "pose"

    def read_split(self, split):
        return [Item(f"{split}{n}", f"satz {n}", num_frames=3 + n) for n in range(4)]

    def load(self, item, indices):
        points = np.zeros((item.num_frames, 5, 4), dtype=np.float32)
        points[..., 0] = np.arange(item.num_frames)[:, None]
        points.flags.writeable = False  # as a mapped cache gives them
        return points[list(indices)] if len(indices) < item.num_frames else points


@pytest.mark.filterwarnings("error")
def test_poses_pass_through():
    tokenizer = Tokenizer.build("word", ["satz"], "de_DE")
    (batch,) = epoch(SLTDataModule(Points(), tokenizer, LoaderConfig()).train_dataloader())
    assert batch.frames.shape == (18, 5, 4)
    assert batch.frames.dtype == torch.float32
    assert [clip[:, 0, 0].tolist() for clip in batch.frames.split(batch.lengths.tolist())] == [
        list(map(float, range(length))) for length in batch.lengths.tolist()
    ]


def test_base_reader_checks(tmp_path):
    class Twice(Points):
        def read_split(self, split):
            return [Item("a", "x"), Item("a", "y")]

    class Empty(Points):
        def read_split(self, split):
            return [Item("a", " ")]

    class Nothing(Points):
        def read_split(self, split):
            return []

    with pytest.raises(UserError, match="video a occurs twice"):
        Twice().items("train")
    with pytest.raises(UserError, match="a has an empty sentence; remove it or fill it in"):
        Empty().items("train")
    with pytest.raises(UserError, match="points train: no clips"):
        SLTDataset(Nothing(), "train", PLAIN)
    assert json.loads(json.dumps(Points().describe()))["splits"]["dev"]["frames"] == 18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ({"max_batch_frames": 0}, "max_batch_frames=0; expected at least 1"),
        ({"num_workers": -1}, "num_workers=-1; expected 0"),
        ({"resize": 200}, "resize=200 is below frame_size=224"),
        ({"question_dropout": 1.1}, r"question_dropout=1.1; expected 0\.\.1"),
        ({"corruption_rate": -1.0}, "corruption_rate=-1.0"),
    ],
)
def test_bad_loader_options(options, message):
    with pytest.raises(UserError, match=message):
        LoaderConfig(**options)
