"""Which labels are one region a class."""

import numpy as np
import pytest
from css.memory.components import admissible


def label(*rows):
    return np.array([[int(c) for c in row.replace("x", "9")] for row in rows], np.uint8)


@pytest.mark.parametrize(
    ("rows", "four", "eight"),
    [
        (["000", "000"], True, True),
        (["110", "010", "000"], True, True),
        (["101", "101"], False, False),
        (["10", "01"], False, True),
        (["12", "21"], False, True),
        (["122", "112", "002"], True, True),
        (["111", "101", "111"], True, True),
        (["1110", "1010", "0001"], False, True),
    ],
)
def test_regions(rows, four, eight):
    assert admissible(label(*rows)) is four
    assert admissible(label(*rows), 8) is eight


def test_the_second_class_counts_as_much_as_the_first():
    assert not admissible(label("1102", "1100", "0002"))
    assert admissible(label("1102", "1102", "0002"))


def test_background_and_ignored_pixels_may_lie_in_pieces():
    found = label("0110", "0110", "1000")
    assert not admissible(found)
    found[2, 0] = 255
    found[0, 0] = 255
    assert admissible(found)


def test_ids_up_to_254():
    found = np.zeros((4, 4), np.uint8)
    found[0, 0] = found[3, 3] = 254
    assert not admissible(found)
    found[3, 3] = 0
    assert admissible(found)


def test_other_connectivities_are_refused():
    with pytest.raises(ValueError, match="connectivity=6; expected 4 or 8"):
        admissible(label("10"), 6)
