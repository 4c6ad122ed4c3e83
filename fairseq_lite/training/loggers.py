"""How progress reaches the screen, a file and TensorBoard, in fairseq's formats.

`ProgressLogs` is made once a run. `begin` opens one pass over data (an epoch, or a validation), on
which `advance`, `log` and `summary` are called. Values come from `metrics`, in order and rounded.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from fairseq_lite.config.core import CommonConfig
from fairseq_lite.errors import ConfigError, MissingDependency

LINE_FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

Values = Mapping[str, float]
# Of each layer of experts, by name: numbers, and lists with the share of each expert.
Layers = Mapping[str, Mapping[str, Any]]


class _Dispensable(logging.Handler):
    """Where lines are written as long as that works: no training ends for want of a log."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """One line instead of a traceback for every record, and no further attempt."""
        error = sys.exc_info()[1]
        if not isinstance(error, (OSError, ValueError)):  # ValueError: the stream was closed
            super().handleError(record)
            return
        self.setLevel(logging.CRITICAL + 1)
        where = getattr(getattr(self, "stream", None), "name", "the log")
        with contextlib.suppress(OSError, ValueError):
            print(f"log lines to {where} are lost from here on: {error}", file=sys.stderr)


class _Screen(_Dispensable, logging.StreamHandler):  # type: ignore[type-arg]  # from Python 3.11
    """Standard output."""


class _File(_Dispensable, logging.FileHandler):
    """A file."""

    def close(self) -> None:
        """What could not be written before cannot be written now."""
        with contextlib.suppress(OSError):
            super().close()


def setup_logging(common: CommonConfig, *, is_main: bool = True) -> None:
    """Send log lines to standard output (and `--log-file`); other ranks only warn.

    The level is that of the environment's LOGLEVEL, INFO by default. Calling it again replaces what
    it set up before, so a test or a notebook may run two commands in one process.

    Raises:
        ConfigError: the log file cannot be opened.
    """
    level = os.environ.get("LOGLEVEL", "INFO").upper() if is_main else "WARNING"
    if level not in _LEVELS:
        raise ConfigError(f"LOGLEVEL={level}: expected one of {', '.join(_LEVELS)}")
    handlers: list[logging.Handler] = [_Screen(sys.stdout)]
    if common.log_file is not None and is_main:
        try:
            Path(common.log_file).parent.mkdir(parents=True, exist_ok=True)
            handlers.append(_File(common.log_file, encoding="utf-8", errors="backslashreplace"))
        except OSError as e:
            raise ConfigError(f"--log-file {common.log_file}: {e.strerror}") from None
    logging.basicConfig(
        level=level, format=LINE_FORMAT, datefmt=TIME_FORMAT, handlers=handlers, force=True
    )


def formatted(values: Values) -> dict[str, str]:
    """Values as text: six significant digits, no trailing zeros.

    >>> formatted({"wpb": 1749.0, "lr": 4.00081e-05, "num_updates": 1234567})
    {'wpb': '1749', 'lr': '4.00081e-05', 'num_updates': '1.23457e+06'}
    """
    return {key: f"{value:g}" for key, value in values.items()}


class Sink(ABC):
    """Where values go besides the screen."""

    @abstractmethod
    def write(self, values: Values, tag: str, step: int) -> None:
        """Record `values` under `tag` at update `step`."""

    def write_layers(self, layers: Layers, tag: str, step: int) -> None:
        """Record what is known of layers of experts: their numbers as `moe/LAYER/KEY`."""
        self.write(
            {
                f"moe/{name}/{key}": value
                for name, values in layers.items()
                for key, value in values.items()
                if not isinstance(value, list)
            },
            tag,
            step,
        )

    def close(self) -> None:  # noqa: B027 - nothing to close is the usual case
        """Finish writing."""


class TensorBoard(Sink):
    """One events folder a tag (`train_inner`, `train`, `valid`, …) below `logdir`, as fairseq's.

    Raises:
        MissingDependency: tensorboard is not installed.
        ConfigError: the folder cannot be made.
    """

    def __init__(self, logdir: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingDependency(
                "--tensorboard-logdir needs TensorBoard: pip install tensorboard"
            ) from None
        try:  # now: the first figures come after hours, perhaps
            os.makedirs(logdir, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"--tensorboard-logdir {logdir}: {e.strerror}") from None
        self._make: Any = SummaryWriter
        self._logdir = logdir
        self._writers: dict[str, Any] = {}

    def write(self, values: Values, tag: str, step: int) -> None:
        """See the base class."""
        writer = self._writer(tag)
        for key, value in values.items():
            if key != "num_updates":
                writer.add_scalar(key, value, step)
        writer.flush()

    def write_layers(self, layers: Layers, tag: str, step: int) -> None:
        """The numbers, and each list as a histogram with a bar for each expert."""
        super().write_layers(layers, tag, step)
        for name, values in layers.items():
            for key, shares in values.items():
                if isinstance(shares, list):
                    _add_bars(self._writer(tag), f"moe/{name}/{key}", shares, step)

    def _writer(self, tag: str) -> Any:
        if tag not in self._writers:
            try:
                self._writers[tag] = self._make(os.path.join(self._logdir, tag))
            except OSError as e:
                raise ConfigError(f"--tensorboard-logdir {self._logdir}: {e.strerror}") from None
            self._writers[tag].add_text("sys.argv", " ".join(sys.argv))
        return self._writers[tag]

    def close(self) -> None:
        """See the base class."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def _add_bars(writer: Any, name: str, bars: list[float], step: int) -> None:
    writer.add_histogram_raw(
        name,
        min=0,
        max=len(bars),
        num=sum(bars),
        sum=sum(i * bar for i, bar in enumerate(bars)),
        sum_squares=sum(i * i * bar for i, bar in enumerate(bars)),
        bucket_limits=[i + 1 for i in range(len(bars))],
        bucket_counts=bars,
        global_step=step,
    )


class WandB(Sink):
    """One run of Weights & Biases; keys get their tag in front, `train_inner/loss`.

    Args:
        project: `--wandb-project`.
        name: the run's name; WANDB_NAME in the environment comes first.

    Raises:
        MissingDependency: wandb is not installed.
    """

    def __init__(self, project: str, name: str) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError:
            raise MissingDependency("--wandb-project needs wandb: pip install wandb") from None
        self._run: Any = wandb.init(project=project, name=os.environ.get("WANDB_NAME", name))

    def write(self, values: Values, tag: str, step: int) -> None:
        """See the base class."""
        named = {f"{tag}/{key}": value for key, value in values.items() if key != "num_updates"}
        self._run.log(named, step=step)

    def close(self) -> None:
        """See the base class."""
        self._run.finish()


class Progress:
    """One pass over data: an epoch of training, or a validation.

    Args:
        epoch: number of the epoch, from 1; None outside training.
        size: batches (groups of them with --update-freq) in the whole pass.
        offset: how many of them were done before, when a run resumes in mid-epoch.
        title: what is said after the epoch, as in "valid on 'valid' subset".
        sinks: where values go besides.
    """

    def __init__(
        self,
        epoch: int | None,
        size: int,
        offset: int = 0,
        title: str | None = None,
        sinks: tuple[Sink, ...] = (),
    ) -> None:
        self.epoch = epoch
        self.size = size
        self.done = offset
        parts = [] if epoch is None else [f"epoch {epoch:03d}"]
        self.prefix = " | ".join(parts if title is None else [*parts, title])
        self._sinks = sinks

    def advance(self, n: int = 1) -> None:
        """`n` more batches (or groups) are done. Call it before `log`."""
        self.done += n

    def log(self, values: Values, *, tag: str, num_updates: int) -> None:
        """Report in the middle of the pass; the trainer calls it every --log-interval updates."""
        self._record(values, tag, num_updates)
        self._log(values, tag)

    def summary(self, values: Values, *, tag: str, num_updates: int) -> None:
        """Report the whole pass at its end."""
        self._record(values, tag, num_updates)
        self._summary(values, tag)

    def layers(self, layers: Layers, *, tag: str, num_updates: int) -> None:
        """Report what becomes of tokens in layers of experts; nothing where there are none.

        Call it after `log` or `summary`, with the same tag.
        """
        if layers:
            for sink in self._sinks:
                sink.write_layers(layers, tag, num_updates)
            self._layers(layers, tag, num_updates)

    def close(self) -> None:
        """The pass is over."""

    def _record(self, values: Values, tag: str, num_updates: int) -> None:
        for sink in self._sinks:
            sink.write(values, tag, num_updates)

    def _log(self, values: Values, tag: str) -> None:
        """Show values in the middle of the pass."""

    def _layers(self, layers: Layers, tag: str, num_updates: int) -> None:
        """Show layers of experts; too much for the screen in most formats."""

    def _summary(self, values: Values, tag: str) -> None:
        text = " | ".join(f"{key} {value}" for key, value in formatted(values).items())
        logging.getLogger(tag).info(f"{self.prefix} | {text}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class NoProgress(Progress):
    """--log-format none: nothing on the screen; the sinks still get everything."""

    def _summary(self, values: Values, tag: str) -> None:
        pass


class SimpleProgress(Progress):
    """--log-format simple: one line of key=value a report."""

    def _log(self, values: Values, tag: str) -> None:
        text = ", ".join(f"{key}={value}" for key, value in formatted(values).items())
        logging.getLogger(tag).info(f"{self.prefix}:  {self.done:5d} / {self.size:d} {text}")


class JsonProgress(Progress):
    """--log-format json: one object a line, `epoch` a number, values as text."""

    def _log(self, values: Values, tag: str) -> None:
        where: dict[str, Any] = {}
        if self.epoch is not None:
            update = self.epoch - 1 + self.done / self.size
            where = {"epoch": self.epoch, "update": round(update, 3)}
        logging.getLogger(tag).info(json.dumps({**where, **formatted(values)}))

    def _summary(self, values: Values, tag: str) -> None:
        where = {} if self.epoch is None else {"epoch": self.epoch}
        named = {f"{tag}_{key}": value for key, value in formatted(values).items()}
        logging.getLogger(tag).info(json.dumps({**where, **named}))

    def _layers(self, layers: Layers, tag: str, num_updates: int) -> None:
        """A line for each. The key is not num_updates, by which readers find the other lines."""
        where = {"split": tag, "epoch": self.epoch, "updates": num_updates}
        for name, values in layers.items():
            logging.getLogger("moe").info(json.dumps({**where, "layer": name, **values}))


class TqdmProgress(Progress):
    """--log-format tqdm: a bar on standard error; summaries are lines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        from tqdm import tqdm

        self._bar = tqdm(
            desc=self.prefix,
            total=self.size,
            initial=self.done,
            leave=False,
            disable=logging.getLogger(__name__).getEffectiveLevel() > logging.INFO,
        )

    def advance(self, n: int = 1) -> None:
        """See the base class."""
        super().advance(n)
        self._bar.update(n)

    def close(self) -> None:
        """See the base class."""
        self._bar.close()

    def _log(self, values: Values, tag: str) -> None:
        self._bar.set_postfix(formatted(values), refresh=False)

    def _summary(self, values: Values, tag: str) -> None:
        self._bar.clear()  # or the line would be written into the bar
        super()._summary(values, tag)


_FORMATS: Mapping[str, type[Progress]] = {
    "json": JsonProgress,
    "none": NoProgress,
    "simple": SimpleProgress,
    "tqdm": TqdmProgress,
}


def choose_format(common: CommonConfig, *, terminal: bool) -> str:
    """The log format: a bar unless asked otherwise, plain lines where there is no terminal.

    Args:
        common: `--log-format`, `--no-progress-bar`.
        terminal: whether standard error is one.
    """
    chosen = common.log_format or ("simple" if common.no_progress_bar else "tqdm")
    return "simple" if chosen == "tqdm" and not terminal else chosen


class ProgressLogs:
    """The logs of one run; ranks other than the first write nothing.

    Args:
        common: `--log-format`, `--no-progress-bar`, `--tensorboard-logdir`, `--wandb-project`.
        is_main: whether this rank writes.
        name: the name of the run in Weights & Biases.
        terminal: whether standard error is a terminal; looked up when None.
        sinks: further places for the values.
    """

    def __init__(
        self,
        common: CommonConfig,
        *,
        is_main: bool = True,
        name: str = "",
        terminal: bool | None = None,
        sinks: tuple[Sink, ...] = (),
    ) -> None:
        self._sinks = sinks
        if not is_main:
            self._kind: type[Progress] = NoProgress
            self._sinks = ()
            return
        if terminal is None:
            terminal = sys.stderr.isatty()
        self._kind = _FORMATS[choose_format(common, terminal=terminal)]
        if common.tensorboard_logdir is not None:
            self._sinks = (TensorBoard(common.tensorboard_logdir), *self._sinks)
        if common.wandb_project is not None:
            self._sinks = (WandB(common.wandb_project, name), *self._sinks)

    def begin(
        self, *, epoch: int | None, size: int, offset: int = 0, title: str | None = None
    ) -> Progress:
        """Open a pass over data; see `Progress`. Use it in a `with` statement."""
        return self._kind(epoch, size, offset, title, self._sinks)

    def begin_validation(self, subset: str, *, epoch: int | None, size: int) -> Progress:
        """Open a validation; its summary's tag is the subset's name."""
        return self.begin(epoch=epoch, size=size, title=f"valid on '{subset}' subset")

    def close(self) -> None:
        """Finish writing."""
        for sink in self._sinks:
            sink.close()
