"""One intra-op thread for every test: spinning threads on a busy machine are many times slower. Must precede torch."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("polymodal.testing", "polymodal.forked")  # say what differs
