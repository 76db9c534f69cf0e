"""The ledger: on the disk first, joined by ids, never forgetting, closed where something is wrong."""

from __future__ import annotations

import json

import pytest
from fedcore.privacy import Event, Ledger
from polymodal.errors import UserError


def event(round=0, **options):
    return Event(round, "poisson", 0.1, 1.0, 0.5, 100, 10, **options)


def filled(path, count=3):
    ledger = Ledger(path)
    for round in range(count):
        ledger.append(event(round))
    return ledger


def test_events_come_back_from_the_file(tmp_path):
    path = tmp_path / "deep" / "ledger.jsonl"
    ledger = filled(path)
    ledger.append(event(3, reasons=("a", "b")))
    again = Ledger(path)
    assert again.events == ledger.events
    assert len({e.id for e in again.events}) == 4


def test_an_event_is_on_the_disk_before_append_returns(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    ledger, synced = filled(path, 0), []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(path.read_bytes()))
    ledger.append(event())
    assert ledger.events[0].id.encode() in synced[-1]


def test_nothing_is_added_that_could_not_be_written(tmp_path, monkeypatch):
    ledger = filled(tmp_path / "ledger.jsonl")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        ledger.append(event())
    assert len(ledger) == 3
    monkeypatch.undo()
    with pytest.raises(UserError, match="another process"):  # half a line may be there: closed from now on
        ledger.append(event())


def test_another_writer_is_noticed(tmp_path):
    ledger = filled(tmp_path / "ledger.jsonl")
    filled(tmp_path / "ledger.jsonl", 1)
    with pytest.raises(UserError, match="another process"):
        ledger.append(event())


def test_ledgers_are_joined_whichever_knows_more(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = filled(path, 5)
    older = Ledger.events_of({**ledger.to_dict(), "events": ledger.to_dict()["events"][:2]})
    resumed = Ledger(path)
    resumed.merge(older)
    assert resumed.events == ledger.events
    # The file is gone: the checkpoint's events are written again.
    path.unlink()
    fresh = Ledger(path)
    fresh.merge(older)
    assert Ledger(path).events == older
    # Known before the file is opened.
    late = Ledger()
    late.append(event(9))
    late.open(path)
    assert [e.round for e in late.events] == [0, 1, 9]
    assert Ledger(path).events == late.events


def test_plain_values_survive_json():
    ledger = filled(None)
    assert Ledger.events_of(json.loads(json.dumps(ledger.to_dict()))) == ledger.events


def test_a_line_that_was_cut_off_was_never_released(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    again = Ledger(path)
    assert again.events == ledger.events[:2]
    again.append(event(7))
    assert [e.round for e in Ledger(path).events] == [0, 1, 7]
    path.write_bytes(b'{"schema": "fedcore.pri')
    assert Ledger(path).events == []


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:1], "{not json", *lines[1:]],
        lambda lines: [lines[0], lines[1].replace('"noise_multiplier": 1.0', '"noise_multiplier": -1.0'), lines[2]],
        lambda lines: [lines[0], lines[1].replace('"noise_multiplier": 1.0', '"noise_multiplier": NaN'), lines[2]],
        lambda lines: [lines[0], lines[1].replace('"poisson"', '"perhaps"'), lines[2]],
        lambda lines: [lines[0], lines[1].replace('"clip": 0.5, ', ""), lines[2]],
        lambda lines: [lines[0], "[]", lines[2]],
        lambda lines: lines[1:],
        lambda lines: [lines[0].replace('"schema_version": 1', '"schema_version": 2'), *lines[1:]],
        lambda lines: [lines[0].replace("privacy_ledger", "something"), *lines[1:]],
    ],
)
def test_damaged_and_newer_files_are_refused_in_one_line(tmp_path, change):
    path = tmp_path / "ledger.jsonl"
    filled(path, 2)
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(UserError, match="ledger") as caught:
        Ledger(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_ledger(tmp_path):
    with pytest.raises(UserError, match="ledger"):
        Ledger(tmp_path)


@pytest.mark.parametrize(
    "saved",
    [{}, {"schema": "fedcore.privacy_ledger", "schema_version": 9}, {"schema": "fedcore.privacy_ledger"}, [1], None],
)
def test_damaged_checkpoints_are_refused(saved):
    with pytest.raises(UserError, match="ledger"):
        Ledger.events_of(saved)


def test_a_checkpoint_with_a_broken_event_is_refused():
    saved = filled(None).to_dict()
    del saved["events"][1]["clip"]
    with pytest.raises(UserError, match="damaged"):
        Ledger.events_of(saved)
