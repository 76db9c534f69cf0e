"""One intra-op thread for every test: spinning threads on a busy machine are many times slower. Must precede torch."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest_plugins = ["polymodal.testing"]
pytest.register_assert_rewrite("polymodal.forked")  # so that its asserts say what differs
