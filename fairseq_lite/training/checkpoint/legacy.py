"""Reading checkpoints that hold Python objects, without running any of them.

fairseq's checkpoints are pickles with objects in them: an `argparse.Namespace`, numpy scalars,
OmegaConf containers, fairseq's own config classes and enums. They are read with torch's
`weights_only` unpickler, which refuses every name it is not told of. Each name on the list below
is answered with an inert stand-in: a class or function of this module that keeps the stored values
and does nothing else. Nothing named in a file is ever imported or called. Afterwards `plain` turns
the stand-ins into dicts, lists, numbers and text.

A name that is not on the list is refused, and the error names it. There is no fallback.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from fairseq_lite.errors import CheckpointError

# Number kinds of numpy that become Python numbers: bool, signed, unsigned, float.
_NUMERIC_KINDS = "biuf"


class Inert:
    """Stands in for an instance of a listed class: keeps what it was made of, does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __new__(cls, *args: Any) -> Inert:
        self = super().__new__(cls)
        self.args = args
        self.state = None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)

    def value(self, convert: Callable[[Any], Any]) -> Any:
        """The plain value this object stood for."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2:  # (__dict__, slots)
            state = {**(state[0] or {}), **(state[1] or {})}
        if isinstance(state, Mapping):
            return {str(k): convert(v) for k, v in state.items()}
        # An enum member or a path is pickled as its class called with its value.
        return convert(self.args[0]) if len(self.args) == 1 else None


class _Container(Inert):
    """OmegaConf's DictConfig and ListConfig: only their content matters."""

    def value(self, convert: Callable[[Any], Any]) -> Any:
        content = self.state.get("_content") if isinstance(self.state, Mapping) else None
        if isinstance(content, Mapping):
            return {_key(k): convert(v) for k, v in content.items()}
        if isinstance(content, list):
            return [convert(v) for v in content]
        # None, a missing value ("???") or an interpolation ("${a.b}").
        return convert(content)


class _Node(Inert):
    """OmegaConf's leaf nodes."""

    def value(self, convert: Callable[[Any], Any]) -> Any:
        return convert(self.state.get("_val")) if isinstance(self.state, Mapping) else None


class _Path(Inert):
    def value(self, convert: Callable[[Any], Any]) -> Any:
        return str(Path(*(str(a) for a in self.args)))


class _DType(Inert):
    """numpy.dtype(code, align, copy), then a state whose second item is the byte order."""

    def numpy(self) -> np.dtype[Any]:
        code = self.args[0] if self.args else None
        if isinstance(code, bytes):
            code = code.decode("latin1")
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "|"
        if isinstance(order, bytes):
            order = order.decode("latin1")
        if not isinstance(code, str) or order not in ("<", ">", "|"):
            raise ValueError(f"a numpy type {code!r} with byte order {order!r}")
        dtype = np.dtype(code)
        if dtype.kind not in _NUMERIC_KINDS:
            raise ValueError(f"a numpy array of {code!r}: only numbers are read")
        return dtype if order == "|" else dtype.newbyteorder("<" if order == "<" else ">")

    def value(self, convert: Callable[[Any], Any]) -> Any:
        return str(self.numpy())


class _Array(Inert):
    """numpy.ndarray: its state is (version, shape, dtype, Fortran order, bytes)."""

    def value(self, convert: Callable[[Any], Any]) -> Any:
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise ValueError("a numpy array without a state")
        _, shape, dtype, fortran, data = self.state
        if not isinstance(dtype, _DType):
            raise ValueError("a numpy array without a type")
        kind = dtype.numpy()  # refuses objects before anything looks at the data
        flat = np.frombuffer(_as_bytes(data), dtype=kind)
        return flat.reshape(shape, order="F" if fortran else "C").tolist()


class _Scalar(Inert):
    """numpy's scalars: (dtype, bytes)."""

    def value(self, convert: Callable[[Any], Any]) -> Any:
        dtype, data = self.args
        if not isinstance(dtype, _DType):
            raise ValueError("a numpy scalar without a type")
        return np.frombuffer(_as_bytes(data), dtype=dtype.numpy(), count=1)[0].item()


def _as_bytes(data: Any) -> bytes:
    if isinstance(data, str):
        return data.encode("latin1")
    if isinstance(data, (bytes, bytearray)):
        return bytes(data)
    raise ValueError(f"a numpy value stored as {type(data).__name__}")


def _new_array(kind: Any = None, *_: Any) -> Any:
    # numpy calls this with its array class, which in the file is a stand-in already.
    if not (isinstance(kind, type) and issubclass(kind, _Array)):
        raise ValueError("a numpy array of an unknown class")
    return kind()


def _new_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _new_bytes(*_: Any) -> bytes:
    return b""


# Full name in the file -> the stand-in (a class is subclassed for each name).
_STAND_INS: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": Inert,
    "collections.defaultdict": _new_dict,
    "builtins.bytes": _new_bytes,
    "numpy.dtype": _DType,
    "numpy.ndarray": _Array,
    "omegaconf.dictconfig.DictConfig": _Container,
    "omegaconf.listconfig.ListConfig": _Container,
    **{f"numpy.{core}.multiarray._reconstruct": _new_array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _Scalar for core in ("core", "_core")},
    **{
        f"{module}.{name}": _Path
        for module in ("pathlib", "pathlib._local")  # of Python 3.13
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath")
    },
    **{
        f"omegaconf.nodes.{name}": _Node
        for name in (
            "AnyNode BooleanNode BytesNode EnumNode FloatNode IntegerNode InterpolationResultNode "
            "PathNode StringNode UnionNode"
        ).split()
    },
    "omegaconf.base.Metadata": Inert,
    "omegaconf.base.ContainerMetadata": Inert,
    # Types that OmegaConf's metadata mention; `Optional[int]` is pickled as getitem(Union, …).
    "_operator.getitem": Inert,
    **{f"typing.{n}": Inert for n in ("Any", "Dict", "List", "Optional", "Tuple", "Union")},
    **{
        f"builtins.{n}": Inert
        for n in ("bool", "dict", "float", "int", "list", "object", "str", "tuple", "type")
    },
}


def _stand_in(name: str) -> Callable[..., Any] | None:
    """The stand-in for a full name, or None when it is not on the list.

    fairseq's own classes (dataclass configs, enums, meters) are allowed as a family: their
    stand-ins only hold values, and fairseq itself is not imported.
    """
    found = _STAND_INS.get(name)
    if found is None and name.startswith("fairseq.") and name.replace(".", "").isidentifier():
        found = Inert
    if isinstance(found, type):
        return type(name.rpartition(".")[2], (found,), {"__doc__": f"Stands in for {name}."})
    return found


def allow_list(
    names: set[str], path: str | Path
) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Stand-ins for the names in a file, in the form `torch.serialization.safe_globals` takes.

    Raises:
        CheckpointError: a name is not on the list; nothing was loaded.
    """
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    for name in sorted(names):
        stand_in = _stand_in(name)
        if stand_in is None:
            raise CheckpointError(
                f"{path}: refers to {name}, which is not a plain value a checkpoint may hold: not "
                "loaded, and nothing was executed"
            )
        allowed.append((stand_in, name))
    return allowed


def names_in(path: str | Path) -> set[str]:
    """Every class or function a checkpoint's pickle names, beyond those torch itself allows.

    Only the instructions are read; nothing is built. Should a name escape this scan, torch's
    unpickler refuses it all the same: it builds nothing that was not listed.
    """
    names: set[str] = set()
    with open(path, "rb") as f:
        if zipfile.is_zipfile(f):
            f.seek(0)
            with zipfile.ZipFile(f) as archive:
                for member in archive.namelist():
                    if member.rpartition("/")[2] == "data.pkl":
                        with archive.open(member) as pickle:
                            names |= _globals(pickle)  # type: ignore[arg-type]
        else:
            f.seek(0)
            for _ in range(4):  # before torch 1.6: magic number, version, system, then the object
                names |= _globals(f)
    default = set(torch._weights_only_unpickler._get_allowed_globals())
    return names - default


def _globals(pickle: BinaryIO) -> set[str]:
    names = set()
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name == "GLOBAL" and isinstance(argument, str):
            module, _, name = argument.partition(" ")
            # Protocol 2 writes Python 2's names, as torch's reader knows too.
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
            names.add(f"{module}.{name}")
    return names


def _key(key: Any) -> Any:
    return key if isinstance(key, (str, int, float, bool)) else str(key)


def plain(value: Any) -> Any:
    """Replace every stand-in by what it stood for; tensors are kept as they are.

    Raises:
        ValueError: a value that has no plain form.
    """
    return _Plain().convert(value)


class _Plain:
    """One conversion; an object met twice is converted once, so sharing costs nothing."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}
        self._held: list[Any] = []  # keeps ids from being used again

    def convert(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str, bytes, torch.Tensor)):
            return value
        if id(value) in self._done:
            return self._done[id(value)]
        result = self._new(value)
        self._done[id(value)] = result
        self._held.append(value)
        return result

    def _new(self, value: Any) -> Any:
        if isinstance(value, Inert):
            return value.value(self.convert)
        if isinstance(value, type) and issubclass(value, Inert):
            return value.__name__
        if isinstance(value, Mapping):
            made = OrderedDict if isinstance(value, OrderedDict) else dict
            return made((self.convert(k), self.convert(v)) for k, v in value.items())
        if isinstance(value, tuple):  # torch.Size too
            return tuple(self.convert(v) for v in value)
        if isinstance(value, (list, set, frozenset)):
            return [self.convert(v) for v in value]
        if isinstance(value, (np.generic, np.ndarray)) and value.dtype.kind in _NUMERIC_KINDS:
            return value.tolist()
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, (torch.dtype, torch.device)):
            return str(value)
        raise ValueError(f"a value of type {type(value).__name__}")
