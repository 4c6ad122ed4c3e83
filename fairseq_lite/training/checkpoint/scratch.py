"""Memory for tensors that is a file: a checkpoint may be larger than the machine's memory."""

from __future__ import annotations

import mmap
import os
import tempfile
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fairseq_lite.errors import CheckpointError


class Scratch:
    """Allocates tensors in a file that has no name and goes with the last of them.

    Args:
        folder: where there is room for them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as its tensors
        except OSError as e:
            raise CheckpointError(f"{folder}: cannot be written: {e.strerror or e}") from e
        self._end = 0

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor, not filled.

        Raises:
            CheckpointError: the disk is full.
        """
        count = prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        size = count * dtype.itemsize
        page = mmap.ALLOCATIONGRANULARITY
        start = -(-self._end // page) * page
        try:
            # Reserved now: writing to memory without room behind it would end the process.
            _reserve(self._file.fileno(), start, size)
            memory = mmap.mmap(self._file.fileno(), size, offset=start)
        except OSError as e:
            raise CheckpointError(
                f"{self._folder}: no room to put tensors together: {e.strerror or e}"
            ) from e
        self._end = start + size
        return torch.frombuffer(memory, dtype=dtype).view(shape)


def _reserve(file: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, start, size)
    else:  # macOS
        os.ftruncate(file, start + size)
