"""Results that need not be made again: whole, of these settings, this checkpoint and these data."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.few_shot import results
from examples.few_shot.files import data_root
from examples.few_shot.options import EvaluationOptions
from examples.few_shot.predictors.api import predictor_type
from examples.few_shot.settings import PlannedEvaluation
from examples.few_shot.tasks.api import build_task
from fairseq_lite.errors import DataError

logger = logging.getLogger(__name__)


def unfinished(
    planned: Sequence[PlannedEvaluation], options: EvaluationOptions
) -> tuple[PlannedEvaluation, ...]:
    """Evaluations of one model that have no complete results, or results of other files.

    Where a checkpoint or a data file is gone, its results are kept.
    """
    model = None
    there = [each for each in planned if results.is_complete(each)]
    if there and predictor_type(options.predictor_name).needs_model:
        from examples.few_shot.models.loading import digest_of_files

        model = digest_of_files(planned[0].model, options)
    done = {each.results_file for each in there if _is_of_these_files(each, model)}
    if done:
        logger.info("%d of %d evaluations are complete", len(done), len(planned))
    return tuple(each for each in planned if each.results_file not in done)


def _is_of_these_files(planned: PlannedEvaluation, model: str | None) -> bool:
    found = results.read_results(planned.results_file)
    if model not in (None, found["model"].get("sha256")):
        logger.warning("%s: was made with another checkpoint; made anew", planned.results_file.name)
        return False
    try:
        data = data_digests(planned)
    except DataError:
        return True
    if found.get("data", data) != data:
        logger.warning("%s: was made with other data; made anew", planned.results_file.name)
        return False
    return True


def data_digests(planned: PlannedEvaluation) -> Mapping[str, str]:
    """SHA-256 of the files that samples come from, by what they are for.

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
            found[name] = _digest(task.path(set_name))
    return found


def _digest(path: Path) -> str:
    """Of a file; of a folder those of its files by name."""
    if path.is_dir():
        parts = [f"{each.name} {_digest(each)}" for each in sorted(path.iterdir())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
    state = path.stat()
    return _digest_of_file(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _digest_of_file(path: Path, size: int, modified: int) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
