"""What a task is: files and how a row of them becomes a sample.

A task is one class in one file of this folder (or of a `--user-dir`):

    @TASKS.register("mytask")
    class MyTask(FewShotTask):
        "What it asks; where its public files come from."
        sets = {"train": "mytask/train.jsonl", "val": "mytask/val.jsonl"}
        train_set, eval_set = "train", "val"
        template = "mytask"

        def sample(self, row, where):
            return choice(row, (row["right"], row["wrong"]), 0, where)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from examples.few_shot import files
from examples.few_shot.samples import FewShotSample
from fairseq_lite.errors import ConfigError, DataError
from fairseq_lite.registry import NoConfig, Registry, near

TASKS = Registry("few-shot task", "--tasks")

# Names of several tasks, for `--tasks`: filled beside the tasks that belong together.
GROUPS: dict[str, tuple[str, ...]] = {}

Kind = Literal["choice", "generation", "ranking", "perplexity"]
Paths = str | tuple[str, ...]


NO_CONFIG = NoConfig()


class FewShotTask(ABC):
    """Samples of one task.

    Class attributes say what it is; an object is the task in one language, with one data folder.

    Attributes:
        sets: set name -> its file below the data folder, or several where it may be called
            differently (the first that is there counts); `{lang}` stands for the language.
        train_set: where shots come from by default; None: it takes no shots.
        eval_set: what is evaluated by default; None: the user names a file.
        languages: those it has, if it has several.
        default_languages: those that are evaluated by default; None: all.
        template: the template by default.
        metrics: names of its metrics, the preferred one first; see `metrics/api.py`.
        kind: "choice" scores candidates, "generation" writes answers, "ranking" ranks one word of
            the vocabulary, "perplexity" scores running text.
        max_shots: the most shots; None: no limit.
        max_new_tokens: how long a written answer may be.
        stop: what ends a written answer.
        description: what is said in front of the shots, where the template says nothing.

    Args:
        cfg: the values of its own options.
        language: one of `languages`; None for a task in one.
        data_dir: the folder of all tasks' files.
    """

    name: str = ""
    sets: ClassVar[Mapping[str, Paths]] = {}
    train_set: ClassVar[str | None] = None
    eval_set: ClassVar[str | None] = "val"
    languages: ClassVar[tuple[str, ...]] = ()
    default_languages: ClassVar[tuple[str, ...] | None] = None
    template: ClassVar[str] = ""
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    kind: ClassVar[Kind] = "choice"
    max_shots: ClassVar[int | None] = None
    max_new_tokens: ClassVar[int] = 20
    stop: ClassVar[tuple[str, ...]] = ("\n",)
    description: ClassVar[str] = ""

    def __init__(self, cfg: Any = NO_CONFIG, *, language: str | None = None,
                 data_dir: Path = files.DEFAULT_DATA_DIR) -> None:  # fmt: skip
        self.cfg = cfg
        self.language = language
        self.data_dir = data_dir
        self._samples: dict[str, tuple[FewShotSample, ...]] = {}

    @abstractmethod
    def sample(self, row: dict[str, Any], where: str) -> FewShotSample | None:
        """A row of a file as a sample; None leaves the row out.

        Args:
            row: its fields.
            where: file and line.
        """

    def rows(self, path: Path) -> Iterable[files.Row]:
        """The rows of a file; JSON lines, TSV and CSV are told by its name."""
        return files.read_rows(path)

    def read(self, path: Path) -> Iterator[FewShotSample]:
        """The samples of a file, in its order; a task that joins rows overrides this."""
        for row, where in self.rows(path):
            try:
                found = self.sample(row, where)
            except (AttributeError, KeyError, IndexError, TypeError, ValueError) as e:
                reason = f"has no field {e}" if isinstance(e, KeyError) else str(e)
                raise DataError(f"{where}: is no row of {self.name}: {reason}") from None
            if found is not None:
                yield found

    def samples(self, set_name: str) -> tuple[FewShotSample, ...]:
        """All samples of a set: one of `sets`, or a file. They are kept as long as the task is.

        Raises:
            ConfigError: neither.
            DataError: its file is missing, damaged or empty.
        """
        if set_name not in self._samples:
            path = self.path(set_name)
            found = tuple(self.read(path))
            if not found:
                raise DataError(f"task {self.name}: {path} has no sample")
            self._samples[set_name] = found
        return self._samples[set_name]

    def set_files(self, set_name: str) -> tuple[Path, ...]:
        """All files, or folders, that the samples of a set are made of; nothing is read.

        Raises:
            ConfigError: no such set.
            DataError: one of them is missing.
        """
        path = self.path(set_name)
        beside = tuple(self.beside(path))
        for each in beside:
            if not each.exists():
                raise DataError(f"task {self.name}: {each} is missing, which {path.name} needs")
        return (path, *beside)

    def beside(self, path: Path) -> Iterable[Path]:
        """Other files that the samples of a file are made of; a task with such overrides this."""
        return ()

    def path(self, set_name: str) -> Path:
        """The file of a set; see `samples`."""
        if set_name in self.sets:
            names = self.sets[set_name]
            names = (names,) if isinstance(names, str) else names
            filled = tuple(name.replace("{lang}", self.language or "") for name in names)
            return files.existing(self.name, self.data_dir, filled)
        if Path(set_name).is_file():
            return Path(set_name)
        raise ConfigError(
            f"task {self.name}: no set and no file {set_name!r}; its sets are"
            f" {', '.join(self.sets) or 'none'}"
        )


def task_type(name: str) -> type[FewShotTask]:
    """The class of a task: what can be asked without its data.

    Raises:
        ConfigError: unknown.
    """
    found: Any = TASKS.get(name).factory
    return found  # type: ignore[no-any-return]


def task_names(words: Iterable[str]) -> list[str]:
    """Names and groups as names, each once, in order.

    Raises:
        ConfigError: neither a task nor a group.
    """
    found: dict[str, None] = {}
    for word in words:
        if word in GROUPS:
            found.update(dict.fromkeys(GROUPS[word]))
        elif word in TASKS:
            found[word] = None
        else:
            hint = near(word, [*TASKS.names(), *GROUPS])
            raise ConfigError(
                f"--tasks {word}: no such task or group{hint or ''}; groups are"
                f" {', '.join(sorted(GROUPS))}; --list-tasks prints all"
            )
    return list(found)


def build_task(
    name: str, cfg: Any, *, language: str | None = None, data_dir: Path | None = None
) -> FewShotTask:
    """A task that is registered.

    Raises:
        ConfigError: unknown, or not in this language.
    """
    entry = TASKS.get(name)
    task: FewShotTask = entry.factory(
        cfg, language=language, data_dir=data_dir or files.data_root(None)
    )
    task.name = name
    if task.languages and language not in task.languages:
        raise ConfigError(
            f"task {name}: no language {language!r}; it has {', '.join(task.languages)}"
        )
    return task
