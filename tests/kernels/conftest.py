"""Kernels run on a GPU where there is one, else in Triton's interpreter, which must be asked for before they are decorated."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
