"""Checkpoints for pandas DataFrames, and flows that free what nobody needs, for Prefect < 2.

`checkpoint_handler` asks the `DSTaskRunner` for the task's file. If it is there, the state gets a
`PandasResult` without a value, which is read when a task that runs, or the user, asks for it. Else
the task runs, and `PandasResult` writes what it returns. `_Run`, the heart of `DSFlowRunner`, puts
the calls of a flow run in order, and lets go of each result when nobody will read it any more. A
place (`_Here`, `_InThreads`, `_InProcesses`, `_OnCluster`) is where the calls run.

The internals of Prefect that this relies on are listed by `test_touches_only_these_internals`.
"""

import concurrent.futures
import copy
import datetime
import functools
import hashlib
import heapq
import inspect
import io
import itertools
import os
import pathlib
import pickle
import queue
import re
import shutil
import socket
import string
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections import ChainMap, deque
from contextlib import contextmanager, nullcontext, suppress
from decimal import Decimal
from enum import Enum
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import cloudpickle
import numpy
import pandas
import prefect
import psutil
from numpy.testing import assert_equal
from pandas.testing import assert_index_equal, assert_series_equal
from prefect.core import Edge, Flow, Task
from prefect.engine import flow_runner as _prefect_flow_runner
from prefect.engine.cloud import CloudTaskRunner
from prefect.engine.flow_runner import FlowRunner
from prefect.engine.result import NoResult, Result
from prefect.engine.runner import ENDRUN
from prefect.engine.state import Cached, Failed, Mapped, Pending, State, Success
from prefect.engine.task_runner import TaskRunner
from prefect.tasks.core.constants import Constant
from prefect.tasks.core.function import FunctionTask
from prefect.utilities.logging import get_logger

try:
    from tqdm import tqdm
except ImportError:  # There is no progress bar then.
    tqdm = None

__version__ = "2.0.0"

__all__ = ["PandasResultHandler", "PandasResult", "checkpoint_handler", "DSTaskRunner"]
__all__ += ["DSFlowRunner", "DSExecutor", "PurgedResult"]


# What the installed Prefect offers ----------------------------------------------------------

#: From 0.11 on a task keeps a `Result`, which knows its location; before, a `ResultHandler`.
_HAS_LOCATIONS = "result_handler" not in inspect.signature(TaskRunner.__init__).parameters

#: The attribute under which flows, tasks, and task runners have their storage, and its class.
_STORAGE = "result" if _HAS_LOCATIONS else "result_handler"
_Storage: Any = Result if _HAS_LOCATIONS else prefect.engine.result_handlers.ResultHandler

#: Tasks opt out of checkpoints by `checkpoint=False`; not where that is the default (0.9.0).
_CAN_OPT_OUT = "checkpoint" not in prefect.config.tasks.defaults

#: From 0.12 on the flow runner submits mapped children itself, by the function `run_task`, and
#: executors take futures apart. Before, tasks submit their own children to the executor.
_FLOW_RUNNER_MAPS = hasattr(_prefect_flow_runner, "run_task")

#: From 0.13 on the configuration in the context decides on checkpointing; before, the process's.
_CONTEXT_CONFIGURES = tuple(map(int, prefect.__version__.split(".")[:2])) >= (0, 13)

try:
    from prefect.executors import DaskExecutor, Executor, LocalDaskExecutor, LocalExecutor
except ImportError:  # below 0.14
    from prefect.engine.executors import DaskExecutor, Executor, LocalDaskExecutor, LocalExecutor

#: Tasks that Prefect runs again in every later round of an unfinished flow, where it has them.
_RESTARTED: tuple = (getattr(prefect.tasks.secrets, "SecretBase", ()),)
if hasattr(prefect.tasks.core, "resource_manager"):
    _RESTARTED += (
        prefect.tasks.core.resource_manager.ResourceSetupTask,
        prefect.tasks.core.resource_manager.ResourceCleanupTask,
    )


def _stored(storage, location, frame):
    """A result that has a frame, and knows its location."""
    if _HAS_LOCATIONS:
        result = copy.copy(storage)
        result.location, result.value = location, frame
    else:
        result = Result(frame, result_handler=storage)
        result.safe_value = prefect.engine.result.SafeResult(location, result_handler=storage)
    return result


def _location_of(result):
    """Where a result is stored; None if it is not."""
    return result.location if _HAS_LOCATIONS else result.safe_value.value


# Where a frame is stored: the template in the path -------------------------------------------


class _Template(string.Formatter):
    """A path with fields, filled as by `str.format`, but never with a value that leads astray."""

    def __init__(self, path):
        self.path = path = os.fspath(path)
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)", path):
            raise ValueError(f"{path!r} was a URL before pathlib took a slash: pass a str.")
        try:
            parts = list(self.parse(path))
        except ValueError as exc:
            raise ValueError(f"The path {path!r} is no template for str.format: {exc}.") from exc
        names = [name for _, name, _, _ in parts if name is not None]
        #: names of the fields, without attributes and items
        self.fields = {re.split(r"[.\[]", name)[0] for name in names}
        if not all(name[:1].isidentifier() for name in self.fields):
            raise ValueError(f"The fields of {path!r} need names, as in 'data_{{id}}.csv'.")
        # What stands before the first field: no value may lead out of its folder.
        first = next((n for n, part in enumerate(parts) if part[1] is not None), len(parts) - 1)
        self.folder = os.path.dirname("".join(part[0] for part in parts[: first + 1]))

    def fill(self, values, mapped=()):
        """The path with these values; `mapped` are the arguments that a task is mapped over."""
        distinct = {"map_index", "task_full_name", "task_run_id", "task_run_name", *mapped}
        if mapped and not distinct.intersection(self.fields):
            raise ValueError(
                f"The path {self.path!r} is the same for every child of this mapped task. These "
                f"fields would tell them apart: {', '.join(sorted(distinct))}."
            )
        try:
            filled = self.vformat(self.path, (), values)
        except Exception as exc:
            raise ValueError(
                f"The path {self.path!r} cannot be filled: {type(exc).__name__}: {exc}. There are "
                f"the fields: {', '.join(sorted(map(str, values)))}."
            ) from exc
        folder = os.path.join(_absolute(self.folder), "")
        # By "::", fsspec joins URLs.
        strays = _is_url(filled) and re.search(r"/\.\./|::", f"/{filled[len(self.folder) :]}/")
        if self.fields and (strays or not _absolute(filled).startswith(folder)):
            raise ValueError(
                f"The path {self.path!r} became {filled!r}, which leads out of the folder {folder} "
                "that it names. Write that folder into the path, or clean the value."
            )
        return filled

    def get_field(self, field_name, args, kwargs):
        value, used = super().get_field(field_name, args, kwargs)
        if isinstance(value, (pandas.DataFrame, pandas.Series, pandas.Index, numpy.ndarray)):
            raise TypeError(
                f"the field {field_name!r} is a {type(value).__name__}, whose text names no file"
            )
        return value, used


def _is_url(path):
    """Whether fsspec is to be asked; it joins protocols by "::", as in simplecache::s3://..."""
    return re.match(r"(?!(file|local)://)[A-Za-z][A-Za-z0-9+.-]+(://|::)", path) is not None


def _absolute(path):
    """Where a location is, however the working directory may change."""
    if _is_url(path):
        return path
    return os.path.abspath(os.path.expanduser(re.sub("^(file|local)://", "", path)))


# How a frame is stored: what pandas can read and write ---------------------------------------

#: The pairs of `read_*` and `to_*` of the installed pandas, but those that take no path.
_FILE_TYPES = {
    name[5:]: (getattr(pandas, name), getattr(pandas.DataFrame, "to_" + name[5:]))
    for name in dir(pandas)
    if name.startswith("read_") and hasattr(pandas.DataFrame, "to_" + name[5:])
    if name[5:] not in ("clipboard", "gbq", "iceberg", "sql")
}

_READ, _WRITE = 0, 1  # what is first in a pair, and what is second

#: Extensions that are not the name of their file type.
_EXTENSIONS = {
    **dict.fromkeys(("ods", "xls", "xlsb", "xlsm", "xlsx"), "excel"),
    **dict.fromkeys(("jsonl", "ndjson"), "json"),
    **dict.fromkeys(("parq", "pq"), "parquet"),
    **dict.fromkeys(("h5", "hdf5"), "hdf"),
    "dta": "stata",
    "ftr": "feather",
    "htm": "html",
    "pkl": "pickle",
    "tsv": "csv",
}

_WORDS_STAY = {"keep_default_na": False, "na_values": [""]}

_BY_LINES = ({"lines": True}, {"double_precision": 15, "orient": "records", "lines": True})

#: What makes a frame come back as it was: keyword arguments of the reader, and of the writer, by
#: extension or else by file type. Where pandas refuses them, it gets none of them.
_DEFAULTS: dict = {
    "csv": (_WORDS_STAY, {"index": False}),
    "excel": (_WORDS_STAY, {"index": False}),
    "hdf": ({"key": "data"}, {"key": "data", "mode": "w"}),
    "html": (_WORDS_STAY, {"index": False, "float_format": str, "na_rep": ""}),
    "json": ({"precise_float": True}, {"double_precision": 15}),
    **dict.fromkeys(("jsonl", "ndjson"), _BY_LINES),
    "stata": ({}, {"write_index": False}),
    "tsv": ({**_WORDS_STAY, "sep": "\t"}, {"index": False, "sep": "\t"}),
    "xml": ({}, {"index": False}),
}

#: What the parser in C of `read_csv` takes besides, and no other: one type for a whole column, and
#: exact floats. From pandas 3 on these are exact anyway, and the argument goes.
_C_DEFAULTS: dict = {"low_memory": False}
if int(pandas.__version__.split(".")[0]) < 3:
    _C_DEFAULTS["float_precision"] = "round_trip"

_hdf_lock = threading.RLock()  # PyTables may end the process if two threads are in it.


def _extension_of(path):
    """The extension in lower case, without the dot, and what is behind it in some names."""
    behind = r"(\.(bz2|gz|gzip|xz|zip|zst|unreadable-\w+))+$"
    name = re.sub(behind, "", os.path.basename(path).lower())
    return name.rpartition(".")[2] if "." in name else ""


def _check_file_type(file_type, path):
    """The name of a file type in lower case: the one given, or that which the extension tells."""
    found = (file_type or _EXTENSIONS.get(_extension_of(path), _extension_of(path))).lower()
    if found not in _FILE_TYPES:
        problem = f"The extension of {path!r} tells no file type; name one."
        if file_type is not None:
            problem = f"There is no file type {file_type!r}."
        raise ValueError(f"{problem} The installed pandas has: {', '.join(sorted(_FILE_TYPES))}.")
    return found


# What a file does not keep -------------------------------------------------------------------

#: Of a frame with more cells, not all is read back to see what its file loses, but so many rows.
_MAX_CELLS, _SAMPLE_ROWS = 100_000, 300


def _check_column(one, other):
    if one.dtype == other.dtype == object:
        one, other = one.where(one.notna(), None), other.where(other.notna(), None)
        if list(map(type, one)) != list(map(type, other)):
            raise AssertionError("the objects are of other types")
    if one.dtype != other.dtype or not one.equals(other):
        assert_series_equal(one, other)
        if not one.equals(other):
            raise AssertionError("values differ in digits that are not shown")


def _losses(frame, restored):
    """Say, in sentences, what differs in a frame that was written and read back."""
    frames = (frame, restored)
    pairs = [
        ("its class", assert_equal, *map(type, frames)),
        ("its attrs", assert_equal, *(getattr(each, "attrs", None) for each in frames)),
        ("the index", assert_index_equal, *(each.index for each in frames), "equiv"),
        ("the frequency", assert_equal, *(getattr(each.index, "freq", None) for each in frames)),
        ("the columns", assert_index_equal, *(each.columns for each in frames), "equiv"),
    ]
    if len(frame) == len(restored) and frame.columns.equals(restored.columns):
        restored.index = frame.index
        for n, name in enumerate(frame.columns):
            columns = (each.iloc[:, n] for each in frames)
            pairs.append((f"column {name!r}", _check_column, *columns))
    losses = []
    for name, check, *both in pairs:
        try:
            check(*both)
        except Exception as exc:  # Arrays in a cell raise others than AssertionError.
            text = " ".join(str(exc).split())
            text = text.replace("[left]:", "written:").replace("[right]:", "read back:")
            losses.append(f"{name}: {text[:250]}")
    return losses


def _remedy(file_type, frame, losses):
    """What to do so that a file of this type keeps what was lost."""
    index, header = (list(range(labels.nlevels)) for labels in (frame.index, frame.columns))
    loses_index = any(loss.startswith("the index") for loss in losses)
    loses_types = any(re.match('column .*"dtype"', loss) for loss in losses)
    keep_index = "write_kwargs={'index': True} with read_kwargs={'index_col': %s}"
    helps = [
        ("csv excel html", loses_index, keep_index % (index if len(index) > 1 else 0)),
        ("csv excel html", len(header) > 1, f"read_kwargs={{'header': {header}}}"),
        ("csv excel", loses_types, "read_kwargs={'dtype': {...}, 'parse_dates': [...]}"),
        ("json", loses_types, "read_kwargs={'dtype': {...}, 'convert_dates': [...]}"),
    ]
    found = [help for types, is_lost, help in helps if is_lost and file_type in types.split()]
    other = "pickle" if file_type in ("feather", "hdf", "orc", "parquet") else "parquet"
    either = " with ".join(found) + ", or " if found else ""
    return f"To keep it, try {either}the file type {other}."


_said: set = set()  # in this process, once for each path and loss, or task


def _is_said(*key):
    is_said = key in _said
    _said.add(key)
    return is_said


# How a file appears: whole or not at all -----------------------------------------------------


def _filesystem(path, storage_options):
    """The file system of fsspec, None for the local one, and the path in it."""
    if not _is_url(path):
        return None, os.path.realpath(_absolute(path))  # A link stays a link to the new file.
    import fsspec

    if hasattr(fsspec.core, "url_to_fs"):
        filesystem, path = fsspec.core.url_to_fs(path, **storage_options)
    else:  # fsspec of 2020, which knows no joined protocols
        filesystem = fsspec.filesystem(path.partition("://")[0], **storage_options)
        path = filesystem._strip_protocol(path)
    # It remembers listings; what others have written or deleted since would not be seen.
    filesystem.invalidate_cache()
    return filesystem, path


def _on_file(filesystem, command, *paths):
    """Run `get_file` and the like: to `get` a name with `*`, `?` or `[` would be a pattern."""
    # Old releases of fsspec have only `get`, `copy` and so on, and take names literally.
    old = getattr(filesystem, {"cp": "copy"}.get(command, command))
    try:
        return getattr(filesystem, command + "_file", old)(*paths)
    except (FileNotFoundError, KeyError) as exc:  # KeyError: of "memory://"
        raise FileNotFoundError(paths[0]) from exc
    except Exception as exc:  # Each file system has errors of its own.
        raise ConnectionError(f"{command} {' '.join(paths)}: {exc}") from exc


def _stat(path, storage_options):
    """When a local file was written, and the bytes of any file; None if it is not there."""
    filesystem, path = _filesystem(path, storage_options)
    try:
        if filesystem is None:
            is_folder, stat = os.path.isdir(path), os.stat(path)
            modified, size = stat.st_mtime, stat.st_size
        else:
            info = _on_file(filesystem, "info", path)
            is_folder, modified, size = info.get("type") == "directory", None, info.get("size")
    except (FileNotFoundError, NotADirectoryError):
        return None
    if is_folder:
        raise IsADirectoryError(f"{path} is a folder, but a result is one file: use another path.")
    return modified, size


_MARK = f"~{socket.gethostname()}-"  # in the names of the hidden folders of this host


@contextmanager
def _new_file(path, storage_options):
    """A local path, in a hidden folder, for pandas to write what then appears, whole, at `path`."""
    filesystem, path = _filesystem(path, storage_options)
    folder, name = os.path.split(path)
    if filesystem is None:
        os.makedirs(folder, exist_ok=True)
        _remove_leftovers(folder)
    prefix = f".{name[:50]}{_MARK}{os.getpid()}-"
    hidden = tempfile.mkdtemp(prefix=prefix, dir=folder if filesystem is None else None)
    partial = os.path.join(hidden, name)  # pandas writes the name of the file into archives.
    try:
        yield partial
        if filesystem is None:
            with open(partial, "rb+") as opened:
                os.fsync(opened.fileno())
            with suppress(OSError):  # The earlier one may be for few eyes.
                shutil.copymode(path, partial)
            os.replace(partial, path)
        else:
            _on_file(filesystem, "put", partial, path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


@functools.lru_cache(maxsize=1000)
def _remove_leftovers(folder):
    """Remove, once per folder, what writers on this host left behind when they were killed."""
    for name in os.listdir(folder):
        pid = re.match(rf"\..*{_MARK}(\d+)-", name)
        if pid and not psutil.pid_exists(int(pid.group(1))):
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)


def _set_aside(path, storage_options):
    """Give a file that cannot be used another name, and return that; None if it is gone."""
    filesystem, path = _filesystem(path, storage_options)
    name = os.path.basename(path)
    moment = f"{datetime.datetime.now():%Y%m%dT%H%M%S%f}"
    aside = f"{path[: len(path) - len(name)]}{name[:200]}.unreadable-{moment}"
    try:
        if filesystem is None:
            os.replace(path, aside)
        else:
            _on_file(filesystem, "cp", path, aside)
            _on_file(filesystem, "rm", path)
    except FileNotFoundError:
        return None
    return aside


# The storage of a task, which is read when it is needed --------------------------------------

#: `reads`: what results do in this thread when they are asked for their value. None: no flow run of
#: ours is under way. False: Prefect hands results on. True: somebody really reads.
_in_thread = threading.local()


@contextmanager
def _reading(reads):
    outer = getattr(_in_thread, "reads", None)
    _in_thread.reads = reads
    try:
        yield outer
    finally:
        _in_thread.reads = outer


_read_locks = [threading.RLock() for _ in range(64)]  # Two that ask for one file read it once.


class PandasResult(_Storage):
    """Store a task's DataFrame in a file that is named in full.

    `PandasResultHandler` is the same class. Tasks and flows take it as `result_handler=` below
    Prefect 0.14, as `result=` from 0.11 on.

    Parameters
    ----------
    path : str, os.PathLike or callable, optional
        Where the file is: a path, or a URL for fsspec. It is a template for `str.format`, filled
        from the task's arguments (this takes `DSTaskRunner`), then from the flow's parameters, then
        from `prefect.context`. From 0.11 on also a function of these as keyword arguments (of
        arguments that are stored themselves, those which it names), or the task's `target`.
    file_type : str, optional
        Which pair of pandas' `read_*` and `to_*` to use: "csv", "parquet", ... If left out, it
        follows from the extension of the path, with or without a compression (".csv.gz").
    read_kwargs, write_kwargs : dict, optional
        Keyword arguments for pandas' reader and writer. They override the defaults, which leave
        out the index in csv, excel, html, stata and xml. `storage_options` are for fsspec.
    **kwargs
        What Prefect's `Result` takes. `location` is another name for `path`.

    Raises
    ------
    TypeError, ValueError
        If the path is no str, no PathLike, or no template; if neither it nor `file_type` tells a
        type that pandas has; if `read_kwargs` ask for a frame in parts.

    Examples
    --------
    >>> PandasResult("data/{month:02}.parquet").file_type
    'parquet'
    """

    _value: Any = None
    _place: Optional[str] = None  # where the value can be read again; None: only in memory
    _is_open: bool = False  # The flow run is over: anybody who asks reads, and nothing is kept.
    _owner: Optional[str] = None  # the full name of the task run whose result it is
    _puts_off: bool = False  # It is of a `DSTaskRunner`, which writes when the task run ends.

    def __init__(
        self,
        path: Union[str, "os.PathLike[str]", Callable[..., str], None] = None,
        file_type: Optional[str] = None,
        read_kwargs: Optional[Dict[str, Any]] = None,
        write_kwargs: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
    ) -> None:
        path = kwargs.pop("location", None) if path is None else path
        if {"chunksize", "iterator"}.intersection(read_kwargs or ()):
            what = "chunksize or iterator, for a frame in parts, but a result is one frame"
            raise ValueError(f"read_kwargs of the path {path!r} have {what}.")
        super().__init__(**kwargs)
        self.location: Any = None if path is None or callable(path) else _Template(path).path
        self._formatter = path if callable(path) else None
        self.read_kwargs = dict(read_kwargs or {})
        self.write_kwargs = dict(write_kwargs or {})
        self._kwargs = kwargs = {**self.write_kwargs, **self.read_kwargs}
        self._key = {"key": kwargs["key"]} if "key" in kwargs else {}  # It need not be given twice.
        self._storage_options = kwargs.get("storage_options") or {}
        self._file_type = file_type
        #: the type that was given or that the path tells, None as long as there is neither
        self.file_type: Optional[str] = None
        if file_type is not None or self.location is not None:
            self.file_type = _check_file_type(file_type, self.location)

    def __repr__(self):
        return f"<{type(self).__name__}: {self.path}>"

    @property
    def path(self) -> Union[str, Callable[..., str], None]:
        """str or callable: the template of the path."""
        return self.location or self._formatter

    @property
    def value(self) -> Any:
        """pandas.DataFrame: read from its file if it is not at hand, and if it is to be read."""
        value, place = self._value, self._place  # Another thread may let go of it.
        reads = getattr(_in_thread, "reads", None)
        is_asked_for = self._is_open if reads is None else reads
        if value is not None or place is None or not is_asked_for:
            return value
        with _read_locks[hash(place) % len(_read_locks)]:
            value = self._value if self._value is not None else self._load_later(place)
            if not self._is_open:
                self._value = value
        return value

    @value.setter
    def value(self, value):
        self._value, self._place = value, None

    def __getstate__(self):
        # What is in a file is read where it is needed: a place travels, not a frame.
        return vars(self) if self._place is None else dict(vars(self), _value=None)

    # The contract of Prefect's `Result` and `ResultHandler`. Fields fill a location that is None.

    def exists(self, location: str, **kwargs: Any) -> bool:
        return _stat(_Template(location).fill(kwargs), self._storage_options) is not None

    def read(self, location: Optional[str] = None, input_mapping: Any = None) -> Any:
        location = self._fill(input_mapping or {}) if location is None else location
        if getattr(_in_thread, "reads", None) is False:  # under a backend: it is handed on
            result = _stored(self, location, None)
            result._place = _absolute(location)
            return result
        frame = self._load(location)
        return _stored(self, location, frame) if _HAS_LOCATIONS else frame

    def write(self, value_: Any, input_mapping: Any = None, **kwargs: Any) -> Any:
        if self._puts_off:
            return self.from_value(value_)
        location = self._fill({**kwargs, **(input_mapping or {})})
        self._save(value_, location)
        return _stored(self, location, value_) if _HAS_LOCATIONS else location

    def _fill(self, values, mapped=()):
        """The location for these fields, before those that the parameters and the context offer."""
        path: Any = self.path
        if path is None:
            raise ValueError("There is no path: give one to PandasResult, or a target to the task.")
        context = dict(prefect.context)
        given = ChainMap(values, context.get("parameters") or {})
        if callable(path):
            return _Template(path(**ChainMap(given, context))).path
        # In Prefect's context None means that there is no such thing.
        known = {name: value for name, value in context.items() if value is not None}
        return _Template(path).fill(ChainMap(given, known), mapped)

    def _load(self, location):
        filesystem, path = _filesystem(location, self._storage_options)
        with tempfile.TemporaryDirectory() as folder:
            if filesystem is not None:
                remote, path = path, os.path.join(folder, os.path.basename(path))
                _on_file(filesystem, "get", remote, path)
            frame = self._call_pandas(_READ, location, path)
        if not isinstance(frame, pandas.DataFrame):
            raise TypeError(f"{location} holds a {type(frame).__name__}, not a pandas DataFrame.")
        self._log("Loaded %s", _absolute(location))
        return frame

    def _load_later(self, place):
        try:
            return self._load(place)
        except Exception as exc:
            what = self._put_aside(place, exc)
            raise ValueError(f"{what}. Run the flow again, and {self._owner!r} makes it.") from exc

    def _put_aside(self, place, error):
        """Set a file aside that cannot be read, and say so; raise the error if the file is fine."""
        is_gone = isinstance(error, (FileNotFoundError, NotADirectoryError))
        # Libraries raise an OSError for what they read, too, but have no number for it.
        is_fine = getattr(error, "errno", None) or isinstance(error, ConnectionError)
        is_fine = is_fine or re.search("out of memory|module not available", str(error))
        # A damaged pickle may look for any module, and ask for any amount of memory.
        if _check_file_type(self._file_type, place) != "pickle":
            is_fine = is_fine or isinstance(error, (ImportError, MemoryError))
        if (self.read_kwargs or self._key) and not is_fine:
            plain = copy.copy(self)
            plain.read_kwargs = plain._key = {}
            with suppress(Exception):
                plain._load(place)
                is_fine = True  # It is these arguments that do not fit.
        if is_fine and not is_gone:
            raise error
        aside = _set_aside(place, self._storage_options)
        reason = f"cannot be read ({type(error).__name__}: {error})"
        return f"{place} is there, but {reason}. It is now {aside}" if aside else f"{place} is gone"

    def _save(self, frame, location):
        """Write a frame. Return whether its file gives it back, as far as was looked."""
        if not isinstance(frame, pandas.DataFrame):
            what = type(frame).__name__
            raise TypeError(f"{location} stores a pandas DataFrame, but the task returned {what}.")
        with _new_file(location, self._storage_options) as path:
            try:
                what = "write it"
                self._call_pandas(_WRITE, location, frame, path)
                if os.path.isdir(path):
                    raise ValueError("pandas made a folder, but a result is one file")
                what = "read it back"
                losses = self._losses_in(path, location, frame)
            except (OSError, ImportError, MemoryError):
                raise
            except Exception as exc:
                raise ValueError(
                    f"{location} was not written, since pandas could not {what}: "
                    f"{type(exc).__name__}: {exc}. Use pickle, or other keyword arguments."
                ) from exc
        place = _absolute(location)
        self._log("Wrote %s", place)
        new = [loss for loss in losses if not _is_said(self.path or location, loss)]
        if new:
            remedy = _remedy(_check_file_type(self._file_type, location), frame, losses)
            text = "%s does not keep all of the frame: %s. %s"
            self._log(text, place, "; ".join(new[:5]), remedy, level="warning")
        return not losses

    def _losses_in(self, path, location, frame):
        """What the file at `path` does not keep of the frame, as far as was looked."""
        is_pickle = _check_file_type(self._file_type, location) == "pickle"
        compare = _losses if not is_pickle else lambda *frames: []  # It keeps all, if it is read.
        if is_pickle and not self._kwargs:
            return []
        if frame.size > _MAX_CELLS and len(frame) > _SAMPLE_ROWS:
            sample = frame.iloc[numpy.linspace(0, len(frame) - 1, _SAMPLE_ROWS).astype(int)]
            index = frame.index
            if getattr(index, "freq", None) or index.equals(pandas.RangeIndex(len(frame))):
                sample.index = index[:_SAMPLE_ROWS]  # It stays as regular as it was.
            # Keyword arguments may ask for more than the sample has.
            with suppress(Exception), tempfile.TemporaryDirectory() as folder:
                small = os.path.join(folder, os.path.basename(path))
                self._call_pandas(_WRITE, location, sample, small)
                return compare(sample, self._call_pandas(_READ, location, small))
        return compare(frame, self._call_pandas(_READ, location, path))

    def _call_pandas(self, direction, location, *args):
        """Read or write, with the first of several defaults that pandas does not refuse."""
        file_type = _check_file_type(self._file_type, location)
        extension = _extension_of(location) if self._file_type is None else None
        defaults = _DEFAULTS.get(extension, _DEFAULTS.get(file_type, ({}, {})))[direction]
        several = [defaults]
        if file_type == "csv" and direction == _READ:
            several.insert(0, {**defaults, **_C_DEFAULTS})
        kwargs = {**self._key, **(self.read_kwargs, self.write_kwargs)[direction]}
        kwargs.pop("storage_options", None)
        refused: Any = None
        for defaults in (*filter(None, several), {}):
            try:
                with _hdf_lock if file_type == "hdf" else nullcontext():
                    found = _FILE_TYPES[file_type][direction](*args, **{**defaults, **kwargs})
            except (OSError, ImportError, MemoryError):
                raise
            except Exception as exc:
                refused = refused or exc
                if file_type == "csv" and not re.search("argument|option|support|engine", str(exc)):
                    break
            else:
                # `read_html` returns the tables of a page; a page that we wrote has one.
                return found[0] if file_type == "html" and direction == _READ else found
        raise refused

    def _log(self, text, *args, level="info"):
        name = self._owner or prefect.context.get("task_full_name")
        text, args = ("Task '%s': " + text, (name, *args)) if name else (text, args)
        getattr(self.logger, level)(text, *args)


PandasResultHandler = PandasResult

with suppress(ImportError):  # From 0.11 to 0.13 `result_handler=` is converted by this table.
    from prefect.engine.results.result_handler_result import CONVERSIONS

    _attributes = ("path", "_file_type", "read_kwargs", "write_kwargs")
    CONVERSIONS.append((PandasResult, {n: n.lstrip("_") for n in _attributes}, PandasResult))


# Purged results, marks on states, and tags of tasks ------------------------------------------


class _PurgedResultType(type(NoResult)):  # type: ignore[misc]
    """The type of `PurgedResult`: a task that would read it fails, and says so."""

    def __eq__(self, other):
        # Where Prefect asks whether there is a result, there is none.
        return isinstance(other, type(NoResult))

    __hash__ = object.__hash__

    def __repr__(self):
        return "PurgedResult"

    __reduce__ = __repr__  # In a pickle, it is the name of what there is only one of.
    from_value = staticmethod(Result)


#: What a state has as its `_result` when its result was dropped; its `result` is None then.
PurgedResult = _PurgedResultType()

_KEEP = "prefect-ds:keep"  # A task with this tag keeps its result until the flow has ended.


class _Marks(NamedTuple):
    """What others have to know of the task run that a state is of."""

    origin: Optional[str] = None  # which task run of the flow it is
    name: Optional[str] = None
    file: Optional[str] = None  # that belongs to it: the same for all paths that lead there
    work: Tuple[str, ...] = ()  # One of these is the same for the same task with equal arguments.
    is_found: bool = False  # Its file was there, so that it did not run.
    newest: Optional[Tuple[float, str]] = None  # the newest file behind its result: when, where
    is_for_next_round: bool = False  # made by a round of the flow run that has not finished


def _marks_of(state):
    return getattr(state, "_prefect_ds", None) or _Marks()


class _Listed(Result):
    """What the children of a map have as their results: one list, put together when it is read."""

    def __init__(self, results):
        super().__init__(None)
        self.results: list = results

    #: that of the children, whatever Prefect sets
    value: Any = property(
        lambda self: [getattr(result, "value", None) for result in self.results],
        lambda self, value: None,
    )


def _list_children(state):
    """Where Prefect has hung a list of what its children have at hand into a map, hang in this."""
    if isinstance(state, Mapped) and all(isinstance(each, State) for each in state.map_states):
        results = [child._result for child in state.map_states]
        if any(result is PurgedResult or isinstance(result, PandasResult) for result in results):
            state._result = _Listed(results)


def _is_read(edge):
    """Whether the downstream task may look at the result that comes through this edge."""
    if edge.key is not None or edge.mapped:
        return True
    # Prefect's own triggers look at the type of a state only; others may look at its result.
    return getattr(edge.downstream_task.trigger, "__module__", None) != "prefect.triggers"


def _states_seen(upstream_states):
    """Pairs of an edge and a state that is seen through it: of a reduced map, each child's."""
    for edge, upstream in upstream_states.items():
        is_reduced = isinstance(upstream, Mapped) and not edge.mapped
        for state in upstream.map_states if is_reduced else [upstream]:
            if isinstance(state, State):
                yield edge, state


# Which file belongs to which task run --------------------------------------------------------

#: What Prefect itself keeps of a task; other attributes are part of what it computes.
_TASK_ATTRIBUTES = {*vars(Task()), "_cached_signature"}

#: Types of which equal values have equal pickles.
_PLAIN: tuple = (type(None), bool, int, float, complex, str, bytes, Decimal, Enum, uuid.UUID)
_PLAIN += (datetime.date, datetime.time, datetime.timedelta, numpy.generic)

_claims_lock = threading.Lock()  # Two threads may be the first of a flow run to ask for them.


def _text_of(value):
    """The same text for equal plain values, in any process; None for others."""
    if type(value) in (list, tuple, dict) and len(value) <= 1000:
        texts = [_text_of(item) for item in (value.items() if type(value) is dict else value)]
        if None in texts:
            return None
        value = f"{type(value)} {sorted(texts) if type(value) is dict else texts}"
    # Pickles of paths tell how these were made, and other processes cannot pickle all classes.
    if isinstance(value, (pathlib.PurePath, type)) and "<locals>" not in str(value):
        value = f"{type(value)} {value}"
    if isinstance(value, _PLAIN):
        with suppress(Exception):  # of classes that cannot be pickled
            return hashlib.sha256(pickle.dumps(value, 4)).hexdigest()
    return None


def _flow_run():
    names = ("flow_run_id", "flow_name", "scheduled_start_time")
    return tuple(str(prefect.context.get(name)) for name in names)


@functools.lru_cache(maxsize=100)  # Nobody tells when a flow run ends that is not ours.
def _claims_of(flow_run) -> Dict[str, _Marks]:
    """The task runs of a flow run in this process, by the file that belongs to them."""
    return {}


def _conflict(earlier, later):
    """What to say of two task runs with one file, unless they are the same with equal arguments."""
    if earlier.origin == later.origin or set(earlier.work) & set(later.work):
        return None
    return (
        f"The file {earlier.file} belongs to the task run {earlier.name!r} ({earlier.origin}). The "
        f"task run {later.name!r} ({later.origin}) of this flow run has the same path, but is not "
        "the same task with equal arguments. Put an argument that differs, or {task_name}, into it."
    )


def _settle_claims(states):
    """Set aside each file that two final states claim; raise if neither task run was refused."""
    by_file: Dict[str, list] = {}
    for state in filter(lambda state: _marks_of(state).file, states):
        by_file.setdefault(_marks_of(state).file, []).append(state)
    messages = []
    for file, claimed in by_file.items():
        first, *others = map(_marks_of, claimed)
        message = next(filter(None, (_conflict(first, other) for other in others)), None)
        if message:
            aside = None if _is_url(file) else _set_aside(file, {})
            for state in claimed:
                if aside and getattr(state._result, "_place", None):
                    state._result._place = aside
            remedy = f"It is now {aside}" if aside else "Delete it"
            message += f" {remedy}, since it may hold the result of either."
            get_logger("PandasResult").warning(message)
            if not any(state.is_failed() for state in claimed):
                messages.append(message)
    if messages:
        raise ValueError(" ".join(messages))


# A task whose file is there is not run -------------------------------------------------------


def checkpoint_handler(task_runner: TaskRunner, old_state: State, new_state: State) -> State:
    """Load a task's result instead of running it, if its file is there; else write the file.

    A state handler for `task_runner_state_handlers`, best as the last one. It acts on tasks that
    store their result by `PandasResult`, unless they have `checkpoint=False`, and leaves all
    others alone. Prefect's own checkpointing may be on or off: each file is written once.

    Parameters
    ----------
    task_runner : prefect.engine.TaskRunner
        A `DSTaskRunner`, if the path has fields.
    old_state, new_state : prefect.engine.state.State
        On Pending to Running the file is looked for, on Running to Success it is written. A file
        that is empty or cannot be read is kept beside, with ".unreadable-" and the time behind its
        name; there is a warning, and the task runs.

    Returns
    -------
    prefect.engine.state.State
        `new_state`; Success, if the file was found; or Failed, with the exception as its result, if
        the path cannot be filled or used, or if the frame cannot be stored, or not be read back.

    Raises
    ------
    TypeError
        If it is among the state handlers of a task or a flow.

    Examples
    --------
    >>> flow.run(task_runner_state_handlers=[checkpoint_handler])  # doctest: +SKIP
    """
    if not isinstance(task_runner, TaskRunner):
        raise TypeError("Not for a task: flow.run(task_runner_state_handlers=[checkpoint_handler])")
    run = task_runner
    if not isinstance(run, DSTaskRunner):  # Of its arguments nobody knows.
        run = DSTaskRunner(task_runner.task, None, getattr(task_runner, _STORAGE))
        run._note_run()
    if run.storage is None:
        return new_state
    try:
        if old_state.is_pending() and new_state.is_running():
            new_state = run.find_checkpoint(Success) or new_state
        elif old_state.is_running() and new_state.is_successful():
            run.write_checkpoint(new_state)
    except Exception as exc:
        # The task's own handlers have seen `new_state`, so they must hear of the failure.
        return TaskRunner.call_runner_target_handlers(task_runner, new_state, run.failed(exc))
    return new_state


# Which tasks run though their file is there --------------------------------------------------

#: In `prefect.context`: the names of tasks that the user gives, and the slugs of those tasks.
_RECOMPUTE, _RECOMPUTED = "recompute", "_prefect_ds_recomputed"

_OUT_OF_DATE = "out-of-date"  # among these: all whose files are older than those before them


def _note_recomputed(flow):
    """Note in the context of a flow run which tasks `recompute` means."""
    given = prefect.context.get(_RECOMPUTE) or ()
    given = given if isinstance(given, (list, tuple, set)) else str(given).split(",")
    patterns = list(filter(None, (str(pattern).strip() for pattern in given)))
    found = set()
    for pattern in patterns:
        tasks = {task for task in flow.tasks if task.name == pattern}
        if not tasks:
            name = pattern[:-1] if pattern.endswith("+") else pattern
            wildcard = ".*".join(map(re.escape, name.split("*")))
            tasks = {task for task in flow.tasks if re.fullmatch(wildcard, task.name, re.DOTALL)}
            for task in flow.sorted_tasks() if pattern.endswith("+") else ():
                if any(edge.upstream_task in tasks for edge in flow.edges_to(task)):
                    tasks.add(task)
        # A flow within a task has tasks of its own.
        if not tasks and pattern != _OUT_OF_DATE and _RECOMPUTED not in prefect.context:
            names = ", ".join(sorted({task.name for task in flow.tasks}))
            raise ValueError(f"recompute={pattern!r} matches no task of the flow. It has: {names}.")
        found |= tasks
    if prefect.context.get(_RECOMPUTE):
        slugs = getattr(flow, "slugs", None) or {task: task.slug for task in flow.tasks}
        of_no_task = {_OUT_OF_DATE}.intersection(patterns)
        prefect.context[_RECOMPUTED] = of_no_task.union(slugs[task] for task in found)


# How a task is run ---------------------------------------------------------------------------


class DSTaskRunner(TaskRunner):
    """A `TaskRunner` that lets the task's arguments fill the template in the path.

    This holds for plain and for mapped tasks, for constants, and for defaults of the signature.
    It also reads what a task that runs needs from files, and a task that needs a result that was
    purged fails. To store is for `checkpoint_handler`, or for Prefect's own checkpointing. Its
    parameters are those of Prefect's `TaskRunner`.

    Examples
    --------
    >>> FlowRunner(flow, task_runner_cls=DSTaskRunner).run()  # doctest: +SKIP
    """

    storage: Any = None  # where the result goes, if it is one of ours

    # What is known of a task run: `run` makes a copy of the runner for each.
    inputs: Any = None  # by argument; None as long as nobody knows
    upstream_states: Dict[Edge, State] = {}  # noqa: RUF012
    slug: str = ""
    marks: _Marks = _Marks()
    location: Optional[str] = None  # the filled path: once, as a task may change its arguments
    place: Any = None  # where that is
    reads_later: bool = False  # Files are read when somebody asks, not when they are found.
    recomputes: bool = False
    newest_input: Optional[Tuple[float, str]] = None  # of the files behind it: when, and where
    own_file: Optional[Tuple[float, str]] = None

    def __init__(self, task, *args, **kwargs):
        given = (getattr(task, _STORAGE), *args, *kwargs.values())
        if any(_is_class(storage, PandasResult) for storage in given):
            raise TypeError(f"The storage of {task.name!r} is PandasResult, not an instance of it.")
        super().__init__(task, *args, **kwargs)
        storage = getattr(self, _STORAGE)
        if isinstance(storage, PandasResult):
            # Prefect puts the task's target into it, and other tasks may have the same one.
            storage = copy.copy(storage)
            storage._puts_off = True
            setattr(self, _STORAGE, storage if _HAS_LOCATIONS else None)
            # That of a flow is for its author's tasks, not for what Prefect puts in between.
            modules = ("prefect.tasks.core.", "prefect.tasks.control_flow.")
            is_prefects = type(task).__module__.startswith(modules)
            opts_out = _CAN_OPT_OUT and task.checkpoint is False
            if not opts_out and (isinstance(task, FunctionTask) or not is_prefects):
                self.storage = storage

    @functools.wraps(TaskRunner.run)  # Prefect makes loops by an attribute of this function.
    def run(self, *args, **kwargs):
        given = kwargs.get("state", args[0] if args else None)
        run = copy.copy(self)
        with _reading(True) as outer:
            run.reads_later = _FLOW_RUNNER_MAPS and outer is False
            state = super(DSTaskRunner, run).run(*args, **kwargs)
        if state is not given:
            state._prefect_ds = run.marks._replace(newest=run.own_file or run.newest_input)
        if outer is not None and run.inputs is not None and _has_read_for_good(state):
            run.inputs.clear()  # The calls in the traceback of an error have it, too.
        return state

    def _note_run(self):
        """Note what the context says: which task run it is, and whether its file counts."""
        name, self.slug = map(prefect.context.get, ("task_full_name", "task_slug"))
        self.slug = self.slug or self.task.name
        self.marks = _Marks(f"{self.slug} {name}", name)
        recomputed = prefect.context.get(_RECOMPUTED)
        if prefect.context.get(_RECOMPUTE) and recomputed is None:
            raise ValueError("recompute needs DSFlowRunner or DSExecutor, which know all tasks.")
        self.recomputes = self.slug in (recomputed or ())

    def check_upstream_finished(self, state, upstream_states):
        """As Prefect's; moreover, note what is known of this run."""
        self._note_run()
        for edge, upstream_state in upstream_states.items():
            if not edge.mapped:
                _list_children(upstream_state)
        state = super().check_upstream_finished(state, upstream_states=upstream_states)
        maps = any(edge.mapped for edge in upstream_states)
        if maps and prefect.context.get("map_index") is None and not state.is_mapped():
            self._check_inputs(state, upstream_states)
        if self.recomputes and not _marks_of(state).is_for_next_round:
            caches, key = prefect.context.get("caches", {}), self.task.cache_key or self.task.name
            if key in caches:
                caches[key] = []  # Of several results, Prefect takes the oldest one.
            if state.is_cached():
                state = self.handle_state_change(state, Pending("It is to be recomputed."))
        read = [up for edge, up in _states_seen(upstream_states) if edge.key is not None]
        self.newest_input = max(filter(None, (_marks_of(up).newest for up in read)), default=None)
        return state

    def get_task_inputs(self, state, upstream_states):
        """As Prefect's; moreover, offer the inputs to the path's template."""
        self.inputs = super().get_task_inputs(state, upstream_states=upstream_states)
        self.upstream_states = upstream_states
        return self.inputs

    def check_target(self, state, inputs):
        """As Prefect's, if the task is not recomputed; a `PandasResult` as `checkpoint_handler`."""
        if state.is_cached() and _marks_of(state).origin and not self.recomputes:
            return state  # An earlier round has found it, and let go of what fills the target.
        if self.storage is None and not self.recomputes:
            new_state = super().check_target(state, inputs=inputs)
            self.marks = self.marks._replace(is_found=new_state is not state)
            return new_state
        found = self.find_checkpoint(Cached) if self.storage is not None else None
        return self.handle_state_change(state, found) if found else state

    def set_task_run_name(self, task_inputs):
        """As Prefect's, but what the name does not need is not read from its file."""
        name = self.task.task_run_name
        if isinstance(name, str):
            task_inputs = {n: result for n, result in task_inputs.items() if "{" + n in name}
        super().set_task_run_name(task_inputs=task_inputs)

    def set_task_to_running(self, state, inputs):
        """As Prefect's, if no input is gone."""
        self._check_inputs(state, self.upstream_states)
        return super().set_task_to_running(state, inputs=inputs)

    def get_task_run_state(self, state, inputs, **kwargs):
        """As Prefect's; moreover, read the inputs that are in files, if the task really runs."""
        if state.is_running():
            try:
                if self.storage is not None and prefect.context.get("checkpointing"):
                    self._locate()  # before the task changes its arguments, or the folder
                # In no variable, which the traceback of an error would hold.
                deque((result.value for result in inputs.values()), maxlen=0)
            except Exception as exc:
                message = f"Task '{self.marks.name}' cannot run: {exc}"
                return self.handle_state_change(state, self.failed(exc, message))
        return super().get_task_run_state(state, inputs=inputs, **kwargs)

    def handle_state_change(self, old_state, new_state):
        """As Prefect's, but a copy of what a handler has put in: it may be in use elsewhere."""
        state = super().handle_state_change(old_state, new_state)
        if state is not new_state:
            with _reading(False):  # To copy a state is to look at its result.
                state = copy.copy(state)
        return state

    def call_runner_target_handlers(self, old_state, new_state):
        """As Prefect's; moreover, write what Prefect wants written, if no handler will."""
        new_state = super().call_runner_target_handlers(old_state, new_state)
        is_on = prefect.context.get("checkpointing") and old_state.is_running()
        if is_on and checkpoint_handler not in self.state_handlers and new_state.result is not None:
            new_state = checkpoint_handler(self, old_state, new_state)
        for error in _errors_behind(old_state._result) if new_state.is_retrying() else ():
            error.__traceback__ = None  # It is in the log, and in nobody's state any more.
        return new_state

    def find_checkpoint(self, state_class):
        """A state of this class with what is stored for this task run; None if it has to run."""
        self._locate()
        storage, place = self.storage, self.place
        # Prefect's own task runner, with its checkpointing on, stores each round of a loop.
        is_round = self.inputs is None and prefect.context.get("task_loop_count", 1) > 1
        found = None if self.recomputes or is_round else _stat(place, storage._storage_options)
        if found is None:
            return None
        (modified, size), frame = found, None
        try:
            by_lines = "lines" in storage.read_kwargs or _extension_of(place) in ("jsonl", "ndjson")
            if size == 0 and not by_lines:
                raise EOFError("it is empty")
            self.own_file = (modified, place) if modified is not None else None
            if self._is_out_of_date():
                return None
            if not self.reads_later or _KEEP in self.task.tags:
                frame = storage._load(place)
        except Exception as exc:
            said = storage._put_aside(place, exc)
            storage._log("%s. The task runs.", said, level="warning")
            return None
        storage._log("Found %s", place)
        self.marks = self.marks._replace(is_found=True)
        return state_class(f"Found {place}.", result=self._stored(frame, frame is None))

    def write_checkpoint(self, success):
        """Write what a task has returned, unless it was skipped, or Prefect has."""
        self._locate()
        if success.is_skipped() or _location_of(success._result) == self.location:
            return
        gives_it_back = self.storage._save(success.result, self.place)
        modified, _ = _stat(self.place, self.storage._storage_options) or (None, None)
        self.own_file = (modified, self.place) if modified is not None else None
        lives_there = gives_it_back and self.reads_later and _KEEP not in self.task.tags
        success.result = self._stored(success.result, lives_there)

    def failed(self, exc, message=None):
        """The state of a task run that cannot go on, by default for what is wrong with its file."""
        if prefect.context.get("raise_on_exception"):
            raise exc
        where = f"Task '{self.marks.name}', path {getattr(self.storage, 'path', None)}"
        message = message or f"{where}: {type(exc).__name__}: {exc}"
        self.logger.error(message)
        return Failed(message, result=exc)

    def _stored(self, frame, lives_there):
        result = _stored(self.storage, self.location, frame)
        if isinstance(result, PandasResult):
            result._puts_off, result._owner = False, self.marks.name
            result._place = self.place if lives_there else None
        return result

    def _locate(self):
        """Fill the path, and take the file for this task run."""
        if self.location is not None:
            return
        path = self.storage.path
        is_function = callable(path)
        named = inspect.signature(path).parameters if is_function else _Template(path or "").fields
        if self.inputs is None and (named or is_function):
            raise TypeError(
                f"The path {path!r} is filled from the task's arguments, which only DSTaskRunner "
                "knows: run the flow with runner_cls=DSFlowRunner, which includes it."
            )
        arguments = self._defaults()
        for name, result in (self.inputs or {}).items():
            # What names a file is hardly ever a frame.
            is_stored = _location_of(result) is not None or isinstance(result, _Listed)
            arguments[name] = result.value if name in named or not is_stored else None
        mapped = [edge.key or "map_index" for edge in self.upstream_states if edge.mapped]
        location = self.storage._fill(arguments, mapped)
        self.place = file = _absolute(location)
        if not _is_url(file):
            file = os.path.normcase(os.path.realpath(file))
        self.marks = self.marks._replace(file=file, work=self._describe())
        with _claims_lock:
            message = _conflict(_claims_of(_flow_run()).setdefault(file, self.marks), self.marks)
        if message:
            raise ValueError(f"{message} Nothing was read or written.")
        self.location = location

    def _defaults(self):
        """What the arguments are that are left out: Prefect's `defaults_from_attrs` counts, too."""
        run = self.task.run
        own = vars(self.task) if inspect.ismethod(run) and hasattr(run, "__wrapped__") else {}
        parameters = inspect.signature(run).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return {n: own.get(n) if value is None else value for n, value in defaults.items()}

    def _describe(self):
        """A text for runs of one task with equal arguments, and one for copies of it, as well."""
        task, storage = self.task, self.storage
        own = {n: v for n, v in vars(task).items() if n not in _TASK_ATTRIBUTES}
        parts = [type(task), storage._file_type, storage.read_kwargs, storage.write_kwargs]
        parts += itertools.chain(*sorted({**self._defaults(), **own}.items()))
        parts = [_text_of(part) or f"{id(part)} in process {os.getpid()}" for part in parts]
        words = {"": self.marks.origin} if self.inputs is None else {}
        for edge, upstream_state in self.upstream_states.items():
            if edge.key in (self.inputs or {}):
                result = self.inputs[edge.key]
                index = prefect.context.get("map_index") if edge.mapped else ""
                maker = _marks_of(upstream_state).origin or f"{edge.key} of {self.slug}"
                words[edge.key] = f"that of {maker} {index}"
                made_by = result if _HAS_LOCATIONS else result.result_handler
                if isinstance(made_by, PandasResult) and _location_of(result) is not None:
                    words[edge.key] = f"stored {_location_of(result)}"
                elif not isinstance(result, _Listed):
                    words[edge.key] = _text_of(result.value) or words[edge.key]
        arguments = repr(sorted(words.items()))
        return _text_of(f"{self.slug} {arguments}"), _text_of(f"{task.name} {parts} {arguments}")

    def _is_out_of_date(self):
        """Whether to run a task since its file is older than one that it was made from."""
        newest, own = self.newest_input, self.own_file
        if newest is None or own is None or newest[0] <= own[0]:
            return False
        if _OUT_OF_DATE in prefect.context.get(_RECOMPUTED, ()):
            self.recomputes = True
        elif not _is_said(_flow_run(), self.slug):
            text = "%s is older than %s, which it was made from; recompute=%r computes it again."
            self.storage._log(text, own[1], newest[1], _OUT_OF_DATE, level="warning")
        return self.recomputes

    def _check_inputs(self, state, upstream_states):
        if state.is_finished():
            return
        seen = [(edge, up) for edge, up in _states_seen(upstream_states) if _is_read(edge)]
        what = "was purged when its last reader had finished"
        names = {edge.upstream_task.name for edge, up in seen if up._result is PurgedResult}
        if not names:
            what = "is not at hand: it was not stored, and another process had it, or it was None"
            names = {edge.upstream_task.name for edge, up in seen if self._is_lost(edge, up)}
        if not names:
            return
        message = (
            f"Task '{self.marks.name}' needs the result of {', '.join(map(repr, sorted(names)))}, "
            f"which {what}. Run the upstream task again (leave its state out of task_states), give "
            f"it a checkpoint, or keep its result with the tag {_KEEP!r}."
        )
        raise ENDRUN(self.handle_state_change(state, self.failed(ValueError(message), message)))

    def _is_lost(self, edge, upstream_state):
        """Whether a backend knows neither the value nor the place: it may be None, or be lost."""
        is_here = isinstance(edge.upstream_task, Constant) or _marks_of(upstream_state).origin
        is_told = isinstance(self, CloudTaskRunner) and type(upstream_state) in (Success, Cached)
        if is_here or not is_told or self.storage is None or edge.key is None:
            return False
        location = getattr(upstream_state._result, "location", None)
        return location is None and upstream_state.result is None


class _BeforeReport(TaskRunner):
    """Looks for the checkpoint when a task's handlers have acted: what it finds is reported."""

    def call_runner_target_handlers(self, old_state, new_state):
        new_state = super().call_runner_target_handlers(old_state, new_state)
        return checkpoint_handler(self, old_state, new_state)


class DSCloudTaskRunner(DSTaskRunner, CloudTaskRunner, _BeforeReport):
    """The `DSTaskRunner`, with its checkpoints, that reports to Prefect Server or Cloud."""

    def load_results(self, state, upstream_states):
        """As Prefect's, but what is in our files is read when somebody asks for it."""
        with _reading(False):
            state, upstream_states = super().load_results(state, upstream_states)
        for upstream_state in upstream_states.values():
            _list_children(upstream_state)
        return state, upstream_states


# How a flow is run ---------------------------------------------------------------------------


class DSFlowRunner(FlowRunner):
    """A `FlowRunner` that drops each result as soon as its last reader has finished.

    A flow then needs the memory of its working set: with `LocalExecutor` a map of any width,
    through any number of stages, needs two partitions alive at a time. It gives the same states
    and terminal results as Prefect's `FlowRunner`.

    Kept are the results that no other task reads, those of reference tasks, of tasks with the tag
    "prefect-ds:keep" or with `cache_for`, and whatever a task run that is not finished (Retrying,
    Paused, ...) will read again. Of all others, those that are in a file are read from there when
    somebody asks for them, and the rest is replaced by `PurgedResult`. States that the caller
    passes in are never changed, except those of an earlier round that has not finished.

    `recompute` in `prefect.context`, or `PREFECT__CONTEXT__RECOMPUTE` in the environment, makes
    tasks run though their file is there: names of tasks, with `*` for any characters and `+` behind
    for all tasks downstream as well, separated by commas or in a list; `out-of-date` are those
    whose files are older than files that they were made from. If a name matches no task, or a file
    belongs to two task runs, the flow run is Failed.

    Parameters
    ----------
    flow : prefect.Flow
        The flow to run.
    task_runner_cls : type, optional
        The class that runs the tasks, `DSTaskRunner` by default.
    state_handlers : iterable of callable, optional
        As for Prefect's `FlowRunner`.

    Examples
    --------
    >>> flow.run(runner_cls=DSFlowRunner, context={"recompute": "load+"})  # doctest: +SKIP
    """

    def __init__(self, flow: Flow, task_runner_cls: Any = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(flow, task_runner_cls or DSTaskRunner, *args, **kwargs)

    def get_flow_run_state(self, state: State, executor: Any, **kwargs: Any) -> State:
        """As Prefect's, on an executor that goes deep first and purges as it goes."""
        # Below 0.12 the context has only those parameters that were passed.
        defaults = {p.name: p.default for p in self.flow.parameters() if not p.required}
        prefect.context["parameters"] = {**defaults, **(prefect.context.get("parameters") or {})}
        if not isinstance(executor, DSExecutor):  # which does the rest itself
            executor = _in_order(self.flow, executor, self.logger)
        state = super().get_flow_run_state(state, executor=executor, **kwargs)
        if state.is_finished() and not isinstance(executor, (_Run, DSExecutor)):
            _settle_claims(itertools.chain(*map(_with_children, state.result.values())))
        return state


class DSExecutor(Executor):
    """An `Executor` that does what `DSFlowRunner` does, where Prefect chooses the flow runner.

    So under Prefect Server and Cloud, with any agent, and with plain `flow.run()`. It includes
    `DSTaskRunner` and `checkpoint_handler`. A task runner class of your own has to inherit from
    `DSTaskRunner`, under a backend from `DSCloudTaskRunner`.

    Parameters
    ----------
    flow : prefect.Flow
        The flow that has this executor. Tasks may still be added to it. A copy of it needs a
        `DSExecutor` of its own as soon as it has other tasks, edges or reference tasks.
    executor : prefect.executors.Executor, optional
        What runs the tasks: a `LocalExecutor` by default.

    Raises
    ------
    TypeError, NotImplementedError
        If these are no flow and no executor; below Prefect 0.12.
    ValueError
        In a flow run, which is then Failed: if the flow has another task, and as `DSFlowRunner`.

    Examples
    --------
    >>> flow.executor = DSExecutor(flow)  # doctest: +SKIP
    """

    def __init__(self, flow: Flow, executor: Optional[Executor] = None) -> None:
        if not isinstance(flow, Flow) or not isinstance(executor, (Executor, type(None))):
            raise TypeError(f"DSExecutor takes a flow and an executor, not {flow!r}, {executor!r}.")
        if not _FLOW_RUNNER_MAPS:
            raise NotImplementedError("Below Prefect 0.12, use flow.run(runner_cls=DSFlowRunner).")
        super().__init__()
        self.flow = flow
        self.executor = executor or LocalExecutor()
        self.logger = get_logger(type(self).__name__)  # 0.12.0 gives it none.
        self._under_way: dict = {}  # by thread, the flow run that is under way in it

    def __getstate__(self):
        return {**vars(self), "_under_way": {}}

    @contextmanager
    def start(self: Any = None) -> Iterator[None]:
        """Start Prefect's executor, for a run of the flow in this thread."""
        if self is None:
            raise TypeError("flow.executor is a class, not an instance as in DSExecutor(flow).")
        thread = threading.get_ident()
        outer = self._under_way.get(thread)
        self._under_way[thread] = _in_order(self.flow, self.executor, self.logger)
        try:
            with self._under_way[thread].start():
                yield
        finally:
            self._under_way[thread] = outer

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        """Put off a call; a task is run by a task runner that knows of checkpoints."""
        if "task_runner_cls" in kwargs:
            if kwargs["task"] not in self.flow.tasks:
                raise ValueError(
                    f"This DSExecutor is of a flow without the task {kwargs['task'].name!r}. A "
                    "changed copy needs one of its own: flow.executor = DSExecutor(flow)."
                )
            given, handlers = kwargs["task_runner_cls"], kwargs["task_runner_state_handlers"] or ()
            cls = {TaskRunner: DSTaskRunner, CloudTaskRunner: DSCloudTaskRunner}.get(given, given)
            if not _is_class(cls, DSTaskRunner):
                raise TypeError(
                    f"DSExecutor cannot run tasks by {cls!r}: let it inherit from "
                    "prefect_ds.DSTaskRunner, under a backend from prefect_ds.DSCloudTaskRunner."
                )
            kwargs["task_runner_cls"] = cls
            if not _is_class(cls, CloudTaskRunner) and checkpoint_handler not in handlers:
                kwargs["task_runner_state_handlers"] = [*handlers, checkpoint_handler]
        return self._under_way[threading.get_ident()].submit(fn, *args, **kwargs)

    def wait(self, futures: Any) -> Any:
        """Run calls until these are done; return what they came to."""
        return self._under_way[threading.get_ident()].wait(futures)


def _is_class(cls, base):
    return isinstance(cls, type) and issubclass(cls, base)


# When a result may go ------------------------------------------------------------------------


def _open(outcome, is_open=True):
    """Let anybody who asks read a result from its file, or only who waits for it, and keep it."""
    if isinstance(getattr(outcome, "_result", None), PandasResult):
        outcome._result._is_open = is_open


def _has_read_for_good(outcome):
    """Whether a task run that came to this will never read its inputs again."""
    if not isinstance(outcome, State):
        return True
    # A later round looks whether the inputs of a Cached task are the same, unless it was found.
    return outcome.is_finished() and (not outcome.is_cached() or _marks_of(outcome).is_found)


def _drop(state, is_kept=False):
    """Drop a state's result: what is in its file can be read again; others are purged, or kept."""
    if not isinstance(state, State) or not state.is_successful():
        return
    if isinstance(state._result, PandasResult) and state._result._place is not None:
        state._result._value = None
    elif not (is_kept or state.is_mapped() or state.is_skipped()):
        state._result = PurgedResult


def _is_large(outcome):
    """Whether an outcome holds, here or on the cluster, what is not certain to be small."""
    if isinstance(outcome, State):
        if isinstance(outcome._result, _Elsewhere):
            return True
        # What is in a file and not at hand has the value None.
        outcome = outcome.result if outcome.is_successful() and not outcome.is_mapped() else None
    items = outcome if isinstance(outcome, (list, tuple)) else [outcome]
    sizes = (len(item) if isinstance(item, (str, bytes)) else 1 for item in items)
    small = (int, float, str, bytes, type(None))
    return len(items) > 1000 or sum(sizes) > 1000 or not all(isinstance(i, small) for i in items)


def _errors_behind(result):
    """The error in a result, and those that led to it, but none of whoever runs the flow."""
    # In no file: the value of a `PandasResult` has another name.
    ahead, seen = [vars(result).get("value")], {id(sys.exc_info()[1])}
    while ahead:
        error = ahead.pop()
        if isinstance(error, BaseException) and id(error) not in seen:
            seen.add(id(error))
            yield error
            ahead += [error.__cause__, error.__context__, *(getattr(error, "exceptions", ()) or ())]


class _Plan:
    """What is known, during one flow run, of a task: its calls, and who reads its results."""

    def __init__(self, task, position):
        self.task: Task = task
        self.position: int = position  # in the order in which the flow runner goes
        self.last: int = position  # that of the last task downstream: then all calls are known
        self.is_passed: bool = False
        self.downstream: List[_Plan] = []
        self.edges: List[Edge] = []  # to it
        self.reads: List[Edge] = []  # those through which it reads,
        self.unsettled: List[Edge] = []  # and, if it is mapped, those with claims to give back
        self.readers: int = 0  # by how many edges its results are read
        self.is_kept: bool = False  # Its results stay; with a file, they stay there.
        self.is_awaited: bool = False  # The flow runner waits for it before it maps another task.
        self.maps: bool = False
        self.calls: List[_Call] = []  # the run of the task itself, then those of its children
        self.reading: int = 0  # how many of them may still read


class _Call:
    """A call that the flow runner has submitted: a task run, or a small helper of Prefect's.

    It stands for the state that it will come to, also in the arguments of other calls. In a pickle
    a call that is done simply is its state.
    """

    #: For a piece of work: what is called, `context` without what all share, by how many edges it
    #: will be read, and which calls of its own piece it `reads`.
    _SENT = ("function", "args", "kwargs", "context", "claims", "is_kept", "reads")
    #: What the flow runner's process knows. `index` is -1 for the task itself. `needs` are the
    #: calls that it cannot begin without, the first one last: `size` in all, of which some are
    #: still `missing`; `dependents` cannot begin without it. `value` is what it came to.
    _HERE = ("plan", "index", "number", "extra_context", "needs", "size", "missing", "dependents")
    __slots__ = (*_SENT, *_HERE, "is_wanted", "has_begun", "is_done", "value")

    def __init__(self, *sent):
        self.function, self.args, self.kwargs, self.context, *others = sent
        self.claims, self.is_kept, self.reads = others
        self.plan = self.extra_context = self.value = None
        self.index, self.number, self.size, self.missing = -1, 0, 0, 0
        self.needs: Any = []
        self.dependents: Any = []
        self.is_wanted = self.has_begun = self.is_done = False

    def __reduce__(self):
        if self.is_done:
            return _same, (self.value,)
        return _Call, tuple(getattr(self, name) for name in self._SENT)

    def end(self, value):
        """Note what it came to, and forget what only a waiting call needs."""
        if self.index >= 0:
            # Prefect has them, too, and so has the traceback of each error until the run is over.
            self.kwargs.get("upstream_states", {}).clear()
        self.value, self.is_done, self.has_begun = value, True, True
        self.function = self.args = self.kwargs = self.context = self.extra_context = None
        self.needs = self.dependents = self.reads = None

    def run(self, context, outcomes):
        """Run it, after those calls whose `outcomes` are there."""
        reduced = []

        def state_of(upstream):
            if isinstance(upstream, _Call):
                upstream = outcomes[upstream] if upstream in outcomes else upstream.value  # noqa: SIM401
            if isinstance(upstream, Mapped):
                # Prefect hangs children into a state, and before a reduce all their results.
                upstream = copy.copy(upstream)
                reduced.append(upstream)
            return upstream

        with _reading(False):
            args, kwargs = _replace((self.args, self.kwargs), (_Call, Mapped), state_of)
        if self.context is not None:
            kwargs["context"] = {**context, **self.context}
        # Prefect's helpers look into what they get; task runners that are not ours read at once.
        is_ours = _is_class(self.kwargs.get("task_runner_cls", DSTaskRunner), DSTaskRunner)
        with _reading("upstream_states" not in kwargs if is_ours else None):
            outcome = self.function(*args, **kwargs)
        kwargs.get("context", {}).pop("task_loop_result", None)  # A signal's traceback has it.
        if isinstance(outcome, State):
            for error in _errors_behind(outcome._result):
                if outcome.is_failed():
                    traceback.clear_frames(error.__traceback__)
                else:  # a signal, or what a task is retried after, which Prefect has logged
                    error.__traceback__ = None
            if _has_read_for_good(outcome):
                # Up to Prefect 0.11 every state holds its inputs, in case that it is retried. The
                # calls in the traceback of an error have those that were handed to them.
                outcome.cached_inputs = {}
                if _marks_of(self.kwargs.get("state")).is_for_next_round:
                    self.kwargs["state"].cached_inputs = {}
                kwargs.get("upstream_states", {}).clear()
                for each in reduced if not outcome.is_mapped() else ():  # Its children have them.
                    each._result = PurgedResult
        return outcome


def _same(value):
    return value


def _with_children(state):
    return [state, *getattr(state, "map_states", ())]


def _replace(futures, kinds, replacement):
    """A copy of nested dicts and lists in which other things stand for those of these kinds."""
    if isinstance(futures, kinds):
        return replacement(futures)
    if isinstance(futures, dict):
        return {key: _replace(future, kinds, replacement) for key, future in futures.items()}
    if isinstance(futures, (list, tuple, set)):
        return type(futures)([_replace(future, kinds, replacement) for future in futures])
    return futures


def _all_in(futures, kind):
    """All things of a kind in nested dicts and lists."""
    found: list = []
    _replace(futures, kind, found.append)
    return found


# What runs next ------------------------------------------------------------------------------


class _Order:
    """Which call comes next: deep before wide.

    What misses least comes first; then what has begun last; then the oldest. So a partition goes
    through all stages before the next one starts: https://docs.dask.org/en/stable/order.html.
    """

    def __init__(self):
        self._heap = []
        self._turns = itertools.count(1)

    def want(self, calls):
        """Let these calls have their turn, with all that they need."""
        ahead = list(calls)
        while ahead:
            call = ahead.pop()
            if not (call.has_begun or call.is_wanted):
                call.is_wanted = True
                ahead.extend(call.needs)
                if not call.missing:
                    heapq.heappush(self._heap, (float("inf"), 0, call.number, call))

    def push(self, call):
        """Note that one of the calls that this one needs is done."""
        # Of equals, what needs less lets go sooner; then what has begun last.
        heapq.heappush(self._heap, (call.missing, call.size, -next(self._turns), call))

    def next(self):
        """The call that comes next, or None as long as all that could are under way."""
        while self._heap:
            missing, _, _, call = self._heap[0]
            if not call.has_begun and missing in (call.missing, float("inf")):
                # Straight down to what it cannot begin without.
                while call.missing:
                    while call.needs and call.needs[-1].has_begun:
                        call.needs.pop()
                    if not call.needs:
                        break
                    call = call.needs[-1]
                if not call.missing:
                    return call
            # Begun, blocked or stale: it comes back when something that it needs is done.
            heapq.heappop(self._heap)
        return None


class _Run:
    """An executor that puts calls off until `wait`, and drops what nobody will read any more.

    A result starts with one claim for each edge through which it is read. Each mapped child adds
    one to the item that it reads. A task run gives its claims back when it has read for good, and
    a mapped task those of its edges when all its children are known. Without claims, the result
    goes: Kedro's count of readers (`AbstractRunner._release_datasets`), as calls become known.
    """

    def __init__(self, flow, executor, place, logger):
        self._executor, self._place, self._progress = executor, place, _Progress(logger)
        self._order, self._numbers = _Order(), itertools.count(1)
        tasks = flow.sorted_tasks()
        self._plans = {task: _Plan(task, position) for position, task in enumerate(tasks)}
        for edge in flow.edges:
            upstream, plan = self._plans[edge.upstream_task], self._plans[edge.downstream_task]
            upstream.downstream.append(plan)
            plan.edges.append(edge)
            plan.maps |= edge.mapped
            if getattr(edge, "flattened", False):
                upstream.readers += 10**9  # In each round, Prefect asks for all lengths again.
            elif _is_read(edge):
                plan.reads.append(edge)
                plan.unsettled.append(edge)
                upstream.readers += 1
        for task in reversed(tasks):
            plan = self._plans[task]
            plan.last = max([plan.position, *(each.last for each in plan.downstream)])
            plan.is_awaited = any(each.maps for each in plan.downstream)
            is_kept = task in flow.reference_tasks() or _KEEP in task.tags
            plan.is_kept = is_kept or not plan.readers or task.cache_for is not None
        self._coming: List[_Plan] = []  # the task that the flow runner submits, if any
        self._incomplete = sorted(self._plans.values(), key=lambda plan: -plan.last)
        self._awaited: List[_Call] = []
        self._current: Optional[_Call] = None  # the call that runs in this thread
        self._under_way = 0
        self._context: dict = {}  # what the contexts of all calls have in common
        self._given_ends: List[State] = []  # what tasks came to in earlier rounds
        self._is_reported = False  # Given states come from a backend: they are nobody else's.
        self.timeout_handler = getattr(executor, "timeout_handler", None)  # for Prefect 0.9

    @contextmanager
    def start(self):
        self._context = dict(prefect.context)
        with _reading(False), self._executor.start(), self._place.start(self._context, self._plans):
            try:
                yield
                self._close()
            finally:
                self._progress.close()
                for plan in self._plans.values():  # A call and its plan refer to each other.
                    plan.calls.clear()

    def submit(self, fn, *args, extra_context=None, context=None, **kwargs):
        is_child = self._current is not None  # submitted by a task run, below Prefect 0.12
        plan: Any = self._current.plan if self._current else self._plans.get(kwargs.get("task"))
        if plan is not None and not is_child:
            if plan not in self._coming:
                self._pass(self._coming)
                self._coming = [plan]
            self._is_reported |= _is_class(kwargs.get("task_runner_cls"), CloudTaskRunner)
        given = kwargs.get("state")
        if isinstance(given, State) and not self._is_ours(given):
            kwargs["state"] = copy.copy(given)
        elif isinstance(given, Mapped):
            given.result = None  # What the children hold.
        else:
            _open(given, False)
        if context is not None:
            shared = self._context.get
            context = {k: v for k, v in context.items() if v is None or shared(k) is not v}
        call = self._new_call(plan, fn, args, kwargs, context)
        call.extra_context, call.number = extra_context, next(self._numbers)
        self._connect(call, self._needed(args, kwargs))
        if plan is not None and call.index >= 0:
            self._progress.total += 1
            for edge in plan.reads:
                for item in self._items(edge, call.index):
                    item.claims += 1
        if is_child:
            self._order.want([call])
        elif plan is not None and plan.is_awaited and call.index == -1:
            self._awaited.append(call)
        return call

    def map(self, fn, *args):
        """What a mapped task submits its children by, below Prefect 0.12."""
        names = inspect.signature(fn).parameters
        return [self.submit(fn, **dict(zip(names, arguments))) for arguments in zip(*args)]

    def wait(self, futures):
        if self._current is None:
            if isinstance(futures, dict) and all(isinstance(key, Task) for key in futures):
                # All tasks are submitted: the flow runner is about to end.
                ends = (s for s in futures.values() if isinstance(s, State))
                self._given_ends = [each for s in ends for each in _with_children(s)]
                self._pass(self._plans.values())
                self._order.want(self._calls())
                self._advance(None)
            else:
                asked = [call for call in _all_in(futures, _Call) if not call.is_done]
                self._order.want(asked)
                if self._place.width > 1:
                    self._order.want(self._may_run_meanwhile())
                self._advance(asked)
        # Otherwise a task run waits for its children, whose turn comes later, or for what is done.
        found = self._place.resolve(futures)
        for edge, state in found.items() if isinstance(found, dict) else ():
            if isinstance(edge, Edge) and edge.mapped and isinstance(state, State):
                _open(state, False)  # so that what is read now stays at hand
                with _reading(not state.is_mapped()):  # Prefect maps over the items of a result.
                    state.result  # noqa: B018
        return found

    def _calls(self):
        return [call for plan in self._plans.values() for call in plan.calls]

    def _pass(self, plans):
        """Note that all calls of these tasks are known."""
        for plan in plans:
            plan.is_passed = True
            self._settle(plan)

    def _may_run_meanwhile(self):
        """While the flow runner waits: what it will map over, and what has all its readers."""
        calls, self._awaited = self._awaited, []
        position = self._coming[0].position if self._coming else 0
        while self._incomplete and self._incomplete[-1].last < position:
            calls += self._incomplete.pop().calls
        return calls

    def _new_call(self, plan, function=None, args=(), kwargs=None, context=None):
        claims, is_kept = (plan.readers, plan.is_kept) if plan else (0, True)
        call = _Call(function, args, kwargs or {}, context, claims, is_kept, ())
        if plan is not None:
            call.plan, call.index = plan, len(plan.calls) - 1
            plan.calls.append(call)
            plan.reading += 1
        return call

    def _needed(self, args, kwargs):
        """The calls among the arguments; for states of earlier rounds, calls that are done."""
        needed: Dict[_Call, None] = {}
        for argument in (*args, *kwargs.values()):
            for edge, upstream in argument.items() if isinstance(argument, dict) else ():
                plan = self._plans.get(getattr(edge, "upstream_task", None))
                if plan is None or plan.calls or not isinstance(upstream, State):
                    continue
                self._pass([plan])  # It is not submitted any more.
                for state in _with_children(upstream) if self._is_ours(upstream) else ():
                    done = self._new_call(plan)
                    done.end(state)
                    if not self._is_ours(state):
                        done.claims = float("inf")
                    else:
                        _open(state, False)
            needed.update(dict.fromkeys(_all_in(argument, _Call)))
        return needed

    def _is_ours(self, state):
        """Whether it was made by an earlier round, or for us: the caller's are never changed."""
        return self._is_reported or _marks_of(state).is_for_next_round

    def _connect(self, call, needed):
        needed = [other for other in needed if not other.is_done]
        for other in needed:
            other.dependents.append(call)
        call.needs[:0] = reversed(needed)
        call.missing += len(needed)
        call.size += len(needed)

    def _items(self, edge, index):
        """The item of a map that a child of this index reads through an edge, in a list."""
        calls = self._plans[edge.upstream_task].calls
        return calls[index + 1 : index + 2] if edge.mapped and len(calls) > 1 else []

    def _reads(self, call):
        """The calls on whose results this one holds claims, one for each edge."""
        for edge in call.plan.reads if call.plan else ():
            if call.index >= 0:
                yield from self._items(edge, call.index)
            elif not call.plan.maps:
                yield from self._plans[edge.upstream_task].calls

    def _advance(self, asked):
        """Run calls until these are done (None: until all that are wanted are)."""
        while asked is None or asked:
            while self._under_way < self._place.width:
                call = self._order.next()
                if call is None:
                    break
                self._begin(call)
            if not self._under_way:
                break
            for piece, outcomes in self._place.finished():
                self._under_way -= 1
                for call, outcome in zip(piece, outcomes):
                    self._finish(call, outcome)
            piece = outcomes = call = outcome = None
            while asked and asked[-1].is_done:
                asked.pop()

    def _begin(self, call):
        piece = [call]
        call.has_begun = True
        if self._place.width > 1:
            if call.kwargs.get("is_mapped_parent"):
                # All that comes of it is "Mapped": not worth to send what its children will read.
                return self._finish(call, *_run_piece(self._context, piece))
            self._grow(piece)
            for each in piece if len(piece) > 1 else ():
                each.reads = tuple(other for other in self._reads(each) if other in piece)
        self._under_way += 1
        self._current = call
        try:
            self._place.submit(piece)
        finally:
            self._current = None

    def _grow(self, piece):
        """Let those join that can run in one place after the others, and miss nothing else.

        So Dask fuses tasks, too: https://docs.dask.org/en/stable/optimize.html.
        """

        def resources(call):
            tags = (call.extra_context or {}).get("task_tags") or ()
            return {tag for tag in tags if tag.lower().startswith("dask-resource")}

        first, met = piece[0], {}  # type: _Call, Dict[_Call, int]
        for call in piece:
            is_end = first.index < 0 and (len(call.dependents) != 1 or call.claims != 1)
            if call.plan is None or isinstance(call.plan.task, _RESTARTED) or is_end:
                return
            # What goes when it has read would stay until the piece ends.
            if any(o.is_done and o.claims == 1 and _is_large(o.value) for o in self._reads(call)):
                return
            for other in call.dependents:
                met[other] = met.get(other, 0) + 1
                if met[other] < other.missing or not other.is_wanted or other.plan is None:
                    continue
                is_alike = other.index == first.index and resources(other) == resources(first)
                if is_alike and not isinstance(other.plan.task, _RESTARTED):
                    other.has_begun = True
                    piece.append(other)

    def _finish(self, call, outcome):
        plan, reads = call.plan, list(self._reads(call))
        children = _all_in(getattr(outcome, "map_states", ()), _Call)  # below Prefect 0.12
        for other in call.dependents:
            other.missing -= 1
            edges = other.plan.edges if children and other.plan else ()
            if any(edge.upstream_task is plan.task and not edge.mapped for edge in edges):
                self._connect(other, children)
            if other.is_wanted:
                self._order.push(other)
        call.end(outcome)
        if plan is not None:
            is_over = _has_read_for_good(outcome) and not isinstance(plan.task, _RESTARTED)
            plan.reading -= is_over
            for upstream in reads:
                if is_over:
                    self._release(upstream)
                elif upstream.is_done:
                    _drop(upstream.value, is_kept=True)  # It can be read again, if it has a file.
            self._settle(plan)
            self._release(call, 0)
            if call.index >= 0:
                self._progress.tell(outcome)

    def _settle(self, plan):
        """Give back the claims of a mapped task's edges through which nothing more is read."""
        own = plan.calls[0] if plan.calls else None
        # A map without children may get some in a later round.
        is_empty = own and isinstance(own.value, Mapped) and not plan.calls[1:]
        if not plan.is_passed or is_empty or (own and not plan.maps):
            return
        is_known = not own or (own.is_done and (plan.calls[1:] or _has_read_for_good(own.value)))
        for edge in list(plan.unsettled):
            upstream = self._plans[edge.upstream_task].calls
            if is_known if edge.mapped and len(upstream) > 1 else not plan.reading:
                plan.unsettled.remove(edge)
                for call in upstream:
                    self._release(call)

    def _release(self, call, claims=1):
        call.claims -= claims
        if call.is_done and call.claims <= 0:
            _drop(call.value, call.is_kept)

    def _close(self):
        """If there will be no other round, drop what was held for one; else mark it."""
        ends = [call.value for call in self._calls() if not call.plan.downstream]
        is_finished = all(isinstance(state, State) and state.is_finished() for state in ends)
        calls = [call for call in self._calls() if isinstance(call.value, State)]
        for call in calls:
            if call.claims < float("inf"):
                _drop(call.value, call.is_kept or not is_finished)
                marks = _marks_of(call.value)
                if marks.is_for_next_round is is_finished:
                    call.value._prefect_ds = marks._replace(is_for_next_round=not is_finished)
        for call in calls:
            _list_children(call.value)
            _open(call.value)
        if is_finished:
            _claims_of(_flow_run()).clear()
            _settle_claims([*self._given_ends, *(call.value for call in calls)])


def _run_piece(context, piece):
    """Run calls one after the other; return their outcomes. The calls themselves do not change."""
    outcomes: Dict[_Call, Any] = {}
    claims = {call: call.claims for call in piece}
    # Prefect merges the configuration that it is handed into the one that is there, key by key,
    # several times per task run: most of its time. Put in place, it is left out.
    context, own = dict(context), prefect.context.get("config")
    prefect.context["config"] = config = context.pop("config")
    if _CONTEXT_CONFIGURES:
        context.setdefault("checkpointing", config["flows"]["checkpointing"])
    try:
        for call in piece:
            outcomes[call] = call.run(context, outcomes)
            is_read = call.reads if _has_read_for_good(outcomes[call]) else ()
            for other in is_read:
                claims[other] -= 1
            for other in (*is_read, call):
                if claims[other] <= 0:
                    _drop(outcomes[other], other.is_kept)
    finally:
        prefect.context["config"] = own
    return [outcomes[call] for call in piece]


class _Progress:
    """How far the mapped tasks of a flow are: a line in the log, and on a terminal a bar."""

    SECONDS_BETWEEN_LINES, SECONDS_BEFORE_BAR = 30, 1

    def __init__(self, logger):
        self._logger, self._bar, self._begin = logger, None, time.monotonic()
        self._next_line = self._begin + self.SECONDS_BETWEEN_LINES
        self.total = self.done = self.found = self.failed = 0

    def tell(self, state):
        """Count a child's state, and say so if it is time to."""
        self.done += state.is_finished()
        self.found += _marks_of(state).is_found
        self.failed += state.is_failed()
        now = time.monotonic()
        is_due = self._bar is None and now >= self._begin + self.SECONDS_BEFORE_BAR
        if is_due and tqdm is not None and sys.stderr and sys.stderr.isatty():
            self._bar = tqdm(desc="mapped task runs", unit="")
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.update(self.done - self._bar.n)
        if now >= self._next_line:
            self._next_line = now + self.SECONDS_BETWEEN_LINES
            text = "Mapped task runs: %d of %d done, %d found, %d failed"
            self._logger.info(text, self.done, self.total, self.found, self.failed)

    def close(self):
        if self._bar is not None:
            self._bar.close()


# Where calls run: here, in pools, on Dask ----------------------------------------------------
# Dask's schedulers of threads and processes are not used: they would keep all results.


def _in_order(flow, executor, logger):
    """The executor for a flow run: one of ours that uses the given one, or else that itself."""
    _note_recomputed(flow)
    known = [
        (LocalExecutor, _Here, ["map"]),
        (DaskExecutor, _OnCluster, ["map"]),
        (LocalDaskExecutor, _InThreads, ["submit", "map", "wait"]),
    ]
    kind: Any = next((k for k in known if isinstance(executor, k[0])), (Executor, None, ()))
    (base, place, passed_over), cls = kind, type(executor)
    own = [name for name in passed_over if getattr(cls, name, 0) is not getattr(base, name, 0)]
    if place is None or own:
        reason = f"has a {' and a '.join(own)} of its own" if own else "is not known to prefect_ds"
        text = "%s %s. So the flow runs as without prefect_ds, and all results are kept."
        logger.warning(text, cls.__name__, reason)
        return executor
    if place is _InThreads and executor.scheduler.startswith(("sync", "single")):
        place, executor = _Here, LocalExecutor()  # It would keep all results, too.
    elif place is _InThreads and executor.scheduler in ("processes", "multiprocessing"):
        place = _InProcesses
    # Below 0.12, tasks submit their own children, from wherever they run.
    is_possible = place is _Here or _FLOW_RUNNER_MAPS
    return _Run(flow, executor, place(executor), logger) if is_possible else executor


class _Here:
    """Calls run one by one, in this thread."""

    width = 1  # how many pieces may be under way

    def __init__(self, executor):
        self._executor, self._done = executor, queue.Queue()  # type: Any, Any

    @contextmanager
    def start(self, context, tasks):
        self._context = context
        yield

    def submit(self, piece):
        outcomes = self._executor.wait(self._executor.submit(_run_piece, self._context, piece))
        self._done.put((piece, outcomes))

    def finished(self):
        """Pairs of a piece that has run and its outcomes; waits for at least one."""
        yield self._done.get()

    def resolve(self, futures):
        """The states for calls that are done."""
        return _replace(futures, _Call, lambda call: call.value if call.is_done else call)


class _InThreads(_Here):
    """Calls run in threads, as many as `LocalDaskExecutor` asks for."""

    _new_pool: Any = concurrent.futures.ThreadPoolExecutor
    _pickled: Optional[bytes] = None  # what the calls have in common, for other processes

    @contextmanager
    def start(self, context, tasks):
        import dask.config
        from dask.system import CPU_COUNT

        self._context, self._tasks = context, tasks
        self.width = dask.config.get("num_workers", None) or CPU_COUNT
        pool: Any = getattr(self._executor, "_pool", None)
        is_used = isinstance(pool, concurrent.futures.Executor)
        with nullcontext(pool) if is_used else self._new_pool(self.width) as self._pool:
            yield

    def submit(self, piece):
        self._tell(piece, self._begin(piece))

    def _begin(self, piece):
        return self._pool.submit(_run_piece, self._context, piece)

    def _tell(self, piece, future, whole=None):
        future.add_done_callback(lambda done: self._done.put((piece, done, whole)))

    def finished(self):
        piece, future, _ = self._done.get()
        yield piece, future.result()

    def _dumps(self, piece):
        """A pickle that refers by numbers to what is common, and the futures that it refers to."""
        if self._pickled is None:
            common = [self._context, *self._tasks]
            self._numbers = {id(thing): number for number, thing in enumerate(common)}
            self._pickled = cloudpickle.dumps(common)
        sources: dict = {}

        def persistent_id(thing):
            if isinstance(thing, _Elsewhere):
                new = len(sources), thing.future
                return sources.setdefault(id(thing.future), new)[0], thing.position
            return self._numbers.get(id(thing))

        with io.BytesIO() as file:
            pickler: Any = cloudpickle.CloudPickler(file)
            pickler.persistent_id = persistent_id
            pickler.dump(piece)
            return file.getvalue(), [future for _, future in sources.values()]


class _InProcesses(_InThreads):
    """Calls run in processes, as many as `LocalDaskExecutor` asks for."""

    def _new_pool(self, width):
        from dask.multiprocessing import get_context

        # One more waits in front of a process, which else would wait while a message is on its way.
        self.width = width + 1
        return concurrent.futures.ProcessPoolExecutor(width, get_context())

    def _begin(self, piece):
        work, _ = self._dumps(piece)
        return self._pool.submit(_run_pickled, self._pickled, work)

    def finished(self):
        for piece, outcomes in super().finished():
            yield piece, pickle.loads(outcomes)


class _OnCluster(_InThreads):
    """Calls run on a `DaskExecutor`; what is large stays on its cluster until it is wanted."""

    _shared: Any = None

    @contextmanager
    def start(self, context, tasks):
        self._context, self._tasks, self._turns = context, tasks, itertools.count(1)
        # Enough for workers that join; not all, which its scheduler would have in memory.
        self.width = max(1000, 4 * sum(self._executor.client.nthreads().values()))
        yield

    def _begin(self, piece):
        work, sources = self._dumps(piece)
        if self._shared is None:
            # Once for all calls, to all workers; what is lost with a worker, Dask makes anew.
            self._shared = self._executor.submit(_same, self._pickled)
            self._executor.client.replicate([self._shared])
        # What goes on with results that are there comes before what makes new ones.
        turn = next(self._turns)
        options = {"priority": turn if sources else -turn, "extra_context": piece[0].extra_context}
        return self._executor.submit(_run_on_worker, self._shared, work, *sources, **options)

    def finished(self):
        told = [self._done.get()]
        while not self._done.empty():
            told.append(self._done.get())
        there = []
        for piece, future, whole in told:
            if future.status != "finished":
                future.result()  # It raises, or what was lost with a worker is there again.
            if whole is None and future.type is not tuple:  # Its type comes with the news of it.
                digest = self._executor.submit(_without_what_is_large, future)
                self._tell(piece, digest, whole=future)
            else:
                there.append((piece, future, whole))
        answers = self._executor.wait([future for _, future, _ in there]) if there else []
        for (piece, _, whole), outcomes in zip(there, answers):
            for position, outcome in enumerate(outcomes):
                if isinstance(getattr(outcome, "_result", None), _Elsewhere):
                    outcome._result = _Elsewhere(whole, position)
            yield piece, outcomes

    def resolve(self, futures):
        found = super().resolve(futures)
        items = found.items() if isinstance(found, dict) else [(None, found)]
        # What the flow runner does not map over, it hands on.
        looked_at = [each for key, each in items if not isinstance(key, Edge) or key.mapped]
        states = {id(s): s for s in _all_in(looked_at, State)}.values()
        there = [s for s in states if isinstance(s._result, _Elsewhere)]
        where = {id(s._result.future): s._result.future for s in there}
        answers = dict(zip(where, self._executor.wait(list(where.values())) if where else []))
        for state in there:
            state._result = _result_in(answers[id(state._result.future)], state._result.position)
        return found


class _Elsewhere(Result):
    """Stands for a result that stays on the cluster."""

    def __init__(self, future=None, position=0):
        super().__init__(None)
        self.future, self.position = future, position


def _result_in(outcomes, position):
    """The result of a call that stayed on the cluster. If a worker was lost, it has run again."""
    state = outcomes[position]
    if not state.is_successful():
        what = f"{_marks_of(state).name!r} was lost with a worker, and is {state} now"
        raise ValueError(f"The result of the task run {what}. Run the flow again.")
    return state._result


def _without_what_is_large(outcomes):
    """The outcomes of a piece without what stays where it is."""
    outcomes = [copy.copy(outcome) for outcome in outcomes]
    for outcome in outcomes:
        if isinstance(outcome, State) and _is_large(outcome):
            outcome._result = _Elsewhere()
    return outcomes


# How it gets there ---------------------------------------------------------------------------


_load_shared = functools.lru_cache(maxsize=2)(pickle.loads)  # once per process and flow run


class _Unpickler(pickle.Unpickler):
    """Such as may be given a `persistent_load` of its own."""


def _run_work(shared, work, *sources):
    common = _load_shared(shared)

    def persistent_load(found):
        if isinstance(found, tuple):
            return _result_in(sources[found[0]], found[1])
        return common[found]

    unpickler: Any = _Unpickler(io.BytesIO(work))
    unpickler.persistent_load = persistent_load
    return _run_piece(common[0], unpickler.load())


def _run_pickled(shared, work):
    return cloudpickle.dumps(_run_work(shared, work))


def _run_on_worker(shared, work, *sources):
    outcomes = _run_work(shared, work, *sources)
    for outcome in outcomes:
        _drop(outcome, is_kept=True)
        _open(outcome, False)  # Dask asks for its size, and Prefect would read it.
    return outcomes if any(map(_is_large, outcomes)) else tuple(outcomes)  # which comes at once


# The names of the original prefect_ds: its modules are this one, under whatever name this file was
# imported, and `checkpoint_handler`, which is a module there, has itself as an attribute.
PurgedResultType = _PurgedResultType
for _as in ["pandas_result_handler", "task_runner", "flow_runner", "result", "checkpoint_handler"]:
    sys.modules[f"{__name__}.{_as}"] = sys.modules[__name__]
    globals().setdefault(_as, sys.modules[__name__])
checkpoint_handler.checkpoint_handler = checkpoint_handler  # type: ignore[attr-defined]
