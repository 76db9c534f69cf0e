"""Lets the tests import ``vlm_tiny`` (tiny random models of every family) and keeps small models on one thread."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
