"""Shared by all tests: one thread, so that results do not depend on the machine's load."""

from __future__ import annotations

import os

import torch

# Before any work: the processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
