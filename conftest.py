"""One intra-op thread for every test: spinning threads on a busy machine are many times slower. Must precede torch."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
