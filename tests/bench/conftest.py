"""The command line as in tests/cli; kernels are interpreted where there is no GPU, which must be said before they are made."""

import os

import torch
from tests.cli.conftest import cli, saved  # noqa: F401

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
