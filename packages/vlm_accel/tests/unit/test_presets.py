"""Presets of both papers: counts they lead to; flags of the released iLLaVA code."""

import pytest
from polymodal.errors import UserError
from vlm_accel import PRESETS, Step, resolve
from vlm_accel.methods import METHODS
from vlm_accel.presets import FLAVOURS, find_preset, from_official
from vlm_accel.schedule import expand


def counts(name, tokens, group=1, depths=(27, 28)):
    vision, llm = expand(find_preset(name).schedule, *depths)
    found = resolve(vision, tokens, group)
    return found, resolve(llm, found[-1] if found else tokens)


def test_counts_that_were_published():
    assert counts("ov_image", 729) == ([637, 545, 453, 361], [253])
    assert counts("ov_video", 729)[0][-1] == 361
    assert counts("ov_vis", 729) == ([649, 569, 489, 409, 329, 249, 169], [85])
    vision, llm = counts("qwen3vl_8b", 1296, 4, (27, 36))
    assert vision == [1100, 932, 792, 672]
    assert len(llm) == 4
    assert counts("qwen2vl_7b", 1024, 4, (32, 28))[1][-1] < counts("qwen2vl_2b", 1024, 4, (32, 28))[0][-1]
    assert counts("qwen2vl_2b", 1024, 4, (32, 28)) == ([864, 728, 612, 516], [])
    assert counts("keep35", 1024) == ([], [722, 509, 359])
    assert counts("keep3", 1024) == ([], [318, 99, 31])


def test_where_and_with_what():
    assert [step.layer for step in PRESETS["ov_video"].schedule] == [3, 4, 5, 6, 2]
    assert [step.layer for step in PRESETS["ov_vis_video"].schedule] == [2, 3, 4, 5, 6, 7, 8, 2]
    assert PRESETS["keep35"].kv is None
    assert PRESETS["keep3"].kv.entries([1000] * 2) == [500, 500]
    assert PRESETS["long"].kv.entries([4000] * 2) == [512, 512]
    for preset in PRESETS.values():
        assert preset.method in METHODS.names()
        assert preset.source


def test_unknown_preset():
    with pytest.raises(UserError, match="did you mean keep35"):
        find_preset("keep_35")


OV = {"illava_vit_k": "5-6-7-8", "illava_vit_r": 92, "illava_llm_k": 8, "illava_llm_r": 0.70}


def test_flags_of_each_flavour():
    assert from_official(OV, "onevision_2025") == list(PRESETS["ov_image"].schedule)
    qwen2 = {
        "enable_illava_vit": True, "illava_vit_k": "12-13-14-15", "illava_vit_r": "0.16", "enable_illava_llm": "True",
        "illava_llm_k": "6-7-8", "illava_llm_r": "0.90",
    }  # fmt: skip
    assert from_official(qwen2, "qwen2vl_2025") == list(PRESETS["qwen2vl_7b"].schedule)
    assert from_official({**qwen2, "enable_illava_llm": False}, "qwen2vl_2025") == list(PRESETS["qwen2vl_2b"].schedule)
    text = "illava_vit_k=5-6-7-8,illava_vit_r=0.85, illava_llm_k=19-21-23-25,illava_llm_r=0.90"
    assert from_official(text, "qwen3vl_2026") == list(PRESETS["qwen3vl_8b"].schedule)


def test_amounts_a_layer_and_counts_removed():
    found = from_official("illava_vit_k=3-4,illava_vit_r=92-80,illava_llm_k=2-5,illava_llm_r=100", "onevision_2025")
    assert found == [
        Step("vision", 3, drop=92), Step("vision", 4, drop=80), Step("llm", 2, drop=100), Step("llm", 5, drop=100),
    ]  # fmt: skip
    assert from_official({}, "onevision_2025") == []


@pytest.mark.parametrize(
    ("flags", "flavour", "message"),
    [
        (OV, "onevision_2024", "known: onevision_2025"),
        ({"illava_vit_x": 1}, "onevision_2025", "illava_vit_k"),
        ({"illava_vit_k": "5"}, "onevision_2025", "belong together"),
        ({"illava_llm_r": "0.5"}, "onevision_2025", "belong together"),
        ({"illava_vit_k": "5-6", "illava_vit_r": "1-2-3"}, "onevision_2025", "as many"),
        ({"illava_vit_k": "5-x", "illava_vit_r": "1"}, "onevision_2025", "numbers joined by -"),
        ({"illava_vit_k": "5", "illava_vit_r": "0.5"}, "onevision_2025", "no whole number"),
        ({"illava_vit_k": "5.5", "illava_vit_r": "9"}, "onevision_2025", "no whole number"),
        ({"illava_vit_k": "5", "illava_vit_r": "inf"}, "onevision_2025", "no whole number"),
        ({"illava_vit_k": "5", "illava_vit_r": "1.5"}, "qwen3vl_2026", "expected a share kept"),
        ("illava_vit_k", "onevision_2025", "has no value"),
    ],
)
def test_bad_flags_are_one_line(flags, flavour, message):
    with pytest.raises(UserError, match=message) as caught:
        from_official(flags, flavour)
    assert "\n" not in str(caught.value)


def test_flavours_name_amounts_of_steps():
    for kind in FLAVOURS.values():
        assert hasattr(Step("vision", 1, keep=1), kind)
