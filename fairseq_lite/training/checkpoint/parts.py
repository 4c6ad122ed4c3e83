"""The files of one checkpoint, and the state each of them holds.

A checkpoint is one file, or one a part: what a backend calls the main part is `checkpoint_last.pt`
itself, a part called `shard0` is `checkpoint_last-shard0.pt`. Every file but those of experts
carries the whole header (configuration, counters) and says what the run was.

Parts of a checkpoint appear together: each rank writes temporary files, and when all have, all
rename theirs. Where a run was killed between two renamings, the files under temporary names make
the set complete, and are read as if they had their names already.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.api import MAIN_PART, Part, PartReader
from fairseq_lite.parallel.shards import pieces, sets
from fairseq_lite.parallel.shards.flat_shards import FLAT
from fairseq_lite.parallel.shards.gshard import RANKS
from fairseq_lite.parallel.shards.sets import shard_number
from fairseq_lite.parallel.shards.stored import Allocate
from fairseq_lite.training.checkpoint import store

# The one key of ours in a checkpoint; fairseq's loader passes over it.
OWN_KEY = "fairseq_lite"

# fairseq's keys in `extra_state`: the moving average of the weights, and its float32 form with
# --ema-fp32, where the first one is half precision.
AVERAGE_KEY = "ema"
WIDE_AVERAGE_KEY = "ema_fp32_params"


# Where fairseq's shards, and metaseq's, say what lies in them.
_FLAT_KEYS = ("fsdp_metadata", "shard_metadata")

State = dict[str, Any]

# A save's name and the parts it has; None for a file that is not whole.
_Mark = tuple[str, tuple[str, ...]] | None

# Keys of a part's file that say nothing of the whole.
_OF_PARTS = (*_FLAT_KEYS, "last_optimizer_state")

# A part's name, at the end of its file's name.
_PART = rf"-(?P<part>{sets.PATTERN})"


def part_path(path: Path, part: str) -> Path:
    """The file of a part of the checkpoint called `path`."""
    return path if part == MAIN_PART else path.with_name(f"{path.stem}-{part}{path.suffix}")


def whole_name(path: str | Path) -> Path:
    """The checkpoint that a part belongs to: `a.pt` for `a-shard0.pt`, and for `a.pt`."""
    path = Path(path)
    return path.with_name(re.sub(rf"{_PART}$", "", path.stem) + path.suffix)


def whole_names(names: Iterable[str]) -> list[str]:
    """The checkpoints that a folder's files belong to, each once."""
    return list(dict.fromkeys(str(whole_name(name)) for name in names))


def part_files(path: Path, ending: str = "") -> dict[str, Path]:
    """The parts of a checkpoint that exist, by name, sorted by kind and number.

    Args:
        path: the checkpoint's name.
        ending: what follows the names of the files.
    """
    main = path.with_name(path.name + ending)
    found = {MAIN_PART: main} if main.is_file() else {}
    pattern = re.compile(re.escape(path.stem) + _PART + re.escape(path.suffix + ending))
    if path.parent.is_dir():
        for match in filter(None, (pattern.fullmatch(p.name) for p in path.parent.iterdir())):
            found[match.group("part")] = path.with_name(match.group(0))
    return dict(sorted(found.items(), key=lambda item: sets.order(item[0])))


def readable_files(path: Path) -> dict[str, Path]:
    """As `part_files`, of one save; where only temporary files make its parts complete, they count.

    The checkpoint's own file comes before its parts, and parts that need no temporary files before
    those that do.

    Args:
        path: the checkpoint's name, or that of one of its parts.
    """
    whole = whole_name(path)
    if whole != path and _stands_alone(path):
        return {MAIN_PART: path}
    final, waiting = part_files(whole), part_files(whole, store.TEMPORARY)
    if whole != path:  # a part is named: the parts are meant
        final.pop(MAIN_PART, None)
    if MAIN_PART in final:
        return {MAIN_PART: final[MAIN_PART]}
    waiting.pop(MAIN_PART, None)
    sharded = {shard_number(name) is not None for name in final}
    if not waiting and len(sharded) < 2:
        return final
    marks = {file: _mark(file) for file in (*final.values(), *waiting.values())}
    for sources in ((final,), (final, waiting)):
        for mark in dict.fromkeys(marks[f] for source in sources for f in source.values()):
            found = _complete(mark, sources, marks)
            if found is not None:
                return found
    return final


def _stands_alone(path: Path) -> bool:
    """Whether a file that is called like a part is a whole checkpoint."""
    name = path.stem.removeprefix(f"{whole_name(path).stem}-")
    if shard_number(name) is not None or sets.rank_number(name) is not None or not path.is_file():
        return False
    try:
        state = store.load(path, verify=False, mapped=True)
    except CheckpointError:
        return False
    return not _manifest(state).keys() & {"num_experts", RANKS}


def _mark(file: Path) -> _Mark:
    """The save a part belongs to and what it consists of; None for a file that is not whole."""
    try:
        manifest = _manifest(store.load(file, verify=False, mapped=True))
    except CheckpointError:
        return None
    save, names = manifest.get("save"), sets.members(manifest)
    return (save, tuple(names)) if isinstance(save, str) and names is not None else None


def _complete(
    mark: _Mark, sources: Iterable[Mapping[str, Path]], marks: Mapping[Path, _Mark]
) -> dict[str, Path] | None:
    """All parts of one save, or None."""
    if mark is None:
        return None
    files: dict[str, Path] = {}
    for name in mark[1]:
        for source in sources:
            if name in source and marks[source[name]] == mark:
                files.setdefault(name, source[name])
    return files if len(files) == len(mark[1]) else None


def finish_renaming(folder: Path) -> None:
    """Give temporary files that make a checkpoint's parts complete their names, remove the others.

    Raises:
        CheckpointError: a file cannot be renamed.
    """
    pattern = re.compile(rf"(?P<name>.+){_PART}\.pt{re.escape(store.TEMPORARY)}")
    found = filter(None, (pattern.fullmatch(p.name) for p in folder.iterdir()))
    for name in sorted({f"{match['name']}.pt" for match in found}):
        for part, file in readable_files(folder / name).items():
            if file.name.endswith(store.TEMPORARY):
                store.commit(part_path(folder / name, part))
    store.remove_temporaries(folder)


def all_parts(states: Mapping[str, State]) -> Container[str]:
    """The names of all parts of the checkpoint of which these are one rank's.

    Args:
        states: the content of this rank's files, by part; at least one.
    """
    if MAIN_PART in states:
        return states
    return sets.members(_manifest(next(iter(states.values())))) or states


def remove_others(path: Path, kept: Container[str]) -> None:
    """Remove what an earlier save left of a checkpoint under other parts' names."""
    for part, file in part_files(path).items():
        if part not in kept:
            file.unlink(missing_ok=True)


class CheckpointFiles(PartReader):
    """The parts of a checkpoint on disk.

    Args:
        path: the checkpoint's name, or that of one of its parts.
        shard_count: `--checkpoint-shard-count`: how many shards there must be; 1: as many as there
            are.
    """

    def __init__(self, path: Path, shard_count: int = 1) -> None:
        self._path = whole_name(path)
        self._loaded: dict[str, dict[str, Any]] = {}
        self._verified: set[str] = set()
        self._files = readable_files(path)
        self._shard_count = shard_count

    def names(self) -> tuple[str, ...]:
        """The names of all parts.

        Raises:
            CheckpointError: there are not as many shards as were asked for.
        """
        count = sum(shard_number(name) is not None for name in self._files)
        if self._shard_count not in (1, count) and MAIN_PART not in self._files:
            raise CheckpointError(
                f"{self._path}: has {count} shards, --checkpoint-shard-count says "
                f"{self._shard_count}"
            )
        return tuple(self._files)

    def where(self, name: str) -> str:
        """The file of a part, present or not."""
        return str(self._file(name))

    def manifest(self, name: str) -> Mapping[str, Any]:
        """The manifest of one part."""
        return _manifest(self.state(name))

    def header(self) -> State:
        """What the checkpoint says of its run: the content of its first file.

        Of a model with experts that is the file of all that ranks share: `model` has its tensors
        only. Nothing is compared with checksums.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        if pieces.is_in_parts(self):
            pieces.check_first(self)
        return self.state(sets.head(self.names()), verify=False)

    def state(self, name: str, *, verify: bool = True) -> State:
        """All that the file of a part holds; its tensors stay in the file until they are used.

        Args:
            name: the part.
            verify: whether to compare a whole checkpoint with its checksums; for one of several
                parts there is the method `verify`, as one rank may do it for all.

        Raises:
            CheckpointError: the part is missing or damaged.
        """
        verify = verify and name == MAIN_PART and name not in self._verified
        if name not in self._loaded:
            self._loaded[name] = store.load(self._file(name), verify=verify, mapped=True)
        elif verify:  # so far somebody has looked at its header only
            store.check(self._file(name))
        if verify:
            self._verified.add(name)
        return self._loaded[name]

    def read(self, name: str) -> Part:
        """One part, its tensors on the CPU.

        Raises:
            CheckpointError: the part is missing or damaged.
        """
        part = part_of(self.state(name), self._file(name))
        if name == MAIN_PART:
            del self._loaded[name]
        return part

    def open(self, name: str) -> Part:
        """One part, its tensors in the file, compared with nothing."""
        return part_of(self.state(name, verify=False), self._file(name))

    def verify(self, name: str) -> None:
        """Compare a part with its checksums and its tensors with their hashes.

        Raises:
            CheckpointError: one differs.
        """
        store.check(self._file(name))
        pieces.verify(self.open(name), self.where(name))

    def _file(self, name: str) -> Path:
        return self._files.get(name) or part_path(self._path, name)


def part_of(state: Mapping[str, Any], path: str | Path) -> Part:
    """What a loaded file holds of the model.

    Raises:
        CheckpointError: nothing.
    """
    return Part(
        model_of(state, path),
        state.get("last_optimizer_state"),
        average_of(state),
        _manifest(state),
    )


def whole_state(
    path: Path,
    shard_count: int = 1,
    *,
    optimizer: bool = True,
    allocate: Allocate = pieces.in_memory,
) -> State:
    """A checkpoint as one file has it, whichever way it lies on the disk.

    Args:
        path: the checkpoint's name, or that of one of its parts.
        shard_count: how many shards there must be; 1: as many as there are.
        optimizer: whether its state is wanted.
        allocate: makes the tensors that are put together from several parts.

    Returns:
        The content, every byte of it compared with its checksum. Tensors stay in their files where
        they can: not to be kept for longer than those.

    Raises:
        CheckpointError: a file is missing or damaged, or belongs to another checkpoint.
    """
    files = CheckpointFiles(path, shard_count)
    names = files.names()
    if not names:
        raise CheckpointError(f"{path}: no such checkpoint")
    if MAIN_PART in names:
        state = files.state(MAIN_PART)
        return state if optimizer else without_optimizer(state)
    pieces.verify_all(files)
    part = pieces.whole(files, optimizer=optimizer, allocate=allocate)
    first = files.header()
    state = {k: v for k, v in first.items() if k not in _OF_PARTS}
    state["model"] = OrderedDict(part.model)
    if part.average is not None:
        state["extra_state"] = {**state["extra_state"], AVERAGE_KEY: OrderedDict(part.average)}
    if part.optimizer is not None:
        state["last_optimizer_state"] = {**_scalars(first), **part.optimizer}
    if own(state):
        manifest = {"world_size": _manifest(state).get("world_size")}
        state[OWN_KEY] = {**state.pop(OWN_KEY), "manifest": manifest}  # at its place, the end
    return state


def _scalars(state: State) -> State:
    """What a part's optimizer state has beside tensors: the loss scale."""
    optimizer = state.get("last_optimizer_state") or {}
    return {k: v for k, v in optimizer.items() if isinstance(v, (int, float))}


def without_optimizer(state: State) -> State:
    """A file's content without its optimizer state, and without word of it in a part's table."""
    state = {key: value for key, value in state.items() if key != "last_optimizer_state"}
    manifest = _manifest(state)
    if "tensors" in manifest:
        kept = {k: v for k, v in manifest["tensors"].items() if not k.startswith("optimizer.")}
        state[OWN_KEY] = {**state[OWN_KEY], "manifest": {**manifest, "tensors": kept}}
    return state


def check_complete(path: Path) -> None:
    """Refuse parts of which one is missing or of another save, without reading them all.

    Files that are called like parts and do not say what they belong to are none of our business.

    Raises:
        CheckpointError: naming the file.
    """
    files = CheckpointFiles(path)
    if _manifest(files.header()) or shard_number(files.names()[0]) is not None:
        pieces.open_parts(files)


def with_ending(path: Path) -> Path:
    """`checkpoint_last.pt` for `checkpoint_last`; a name that ends in `.pt` as it is."""
    return path if path.suffix == ".pt" else path.with_name(f"{path.name}.pt")


def sealed(state: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The state of a part, on the CPU, with the hash of every tensor in its manifest."""
    manifest = dict(pieces.sealed(part_of(state, path)))
    return {**state, OWN_KEY: {**state[OWN_KEY], "manifest": manifest}}


def model_of(state: Mapping[str, Any], path: str | Path) -> Mapping[str, Any]:
    """The weights of a loaded checkpoint.

    Raises:
        CheckpointError: it has none.
    """
    model = state.get("model")
    if not isinstance(model, Mapping) or not model:
        raise CheckpointError(f"{path}: holds no model weights")
    return model


def average_of(state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The moving average in a loaded checkpoint: float32 where fairseq kept it so beside a half."""
    extra = state.get("extra_state")
    if isinstance(extra, Mapping) and isinstance(extra.get(AVERAGE_KEY), Mapping):
        average = dict(extra[AVERAGE_KEY])
        wide = extra.get(WIDE_AVERAGE_KEY) or {}
        return {name: wide.get(name, tensor) for name, tensor in average.items()}
    # Where this project kept it at first.
    older = (own(state).get("extra") or {}).get("ema")
    if not isinstance(older, Mapping):
        return None
    return {name: tensor for name, tensor in older.items() if name != "_since"}


def own(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What we keep beyond fairseq's keys; empty for a file of fairseq's."""
    found = state.get(OWN_KEY)
    return found if isinstance(found, Mapping) else {}


def _manifest(state: Mapping[str, Any]) -> Mapping[str, Any]:
    found = own(state).get("manifest")
    if isinstance(found, Mapping):
        return found
    for key in _FLAT_KEYS:
        if isinstance(state.get(key), Mapping):
            return {FLAT: state[key]}
    if _is_gshard(state):
        history = state.get("optimizer_history") or [{}]
        return {RANKS: history[-1].get("num_updates")}
    return {}


def _is_gshard(state: Mapping[str, Any]) -> bool:
    """Whether a file is one of several that fairseq's gshard wrote of a mixture of experts."""
    cfg = state.get("cfg")
    model = cfg.get("model") if isinstance(cfg, Mapping) else state.get("args")
    if not isinstance(model, Mapping) or not model.get("moe_expert_count") or own(state):
        return False
    names = state.get("model")
    if not isinstance(names, Mapping):
        return False
    # One of a rank has nothing but experts, that which all share none.
    return len({".experts." in name for name in names}) == 1


def has_numbered_state(state: Mapping[str, Any]) -> bool:
    """Whether a loaded file is one of several in which an optimizer's state goes by positions."""
    return bool(_manifest(state).keys() & {FLAT, RANKS})
