"""Results that need not be made again: whole, of these settings, this checkpoint and these data."""

from __future__ import annotations

import functools
import glob
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.few_shot import model_configs, results
from examples.few_shot.files import data_root, sha256_of
from examples.few_shot.options import EvaluationOptions
from examples.few_shot.predictors.api import predictor_type
from examples.few_shot.settings import PlannedEvaluation
from examples.few_shot.tasks.api import build_task
from fairseq_lite.errors import DataError

logger = logging.getLogger(__name__)


def unfinished(planned: Sequence[PlannedEvaluation]) -> tuple[PlannedEvaluation, ...]:
    """Evaluations that are not done."""
    left = tuple(each for each in planned if not is_done(each))
    if len(left) < len(planned):
        logger.info("%d of %d evaluations are complete", len(planned) - len(left), len(planned))
    return left


def is_done(planned: PlannedEvaluation) -> bool:
    """Whether complete results are there, made with this checkpoint and these data.

    Files are read only where they have changed since the results were written. Where a checkpoint
    or a data file is gone, its results are kept.
    """
    found = results.complete(planned)
    if found is None:
        return False
    since = planned.results_file.stat().st_mtime_ns
    for what, changed in (
        (
            "another checkpoint",
            _other_model(planned, (found.get("model") or {}).get("sha256"), since),
        ),
        ("other data", _other_data(planned, found.get("data"), since)),
    ):
        if changed:
            logger.warning("%s: was made with %s; made anew", planned.results_file.name, what)
            return False
    return True


def _other_model(planned: PlannedEvaluation, digest: str | None, since: int) -> bool:
    if not predictor_type(planned.options.predictor_name).needs_model:
        return False
    config = model_configs.get_model_config(planned.model)
    path = planned.model if config is None else model_configs.path_of(config)
    changed = max((_changed(each) for name in path.split(":") for each in _near(name)), default=0)
    if changed <= since:
        return False
    now = _digest_of_model(planned.model, planned.options, changed)
    return now is not None and now != digest


@functools.lru_cache(maxsize=64)
def _digest_of_model(name: str, options: EvaluationOptions, changed: int) -> str | None:
    from examples.few_shot.models.loading import digest_of_files

    return digest_of_files(name, options)


def _near(name: str) -> list[Path]:
    """The files that a model of this name may be made of."""
    path = Path(name)
    if path.is_dir():
        return list(path.iterdir())
    return list(path.parent.glob(f"{glob.escape(path.stem)}*")) if path.parent.is_dir() else []


def _changed(path: Path) -> int:
    """When a file was written, or put where it is."""
    try:
        state = path.stat()
    except OSError:
        return 0
    return max(state.st_mtime_ns, state.st_ctime_ns)


def _other_data(planned: PlannedEvaluation, digests: object, since: int) -> bool:
    try:
        if all(_changed_within(path) <= since for path in data_files(planned).values()):
            return False
        return digests is not None and digests != data_digests(planned)
    except DataError:
        return False


def _changed_within(path: Path) -> int:
    """When a file, or one of a folder's, was written."""
    inside = path.rglob("*") if path.is_dir() else ()
    return max(map(_changed, (path, *inside)))


def data_files(planned: PlannedEvaluation) -> Mapping[str, Path]:
    """The files that samples come from, by what they are for; none is read.

    Raises:
        DataError: a file is missing.
    """
    sets = {
        "eval": (planned.eval_set, planned.language),
        "train": (planned.train_set, planned.train_lang or planned.language),
        "valid": (planned.valid_set, planned.valid_lang or planned.language),
    }
    root = data_root(planned.options.data_dir)
    found = {}
    for name, (set_name, language) in sets.items():
        if set_name is not None:
            task = build_task(planned.task, planned.task_options, language=language, data_dir=root)
            found[name], *beside = task.set_files(set_name)
            found |= {f"{name}, {each.name}": each for each in beside}
    return found


def data_digests(planned: PlannedEvaluation) -> Mapping[str, str]:
    """SHA-256 of `data_files`.

    Raises:
        DataError: a file is missing.
    """
    return {name: _digest(path) for name, path in data_files(planned).items()}


def _digest(path: Path) -> str:
    """Of a file; of a folder those of its files by name."""
    if path.is_dir():
        parts = [f"{each.name} {_digest(each)}" for each in sorted(path.iterdir())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    state = path.stat()
    return _digest_of_file(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=512)
def _digest_of_file(path: Path, size: int, modified: int) -> str:
    return sha256_of(path)
