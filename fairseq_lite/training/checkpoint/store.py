"""One file in, one file out: atomic writes, safe reads.

A write goes to `NAME.tmp` in the same folder, is flushed to the disk and renamed over NAME, and
the folder is flushed too. Whatever ends the process or fills the disk on the way, the previous
NAME is still whole.

A read uses torch's `weights_only` unpickler, always; what real fairseq files need beyond that goes
through `legacy`'s list of inert stand-ins.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from fairseq_lite.errors import CheckpointError
from fairseq_lite.training.checkpoint import legacy

TEMPORARY = ".tmp"
_CHUNK = 1 << 22
_CUT_SHORT = "{}: is cut short (an unfinished copy or download?)"


class _Recorder:
    """A binary file that remembers its first OSError, which torch's writer hides."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.cause: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as e:
            self.cause = self.cause or e
            raise

    def flush(self) -> None:
        self._file.flush()


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file; its folder must exist.
        state: tensors and plain values; numpy numbers, paths and sets are turned into plain ones.

    Raises:
        CheckpointError: the file could not be written; the previous one of that name is untouched.
        ValueError: the state holds something else: a bug, as such a file could not be read safely.
    """
    save_temporary(path, state)
    try:
        commit(path)
    except CheckpointError:
        discard(path)
        raise


def save_temporary(path: str | Path, state: Mapping[str, Any]) -> None:
    """The first half of `save`: all is written and flushed, under the temporary name."""
    values = to_cpu(legacy.plain(state))
    with _temporary(Path(path)) as file:
        recorder = _Recorder(file)
        try:
            torch.save(values, recorder)  # type: ignore[arg-type]
        except Exception:
            if recorder.cause is not None:
                raise recorder.cause from None
            raise


def copy_temporary(source: str | Path, target: str | Path) -> None:
    """The first half of making `target` a byte-identical copy of `source`.

    A real copy, as fairseq makes: with a hard link a tool that rewrites `checkpoint_best.pt` in
    place would change every other name of the same file too.

    Raises:
        CheckpointError: it could not be written; the previous `target` is untouched.
    """
    with open(source, "rb") as original, _temporary(Path(target)) as file:
        shutil.copyfileobj(original, file, _CHUNK)


def commit(path: str | Path) -> None:
    """The second half of `save`: the temporary file takes its name.

    Raises:
        CheckpointError: it could not; the previous file of that name is untouched.
    """
    path = Path(path)
    try:
        os.replace(temporary(path), path)
        _flush_folder(path.parent)
    except OSError as e:
        raise CheckpointError(_cannot_write(path, e)) from e


def discard(path: str | Path) -> None:
    """Remove the temporary file, if there is one."""
    with contextlib.suppress(OSError):
        temporary(path).unlink()


def temporary(path: str | Path) -> Path:
    """The temporary name of a file."""
    path = Path(path)
    return path.with_name(path.name + TEMPORARY)


def save_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with _replacing(Path(path)) as file:
        file.write(text.encode("utf-8"))


def save_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes atomically."""
    with _replacing(Path(path)) as file:
        file.write(data)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` when the block ends well, and leaves no trace otherwise."""
    with _temporary(path) as file:
        yield file
    try:
        commit(path)
    except CheckpointError:
        discard(path)
        raise


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[BinaryIO]:
    """The temporary file of `path`: flushed to the disk when the block ends well, else removed."""
    try:
        with open(temporary(path), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as e:
        discard(path)
        if isinstance(e, OSError):
            raise CheckpointError(_cannot_write(path, e)) from e
        raise


def _cannot_write(path: Path, error: OSError) -> str:
    why = error.strerror or str(error)
    advice = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "; free some space, or keep fewer (--keep-last-epochs, --no-epoch-checkpoints)"
    elif error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        advice = "; choose another --save-dir"
    kept = "; the previous file of this name is intact" if path.exists() else ""
    return f"{path}: cannot be written: {why}{kept}{advice}"


def _flush_folder(folder: Path) -> None:
    # A rename is only sure to survive a power cut once the folder's entry is on the disk.
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a system whose folders cannot be opened
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(folder: str | Path) -> None:
    """Make a folder and try to write in it, so that a wrong one is known before training starts.

    Raises:
        CheckpointError: it cannot be made or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as e:
        raise CheckpointError(
            f"--save-dir {folder}: checkpoints cannot be written there: {e.strerror or e}; "
            "choose another folder, or --no-save"
        ) from e


def remove_temporaries(folder: str | Path) -> None:
    """Remove what a killed run left half written."""
    for path in Path(folder).glob(f"*.pt{TEMPORARY}"):
        with contextlib.suppress(OSError):
            path.unlink()


def load(path: str | Path, *, verify: bool = True, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint: ours, or a real one of fairseq's. Tensors come back on the CPU.

    Args:
        path: the file.
        verify: compare every stored part with its checksum first, so that a damaged file is never
            trained on.
        mapped: leave the tensors in the file; what is used of them is read then. Not to be kept for
            longer than the file is sure to stay as it is.

    Returns:
        The stored mapping; tensors, and plain Python values for everything else.

    Raises:
        CheckpointError: no such file; cut short or damaged; it names something that is not a plain
            value; or it is not a checkpoint.
    """
    path = Path(path)
    with _reading(path):
        if verify:
            _verify(path)
        in_place = mapped and zipfile.is_zipfile(path)  # what torch wrote before 1.6 cannot be
        with torch.serialization.safe_globals(legacy.allow_list(legacy.names_in(path), path)):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=in_place)
        return _as_mapping(path, state)


def check(path: str | Path) -> None:
    """Compare a file with its checksums, in little memory.

    Raises:
        CheckpointError: no such file; cut short or damaged.
    """
    path = Path(path)
    with _reading(path):
        _verify(path)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say in one line why a checkpoint could not be read."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        yield
    except CheckpointError:
        raise
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from e
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"{path}: not loaded: {_first_line(e)}") from e
    except MemoryError as e:
        raise CheckpointError(f"{path}: not enough memory to load it") from e
    # Whatever a damaged file makes torch's reader trip over, the user's answer is the same.
    except Exception as e:
        if _is_cut_short(path):
            raise CheckpointError(_CUT_SHORT.format(path)) from e
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint: it is cut short, damaged or another kind "
            f"of file ({_first_line(e)})"
        ) from e


def _is_cut_short(path: Path) -> bool:
    """Whether a file begins as an archive and lacks the directory at its end."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(file)


def _as_mapping(path: Path, state: Any) -> dict[str, Any]:
    try:
        state = legacy.plain(state)
    except ValueError as e:
        raise CheckpointError(f"{path}: not loaded: it holds {e}") from e
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: holds a {type(state).__name__}; expected a checkpoint's mapping"
        )
    return cast("dict[str, Any]", state)


def _verify(path: Path) -> None:
    """Compare the checksum of every part; torch's own reader does not."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            if _is_cut_short(path):
                raise CheckpointError(_CUT_SHORT.format(path))
            return  # the format before torch 1.6 has no checksums
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                with archive.open(member) as part:
                    while part.read(_CHUNK):
                        pass


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # torch's message first recommends loading without safety; the cause stands after a mark.
    for i, line in enumerate(lines):
        _, mark, rest = line.partition("WeightsUnpickler error:")
        if mark:
            cause = rest.strip() or (lines[i + 1] if i + 1 < len(lines) else "")
            return cause.partition("Please use")[0].strip()[:200]
    return lines[0][:200]


def to_cpu(value: Any) -> Any:
    """The same values with every tensor on the CPU, detached; storages stay shared."""
    return _ToCpu(copy=False).move(value)


def snapshot(value: Any) -> Any:
    """A copy of every tensor on the CPU, so that training may go on while the copy is written."""
    return _ToCpu(copy=True).move(value)


class _ToCpu:
    """One move; tensors that share storage before (tied embeddings) share it afterwards."""

    def __init__(self, copy: bool) -> None:
        self._copy = copy
        self._storages: dict[tuple[torch.device, int], torch.UntypedStorage] = {}
        self._views: dict[tuple[object, ...], torch.Tensor] = {}

    def move(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value.detach())
        if isinstance(value, dict):
            return type(value)((k, self.move(v)) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return type(value)(self.move(v) for v in value)
        return value

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "cpu" and not self._copy and _fills_storage(tensor):
            return tensor
        if not _fills_storage(tensor):
            # A view of something larger: saving it would write the whole storage.
            if not tensor.numel():
                return torch.empty(tensor.shape, dtype=tensor.dtype)
            where = (tensor.device, tensor.data_ptr(), tensor.dtype)
            view = (*where, tensor.size(), tensor.stride())
            if view not in self._views:
                self._views[view] = tensor.to("cpu", copy=True).contiguous()
            return self._views[view]
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        if key not in self._storages:
            moved = storage.cpu()  # type: ignore[no-untyped-call]
            self._storages[key] = moved.clone() if moved.data_ptr() == storage.data_ptr() else moved
        result = torch.empty(0, dtype=tensor.dtype)
        return result.set_(self._storages[key], 0, tensor.size(), tensor.stride())


def _fills_storage(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
