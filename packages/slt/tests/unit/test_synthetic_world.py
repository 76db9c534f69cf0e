"""The synthetic world: its ceilings, its determinism, its layout, and how it behaves when writing goes wrong."""

import json
import logging
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from polymodal.errors import UserError
from slt.data.leak import overlap
from slt.data.phoenix import Phoenix2014T
from slt.data.synthetic import FILLERS, HOMONYMS, NEGATION, TOPICS, UNAMBIGUOUS, Synthetic
from slt.data.world import draw_glyphs, render_sign

SPLITS = ("train", "dev", "test")
VOCABULARY = {word for words in HOMONYMS.values() for word in words} | set(UNAMBIGUOUS.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYMODAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("worlds")


@pytest.fixture(scope="module")
def world(folder):
    return Synthetic(root=folder, sizes=(12, 6, 6))


@pytest.fixture(scope="module")
def large(folder):
    """Enough sentences for shares; frames do not matter here."""
    return Synthetic(root=folder, sizes=(600, 1, 1), frame_size=12)


def word_accuracy(answers, items):
    right = total = 0
    for answer, item in zip(answers, items, strict=True):
        words = item.sentence.split()
        right += sum(a == b for a, b in zip(answer, words, strict=True))
        total += len(words)
    return right / total


def test_vocabulary_is_as_specified():
    assert len(VOCABULARY) == 24
    assert len(HOMONYMS) == len(UNAMBIGUOUS) == 6
    assert len(TOPICS) == 3
    asked = {word for pair in TOPICS.values() for word in pair} | set(FILLERS) | {NEGATION}
    assert len(asked) == 6 + 6 + 1
    assert not asked & VOCABULARY
    assert all(word == word.lower() for word in asked | VOCABULARY)


def test_ceilings(large):
    """Signs alone give .60 of the words, the question alone next to nothing, both give all."""
    items = large.items("train")
    rows = {sign: dict(zip(TOPICS, words, strict=True)) for sign, words in HOMONYMS.items()}
    rows |= {sign: dict.fromkeys(TOPICS, word) for sign, word in UNAMBIGUOUS.items()}
    topic_of = {word: topic for topic, pair in TOPICS.items() for word in pair}

    asked = [next(topic_of[word] for word in item.question.split() if word in topic_of) for item in items]
    assert asked == [item.topic for item in items]
    both = [[rows[sign][topic] for sign in item.signs] for item, topic in zip(items, asked, strict=True)]
    assert word_accuracy(both, items) == 1.0

    blind = [[rows[sign]["winter"] for sign in item.signs] for item in items]
    assert word_accuracy(blind, items) == pytest.approx(0.60, abs=0.03)

    unseen = [[UNAMBIGUOUS["U1"]] * len(item.signs) for item in items]
    assert word_accuracy(unseen, items) < 0.12
    share = Counter(sign in HOMONYMS for item in items for sign in item.signs)
    assert share[True] / share.total() == pytest.approx(0.6, abs=0.03)


def test_questions_are_as_specified(large):
    items = large.items("train")
    for item in items:
        words = item.question.split()
        assert len(words) == 4
        assert sum(word in TOPICS[item.topic] for word in words) == 1
        assert len(set(words) & set(FILLERS)) == 3
        assert not set(words) & set(item.sentence.split())
    assert {word for item in items for word in item.question.split()} >= set(FILLERS)
    assert {item.topic for item in items} == set(TOPICS)
    assert max(overlap(item.question, item.sentence, large.language) for item in items) == 0


def test_sentences_and_clips_are_as_specified(large):
    for item in large.items("train"):
        assert 3 <= len(item.signs) <= 5
        assert 6 * len(item.signs) <= item.num_frames <= 10 * len(item.signs)
        assert all(a != b for a, b in pairwise(item.signs))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_distractors_keep_the_topic_determinable(folder, count):
    reader = Synthetic(root=folder, sizes=(150, 1, 1), frame_size=12, distractors=count)
    topic_of = {word: topic for topic, pair in TOPICS.items() for word in pair}
    places = set()
    for item in reader.items("train"):
        words = item.question.split()
        assert len(words) == 8
        marked = [topic_of[b] for a, b in pairwise(words) if a == NEGATION]
        free = [i for i, word in enumerate(words) if word in topic_of and words[i - 1 : i] != [NEGATION]]
        assert len(marked) == count
        assert item.topic not in marked
        assert [topic_of[words[i]] for i in free] == [item.topic]
        assert not set(words) & set(item.sentence.split())
        places.add(free[0])
    assert len(places) >= 6, "the place of the word must not give the topic away"


def test_signs_can_be_told_apart():
    glyphs = draw_glyphs(0)
    assert glyphs.shape == (12, 5, 5)
    assert set(np.unique(glyphs)) == {0, 1}
    assert min(np.abs(a - b).sum() for i, a in enumerate(glyphs) for b in glyphs[:i]) >= 6
    assert not np.array_equal(glyphs, draw_glyphs(1))


@pytest.mark.parametrize("size", [12, 24, 40])
@pytest.mark.parametrize("motion", [0, 1, 2])
def test_a_glyph_moves_whole_inside_the_frame(motion, size):
    glyph = draw_glyphs(0)[3]
    for seed in range(20):
        clip = render_sign(glyph, motion, 8, size, np.random.default_rng(seed))
        assert clip.shape == (8, size, size)
        np.testing.assert_array_equal(clip.sum((1, 2)), glyph.sum())
        rows, columns = clip.any(2).argmax(1), clip.any(1).argmax(1)
        assert (np.ptp(rows) > 0) == (motion != 0)
        assert (np.ptp(columns) > 0) == (motion != 1)


def test_frames_are_grey_pictures_with_noise(world):
    item = world.items("test")[0]
    assert item.num_frames == len(list((world.home() / world.features / "test" / item.id).iterdir()))
    with Image.open(f"{item.source[0]}/images0001.png") as image:
        assert (image.mode, image.size) == ("L", (24, 24))
    clip = world.load(item, range(item.num_frames))
    assert clip.shape == (item.num_frames, 24, 24, 3)
    assert clip.dtype == np.uint8
    dark = clip[clip < 128].astype(float) / 255
    assert dark.mean() == pytest.approx(0.15, abs=0.01)
    assert dark.std() == pytest.approx(0.07, abs=0.01)


def test_which_signs_occur_says_nothing_about_the_topic(large):
    counts = {topic: Counter() for topic in TOPICS}
    for item in large.items("train"):
        counts[item.topic].update(item.signs)
    for sign in [*HOMONYMS, *UNAMBIGUOUS]:
        shares = [count[sign] / count.total() for count in counts.values()]
        assert max(shares) - min(shares) < 0.06


def test_the_world_is_the_same_wherever_it_is_written(world, tmp_path):
    again = Synthetic(root=tmp_path, sizes=(12, 6, 6))
    assert again.fingerprint() == world.fingerprint()
    for split in SPLITS:
        for ours, theirs in zip(world.items(split), again.items(split), strict=True):
            np.testing.assert_array_equal(
                world.load(ours, range(ours.num_frames)), again.load(theirs, range(theirs.num_frames))
            )


def test_options_make_other_worlds(world, folder):
    others = [
        Synthetic(root=folder, sizes=(12, 6, 6), **option)
        for option in ({"world_seed": 1}, {"noise": 0.2}, {"frame_size": 25}, {"distractors": 1})
    ]
    assert len({reader.world() for reader in [world, *others]}) == 5
    assert others[0].fingerprint() != world.fingerprint()
    assert world.fingerprint() != Synthetic(root=folder, sizes=(12, 6, 6), append_period=True).fingerprint()


def test_splits_share_no_clip(world):
    world.check()
    ids = [item.id for split in SPLITS for item in world.items(split)]
    assert len(set(ids)) == len(ids) == 24


def test_a_larger_train_split_begins_with_the_smaller_one(world, folder):
    larger = Synthetic(root=folder, sizes=(14, 6, 6))
    assert [i.sentence for i in larger.items("train")][:12] == [i.sentence for i in world.items("train")]


def test_it_is_read_by_the_plain_phoenix_reader(world):
    plain = Phoenix2014T(root=world.world())
    for split in SPLITS:
        for ours, theirs in zip(world.items(split), plain.items(split), strict=True):
            assert (ours.id, ours.sentence, ours.question) == (theirs.id, theirs.sentence, theirs.question)
    assert plain.fingerprint() == world.fingerprint()


def test_default_place_is_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path))
    assert Synthetic().world().parent == tmp_path / "slt" / "worlds"


def test_written_once_and_logged(tmp_path, caplog):
    reader = Synthetic(root=tmp_path, sizes=(1, 1, 1))
    with caplog.at_level(logging.INFO, logger="slt"):
        reader.prepare()
        reader.prepare()
    assert len([r for r in caplog.records if r.message.startswith("writing")]) == 1
    (made,) = tmp_path.iterdir()
    assert made == reader.world()
    assert json.loads((made / "truth.json").read_text())["options"] == reader.options()


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("slt.data.world._write_clip", stop)
    with pytest.raises(KeyboardInterrupt):
        Synthetic(root=tmp_path, sizes=(1, 1, 1)).prepare()
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_faster(tmp_path, monkeypatch):
    from slt.data import world as module

    reader = Synthetic(root=tmp_path, sizes=(1, 1, 1))
    write = module.write_world

    def race(target, options):
        write(target, options)
        monkeypatch.setattr(module, "write_world", write)
        Synthetic(root=tmp_path, sizes=(1, 1, 1)).prepare()

    monkeypatch.setattr(module, "write_world", race)
    reader.prepare()
    assert [path.name for path in tmp_path.iterdir()] == [reader.world().name]
    assert len(reader.items("train")) == 1


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slt.data.world._write_clip", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device.*free some space"):
        Synthetic(root=tmp_path, sizes=(1, 1, 1)).prepare()
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder with --data.root DIR"):
        Synthetic(root=tmp_path / "file", sizes=(1, 1, 1)).prepare()


def test_a_half_deleted_world_is_named(tmp_path):
    reader = Synthetic(root=tmp_path, sizes=(1, 1, 1))
    reader.prepare()
    (reader.world() / "truth.json").unlink()
    with pytest.raises(UserError, match=r"truth\.json is missing; remove the folder"):
        reader.items("train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (1, 1)}, "sizes=(1, 1); expected three numbers"),
        ({"sizes": (1, 0, 1)}, "expected three numbers of at least 1"),
        ({"frame_size": 11}, "frame_size=11; expected at least 12"),
        ({"noise": 1.5}, "noise=1.5; expected 0..1"),
        ({"noise": -0.1}, "noise=-0.1; expected 0..1"),
        ({"distractors": 4}, "distractors=4; expected 0..3"),
        ({"distractors": -1}, "distractors=-1; expected 0..3"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Synthetic(root=tmp_path, **options).items("train")
    assert list(tmp_path.iterdir()) == []
