"""The leak validator: what counts as content, the 30 % rule at its edge, the report."""

from pathlib import Path

import pytest
from polymodal.errors import UserError
from slt.data.leak import check_leaks, content_tokens, format_reports, leak_report, overlap
from slt.data.questions import Question


def test_content_tokens_per_language():
    assert content_tokens("Am Tag ist es , heiter !", "de_DE") == {"tag", "heiter"}
    assert content_tokens("the well-known dog isn't there.", "en") == {"well-known", "dog", "isn't"}
    assert content_tokens("我的书在哪？", "zh_CN") == {"书"}
    assert content_tokens("le chat, le chien", "fr") == {"le", "chat", "chien"}


def test_stop_words_alone_still_count():
    assert content_tokens("was ist das", "de") == {"was", "ist", "das"}
    assert overlap("was ist das ?", "was ist das", "de") == 1.0


def test_overlap_is_the_share_of_the_sentence():
    sentence = "morgen regnet nebelt stürmt schneit friert taut blitzt donnert hagelt"  # ten content words
    assert overlap("morgen regnet nebelt ?", sentence, "de") == pytest.approx(0.3)
    assert overlap("", sentence, "de") == 0.0
    assert overlap("hagelt hagelt hagelt", sentence, "de") == pytest.approx(0.1)
    assert overlap("天气好吗？", "天气很好", "zh") == 1.0


def rows():
    ten = "morgen regnet nebelt stürmt schneit friert taut blitzt donnert hagelt"
    return [
        Question("edge", "morgen regnet nebelt ?", ten, line=2),
        Question("leak", "morgen regnet nebelt stürmt ?", ten, line=3),
        Question("copy", "Guten Abend, Wien ?", "guten abend wien", line=4),
        Question("none", "", ten, line=5),
        Question("same", "morgen regnet nebelt ?", "ganz anderes hier", line=6),
    ]


def test_report_counts_and_the_edge_passes():
    report = leak_report("dev", rows(), "de")
    assert (report.clips, report.empty, report.copies) == (5, 1, 1)
    assert [q.video_id for q, _ in report.rejected] == ["leak", "copy"]
    assert report.copy_rate == pytest.approx(1 / 4)
    assert report.mean_overlap == pytest.approx((0.3 + 0.4 + 1.0 + 0.0) / 4)
    assert report.shared == 2  # edge and same ask the same and have different answers
    table = format_reports([report])
    assert "| dev | 5 | 1 | 42.5 % | 2 (> 30 %) | 1 (25.0 %) | 2 |" in table


def test_check_names_file_line_words_and_remedy():
    with pytest.raises(UserError) as caught:
        check_leaks(Path("q/dev.jsonl"), leak_report("dev", rows(), "de"))
    message = str(caught.value)
    for part in ("q/dev.jsonl:3:", "'leak'", "40 %", "stürmt", "2 of 5", "--allow_leaks"):
        assert part in message
    check_leaks(Path("x"), leak_report("dev", rows()[:1], "de"))  # a clean split passes


def test_threshold_range():
    with pytest.raises(UserError, match=r"threshold=1\.5"):
        leak_report("dev", [], "de", threshold=1.5)
    assert leak_report("dev", [], "de").mean_overlap == 0.0
