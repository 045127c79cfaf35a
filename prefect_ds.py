"""Checkpoints for pandas DataFrames, and flows that free what nobody needs, for Prefect < 2.

The entry points, in the order in which data goes through them:

`PandasResultHandler`, `PandasResult`
    One class under two names: where and how a task's DataFrame is stored.
`checkpoint_handler`
    A state handler: a task whose file is there is not run; else it runs and its file is written.
`DSTaskRunner`
    A `TaskRunner` that lets the task's arguments fill the template in the path.
`DSFlowRunner`
    A `FlowRunner` that drops each result as soon as its last reader has finished.
`DSExecutor`
    An `Executor` that does all this where Prefect chooses the runners: under Server and Cloud.
`PurgedResult`
    What a dropped result is replaced with.

What differs between Prefect's releases is settled in the first section, by flags; below it, nothing
asks for a version. Then comes what happens to a frame: how its path is filled, how pandas writes it
and what gets lost by that, how its file appears, what is known of one that is there, and when it is
read; the storage that a user names; what is noted of a task run, and whose a file is. Then comes a
task run: what decides whether it takes place, the runner that a user names, how it takes place
again, and what its errors hold. Then comes a flow run: the runner and the executor that a user
names, when a result may go, what runs next, and how far it is. The rest is what a flow run is made
of: a piece of work, where it runs, how it gets there, and what Prefect's context costs.

The internals of Prefect that this file relies on are listed, and held, by
`test_touches_only_these_internals` in `test_prefect_ds.py`.
"""

import builtins
import concurrent.futures
import copy
import ctypes
import datetime
import errno
import functools
import gc
import hashlib
import inspect
import io
import itertools
import logging
import os
import pathlib
import pickle
import posixpath
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
import types
import uuid
import weakref
import zlib
from collections import ChainMap, Counter, deque, namedtuple
from contextlib import contextmanager, suppress
from decimal import Decimal
from enum import Enum
from heapq import heappop, heappush
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)

import cloudpickle
import numpy
import pandas
import prefect
import psutil
from prefect.core import Edge, Flow, Task
from prefect.engine import flow_runner as _prefect_flow_runner
from prefect.engine.cloud import CloudTaskRunner
from prefect.engine.flow_runner import FlowRunner
from prefect.engine.result import NoResult, Result
from prefect.engine.runner import ENDRUN
from prefect.engine.state import Cached, Failed, Mapped, Pending, State, Success
from prefect.engine.task_runner import TaskRunner
from prefect.tasks.core import collections as _prefect_collections
from prefect.tasks.core import operators as _prefect_operators
from prefect.tasks.core.constants import Constant
from prefect.tasks.core.function import FunctionTask
from prefect.utilities.collections import DotDict, merge_dicts
from prefect.utilities.logging import get_logger

try:
    from tqdm import tqdm
except ImportError:  # There is no progress bar then.
    tqdm = None

__version__ = "1.1.0"

__all__ = [
    "PandasResultHandler",
    "PandasResult",
    "checkpoint_handler",
    "DSTaskRunner",
    "DSFlowRunner",
    "DSExecutor",
    "PurgedResult",
]


# What the installed Prefect offers ----------------------------------------------------------

#: From 0.11 on a task keeps a `Result`, which knows its location; before, a `ResultHandler`.
_HAS_LOCATIONS = "result_handler" not in inspect.signature(TaskRunner.__init__).parameters

#: The attribute under which flows, tasks, and task runners have their storage.
_STORAGE = "result" if _HAS_LOCATIONS else "result_handler"

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

if "task_name" in inspect.signature(DaskExecutor._prep_dask_kwargs).parameters:  # up to 0.12.0

    def _submit_to_cluster(executor, function, *args, extra_context, priority):
        """Not by `DaskExecutor.submit`: it asks the cluster to keep what it submits."""
        extra_context = extra_context or {}
        kwargs = executor._prep_dask_kwargs(
            extra_context.get("task_full_name", ""), extra_context.get("task_tags", [])
        )
        return executor.client.submit(function, *args, priority=priority, **kwargs)

else:

    def _submit_to_cluster(executor, function, *args, extra_context, priority):
        return executor.submit(function, *args, extra_context=extra_context, priority=priority)


#: Methods of Prefect's states that ask for their results, but not for somebody who reads them.
_STATES_OWN = {"__getstate__", "__sizeof__", "__eq__", "load_result", "load_cached_results"}

#: Functions of Prefect that ask for results only to hand them on.
_HAND_ON = {"run_task", "get_flow_run_state", *_STATES_OWN}

#: Functions of Prefect that look at the length of a list, and hand on its items.
_HAND_ITEMS_ON = {"check_task_ready_to_map", "prepare_upstream_states_for_mapping"}
_HAND_ITEMS_ON |= {"run_mapped_task"}  # below 0.12

#: An error of several errors, where this Python has it.
_ERROR_GROUP: Any = getattr(builtins, "BaseExceptionGroup", ())

if sys.version_info >= (3, 13):

    def _set_local(frame, name, value):
        """Change a local variable of a call that is over."""
        frame.f_locals[name] = value

else:

    def _set_local(frame, name, value):
        frame.f_locals[name] = value
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


if _HAS_LOCATIONS:

    class _Storage(Result):
        """The contract of Prefect's `Result`, in terms of `_locate`, `_load` and `_save`."""

        def __init__(self, path, **kwargs):
            super().__init__(location=None if callable(path) else path, **kwargs)
            self._formatter = path if callable(path) else None

        def format(self, **kwargs):
            new = self.copy()
            new.location = self._locate(kwargs)
            return new

        def exists(self, location, **kwargs):
            return _exists(_Template(location).fill(kwargs), self._storage_options)

        def read(self, location):
            new = self.copy()
            new.location = location
            new.value = self._load(location)
            return new

        def write(self, value_, **kwargs):
            if self._is_put_off():
                return self.from_value(value_)
            new = self.format(**kwargs)
            new.value = value_
            self._save(value_, new.location)
            return new

    _no_storage = Result

    def _stored(storage, location, frame, file):
        result = storage.from_value(frame)
        result.location = location
        result.source = file
        return result

    def _location_of(result):
        return result.location

    def _accept_as_result_handler(cls):
        """Below 0.14 `result_handler=` is taken, too, and converted to a result by this table."""
        try:
            from prefect.engine.results.result_handler_result import CONVERSIONS
        except ImportError:
            return
        attributes = ("path", "_file_type", "read_kwargs", "write_kwargs")
        CONVERSIONS.append((cls, {name: name.lstrip("_") for name in attributes}, cls))

else:
    from prefect.engine.result import SafeResult
    from prefect.engine.result_handlers import ResultHandler

    class _Storage(ResultHandler):  # type: ignore[no-redef]
        """The contract of Prefect's `ResultHandler`, in terms of `_locate`, `_load` and `_save`."""

        def __init__(self, path, **kwargs):
            super().__init__(**kwargs)
            self.location = None if callable(path) else path
            self._formatter = path if callable(path) else None

        def read(self, loc):
            return self._load(loc)

        def write(self, result):
            location = self._locate({})
            self._save(result, location)
            return location

    def _no_storage():
        return None

    def _stored(storage, location, frame, file):
        result = _ResultOnDemand(frame, result_handler=storage)
        result.safe_value = SafeResult(location, result_handler=storage)
        result.source = file
        return result

    def _location_of(result):
        safe = getattr(result, "safe_value", NoResult)
        return safe.value if safe != NoResult else None

    def _accept_as_result_handler(cls):
        """It is one."""


# Where a frame is stored: the template in the path -------------------------------------------
# It is filled from what `PandasResult._fill`, in "The storage of a task", offers: arguments,
# parameters and the context.


class _Template(string.Formatter):
    """A path with fields, filled as by `str.format`, but never with a value that leads astray."""

    def __init__(self, path):
        self.path = path
        try:
            parts = list(self.parse(path))
        except ValueError as exc:
            raise ValueError(f"The path {path!r} is no template for str.format: {exc}.") from exc
        #: names of the fields, without attributes and items
        self.fields = sorted(
            {re.split(r"[.\[]", name)[0] for _, name, _, _ in parts if name is not None}
        )
        #: what stands before the first field: no value may lead out of its folder
        self.head = ""
        for literal, name, _, _ in parts:
            self.head += literal
            if name is not None:
                break

    def fill(self, values):
        try:
            filled = self.vformat(self.path, (), values)
        except Exception as exc:
            is_missing = isinstance(exc, KeyError) and exc.args[0] in self.fields
            reason = f"the field {exc} is missing" if is_missing else f"{type(exc).__name__}: {exc}"
            known = ", ".join(sorted(map(str, values)))
            raise ValueError(
                f"The path {self.path!r} cannot be filled: {reason}. There are the fields: {known}."
            ) from exc
        folder = os.path.dirname(self.head)
        if self.fields and not _is_inside(folder, filled):
            raise ValueError(
                f"The path {self.path!r} became {filled!r}, which leads out of the folder "
                f"{folder or os.curdir!r} that it names. Nothing was read or written. Write that "
                "folder into the path, or clean the value."
            )
        return filled

    def get_value(self, key, args, kwargs):
        return kwargs[key]

    def check_distinct(self, mapped):
        """Raise if it names nothing that tells apart the children of a mapped task."""
        distinct = {"map_index", "task_full_name", "task_run_id", "task_run_name", *mapped}
        if not distinct.intersection(self.fields):
            raise ValueError(
                f"The path {self.path!r} is the same for every child of this mapped task, so "
                "that they would share one file. These fields would tell them apart: "
                f"{', '.join(sorted(distinct))}."
            )


def _is_inside(folder, path):
    if _is_url(path):
        below = path[len(folder) :] if _is_url(folder) and path.startswith(folder + "/") else ".."
        return os.pardir not in below.split("/")
    folder, path = os.path.abspath(_local(folder)), os.path.abspath(_local(path))
    return path.startswith(os.path.join(folder, ""))


def _is_url(path):
    """Whether fsspec is to be asked; it joins protocols by "::", as in simplecache::s3://..."""
    return re.match(r"(?!(file|local)://)[A-Za-z][A-Za-z0-9+.-]+(://|::)", path) is not None


def _real_path(path):
    """The same string for all paths that lead to one file."""
    if _is_url(path):
        scheme, _, path = path.partition("://")
        return f"{scheme.lower()}://{posixpath.normpath(path.lstrip('/'))}"
    return os.path.normcase(os.path.realpath(_local(path)))


def _local(path):
    return os.path.expanduser(re.sub("^(file|local)://", "", path))


def _check_path(path):
    path = os.fspath(path)
    if not isinstance(path, str):
        raise TypeError(f"A path is a str or a PathLike of str, not {path!r}.")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)", path):
        raise ValueError(f"{path!r} was a URL before pathlib took a slash: pass a str.")
    bucket = path.partition("://")[2].partition("/")[0] if _is_url(path) else ""
    if "{" in bucket.replace("{{", ""):
        raise ValueError(
            f"The bucket or host of {path!r} has a field: write it out, so that no value of an "
            "argument leads to another one."
        )
    if not all(name[:1].isidentifier() for name in _Template(path).fields):
        raise ValueError(f"The fields of {path!r} need names, as in 'data_{{id}}.csv'.")
    return path


# How a frame is stored: what pandas can read and write ---------------------------------------


def _find_file_types():
    """Ask the installed pandas for its pairs of `read_*` and `to_*` that take a path."""
    found = {}
    for name in dir(pandas):
        prefix, _, file_type = name.partition("_")
        writer = getattr(pandas.DataFrame, "to_" + file_type, None)
        if prefix == "read" and writer is not None:
            target = list(inspect.signature(writer).parameters)[1]
            if re.search("path|buf|fname|writer", target):
                found[file_type] = (getattr(pandas, name), writer)
    found["hdf"] = tuple(map(_one_at_a_time, found["hdf"]))
    return found


_hdf_lock = threading.RLock()


def _one_at_a_time(function):
    """PyTables may end the process if two threads are in it."""

    @functools.wraps(function)
    def locked(*args, **kwargs):
        with _hdf_lock:
            return function(*args, **kwargs)

    return locked


_FILE_TYPES = _find_file_types()

#: Extensions that are not the name of their file type.
_EXTENSIONS = {
    "dta": "stata",
    "ftr": "feather",
    "h5": "hdf",
    "hdf5": "hdf",
    "htm": "html",
    "ods": "excel",
    "pkl": "pickle",
    "pq": "parquet",
    "xls": "excel",
    "xlsb": "excel",
    "xlsm": "excel",
    "xlsx": "excel",
}

_COMPRESSIONS = ("bz2", "gz", "xz", "zip", "zst")

#: From pandas 3 on floats are read back as they were written anyway, and the argument goes.
_EXACT_FLOATS = (
    {} if int(pandas.__version__.split(".")[0]) >= 3 else {"float_precision": "round_trip"}
)

#: Which file types need to be told the name of the file in a ".zip"; from 1.4 on pandas knows.
_NAMES_IN_ZIP = (
    {"csv"} if (1, 0) <= tuple(map(int, pandas.__version__.split(".")[:2])) < (1, 4) else set()
)

#: What makes a frame come back as it was: keyword arguments of the writer, and of the reader.
_DEFAULTS: dict = {
    "csv": (
        {"index": False},
        {"keep_default_na": False, "na_values": [""]},
    ),
    "excel": ({"index": False}, {"keep_default_na": False, "na_values": [""]}),
    "hdf": ({"key": "data", "mode": "w"}, {"key": "data"}),
    "html": (
        {"index": False, "float_format": str, "na_rep": ""},
        {"keep_default_na": False, "na_values": [""]},
    ),
    "json": ({"double_precision": 15}, {"precise_float": True}),
    "stata": ({"write_index": False}, {}),
    "xml": ({"index": False}, {}),
}

#: What the parser in C of `read_csv` takes besides, and no other: one type for a whole column.
_C_DEFAULTS = {"low_memory": False, **_EXACT_FLOATS}


def _takes_c_defaults(kwargs):
    """Whether `read_csv` uses its parser in C for these keyword arguments of the user's."""
    sep = kwargs.get("sep", kwargs.get("delimiter", ","))
    marks = [sep if sep != r"\s+" else " ", kwargs.get("quotechar", '"')]
    return (
        kwargs.get("engine") in (None, "c")
        and not kwargs.get("skipfooter")
        and all(mark is not None and len(mark.encode()) == 1 for mark in marks)
    )


def _check_file_type(file_type, path):
    """The name of a file type in lower case: the one given, or that which the extension tells."""
    known = f"The installed pandas has: {', '.join(sorted(_FILE_TYPES))}."
    if file_type is not None:
        if file_type.lower() not in _FILE_TYPES:
            raise ValueError(f"There is no file type {file_type!r}. {known}")
        return file_type.lower()
    extensions = os.path.basename(path).lower().split(".")[1:]
    while extensions and extensions[-1] in _COMPRESSIONS:
        extensions.pop()
    extension = extensions[-1] if extensions else ""
    file_type = _EXTENSIONS.get(extension, extension)
    if file_type not in _FILE_TYPES:
        raise ValueError(f"The extension of {path!r} tells no file type; name one. {known}")
    return file_type


# What a file does not keep -------------------------------------------------------------------

#: File types that keep values by the types of their columns; others by each value's text.
_KEEP_BY_TYPE = ("feather", "hdf", "orc", "parquet", "pickle")

#: Frames with up to so many cells are read back whole, to see what their file does not keep. Of
#: larger ones, and where the types of columns tell it, some rows are.
_MAX_CELLS = 200_000

_SAMPLE_ROWS = 100

#: Words that some reader of pandas takes for something else.
_WORDS = [
    "", "#N/A", "#N/A_N/A", "#NA", "-1.#IND", "-1.#QNAN", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "n/a", "NULL", "null", "NaN", "-NaN", "nan", "-nan", "None", "Inf", "inf", "-inf", "Infinity",
    "-Infinity", "True", "TRUE", "true", "False", "FALSE", "false",
]  # fmt: skip

#: Text that some reader or writer of pandas takes for something else.
_PATTERNS = {
    "return": "\r", "zero": "\0", "foreign": "[^\0-\x7f]", "error": "^#", "formula": "^=",
    "digits": r"^[\d,]+$", "escaped": "_x[0-9A-Fa-f]{4}_", "long": r"^[\0-\U0010ffff]{32768}",
}  # fmt: skip


def _is_numbered(frame):
    return frame.index.equals(pandas.RangeIndex(len(frame)))


def _kind_of(frame, file_type):
    """What frames have in common that a file type which keeps types keeps alike, or None."""
    index = frame.index
    levels = list(getattr(index, "levels", [index]))
    objects = [frame.iloc[:, number] for number in _objects(frame)]
    if file_type == "hdf" and (objects or not pandas.api.types.is_numeric_dtype(index.dtype)):
        return None  # It keeps text by value.
    objects += [level for level in levels if pandas.api.types.is_object_dtype(level.dtype)]
    if any(pandas.api.types.infer_dtype(values, skipna=True) != "string" for values in objects):
        return None  # Lists are kept in another way than dicts.
    return (
        type(frame), type(index), tuple(_name_of(level.dtype) for level in levels),
        tuple(index.names), _is_numbered(frame), tuple(frame.columns.names),
        _name_of(frame.columns.dtype), tuple(map(type, frame.columns)), tuple(frame.columns),
        tuple(map(_name_of, frame.dtypes)), len(frame) > 0,
        repr(frame.__dict__.get("_attrs")), str(getattr(index, "freq", None)),
    )  # fmt: skip


def _name_of(dtype):
    """The same string for types that a file keeps alike: with any categories of one type."""
    if hasattr(dtype, "categories"):
        return f"category, ordered: {dtype.ordered}, of {_name_of(dtype.categories.dtype)}"
    return f"{dtype!r} {getattr(dtype, 'storage', '')}"


def _objects(frame):
    """The numbers of the columns whose cells are objects of Python."""
    return [n for n, dtype in enumerate(frame.dtypes) if pandas.api.types.is_object_dtype(dtype)]


def _sample(frame, file_type):
    """A frame, of few rows if it is large, that loses in a file what `frame` would lose.

    File types keep column by column, so that a row of it need not be a row of `frame`: of each
    column it has the first and the last cells, and such that a reader takes for something else.
    """
    is_by_value = file_type not in _KEEP_BY_TYPE or _kind_of(frame, file_type) is None
    if len(frame) <= _SAMPLE_ROWS or (is_by_value and frame.size <= _MAX_CELLS):
        return frame
    half = _SAMPLE_ROWS // 10
    first, last = [*range(half)], [*range(len(frame) - half, len(frame))]
    telling: list = [[] for _ in frame.columns]
    if is_by_value:
        telling = [[*found.values()] for found in _telling_rows(frame, file_type)]
    length = max(map(len, telling), default=0)
    if length + len(first) + len(last) >= len(frame):
        return frame
    cells = {}
    for number, rows in enumerate(telling):
        column = frame.iloc[:, number]
        taken = [*first, *rows, *itertools.repeat(0, length - len(rows)), *last]
        # Neither by the series, whose index would be made, and stay, as large as a column; nor
        # by `take`, which would copy all of a column that is a part of an array.
        cells[number] = pandas.Series(column.array[numpy.array(taken)], dtype=column.dtype)
    sample = pandas.DataFrame(cells, index=range(len(first) + length + len(last)))
    if not _is_numbered(frame):
        sample.index = frame.index.take([*range(len(first) + length), *last])
    sample.columns = frame.columns
    if "_attrs" in frame.__dict__:
        sample.attrs = frame.attrs
    return sample


@numpy.errstate(all="ignore")
def _telling_rows(frame, file_type):
    """For each column the first row of each sort of cells that text may not keep."""
    found: list = [{} for _ in frame.columns]
    groups: dict = {}
    for number, dtype in enumerate(frame.dtypes):
        is_number = isinstance(dtype, numpy.dtype) and dtype.kind in "iuf"
        groups.setdefault(str(dtype) if is_number else number, []).append(number)
    for group, numbers in groups.items():
        chunk = 2**17 // len(numbers) + 1 if isinstance(group, str) else 2**14
        for start in range(0, len(frame), chunk):
            part = frame.iloc[start : start + chunk, numbers]
            settled = set.intersection(*({*found[number]} for number in numbers))
            for sort, mask in _sorts(part, file_type, settled):
                mask = mask.reshape(len(part), -1)
                for column in numpy.flatnonzero(mask.any(axis=0)):
                    if sort not in found[numbers[column]]:
                        found[numbers[column]][sort] = start + mask[:, column].argmax()
    return found


def _sorts(part, file_type, settled):
    """Names of sorts of cells, and masks of those in a part of a frame that are of this sort.

    The part has one column, or numbers of one type. What is `settled` need not be told again.
    """
    yield "missing", part.isna().values
    column = part.iloc[:, 0]
    values, kind = part.values, getattr(column.dtype, "kind", "")
    if not isinstance(column.dtype, numpy.dtype) and not pandas.api.types.is_string_dtype(column):
        return
    if kind == "f":
        yield "infinite", numpy.isinf(values)
        yield "small", (abs(values) < 1e-5) & (values != 0)
        if "fraction" not in settled:
            yield "fraction", _has_fraction(values)
    turns = {*range(8)} - settled  # One in a few such numbers keeps its digits.
    if kind in "iuf" and turns:
        long = (values > 1e15) | (values < -1e15)
        if kind == "f":
            long |= _has_fraction(values * 1e4)
        for turn in turns if long.any() else ():
            yield turn, long & (numpy.arange(len(part)) % 8 == turn).reshape(-1, 1)
    if kind == "M":
        yield "time", (column != column.dt.normalize()).values
        yield "fine", (column.dt.microsecond % 1000 + column.dt.nanosecond > 0).values
        yield "early", (column.dt.year < 1900).values
    if kind != "O":
        return
    if pandas.api.types.infer_dtype(column, skipna=True) != "string":
        sorts = [(type(v), isinstance(v, int) and abs(v) >= 2**63) for v in column]
        for sort in {*sorts}:
            yield sort, numpy.array([other == sort for other in sorts])
        column = pandas.Series([v if isinstance(v, str) else None for v in column], dtype=object)
    words = column.isin(_WORDS).values
    for word in set(column[words]):
        yield word, column.isin([word]).values
    if column.str.contains("|".join(_PATTERNS.values()), na=False).any():
        for name, pattern in _PATTERNS.items():
            yield name, column.str.contains(pattern, na=False).values.astype(bool)
    if "text" not in settled:
        numbers = pandas.to_numeric(column, errors="coerce").notna().values
        yield "text", ~(column.isna().values | words | numbers)
        yield "number", numbers & ~words
    if file_type in ("excel", "html", "xml") and "space" not in settled:
        yield "space", column.astype(str).str.contains(r"^[\s=]|\s\s|\s$|[^\S ]").values


def _has_fraction(values):
    return abs(values - numpy.trunc(values)) > 0  # It is False of what is missing or infinite.


_REMEDIES = (
    " read_kwargs={'dtype': ..., 'parse_dates': [...]} for columns, and write_kwargs="
    "{'index': True} with read_kwargs={'index_col': 0} for the index"
)


def _losses(frame, restored):
    """What differs in a frame that was written and read back: sentences, each with columns."""
    losses: dict = {}
    before, after = frame.index, restored.index
    names = list(before.names), list(after.names)
    if names[0] != names[1]:
        losses[f"the index comes back with the names {names[1]}, not {names[0]}"] = [None]
    elif len(frame) and not (after.equals(before) and _is_same(after.dtype, before.dtype)):
        losses[f"the index comes back as {type(after).__name__} ({after.dtype})"] = [None]
    if not restored.columns.equals(frame.columns):
        if set(restored.columns) != set(frame.columns) or not frame.columns.is_unique:
            some = [*restored.columns[:10], *["..."][: len(restored.columns) // 11]]
            losses[f"the columns come back as {some}"] = [None]
            return losses
        losses["the columns come back in another order"] = [None]
        restored = restored[frame.columns]
    one, other = frame.columns.dtype, restored.columns.dtype
    if not (_is_same(one, other) or (_is_text(one) and _is_text(other))):
        losses[f"the labels of the columns ({one}) come back as {other}"] = [None]
    if list(restored.columns.names) != list(frame.columns.names):
        losses[f"the names {list(frame.columns.names)} of the columns are lost"] = [None]
    if len(frame) != len(restored):
        losses["rows are lost, or come in addition"] = [None]
        return losses
    restored.index = frame.index
    dtypes = list(zip(frame.dtypes, restored.dtypes))
    alike = [number for number, (one, other) in enumerate(dtypes) if _is_same(one, other)]
    for number, name in enumerate(frame.columns):
        one, other = dtypes[number]
        if not _is_same(one, other):
            losses.setdefault(f"column {{}} ({one}) comes back as {other}", []).append(name)
    changed = []
    groups: dict = {}
    for number in alike:
        is_plain = isinstance(dtypes[number][0], numpy.dtype) and dtypes[number][0].kind != "O"
        groups.setdefault(str(dtypes[number][0]) if is_plain else number, []).append(number)
    for group, numbers in groups.items():
        one, other = frame.iloc[:, numbers], restored.iloc[:, numbers]
        if isinstance(group, str):
            one, other = one.values, other.values
            equal = ((one == other) | ((one != one) & (other != other))).all(axis=0)
            changed += [number for number, is_equal in zip(numbers, equal) if not is_equal]
        elif not _are_equal(one.iloc[:, 0], other.iloc[:, 0]):
            changed += numbers
    if changed:
        losses["values of column {} change"] = [frame.columns[number] for number in sorted(changed)]
    return losses


def _is_same(dtype, other):
    # NumPy's may raise when they are compared with those of pandas.
    return type(dtype) is type(other) and dtype == other


def _is_text(dtype):
    # That of categories may pass for one.
    return pandas.api.types.is_string_dtype(dtype) and not hasattr(dtype, "categories")


def _are_equal(one, other):
    """As `Series.equals`; moreover, objects of Python have to be of one type."""
    if not pandas.api.types.is_object_dtype(one.dtype):
        return one.equals(other)
    for before, after, missing, lost in zip(one, other, one.isna(), other.isna()):
        if missing and lost:
            continue
        try:
            if type(before) is not type(after) or not bool(before == after):
                return False
        except ValueError:  # Two arrays have no single answer.
            if not numpy.array_equal(before, after):
                return False
    return True


#: What the checks have found: losses by file type, keyword arguments and kind of frame.
_checked: dict = {}

#: What was said in this process: paths, losses and columns.
_said: set = set()


# How a file appears: whole or not at all -----------------------------------------------------


def _filesystem(path, storage_options):
    """The file system of fsspec, None for the local one, and the path in it."""
    if not _is_url(path):
        # A link stays a link to the new file; folders that ".." leaves need not be there.
        return None, os.path.realpath(_local(path))
    try:
        import fsspec
    except ImportError:
        raise ImportError(
            f"The path {path!r} is remote, and that takes the package fsspec, with what it needs "
            "for this protocol: pip install fsspec"
        ) from None
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
    if hasattr(filesystem, command):
        with suppress(NotImplementedError):
            getattr(filesystem, command)(*paths)
            return
    # Old releases of fsspec have only `get`, or only `rm`, and take names literally.
    try:
        getattr(filesystem, command.partition("_")[0])(*paths)
    except KeyError as exc:  # of "memory://"
        raise FileNotFoundError(paths[0]) from exc


def _exists(path, storage_options):
    filesystem, path = _filesystem(path, storage_options)
    if filesystem is None:
        return os.path.exists(path)
    return filesystem.exists(path) and not filesystem.exists(_mark_of_upload(path))


@contextmanager
def _existing_file(path, storage_options):
    """A local path under which pandas can read what is at `path`."""
    filesystem, path = _filesystem(path, storage_options)
    if filesystem is None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, os.path.basename(path))
        try:
            for file in _files_there(filesystem, path):
                os.makedirs(os.path.dirname(local + file[len(path) :]), exist_ok=True)
                _on_file(filesystem, "get_file", file, local + file[len(path) :])
        except FileNotFoundError:
            raise
        except Exception as exc:  # Each file system has errors of its own.
            raise OSError(errno.EIO, f"{path} cannot be fetched: {exc}") from exc
        yield local


#: While one file takes the place of another, a second writer in this process would find neither.
#: By process: one that is forked meanwhile must not wait for a thread that it does not have.
_appears_locks: Dict[int, Any] = {}


@contextmanager
def _new_file(path, storage_options, unreadable=None):
    """A local path under which pandas can write what then appears, whole, at `path`.

    A local file is written in a hidden folder beside its place, under its own name, which pandas
    writes into archives, and then renamed, as Luigi's `AtomicLocalFile` does:
    http://luigi.readthedocs.io/en/stable/api/luigi.local_target.html

    If the file that is `unreadable` is there by then, it gets another name.
    """
    place = path
    filesystem, path = _filesystem(path, storage_options)
    if filesystem is not None:
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, _as_pandas_knows_it(os.path.basename(path)))
            yield local
            if unreadable is not None:
                _set_aside(place, storage_options, unreadable)
            _upload(filesystem, local, path)
        return
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    _remove_leftovers(folder, name)
    hidden = os.path.join(folder, f"{_mark_of_this_host(name)}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    os.mkdir(hidden)
    partial = os.path.join(hidden, _as_pandas_knows_it(name))
    try:
        yield partial
        _flush_to_disk(partial)
        with _appears_locks.setdefault(os.getpid(), threading.Lock()):
            with suppress(FileNotFoundError):
                if os.access(path, os.R_OK):
                    shutil.copymode(path, partial)
            if unreadable is not None:
                _set_aside(path, storage_options, unreadable)
            _rename(partial, path)
    finally:
        _remove(hidden)


def _as_pandas_knows_it(name):
    """Pandas finds no engine for the extension XLSX."""
    root, extension = os.path.splitext(name)
    return root + extension.lower() if _EXTENSIONS.get(extension.lower()[1:]) == "excel" else name


def _rename(partial, path):
    """Rename a file or folder over the earlier one, if any. Of two writers one wins, whole."""
    earlier = os.path.join(os.path.dirname(partial), "earlier")
    while True:
        if os.path.isdir(partial) and os.path.isdir(path):
            # A folder cannot replace another one: the earlier one steps aside first.
            _remove(earlier)
            with suppress(FileNotFoundError):  # Another writer has just taken it.
                os.replace(path, earlier)
        try:
            os.replace(partial, path)
            break
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                if os.path.isdir(earlier):
                    os.replace(earlier, path)
                raise
            # Another writer's folder has come in between.


def _files(path):
    """A file, or all that are in a folder."""
    if not os.path.isdir(path):
        return [path]
    found = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sorted(found)


def _flush_to_disk(path):
    for file in _files(path):
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())


def _remove(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            os.remove(path)


#: When each large folder was last searched for leftovers (`time.monotonic`).
_searched: dict = {}


def _remove_leftovers(folder, name):
    """Remove what writers of this path left behind when they were killed."""
    if time.monotonic() - _searched.get(folder, -60) < 60:
        return
    start = _mark_of_this_host(name)
    siblings = os.listdir(folder)
    for sibling in siblings:
        pid = sibling[len(start) :].partition("-")[0]
        if sibling.startswith(start) and pid.isdigit() and not psutil.pid_exists(int(pid)):
            _remove(os.path.join(folder, sibling))
    if len(siblings) > 1000:
        # With thousands of files a search before each write would cost more than the writing.
        _searched[folder] = time.monotonic()


def _mark_of_this_host(name):
    return f".{_shortened(name)}~{socket.gethostname().partition('.')[0]}-"


def _shortened(name):
    """A name that leaves room for what is added to it: file systems take 255 bytes."""
    if len(name.encode()) <= 150:
        return name
    return f"{name.encode()[:140].decode(errors='ignore')}~{zlib.crc32(name.encode()):08x}"


def _upload(filesystem, local, path):
    """Make a local file or folder appear, whole, at a remote path."""
    is_folder = os.path.isdir(local)
    files = {file: file[len(local) :].replace(os.sep, "/") for file in _files(local)}
    if _can_rename(filesystem):
        _upload_and_rename(filesystem, files, path)
    elif is_folder:
        _upload_marked(filesystem, files, path)
    else:  # Stores of objects take an object whole.
        _on_file(filesystem, "put_file", local, path)
        if filesystem.exists(_mark_of_upload(path)):
            _on_file(filesystem, "rm_file", _mark_of_upload(path))


def _can_rename(filesystem):
    """Whether it has a command of its own to rename, as disks have; to others it is a copy."""
    from fsspec import AbstractFileSystem

    return getattr(filesystem.mv, "__func__", None) is not AbstractFileSystem.mv


def _upload_and_rename(filesystem, files, path):
    """Upload beside the place, and rename. Many do not rename onto what is there."""
    folder, _, name = path.rstrip("/").rpartition("/")
    hidden = f"{folder}/.{_shortened(name)}~{uuid.uuid4().hex[:8]}"
    for file, below in files.items():
        filesystem.makedirs((hidden + below).rpartition("/")[0], exist_ok=True)
        _on_file(filesystem, "put_file", file, hidden + below)
    earlier = hidden + "-earlier"
    try:
        if filesystem.exists(path):
            filesystem.mv(path, earlier)
        filesystem.mv(hidden, path)
    except BaseException:
        if filesystem.exists(earlier) and not filesystem.exists(path):
            filesystem.mv(earlier, path)
        _remove_there(filesystem, hidden)
        raise
    _remove_there(filesystem, earlier)


def _upload_marked(filesystem, files, path):
    """Upload one by one: the folder is not there as long as the mark beside it is.

    Of two writers one wins, whole: that which has written its name into the mark last; and one
    that finds no mark any more, since another one has finished meanwhile, starts again.
    """
    mark, name = _mark_of_upload(path), uuid.uuid4().hex.encode()

    def owner():
        filesystem.invalidate_cache()
        with suppress(FileNotFoundError), filesystem.open(mark, "rb") as opened:
            return opened.read()

    while True:
        with filesystem.open(mark, "wb") as opened:
            opened.write(name)
        earlier = filesystem.find(path)
        # What was there before the mark was read is of no writer that has marked it later.
        for file in earlier if owner() == name else ():
            with suppress(FileNotFoundError):
                _on_file(filesystem, "rm_file", file)
        for file, below in files.items():
            _on_file(filesystem, "put_file", file, path + below)
            if owner() != name:
                break
        else:
            with suppress(FileNotFoundError):
                _on_file(filesystem, "rm_file", mark)
            return
        if owner() is not None:
            with suppress(FileNotFoundError):  # The other writer may have removed it.
                _on_file(filesystem, "rm_file", path + below)
            return


def _mark_of_upload(path):
    """A file beside a remote folder that is there while the folder is not whole."""
    folder, _, name = path.rstrip("/").rpartition("/")
    return f"{folder}/.{_shortened(name)}~upload"


def _files_there(filesystem, path):
    return filesystem.find(path) if filesystem.isdir(path) else [path]


def _remove_there(filesystem, path):
    if not filesystem.exists(path):
        return
    folders = list(filesystem.walk(path)) if filesystem.isdir(path) else []
    for file in _files_there(filesystem, path):
        _on_file(filesystem, "rm_file", file)
    for folder, _, _ in reversed(folders):
        with suppress(Exception):  # Many know no folders.
            filesystem.rmdir(folder)


# What is known of a file that is there -------------------------------------------------------


def _modified(path, storage_options):
    """When a file was written, in seconds since 1970; None if its file system does not tell."""
    filesystem, path = _filesystem(path, storage_options)
    if filesystem is None:
        with suppress(FileNotFoundError):  # Another process has just removed it.
            return max((os.stat(file).st_mtime for file in _files(path)), default=None)
        return None
    with suppress(Exception):
        moment = filesystem.modified(path)
        return (
            moment if moment.tzinfo else moment.replace(tzinfo=datetime.timezone.utc)
        ).timestamp()
    return None


def _age(modified):
    """How old a file is, in words, or nothing."""
    if modified is None:
        return ""
    return f", written {datetime.timedelta(seconds=max(0, int(time.time() - modified)))} ago"


#: Patterns for how the files of a type begin, and for how they end. Text is only looked at where no
#: reader takes it otherwise: it may have other blanks, marks, or text around it than ours.
_ENDS: dict = {
    "bz2": (b"BZh", b""),
    "excel": (b"PK|\xd0\xcf\x11\xe0", b""),
    "feather": (b"ARROW1|FEA1", rb"(ARROW1|FEA1)\Z"),
    "gz": (rb"\x1f\x8b", b""),
    "hdf": (rb"(.{512})*\x89HDF\r\n\x1a\n", b""),
    "json": (b"", rb"(^|[\]}])[\s\0]*\Z"),
    "orc": (b"ORC", rb"ORC[\0-\xff]\Z"),
    "parquet": (b"PAR1|PARE", rb"PAR[1E]\Z"),
    "pickle": (b"", rb"\.\Z"),
    "xml": (b"", rb"(^|>)[\s\0]*\Z"),
    "xz": (rb"\xfd7zXZ", rb"YZ\Z"),
    "zip": (b"PK", rb"PK\x05\x06"),
    "zst": (rb"\x28\xb5\x2f\xfd", b""),
}


def _check_ends(path, storage_options, kinds):
    """Raise if a file cannot be opened, or does not begin and end as those of its kind must.

    Of which kind it is may depend on the version of pandas: it has to fit one of `kinds`.
    """
    filesystem, path = _filesystem(path, storage_options)
    is_folder = os.path.isdir(path) if filesystem is None else filesystem.isdir(path)
    if is_folder:
        if not (_files(path) if filesystem is None else filesystem.find(path)):
            raise EOFError("the folder is empty")
        return
    with open(path, "rb") if filesystem is None else filesystem.open(path, "rb") as file:
        begin = file.read(4096)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4096))
        end = file.read()
    if not begin and "json" not in kinds:  # That of no lines is empty.
        raise EOFError("the file is empty")
    for kind in kinds:
        begins, ends = _ENDS.get(kind, (b"", b""))
        if re.match(begins, begin, re.DOTALL) and re.search(ends, end):
            return
    raise ValueError(f"it does not begin and end as a file of type {kinds[0]} must")


def _identity(path, storage_options):
    """What tells the file that is at a path now from any later one; None if there is none."""
    filesystem, path = _filesystem(path, storage_options)
    try:
        if filesystem is not None:
            return filesystem.ukey(path)
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns, found.st_size
    except FileNotFoundError:
        return None


def _set_aside(path, storage_options, unreadable):
    """Give a file that cannot be read another name, and return that; None if it is gone."""
    if unreadable is None or _identity(path, storage_options) != unreadable:
        return None  # It is gone, or another one has been written meanwhile.
    filesystem, path = _filesystem(path, storage_options)
    if filesystem is not None:
        return _set_aside_there(filesystem, path)
    folder, aside = os.path.dirname(path), _aside(path)
    try:
        os.replace(path, aside)
    except FileNotFoundError:
        return None
    if _identity(aside, storage_options) != unreadable:
        os.replace(aside, path)  # Another process has written it since we looked.
        return None
    for earlier in _earlier_asides(path, aside, os.listdir(folder)):
        _remove(os.path.join(folder, earlier))
    return aside


def _set_aside_there(filesystem, path):
    aside = _aside(path)
    if _can_rename(filesystem):
        filesystem.mv(path, aside)
    else:
        for file in _files_there(filesystem, path):
            _on_file(filesystem, "cp_file", file, aside + file[len(path) :])
        _remove_there(filesystem, path)
    siblings = {
        p.rstrip("/").rpartition("/")[2]: p
        for p in filesystem.ls(os.path.dirname(path), detail=False)
    }
    for earlier in _earlier_asides(path, aside, siblings):
        _remove_there(filesystem, siblings[earlier])
    return aside


def _aside(path):
    """Another name for `path`, with another extension, that no later one takes."""
    folder, name = os.path.split(path)
    time = f"{datetime.datetime.now():%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    return os.path.join(folder, f"{_shortened(name)}.unreadable-{time}")


def _earlier_asides(path, aside, siblings):
    """Of the names of siblings those which unreadable files at this path have got before."""
    start = re.escape(_shortened(os.path.basename(path)))
    names = [
        s for s in siblings if re.fullmatch(start + r"\.unreadable-\d{8}T\d{6}-[0-9a-f]{6}", s)
    ]
    return [name for name in names if name != os.path.basename(aside)]


# What is stored lives in its file ------------------------------------------------------------


class _OnDemand:
    """A `Result` whose value is read when somebody asks for it.

    To functions of Prefect that only hand on what they get, it is its own value.
    """

    _held: Any = None
    #: where to read the value if it is not held: a `_File` or a `_Collection`
    source: Any = None

    @property
    def value(self):
        held = self._held  # Asked once: another thread may let go of it.
        if self.source is None or held is not None:
            return held
        asking = _who_asks()
        if asking in _HAND_ON:
            return self
        if asking in _HAND_ITEMS_ON and isinstance(self.source, _Collection):
            return self.source.items()
        return self.source.read()

    @value.setter
    def value(self, value):
        self._held, self.source = value, None

    def let_go(self):
        self._held = None
        self.source.let_go()

    def __getstate__(self):
        # What is in a file is read where it is needed: a place travels, not a frame.
        return dict(vars(self), _held=None) if _is_in_file(self) else vars(self)


def _who_asks():
    """The name of the function of Prefect that asks for a state's result on our behalf, or None."""
    frame: Any = sys._getframe(2)
    while frame.f_code is State.result.fget.__code__ or frame.f_code.co_name in _INLINE:
        frame = frame.f_back
    name = frame.f_code.co_name
    if name not in _HAND_ON | _HAND_ITEMS_ON or not _is_prefects(frame):
        return None
    return name if name in _STATES_OWN or _is_for_us(frame) else None


def _is_prefects(frame):
    return frame.f_globals.get("__name__", "").startswith("prefect.")


#: Task runners and executors with this attribute know how to read what they are handed.
_READS_ON_DEMAND = "_prefect_ds_reads_on_demand"


def _is_for_us(frame):
    """Whether what is handed on goes to somebody who knows how to read it."""
    while _is_prefects(frame):
        names = frame.f_locals
        runner = names.get("self")
        cls = names.get("task_runner_cls") or getattr(runner, "task_runner_cls", type(runner))
        if any(getattr(it, _READS_ON_DEMAND, False) for it in (cls, names.get("executor"))):
            return True
        frame = frame.f_back
    return False


_INLINE = {"<listcomp>", "<genexpr>"}


class _ResultOnDemand(_OnDemand, Result):
    """The result of a task that has no other one of its own."""

    def __repr__(self):
        return f"<Result: {self.source}>" if _is_unread(self) else super().__repr__()


def _on_demand(source):
    result = _ResultOnDemand(None)
    result.source = source
    return result


def _is_unread(value):
    """Whether it is a result that is to be read when somebody asks for its value."""
    return isinstance(value, _OnDemand) and value.source is not None and value._held is None


def _is_in_file(result):
    return isinstance(result, _OnDemand) and isinstance(result.source, _File)


def _at_hand(result):
    """The value of a result, as far as it is in memory."""
    if not _is_unread(result):
        return result.value
    return result.source.alive() if _is_in_file(result) else None


class _File:
    """A file with the frame that a task run has returned. Two who read it share what is alive."""

    def __init__(self, storage, place, written, again=None, frame=None):
        self._storage: PandasResult = storage
        self._place: str = place  # its absolute path, or URL
        #: when it was written, and where it is
        self.written: Optional[Tuple[float, str]] = written
        #: how its task run can take place again, where that is known
        self.again: Any = again
        self.was_read: bool = False
        #: whether to hold what is read until it is dropped: several children of a map read it
        self.is_shared: bool = False
        self._held: Any = None
        self.alive: Any = _nothing if frame is None else weakref.ref(frame)
        self._lock = threading.RLock()

    def __reduce__(self):
        return _File, (self._storage, self._place, self.written, self.again)

    def __repr__(self):
        return self._place

    def read(self):
        with self._lock:
            frame = self.alive()
            if frame is None:
                frame = self._read()
                self.alive = weakref.ref(frame)
                self.was_read = True
            self._held = frame if self.is_shared else None
        return frame

    def let_go(self):
        self._held, self.is_shared = None, False

    def holds_data(self):
        return self._held is not None

    def _read(self):
        options = self._storage._storage_options
        identity = _identity(self._place, options)
        try:
            return self._storage._load(self._place)
        except Exception as exc:
            if not _is_damage(exc, _check_file_type(self._storage._file_type, self._place)):
                raise  # The file may be as good as ever.
            if identity != _identity(self._place, options):
                return self._read()  # Another process has just written it.
            found = f"{self._place} cannot be read ({type(exc).__name__}: {exc})"
            if isinstance(exc, FileNotFoundError):
                found = f"{self._place} is gone"
            aside = _set_aside(self._place, options, identity)
            if aside is not None:
                found += f", so it is now {aside}"
            again = self.again and self.again.load()
            if again is None:
                raise ValueError(
                    f"{found}. What the task was run on is not at hand here. Run the flow once "
                    "more: without the file, the task will run."
                ) from exc
            frame, self.written = again.run(found)
            return frame


def _is_damage(error, file_type):
    """Whether an error in reading is due to the file, and not to where and how it is read."""
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return True
    # Libraries raise an OSError for what they read, too, but have no number for it.
    if getattr(error, "errno", None):
        return False
    if file_type == "pickle":
        return True  # Damaged, it may look for any module, or for any amount of memory.
    is_call = isinstance(error, TypeError) and "unexpected keyword argument" in str(error)
    return not (is_call or isinstance(error, (ImportError, MemoryError)))


def _nothing():
    return None


class _Collection:
    """Items that results hold, of which some are in files, put together when they are read."""

    def __init__(self, results, collect):
        self._results: dict = dict(results)
        self._collect = collect

    def items(self):
        """As `read`, but an item that is to be read is left as it is."""
        return self._collect({k: r if _is_unread(r) else r.value for k, r in self._results.items()})

    def read(self):
        return self._collect({key: result.value for key, result in self._results.items()})

    def holds_data(self):
        return any(
            not _is_in_file(r) and (not _is_unread(r) or r.source.holds_data())
            for r in self._results.values()
        )


#: Tasks that Prefect puts in where a list, tuple or dict of tasks is an argument.
_COLLECTIONS = tuple(getattr(_prefect_collections, name) for name in ("List", "Tuple", "Dict"))


def _collect(task, items):
    return task.run(**items)


def _listed(items):
    return list(items.values())


class _Mapped(Mapped):
    """The state of a mapped task; what its children have stored is read on demand."""

    def _set_result(self, value):
        if isinstance(value, list) and any(map(_is_unread, value)):
            results = (item if _is_unread(item) else Result(item) for item in value)
            value = _on_demand(_Collection(enumerate(results), _listed))
        State.result.fset(self, value)

    result = property(State.result.fget, _set_result)


_Mapped.__name__ = "Mapped"


def _hang_in(state):
    """Where Prefect has handed on a result as if it were a value, make it the state's result."""
    for name in ("value", "_held"):
        value = vars(state._result).get(name)
        if _is_unread(value):
            state._result = value


# The storage of a task -----------------------------------------------------------------------


class PandasResult(_OnDemand, _Storage):
    """Store a task's DataFrame in a file that is named in full.

    `PandasResultHandler` is the same class. Give it to a task as `result_handler=` below Prefect
    0.14, as `result=` from 0.11. There it is a `prefect.engine.result.Result` and can be used
    like any other; below it is a `prefect.engine.result_handlers.ResultHandler`.

    Parameters
    ----------
    path : str or os.PathLike, optional
        Where the file is: a template for `str.format`. Its fields are filled from the task's
        arguments first (this takes `DSTaskRunner`), then from the flow's parameters, then from
        `prefect.context` (`map_index`, `task_name`, `flow_name`, `today`, ...). Missing folders
        are made. From 0.11 on also a function of these fields as keyword arguments, and it can
        be left out where the task has a `target`. (Of arguments that are stored themselves, it
        gets those which its signature names.) A URL that fsspec understands is a path, too.
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
    TypeError
        If the path is no string, path or function; if keyword arguments are no dictionary.
    ValueError
        If the file type is unknown, or the path has no known extension to tell it; if the path is
        no template, has a field without a name or, in a URL, a field in the bucket or host; if a
        URL went through `pathlib`, which breaks it; below Prefect 0.11 if there is no path.

    Examples
    --------
    >>> PandasResult("data/{month:02}.parquet").file_type
    'parquet'
    """

    def __init__(
        self,
        path: Union[str, "os.PathLike[str]", Callable[..., str], None] = None,
        file_type: Optional[str] = None,
        read_kwargs: Optional[Dict[str, Any]] = None,
        write_kwargs: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
    ) -> None:
        path = kwargs.pop("location", None) if path is None else path
        if path is None and not _HAS_LOCATIONS:
            raise ValueError(f"{type(self).__name__} needs a path.")
        if path is not None and not callable(path):
            path = _check_path(path)
        if file_type is not None or isinstance(path, str):
            _check_file_type(file_type, path)
        for name, given in [("read_kwargs", read_kwargs), ("write_kwargs", write_kwargs)]:
            if not isinstance(given, (dict, type(None))):
                raise TypeError(f"{name} of the path {path!r} is no dictionary: {given!r}.")
        super().__init__(path, **kwargs)
        self._file_type = file_type
        self.read_kwargs = dict(read_kwargs or {})
        self.write_kwargs = dict(write_kwargs or {})

    def __repr__(self):
        return f"<{type(self).__name__}: {self.location or self._formatter}>"

    @property
    def path(self) -> Union[str, Callable[..., str], None]:
        """str or callable: the template of the path."""
        return self.location or self._formatter

    @property
    def file_type(self) -> Optional[str]:
        """str: the type that was given or that the path tells, None as long as there is neither."""
        if self._file_type is None and self.location is None:
            return None
        return _check_file_type(self._file_type, self.location)

    @property
    def _storage_options(self):
        options = self.write_kwargs.get("storage_options") or {}
        return dict(options, **(self.read_kwargs.get("storage_options") or {}))

    def _locate(self, values):
        """Fill the template; for the task's own storage, once, and take the file for it."""
        task_run = _TaskRun.current()
        if task_run is None or task_run.storage is not self:
            return self._fill(values, task_run)
        if task_run.location is None:
            location = self._fill(values, task_run, is_own=True)
            task_run.take(location)
            task_run.location = location
        return task_run.location

    def _fill(self, values, task_run, is_own=False):
        path: Any = self.path
        is_function = callable(path)
        template = _Template("" if is_function else path or "")
        named: Any = inspect.signature(path).parameters if is_function else template.fields
        arguments = task_run.arguments(named) if task_run else {}
        # Prefect passes its whole context along: given is what differs from that.
        offered = dict(prefect.context)
        given = {k: v for k, v in values.items() if k not in offered or v is not offered[k]}
        # In Prefect's context None means that there is no such thing.
        context = {k: v for k, v in offered.items() if v is not None}
        first = (arguments, given) if is_own else (given, arguments)
        fields = ChainMap(*first, context.get("parameters", {}), context)
        if is_function:
            # As on Prefect's own results: what there is not, is None.
            return _check_path(path(**ChainMap(fields, offered)))
        if path is None:
            raise ValueError("There is no path: give one to PandasResult, or a target to the task.")
        mapped = [e.key for e in task_run.upstream_states if e.mapped] if task_run else []
        is_child = mapped if task_run else "map_index" in context
        if is_child and (is_own or not template.fields):
            template.check_distinct([key for key in mapped if key and is_own])
        return template.fill(fields)

    def _is_put_off(self):
        task_run = _TaskRun.current()
        return task_run is not None and task_run.puts_off(self)

    def _load(self, location):
        with _existing_file(location, self._storage_options) as path:
            frame = self._read(path, location)
        if not isinstance(frame, pandas.DataFrame):
            raise TypeError(f"{location} holds a {type(frame).__name__}, not a pandas DataFrame.")
        self.logger.info("Task '%s': Loaded %s", _task_name(), location)
        return frame

    def _check_ends(self, location):
        """Raise if a file cannot be right, as far as that can be said without reading it."""
        extension = os.path.splitext(location)[1].lower()[1:]
        kinds = [_check_file_type(self._file_type, location)]
        if "compression" in self.read_kwargs:
            kinds = [""]
        elif extension in _COMPRESSIONS:
            kinds.append(extension)
        _check_ends(location, self._storage_options, kinds)

    def _read(self, path, location):
        reader, kwargs = self._pandas(location, 0, self.read_kwargs)
        frame = reader(path, **kwargs)
        # `read_html` returns the tables of a page; a page that we wrote has one.
        return frame[0] if isinstance(frame, list) else frame

    def _save(self, frame, location):
        """Write a frame. Return whether its file is known to give back exactly this frame.

        False means that something does not come back, of which there was a WARNING. True means
        that `_check` has found nothing, in the cells that it looks at.
        """
        if not isinstance(frame, pandas.DataFrame):
            raise TypeError(
                f"{type(self).__name__} stores a pandas DataFrame, but the task returned "
                f"{type(frame).__name__}. Nothing was written to {location}."
            )
        task_run = _TaskRun.current()
        is_own = task_run is not None and task_run.location == location
        unreadable = task_run.unreadable if is_own else None
        place = self._fixed(location)
        with _new_file(place, self._storage_options, unreadable) as path:
            self._write(frame, path, location)
            losses = self._check(frame, path, location)
        self.logger.info("Task '%s': Wrote %s", _task_name(), location)
        self._warn_of_losses(losses, location)
        return not losses

    def _fixed(self, location):
        """Where the location is: a task that changes the working directory does not move it."""
        task_run = _TaskRun.current()
        if _is_url(location) or not task_run or task_run.storage is not self:
            return location
        return os.path.join(task_run.folder, _local(location))

    def _write(self, frame, path, location):
        writer, kwargs = self._pandas(location, 1, self.write_kwargs)
        writer(frame, path, **kwargs)

    def _check(self, frame, path, location):
        """What the file at `path` does not keep of the frame, as `_losses` says it."""
        file_type = _check_file_type(self._file_type, location)
        if file_type == "pickle":
            return {}
        kind = _kind_of(frame, file_type) if file_type in _KEEP_BY_TYPE else None
        key = (file_type, repr((self.read_kwargs, self.write_kwargs)), kind)
        if kind and key in _checked:
            return _checked[key]
        sample = _sample(frame, file_type)
        try:
            try:
                if sample is frame:
                    raise EOFError
                with tempfile.TemporaryDirectory() as folder:
                    small = os.path.join(folder, os.path.basename(path))
                    self._write(sample, small, location)
                    restored = self._read(small, location)
            except Exception:  # Keyword arguments may ask for more than the sample has.
                sample, restored = frame, self._read(path, location)
        except Exception as exc:
            raise ValueError(
                f"{location} was not written, since it could not be read back: "
                f"{type(exc).__name__}: {exc}. Use another file type, such as parquet or pickle, "
                "or other keyword arguments."
            ) from exc
        frequency = getattr(frame.index, "freq", None)
        is_kept = sample is frame and getattr(restored.index, "freq", None) == frequency
        losses = _losses(sample, restored)
        if frequency is not None and not is_kept:
            losses[f"the frequency {frequency} of the index is lost"] = [None]
        if frame.__dict__.get("_attrs") and restored.__dict__.get("_attrs") != frame._attrs:
            losses["its attrs are lost"] = [None]
        if type(restored) is not type(frame):
            losses[f"a {type(frame).__name__} comes back as {type(restored).__name__}"] = [None]
        if kind:
            _checked[key] = losses
        return losses

    def _warn_of_losses(self, losses, location):
        """Say, once per process, path and loss, what will not come back as it was."""
        said = []
        for sentence, columns in losses.items():
            keys = [(self._template(location), sentence, column) for column in columns]
            new = [key[-1] for key in keys if key not in _said]
            _said.update(keys)
            if new:
                more = f" and {len(new) - 5} more" if len(new) > 5 else ""
                said.append(sentence.replace("{}", ", ".join(map(repr, new[:5])) + more))
        if said:
            self.logger.warning(
                "Task '%s': %s does not keep all of the frame: %s. The file types parquet and "
                "pickle keep more, or try%s.",
                _task_name(), location, "; ".join(said), _REMEDIES,
            )  # fmt: skip

    def _template(self, location):
        path = self.path or location
        return os.path.abspath(path) if isinstance(path, str) else getattr(path, "__qualname__", "")

    def _pandas(self, location, direction, kwargs):
        """The function of pandas for this file, and its keyword arguments."""
        file_type = _check_file_type(self._file_type, location)
        defaults = _DEFAULTS.get(file_type, ({}, {}))[1 - direction]
        if file_type == "csv" and direction == 0 and _takes_c_defaults(kwargs):
            defaults = {**defaults, **_C_DEFAULTS}
        if file_type in _NAMES_IN_ZIP and direction == 1 and location.endswith(".zip"):
            name = os.path.basename(location)[: -len(".zip")]
            defaults = {**defaults, "compression": {"method": "zip", "archive_name": name}}
        kwargs = {**defaults, **kwargs}
        kwargs.pop("storage_options", None)
        return _FILE_TYPES[file_type][direction], kwargs


PandasResultHandler = PandasResult

_accept_as_result_handler(PandasResult)


def _task_name():
    return prefect.context.get("task_full_name", "")


# Marks on states, and tags of tasks ----------------------------------------------------------


class _PurgedResultType(type(NoResult)):  # type: ignore[misc]
    """The type of `PurgedResult`, which stands for a result that was dropped.

    A state's `result` is then None, and `state._result is PurgedResult`; it stays the same object
    in a pickle. A task that would read it fails, and says so.
    """

    def __eq__(self, other):
        # Where Prefect asks whether there is a result, there is none.
        return isinstance(other, type(NoResult))

    def __hash__(self):
        return id(self)

    def __repr__(self):
        return "<Purged result>"

    def __str__(self):
        return "PurgedResult"

    def __reduce__(self):
        return "PurgedResult"

    def copy(self):
        return self

    def from_value(self, value):
        return Result(value)

    def to_result(self, result_handler=None):
        return self


#: What a purged state has as its `_result`; the state's `result` is None. There is only this one.
PurgedResult = _PurgedResultType()

#: A task with this tag keeps its result until the flow has ended.
_KEEP = "prefect-ds:keep"

#: Which task run it is the state of: the same string in every process.
_ORIGIN = "_prefect_ds_origin"

#: Which file belongs to the task run, as `_settle_claims` compares it.
_CLAIM = "_prefect_ds_claim"

#: The task was computed again, in the flow run that started at this time.
_RECOMPUTED = "_prefect_ds_recomputed"

#: All tasks downstream are to be computed again, too, in the flow run that started at this time.
#: `DSExecutor` has it in the context as well.
_SPREADS = "_prefect_ds_recompute_spreads"

#: The task's file was found, so that it did not run.
_FOUND = "_prefect_ds_found"

#: The newest file that the result was made from: when it was written, and where it is.
_NEWEST = "_prefect_ds_newest"

#: A round of the flow run that has not finished has made the state, for the next one.
_FOR_NEXT_ROUND = "_prefect_ds_for_next_round"


# What is known of the task run that is under way ---------------------------------------------


class _TaskRun:
    """What the functions of this file need to know of the task run that they are called in.

    It is kept in the thread and not in `prefect.context`, which Prefect pickles for tasks with a
    `timeout`: the process that runs them would have to import this file, and pandas, within
    their time.
    """

    #: `run`: the task run of a `DSTaskRunner`. `plain`: that of another class, which tells
    #: `checkpoint_handler` less.
    _in_thread = threading.local()

    def __init__(self, task_runner):
        self.task_runner: TaskRunner = task_runner
        #: which task run it is
        self.key: _Key = _key()
        #: what the task gets, by argument; None as long as that is not known
        self.inputs: Optional[Dict[str, Result]] = None
        #: where `inputs` come from
        self.upstream_states: Dict[Edge, State] = {}
        #: where its result is, or will be, stored: filled once, as a task may change its arguments
        self.location: Optional[str] = None
        #: that the file at `location` belongs to it
        self.claim: Optional[_Claim] = None
        #: the file at `location` that is there but could not be read, as `_identity` tells it
        self.unreadable: Any = None
        #: what it has read, held until it ends: Prefect asks for it more than once
        self.read: list = []
        #: the newest file that its inputs were made from: when it was written, and where it is
        self.newest_input: Optional[Tuple[float, str]] = None
        #: the same of its own file
        self.own_file: Optional[Tuple[float, str]] = None
        #: whether Prefect has asked for its result to be written, which is put off until it ends
        self.is_to_be_written: bool = False
        #: whether the task runs though its file is there
        self.recomputes: bool = False
        #: whether all tasks downstream do so, too
        self.spreads: bool = False
        #: names of the upstream tasks whose results it would read, but which were purged
        self.purged_inputs: List[str] = []
        #: where relative paths begin: the task itself may change that
        self.folder: str = ""
        with suppress(FileNotFoundError):  # A folder that is gone matters to relative paths only.
            self.folder = os.getcwd()

    @classmethod
    @contextmanager
    def started_by(cls, task_runner):
        outer = getattr(cls._in_thread, "run", None)
        cls._in_thread.run = cls(task_runner)
        try:
            yield cls._in_thread.run
        finally:
            cls._in_thread.run = outer

    @classmethod
    def of(cls, task_runner):
        """The task run that this task runner has under way in this thread."""
        run = getattr(cls._in_thread, "run", None)
        if run is None or run.task_runner is not task_runner:
            run = getattr(cls._in_thread, "plain", None)
            if run is None or run.task_runner is not task_runner or run.key != _key():
                run = cls._in_thread.plain = cls(task_runner)
        return run

    @classmethod
    def current(cls):
        """The task run that is under way in this thread, if anything is known of it, or None."""
        for run in (getattr(cls._in_thread, name, None) for name in ("run", "plain")):
            # A flow that a task runs is not that task run.
            if run is not None and run.key == _key():
                return run
        return None

    @classmethod
    def is_any_under_way(cls):
        """Whether this is called in a task, be it of another flow."""
        return getattr(cls._in_thread, "run", None) is not None

    def puts_off(self, storage):
        """Whether Prefect's wish to write is put off: what a loop has in between is not stored."""
        if storage is not self.storage or not isinstance(self.task_runner, DSTaskRunner):
            return False
        self.is_to_be_written = True
        return True

    @property
    def storage(self):
        return _storage_of(self.task_runner)

    @property
    def origin(self):
        """Which task run of the flow this is, in words."""
        return f"{self.key.slug} {self.key.full_name}"

    @property
    def started(self):
        """When the flow run has started, in words."""
        return str(self.key.scheduled)

    def arguments(self, names):
        """All arguments by name, defaults included; None for those stored that are not in `names`.

        These are not read: what names a file is hardly ever a frame.
        """
        if self.inputs is None:
            return {}
        arguments = self._defaults()
        for name, result in self.inputs.items():
            is_stored = _location_of(result) or _is_unread(result)
            arguments[name] = result.value if name in names or not is_stored else None
        return arguments

    def _defaults(self):
        parameters = inspect.signature(self.task_runner.task.run).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def take(self, location):
        """Take the file for this task run; raise if it belongs to another one."""
        slug, full_name = self.key.slug, self.key.full_name
        task = _describe_task(self.task_runner.task, slug, self.storage)
        arguments = self._describe_arguments()
        claim = _Claim(_real_path(location), full_name, slug or task, task, arguments)
        with _claims_lock:
            claims = _known_of_flow_run("claims")
            origin, earlier = claims.setdefault(claim.file, (self.origin, claim))
        message = origin != self.origin and _conflict(earlier, claim)
        if message:
            raise ValueError(message + " Nothing was read or written.")
        self.claim = claim

    def _describe_arguments(self):
        if self.inputs is None:
            return f"those of {self.origin}"
        # Of tasks with one function, the defaults are the same objects.
        task = _describe_task(self.task_runner.task, self.key.slug, self.storage)
        arguments = {k: _describe(v, f"{k} of {task}") for k, v in self._defaults().items()}
        for edge, state in self.upstream_states.items():
            if edge.key in self.inputs:
                arguments[edge.key] = self._describe_input(edge, state)
        return _digest(arguments)

    def _describe_input(self, edge, upstream_state):
        result = (self.inputs or {})[edge.key]
        location = _location_of(result)
        if location is not None:
            return f"stored {location}"
        origin = getattr(upstream_state, _ORIGIN, None) or f"{edge.key} of {self.key.slug}"
        if upstream_state.is_mapped() or _is_unread(result):
            return origin
        index = f"[{prefect.context.get('map_index')}]" if edge.mapped else ""
        return _describe(result.value, origin + index)

    def _describe_result(self):
        """Where it comes from: the same string, if Prefect itself makes it of equal arguments."""
        task = self.task_runner.task
        if self.inputs is None or type(task).__module__ not in _PURE:
            return self.origin
        return f"{type(task).__qualname__} of {self._describe_arguments()}"

    def mark(self, state):
        """Put on its final state what others have to know."""
        marks = {
            _ORIGIN: self.origin if state.is_mapped() else self._describe_result(),
            _CLAIM: self.claim and tuple(self.claim),
            _SPREADS: self.spreads and self.started,
            _RECOMPUTED: self.recomputes and self.started,
            _NEWEST: self.own_file or self.newest_input,
        }
        for name, value in marks.items():
            if value:
                setattr(state, name, value)


class _Key(NamedTuple):
    """Which task run of which flow run it is."""

    flow_name: Optional[str]
    scheduled: Any  # when the flow run was to start
    slug: Optional[str]  # of the task
    full_name: Optional[str]  # of the task, with its index if it is mapped


def _key():
    """That of the task run that the context of this thread is of."""
    names = ("flow_name", "scheduled_start_time", "task_slug", "task_full_name")
    return _Key(*map(prefect.context.get, names))


# Which file belongs to which task run --------------------------------------------------------

#: What Prefect itself keeps of a task; other attributes are part of what it computes.
_TASK_ATTRIBUTES = {*vars(Task()), "_cached_signature"}

#: Types whose `repr` tells their value.
_PLAIN: tuple = (type(None), bool, int, float, complex, str, bytes, Decimal, Enum, uuid.UUID)

_PLAIN += (datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo)

_PLAIN += (pathlib.PurePath, pandas.Period, numpy.generic)

#: Of a larger collection it counts where it comes from.
_MAX_ITEMS = 1000

#: Modules with tasks that Prefect puts in where tasks are combined: `[x]`, `x[0]`, `x + 1`.
_PURE = (_prefect_collections.__name__, _prefect_operators.__name__)

#: What has been said of tasks, as they may change their attributes when they run.
_descriptions: "weakref.WeakKeyDictionary[Task, str]" = weakref.WeakKeyDictionary()

#: Functions have no other name that holds for all that refer to one and for no other.
_tokens: "weakref.WeakKeyDictionary[types.FunctionType, str]" = weakref.WeakKeyDictionary()


def _describe_task(task, slug, storage):
    """The same string for tasks that do the same."""
    if task not in _descriptions:
        parts = {"": f"{task.name} {type(task).__module__}.{type(task).__qualname__}"}
        if isinstance(storage, PandasResult):
            parts["storage"] = repr((storage._file_type, storage.read_kwargs, storage.write_kwargs))
        for name, value in vars(task).items():
            if name not in _TASK_ATTRIBUTES:
                is_function = isinstance(value, types.FunctionType)
                token = is_function and _tokens.setdefault(value, uuid.uuid4().hex)
                parts[name] = _describe(value, token or f"{name} of {slug}")
        _descriptions[task] = _digest(parts)
    return _descriptions[task]


def _digest(descriptions):
    content = repr(sorted(descriptions.items())).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _describe(value, origin):
    """The same string for equal values of one type, in any process; or else their origin."""
    items = 0

    def describe(value):
        nonlocal items
        items += 1
        kind = type(value)
        if isinstance(value, _PLAIN):
            return f"{kind.__qualname__} {value!r}"
        if isinstance(value, types.FunctionType):
            code = value.__code__
            closure = [cell.cell_contents for cell in value.__closure__ or ()]
            value = [code.co_filename, code.co_firstlineno, value.__qualname__, closure]
        elif isinstance(value, type) or inspect.ismodule(getattr(value, "__self__", None)):
            value = [value.__module__, value.__qualname__]
        elif kind is functools.partial:
            value = [value.func, value.args, value.keywords]
        elif kind in (set, frozenset):
            value = sorted(map(describe, value))
        elif kind is dict:
            value = sorted((describe(key), describe(item)) for key, item in value.items())
        elif kind not in (list, tuple):
            raise TypeError
        if items + len(value) > _MAX_ITEMS:
            raise OverflowError
        return f"{kind.__qualname__} [{', '.join(map(describe, value))}]"

    try:
        return describe(value)
    except Exception:
        return f"that of {origin}"


class _Claim(NamedTuple):
    """That a file belongs to a task run. On states it is a plain tuple, also in a pickle."""

    file: str  # its `_real_path`
    name: Optional[str]  # of the task run
    slug: str  # of the task in its flow
    task: str  # the same for tasks that do the same
    arguments: str  # the same for equal ones


#: What is known, by subject, of each flow run that is under way in this process.
#: "claims": by file, the origin of a task run and its claim. "out of date": slugs of tasks.
_known: dict = {}

_claims_lock = threading.Lock()


def _known_of_flow_run(subject):
    """A dictionary for the flow run that the context is of; it goes when that ends."""
    for moment, key in _keys_of_flow_run():
        if key not in _known:
            try:
                weakref.finalize(moment, _known.pop, key, None)
            except TypeError:
                continue
        return _known.setdefault(key, {}).setdefault(subject, {})
    return {}


def _keys_of_flow_run():
    # All rounds of a flow run share the first, and each round its own second one.
    moments = map(prefect.context.get, ("scheduled_start_time", "date"))
    return [(moment, (id(moment), prefect.context.get("flow_name"))) for moment in moments]


def _forget_flow_run():
    """The flow run has ended; another one, in the same task, may share its moment."""
    for _, key in _keys_of_flow_run():
        _known.pop(key, None)


def _conflict(earlier, later):
    """What to say of two claims of one file, unless it is the same task with equal arguments."""
    is_same_task = earlier.slug == later.slug or earlier.task == later.task
    if is_same_task and earlier.arguments == later.arguments:
        return None
    first, second = repr(earlier.name), repr(later.name)
    advice = "an argument, or {task_name}"
    if first == second:
        first, second = f"{first} ({earlier.slug})", f"{second} ({later.slug})"
        advice = "an argument that differs"
    return (
        f"The file {earlier.file} belongs to the task run {first} of this flow run. The task run "
        f"{second} has the same path, but is not the same task with the same "
        f"arguments. Put into the path what tells them apart: {advice}."
    )


def _settle_claims(states):
    """Set aside each file that belongs to two task runs: it may hold the result of either.

    Parameters
    ----------
    states : iterable of prefect.engine.state.State
        All final states of one flow run, those of mapped children included.

    Returns
    -------
    str or None
        What to say, if there is one.
    """
    claims: Dict[str, _Claim] = {}
    messages: Dict[str, str] = {}
    for claim in (_Claim(*getattr(state, _CLAIM)) for state in states if hasattr(state, _CLAIM)):
        file, message = claim.file, _conflict(claims.setdefault(claim.file, claim), claim)
        if message and file not in messages:
            aside = None if _is_url(file) else _set_aside(file, {}, _identity(file, {}))
            remedy = f"It is now {aside}" if aside else "Delete it"
            messages[file] = f"{message} {remedy}, since it may hold the result of either."
    return " ".join(messages.values()) or None


# A task whose file is there is not run -------------------------------------------------------


def checkpoint_handler(task_runner: TaskRunner, old_state: State, new_state: State) -> State:
    """Load a task's result instead of running it, if its file is there; else write the file.

    A state handler for `task_runner_state_handlers`. It acts on tasks that store their result by
    `PandasResult`, unless they have `checkpoint=False`, and leaves all others alone. Prefect's
    own checkpointing may be on or off: each file is written once.

    Parameters
    ----------
    task_runner : prefect.engine.TaskRunner
        A `DSTaskRunner`, if the path has fields.
    old_state, new_state : prefect.engine.state.State
        On Pending to Running the file is looked for: if it is there, the task's state becomes
        Success, and the file is read when a task that runs, or the user through `state.result`,
        asks for the frame (at once for the tag "prefect-ds:keep", and with a task runner that is
        not a `DSTaskRunner`). If there is none, the task runs; if there is one that cannot be
        read, this is a warning, the task runs, and the file is kept beside the new one, with
        ".unreadable-" and the time behind its name. On Running to Success the file is written.

    Returns
    -------
    prefect.engine.state.State
        `new_state`; Success with what was found; or Failed, with the exception as its result,
        if the path cannot be filled or belongs to another task run, the value is not a DataFrame,
        or the file cannot be written or not be read back. A Failed task is retried as its
        `max_retries` say.

    Raises
    ------
    TypeError
        If it is among the state handlers of a task or a flow.

    Examples
    --------
    >>> flow.run(
    ...     runner_cls=DSFlowRunner, task_runner_state_handlers=[checkpoint_handler]
    ... )  # doctest: +SKIP
    """
    if not isinstance(task_runner, TaskRunner):
        raise TypeError(
            "checkpoint_handler is a state handler for task runners, not for a task or a flow: "
            "take it out of their state_handlers, and run the flow with "
            "flow.run(task_runner_state_handlers=[checkpoint_handler])."
        )
    if not _has_checkpoints(task_runner.task, _storage_of(task_runner)):
        return new_state
    try:
        if old_state.is_pending() and new_state.is_running():
            result = _find_checkpoint(task_runner)
            if result is not None:
                new_state = _found(task_runner, Success, result)
        elif old_state.is_running() and new_state.is_successful() and not new_state.is_skipped():
            _write_checkpoint(task_runner, new_state)
    except Exception as exc:
        # The task's own handlers have seen `new_state`, so they must hear of the failure.
        tell = getattr(task_runner, "tell_handlers", task_runner.call_runner_target_handlers)
        return tell(new_state, _failed(task_runner, exc))
    return new_state


def _storage_of(task_runner):
    """Where the result of a task goes; nowhere, if neither it nor the flow says so."""
    return _unless_prefects(task_runner.task, getattr(task_runner, _STORAGE))


def _unless_prefects(task, storage):
    """Storage is for its author's tasks, not for what Prefect puts in between and hands it to."""
    modules = ("prefect.tasks.core.", "prefect.tasks.control_flow.")
    is_prefects = type(task).__module__.startswith(modules) and not isinstance(task, FunctionTask)
    return None if is_prefects else storage


def _has_checkpoints(task, storage):
    opts_out = _CAN_OPT_OUT and task.checkpoint is False
    return isinstance(storage, PandasResult) and not opts_out


def _failed(task_runner, exc):
    if prefect.context.get("raise_on_exception"):
        raise exc
    path = _storage_of(task_runner).path
    message = f"Task '{_task_name()}', path {path}: {type(exc).__name__}: {exc}"
    task_runner.logger.error(message)
    return Failed(message, result=exc)


def _find_checkpoint(task_runner):
    """What is stored for this task run, as a result; None if it has to run."""
    storage, task_run = _storage_of(task_runner), _TaskRun.of(task_runner)
    location = _checkpoint_location(storage, task_run)
    if not isinstance(task_runner, DSTaskRunner):
        task_run.unreadable = None  # It may be of an earlier run of this runner.
    if task_run.recomputes or task_run.unreadable is not None:
        return None
    place, options, frame = storage._fixed(location), storage._storage_options, None
    if not _exists(place, options):
        return None
    identity = _identity(place, options)
    try:
        storage._check_ends(place)
        modified = _modified(place, options)
        if not isinstance(task_runner, DSTaskRunner) or _KEEP in task_runner.task.tags:
            frame = storage._load(location)
    except Exception as exc:
        task_run.unreadable = identity
        storage.logger.warning(
            "Task '%s': %s is there, but cannot be read, so the task runs. Its new file will "
            "take this name; the old one is kept beside it, as %s.unreadable-<time>. Reason: "
            "%s: %s",
            _task_name(), location, location, type(exc).__name__, exc,
        )  # fmt: skip
        return None
    if modified is not None:
        task_run.own_file = (modified, location)
    if _is_out_of_date(task_run, location):
        return None
    storage.logger.info("Task '%s': Found %s%s", _task_name(), location, _age(modified))
    if frame is not None:
        return _stored(storage, location, frame, None)
    again = _Again.of(task_runner, task_run.upstream_states)
    file = _File(storage, place, task_run.own_file, again)
    return _stored(storage, location, None, file)


def _found(task_runner, state_class, result):
    """The state of a task run whose file is there."""
    when = ", which is read when somebody asks for it" if _is_unread(result) else ""
    found = state_class(f"Found {_TaskRun.of(task_runner).location}{when}.", result=result)
    setattr(found, _FOUND, True)
    return found


def _newest_behind(state):
    """The newest file that a result was made from; of an item of a list, its own."""
    if _is_in_file(state._result):
        return state._result.source.written
    return getattr(state, _NEWEST, None)


def _newest_of(upstream_states):
    seen = _states_seen(upstream_states)
    newest = [_newest_behind(state) for edge, state in seen if edge.key is not None]
    return max(filter(None, newest), default=None)


def _is_out_of_date(task_run, location):
    """Whether to run a task since its file is older than one that it was made from."""
    newest, own = task_run.newest_input, task_run.own_file
    if newest is None or own is None or newest[0] <= own[0]:
        return False
    if _OUT_OF_DATE in _recompute_patterns():
        task_run.recomputes = task_run.spreads = True
        return True
    said, task = _known_of_flow_run("out of date"), task_run.key.slug
    if task not in said:
        said[task] = True
        task_run.storage.logger.warning(
            "Task '%s': %s is older than %s, which it was made from. To compute all again that is "
            "out of date: recompute=%r.", _task_name(), location, newest[1], _OUT_OF_DATE,
        )  # fmt: skip
    return False


def _write_checkpoint(task_runner, success):
    if _location_of(success._result) is None:
        storage, task_run = _storage_of(task_runner), _TaskRun.of(task_runner)
        location = _checkpoint_location(storage, task_run)
        frame = success.result
        gives_it_back = storage._save(frame, location) and _KEEP not in task_runner.task.tags
        place = storage._fixed(location)
        modified = _modified(place, storage._storage_options)
        gives_it_back &= modified is not None or _is_url(place)
        task_run.own_file = modified and (modified, location)
        file = None
        if gives_it_back:
            again = _Again.of(task_runner, task_run.upstream_states)
            file = _File(storage, place, task_run.own_file, again, frame)
        success.result = _stored(storage, location, frame, file)


def _checkpoint_location(storage, task_run):
    has_fields = callable(storage.path) or _Template(storage.path or "").fields
    if has_fields and task_run.inputs is None:
        raise TypeError(
            f"The path {storage.path!r} is filled from the task's arguments, which only "
            "DSTaskRunner makes available: run the flow with task_runner_cls=DSTaskRunner, or "
            "with runner_cls=DSFlowRunner, which includes it."
        )
    return storage._locate({})


# Which tasks run though their file is there --------------------------------------------------

#: In `prefect.context`: which tasks to run though their result is stored, set by the user.
_RECOMPUTE = "recompute"

#: Among the names of tasks in `recompute`: all whose files are older than those before them.
_OUT_OF_DATE = "out-of-date"


def _recompute_patterns():
    patterns = prefect.context.get(_RECOMPUTE) or ()
    if isinstance(patterns, str):
        patterns = list(map(str.strip, patterns.split(",")))
    if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"recompute={patterns!r} names no tasks. It takes their names, separated by commas or "
            "in a list, as in recompute='load+'; '*' is the whole flow."
        )
    return [pattern for pattern in patterns if pattern]


def _matches(pattern, task):
    name = pattern[:-1] if pattern.endswith("+") else pattern
    wildcard = ".*".join(map(re.escape, name.split("*")))
    return pattern == task.name or re.fullmatch(wildcard, task.name, re.DOTALL) is not None


def _spreads(pattern, task):
    return pattern.endswith("+") and pattern != task.name


def _is_recompute_inherited():
    """Whether it was not said for this flow: but in the environment, or for one around it."""
    in_environment = prefect.config.get("context", {}).get(_RECOMPUTE)
    return _TaskRun.is_any_under_way() or prefect.context.get(_RECOMPUTE) == in_environment


def _spread_over(flow):
    """The tasks that are computed again since one upstream is.

    States carry this, too, but not those that come from a backend.
    """
    patterns, found = _recompute_patterns(), set()
    for task in flow.sorted_tasks() if patterns else ():
        named = any(_matches(pattern, task) and _spreads(pattern, task) for pattern in patterns)
        if named or any(edge.upstream_task in found for edge in flow.edges_to(task)):
            found.add(task)
    return found


# How a task is run ---------------------------------------------------------------------------


class DSTaskRunner(TaskRunner):
    """A `TaskRunner` that lets the task's arguments fill the template in the path.

    This holds for plain and for mapped tasks, for constants, and for defaults of the signature.
    It also reads what a task that runs needs from files, and a task that needs a result that was
    purged fails. It stores nothing by itself: that is for `checkpoint_handler`.

    `recompute` in `prefect.context` makes tasks run though their file is there, or their result
    is cached, for one run: names of tasks, with `*` for any characters, separated by commas or
    in a list. A `+` behind a name means all tasks downstream as well, unless a task is named so:
    `flow.run(context={"recompute": "load+"})`, or `PREFECT__CONTEXT__RECOMPUTE="load+"` in the
    environment; `*` is the whole flow, and `out-of-date` are all tasks whose files are older than
    files that they were made from, with all that is downstream. `DSFlowRunner` and `DSExecutor`
    refuse names that match no task.

    Parameters are those of Prefect's `TaskRunner`.

    Examples
    --------
    >>> FlowRunner(flow, task_runner_cls=DSTaskRunner).run(
    ...     task_runner_state_handlers=[checkpoint_handler]
    ... )  # doctest: +SKIP
    """

    _prefect_ds_reads_on_demand = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        storage = getattr(self, _STORAGE)
        if isinstance(storage, PandasResult):
            # Prefect puts the task's target into it, and other tasks may have the same one.
            storage = copy.copy(storage) if _storage_of(self) else _no_storage()
            setattr(self, _STORAGE, storage)

    @functools.wraps(TaskRunner.run)  # Prefect makes loops by an attribute of this function.
    def run(self, *args, **kwargs):
        given = kwargs.get("state", args[0] if args else None)
        with _TaskRun.started_by(self) as task_run:
            state = super().run(*args, **kwargs)
        if state is not given:
            task_run.mark(state)
        if type(state) is Mapped:
            state.__class__ = _Mapped
        return state

    def check_upstream_finished(self, state, upstream_states):
        """As Prefect's; moreover, note what the upstream states say about this run."""
        task_run = _TaskRun.of(self)
        task_run.key = _key()
        for upstream_state in upstream_states.values():
            _hang_in(upstream_state)
        state = super().check_upstream_finished(state, upstream_states=upstream_states)
        seen = list(_states_seen(upstream_states))
        purged = {
            edge.upstream_task.name
            for edge, upstream_state in seen
            if _is_read(edge) and upstream_state._result is PurgedResult
        }
        task_run.purged_inputs = sorted(purged)
        maps = any(edge.mapped for edge in upstream_states)
        if maps and prefect.context.get("map_index") is None and not state.is_mapped():
            self._check_inputs(state)
        matching = [p for p in _recompute_patterns() if _matches(p, self.task)]
        task_run.spreads = (
            any(_spreads(p, self.task) for p in matching)
            or any(getattr(upstream, _SPREADS, None) == task_run.started for _, upstream in seen)
            or prefect.context.get(_SPREADS) == (task_run.key.flow_name, task_run.key.slug)
        )
        task_run.recomputes = bool(matching) or task_run.spreads
        task_run.newest_input = _newest_of(upstream_states)
        return state

    def get_task_inputs(self, state, upstream_states):
        """As Prefect's; moreover, offer the inputs to the path's template."""
        inputs = super().get_task_inputs(state, upstream_states=upstream_states)
        task_run = _TaskRun.of(self)
        task_run.inputs, task_run.upstream_states = inputs, upstream_states
        return inputs

    def check_target(self, state, inputs):
        """As Prefect's, if the task is not recomputed; a `PandasResult` as `checkpoint_handler`."""
        task_run = _TaskRun.of(self)
        recomputes = task_run.recomputes
        if task_run.purged_inputs and not recomputes and self._is_still_there(state):
            return state  # An earlier round has found it, and let go of what fills the target.
        if not self.task.target or not (recomputes or isinstance(self.result, PandasResult)):
            new_state = super().check_target(state, inputs=inputs)
            if new_state is not state and new_state.is_cached():
                setattr(new_state, _FOUND, True)
            return new_state
        if isinstance(self.result, PandasResult):
            try:
                result = _find_checkpoint(self)
            except Exception as exc:
                raise ENDRUN(self.handle_state_change(state, _failed(self, exc))) from exc
            if result is not None:
                return self.handle_state_change(state, _found(self, Cached, result))
        return self.check_task_is_cached(state, inputs) if recomputes else state

    def _is_still_there(self, state):
        """Whether a state says that there was a file at the target, and there is."""
        if not (state.is_cached() and getattr(state, _FOUND, False)):
            return False
        return state._result is PurgedResult or self.result.exists(state._result.location)

    def check_task_is_cached(self, state, inputs):
        """As Prefect's, if the task is not recomputed."""
        task_run = _TaskRun.of(self)
        if not task_run.recomputes:
            return super().check_task_is_cached(state, inputs=inputs)
        # Of several results, Prefect takes the oldest one. The key stays: in other threads, task
        # runners that share the dictionary may copy it just now.
        caches, key = prefect.context.get("caches", {}), self.task.cache_key or self.task.name
        if key in caches:
            caches[key] = []
        if state.is_cached() and getattr(state, _RECOMPUTED, None) != task_run.started:
            return self.handle_state_change(state, Pending("Its cache is to be recomputed."))
        return state

    def set_task_to_running(self, state, inputs):
        """As Prefect's, if no input was purged."""
        self._check_inputs(state)
        return super().set_task_to_running(state, inputs=inputs)

    def get_task_run_state(self, state, inputs, **kwargs):
        """As Prefect's; moreover, read the inputs that are in files, if the task really runs."""
        if not state.is_running():
            return super().get_task_run_state(state, inputs=inputs, **kwargs)
        reads_files = any(map(_is_unread, inputs.values()))
        if isinstance(self.task, _COLLECTIONS) and reads_files:
            collection = _Collection(inputs, functools.partial(_collect, self.task))
            collected = Success("Its items are read on demand.", result=_on_demand(collection))
            return self.handle_state_change(state, collected)
        task_run = _TaskRun.of(self)
        try:
            task_run.read = [result.value for result in inputs.values()]
            if reads_files:  # What was damaged has been made again.
                task_run.newest_input = _newest_of(task_run.upstream_states)
        except Exception as exc:
            message = f"Task '{_task_name()}' cannot read its inputs. {exc}"
            return self.handle_state_change(state, Failed(message, result=exc))
        return super().get_task_run_state(state, inputs=inputs, **kwargs)

    def _check_inputs(self, state):
        purged = ", ".join(map(repr, _TaskRun.of(self).purged_inputs))
        if purged and not state.is_finished():
            message = (
                f"Task '{_task_name()}' needs the result of {purged}, which was purged when its "
                "last reader had finished. Run the upstream task again (leave its state out of "
                f"task_states), give it a checkpoint, or keep its result with the tag {_KEEP!r}."
            )
            failed = Failed(message, result=ValueError(message))
            raise ENDRUN(self.handle_state_change(state, failed))

    def handle_state_change(self, old_state, new_state):
        """As Prefect's, but a copy of what a handler has put in: it may be in use elsewhere."""
        state = super().handle_state_change(old_state, new_state)
        return state if state is new_state else copy.copy(state)

    def call_runner_target_handlers(self, old_state, new_state):
        """As Prefect's; moreover, write what Prefect wants written, and let go of errors."""
        task_run = _TaskRun.of(self)
        if old_state.is_running() and task_run.is_to_be_written:
            task_run.is_to_be_written = False
            if new_state.is_successful():
                try:
                    _write_checkpoint(self, new_state)
                except Exception as exc:
                    new_state = _failed(self, exc)
        new_state = super().call_runner_target_handlers(old_state, new_state)
        if new_state.is_retrying():
            inputs = task_run.inputs or {}
            _let_go_of_data(old_state.result, [*map(_at_hand, inputs.values()), *task_run.read])
        return new_state


class _BeforeReport(TaskRunner):
    """Looks for the checkpoint when a task's handlers have acted: what it finds is reported."""

    #: Of a checkpoint that fails only they hear: the backend does when this returns.
    tell_handlers = TaskRunner.call_runner_target_handlers

    def call_runner_target_handlers(self, old_state, new_state):
        new_state = super().call_runner_target_handlers(old_state, new_state)
        return checkpoint_handler(self, old_state, new_state)


class _DSCloudTaskRunner(DSTaskRunner, CloudTaskRunner, _BeforeReport):
    """The `DSTaskRunner`, with its checkpoints, that reports to Prefect Server or Cloud."""

    def load_results(self, state, upstream_states):
        """As Prefect's, but only of what the task reads: the rest is not asked for."""
        read = {edge: upstream for edge, upstream in upstream_states.items() if _is_read(edge)}
        state, loaded = super().load_results(state=state, upstream_states=read)
        return state, {**upstream_states, **loaded}


# How a task run takes place again ------------------------------------------------------------
# When the file that it has written turns out to be damaged.


class _Again(NamedTuple):
    """How a task run that has a file can take place again, as far as its inputs are there."""

    task: Task
    task_runner_cls: type
    state_handlers: list
    storage: Any
    upstream_states: Dict[Edge, State]
    context: dict

    @classmethod
    def of(cls, task_runner, upstream_states):
        is_cloud = isinstance(task_runner, CloudTaskRunner)  # The backend knows how it has ended.
        states = {
            edge: upstream_state
            if isinstance(edge.upstream_task, Constant)
            else _without_data(upstream_state)
            for edge, upstream_state in upstream_states.items()
        }
        # Each task run has its own copies of the dictionaries in it, some of them large.
        context = {
            name: value
            for name, value in prefect.context.items()
            if not isinstance(value, (dict, DotDict)) or name == "parameters"
        }
        context.setdefault("map_index", None)  # What reads the file may be mapped.
        return cls(
            task_runner.task,
            DSTaskRunner if is_cloud else type(task_runner),
            [checkpoint_handler] if is_cloud else task_runner.state_handlers,
            getattr(task_runner, _STORAGE),
            states,
            context,
        )

    def __reduce__(self):
        return _nothing, ()  # It travels as a `_PickledAgain`, or not at all.

    def load(self):
        return self

    def run(self, found):
        """The frame, and when its file was written, and where."""
        task_runner = self.task_runner_cls(task=self.task, state_handlers=self.state_handlers)
        setattr(task_runner, _STORAGE, self.storage)
        name = self.context.get("task_full_name")
        task_runner.logger.warning("%s. The task run %r takes place again.", found, name)
        state = task_runner.run(upstream_states=self.upstream_states, context=dict(self.context))
        if not state.is_successful() or state.is_skipped():
            raise ValueError(
                f"{found}. The task run {name!r} took place again for that, but came to {state}. "
                "Run the flow once more: without the file, the task will run."
            )
        return state.result, _newest_behind(state)


def _without_data(state):
    """A copy of a state that keeps its result, once it is purged, if that is in a file or small."""
    state, stays = copy.copy(state), _stays(state)
    if state.is_mapped():
        state.map_states = [_without_data(child) for child in state.map_states]
        # A copy of what is in a file does not hold it.
        results = [copy.copy(child._result) for child in state.map_states]
        state.result = [r if _is_unread(r) else _at_hand(r) for r in results]
    elif stays:
        state._result = PurgedResult
    return state


# What errors hold ----------------------------------------------------------------------------


def _errors_behind(error):
    """An error of a task run, and those that led to it, but none of whoever runs the flow."""
    seen = {id(sys.exc_info()[1])}
    ahead = [error]
    while ahead:
        error = ahead.pop()
        if not isinstance(error, BaseException) or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        ahead += [error.__cause__, error.__context__]
        ahead += error.exceptions if isinstance(error, _ERROR_GROUP) else []


def _let_go_of_data(error, inputs):
    """Let the traceback of an error hold no data: neither the task's inputs nor frames of pandas.

    A traceback keeps the local variables of the calls that it names, and of those that led
    there. Variables that hold data get a few words instead; all others stay, for a debugger.
    """
    known = {id(value) for value in inputs if not _is_small(value)}
    tracebacks = [behind.__traceback__ for behind in _errors_behind(error)]
    steps = [frame for part in tracebacks for frame, _ in traceback.walk_tb(part)]
    steps += _frames_from(steps[0].f_back if steps else None)
    # Asked after that: in another thread, a task may still run that has raised the same error.
    under_way = _calls_under_way() if steps else ()
    for frame in dict.fromkeys(steps):
        if id(frame) not in under_way:
            _empty(frame, known)


def _calls_under_way():
    """The ids of all frames that run, in any thread; to hold these frames would be a cycle."""
    return {id(f) for top in sys._current_frames().values() for f in _frames_from(top)}


def _frames_from(frame):
    while frame is not None:
        yield frame
        frame = frame.f_back


#: What counts as data wherever it comes from, and what of Prefect holds it.
_DATA = (pandas.DataFrame, pandas.Series, pandas.Index, numpy.ndarray, State, Result)

#: What is not looked into: it belongs to no task run, and leads everywhere.
_COMMON = (type, types.ModuleType, types.FrameType, types.CodeType, logging.Logger, Task)

_CO_GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def _empty(frame, known):
    # Asked first: up to Python 3.12, to look at local variables is to keep what they are now.
    if frame.f_code.co_flags & _CO_GENERATORS and _goes_on(frame):
        return
    data = {name: v for name, v in frame.f_locals.items() if _holds_data(v, known)}
    if not data.keys() <= set(frame.f_code.co_varnames) - set(frame.f_code.co_cellvars):
        # What is shared with an inner function may live on there: give up this frame's part in it.
        frame.clear()
        _ = frame.f_locals  # up to date, now: it is kept, too
        _empty_function(frame)
        return
    for name, value in data.items():
        _set_local(frame, name, f"<{type(value).__name__} that the task had, let go of>")


def _empty_function(frame):
    """Let the function of a frame hold nothing, if only the frame keeps it: from Python 3.11 on."""
    for function in gc.get_referents(frame):
        if type(function) is types.FunctionType and sys.getrefcount(function) == 4:
            for cell in function.__closure__ or ():
                if sys.getrefcount(cell) == 3:
                    del cell.cell_contents


def _goes_on(frame):
    """Whether a generator that is not under way may go on, with all that it has."""
    kinds = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)
    return any(isinstance(holder, kinds) for holder in gc.get_referrers(frame))


def _holds_data(value, known):
    """Whether data can be reached from a value, among the first things that it refers to."""
    seen: set = set()
    ahead = deque([value])
    while ahead and len(seen) < 1000:
        value = ahead.popleft()
        kind = type(value)  # `isinstance` might ask the value.
        if id(value) in known or issubclass(kind, _DATA):
            return True
        if id(value) in seen or issubclass(kind, _COMMON):
            continue
        seen.add(id(value))
        if kind is types.FunctionType:  # not its module
            ahead.extend((value.__closure__, value.__defaults__, value.__kwdefaults__))
        elif kind is types.GeneratorType and value.gi_frame is not None:  # nor its
            around = {id(value.gi_frame.f_globals), id(value.gi_frame.f_builtins)}
            inside = gc.get_referents(value, value.gi_frame)
            ahead.extend(each for each in inside if id(each) not in around)
        else:
            ahead.extend(gc.get_referents(value))
    return False


# How a flow is run ---------------------------------------------------------------------------


class DSFlowRunner(FlowRunner):
    """A `FlowRunner` that drops each result as soon as its last reader has finished.

    A flow then needs the memory of its working set: with `LocalExecutor` a map of any width,
    through any number of stages, needs two partitions alive at a time. It gives the same states
    and terminal results as Prefect's `FlowRunner`.

    Kept are the results that no other task reads, those of reference tasks, of tasks with the tag
    "prefect-ds:keep" or with `cache_for`, and whatever a task run that is not finished (Retrying,
    Paused, ...), or has `cache_for`, will read again. Of all others, those that are in a file are
    read from there when somebody asks for them, and the rest is replaced by `PurgedResult`.
    Results of states that the caller passes in (`task_states`), or a state handler returns, are
    never touched, except those of an earlier round that has not finished: this one uses them up.
    A flow run is Failed if a file belongs to two task runs, or if `recompute` names no task.

    Parameters
    ----------
    flow : prefect.Flow
        The flow to run.
    task_runner_cls : type, optional
        The class that runs the tasks, `DSTaskRunner` by default.
    state_handlers : iterable of callable, optional
        As for Prefect's `FlowRunner`.

    Notes
    -----
    Results are purged on `LocalExecutor`, and from Prefect 0.12 on also on `LocalDaskExecutor`
    and `DaskExecutor`. On other executors, and on those that override what would be passed over,
    nothing is purged, and a warning says so.

    Examples
    --------
    >>> flow.run(
    ...     runner_cls=DSFlowRunner, task_runner_state_handlers=[checkpoint_handler]
    ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        flow: Flow,
        task_runner_cls: Optional[type] = None,
        state_handlers: Optional[Iterable[Callable]] = None,
    ) -> None:
        super().__init__(
            flow=flow,
            task_runner_cls=task_runner_cls or DSTaskRunner,
            state_handlers=state_handlers,
        )

    def get_flow_run_state(self, state: State, executor: Executor, **kwargs: Any) -> State:
        """As Prefect's, on an executor that goes deep first and purges as it goes."""
        run = _new_run(self.flow, executor, self.logger)
        if not isinstance(executor, DSExecutor):
            self._warn_if_nothing_is_stored(kwargs)
        state = super().get_flow_run_state(state, executor=run or executor, **kwargs)
        if not state.is_finished():
            return state
        message = run.conflict if run else _settle_claims(_with_children(state.result))
        if message:
            self.logger.error(message)
            state = self.handle_state_change(state, Failed(message, result=state.result))
        return state

    def _warn_if_nothing_is_stored(self, arguments):
        if checkpoint_handler in (arguments.get("task_runner_state_handlers") or ()):
            return
        config = prefect.context.get("config") or prefect.config
        if prefect.context.get("checkpointing", config.flows.checkpointing):
            return
        of_flow = getattr(self.flow, _STORAGE)
        names = {
            task.name
            for task in self.flow.tasks
            if _has_checkpoints(task, _unless_prefects(task, getattr(task, _STORAGE) or of_flow))
        }
        # In the later rounds of a flow run there are states.
        if names and not arguments.get("task_states"):
            self.logger.warning(
                "Nothing is stored, and nothing is loaded, for the tasks %s: run the flow with "
                "task_runner_state_handlers=[checkpoint_handler].",
                ", ".join(sorted(names)),
            )


def _with_children(states):
    states = list(states.values()) if isinstance(states, dict) else []
    return states + [child for state in states for child in _children_of(state)]


def _names(tasks):
    return ", ".join(sorted({task.name for task in tasks}))


class DSExecutor(Executor):
    """An `Executor` that does what `DSFlowRunner` does, where Prefect chooses the flow runner.

    So under Prefect Server and Cloud, with any agent, and with plain `flow.run()`: tasks are run
    by `DSTaskRunner`, those whose file is there are not run, as `checkpoint_handler` does it, and
    each result is dropped as soon as its last reader has finished. Needs Prefect 0.12, and under
    a backend 0.12.1.

    Parameters
    ----------
    flow : prefect.Flow
        The flow that has this executor. Tasks may still be added to it. A copy of it needs a
        `DSExecutor` of its own as soon as it has other tasks, edges or reference tasks.
    executor : prefect.executors.Executor, optional
        What runs the tasks: a `LocalExecutor` by default.

    Raises
    ------
    TypeError
        If these are no flow and no executor.
    NotImplementedError
        Below Prefect 0.12.
    ValueError
        In a flow run, which Prefect reports as Failed: if the flow is another one, if a file
        belongs to two task runs, or if `recompute` names no task.

    Notes
    -----
    `TaskRunner` and Prefect's `CloudTaskRunner` are replaced. A task runner class of your own is
    left as it is, and a warning says so: let it inherit from `DSTaskRunner`.

    Examples
    --------
    >>> flow.executor = DSExecutor(flow)  # doctest: +SKIP
    >>> flow.register(project_name="sales")  # doctest: +SKIP
    """

    _prefect_ds_reads_on_demand = True

    def __init__(self, flow: Flow, executor: Optional[Executor] = None) -> None:
        if not isinstance(flow, Flow) or not isinstance(executor, (Executor, type(None))):
            raise TypeError(
                f"DSExecutor takes a flow and an executor, not {flow!r} and {executor!r}, as in "
                "flow.executor = DSExecutor(flow, LocalDaskExecutor())."
            )
        if not _FLOW_RUNNER_MAPS:
            raise NotImplementedError(
                "DSExecutor needs Prefect 0.12; below, use flow.run(runner_cls=DSFlowRunner)."
            )
        super().__init__()
        self.flow = flow
        self.executor = executor or LocalExecutor()
        self.logger = get_logger(type(self).__name__)  # 0.12.0 gives it none.
        self._under_way: dict = {}

    def __getstate__(self):
        return {**vars(self), "_under_way": {}}

    @contextmanager
    def start(self) -> Iterator[None]:
        """Start Prefect's executor, for a run of the flow in this thread."""
        thread = threading.get_ident()
        outer = self._under_way.get(thread)
        run = _new_run(self.flow, self.executor, self.logger)
        self._under_way[thread] = _UnderWay(run or self.executor, _spread_over(self.flow), set())
        try:
            with self._under_way[thread].run.start():
                yield
        finally:
            self._under_way[thread] = outer
        if run and run.conflict:
            raise ValueError(run.conflict)

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        """Put off a call; a task is run by a task runner that knows of checkpoints."""
        under_way = self._under_way[threading.get_ident()]
        if "task_runner_cls" in kwargs:
            self._check_edges(kwargs["task"], kwargs["upstream_states"])
            self._add_checkpoints(under_way, kwargs)
        return under_way.run.submit(fn, *args, **kwargs)

    def wait(self, futures: Any) -> Any:
        """Run calls until these are done; return what they came to."""
        ends = {*self.flow.terminal_tasks(), *self.flow.reference_tasks()}
        is_end = isinstance(futures, dict) and any(isinstance(key, Task) for key in futures)
        if is_end and not ends <= set(futures):
            raise self._other_flow(f"does not end with {_names(ends - set(futures))}")
        return self._under_way[threading.get_ident()].run.wait(futures)

    def _check_edges(self, task, edges):
        """Raise if this task reads something else than in the flow that is known."""
        if task not in self.flow.tasks:
            raise self._other_flow(f"has another task {task.name!r}")
        known = set(self.flow.edges_to(task))
        added = {e for e in set(edges) - known if not isinstance(e.upstream_task, Constant)}
        if added or not known <= set(edges):
            raise self._other_flow(f"has other edges to the task {task.name!r}")

    def _other_flow(self, difference):
        return ValueError(
            f"This DSExecutor was made for another flow {self.flow.name!r}: the one that runs "
            f"{difference}. A changed copy needs one of its own: flow.executor = DSExecutor(flow)."
        )

    def _add_checkpoints(self, under_way, kwargs):
        given, context = kwargs["task_runner_cls"], kwargs["context"]
        kwargs["task_runner_cls"] = cls = _TASK_RUNNERS.get(given, given)
        is_cloud = _is_class(cls, CloudTaskRunner)
        handlers = kwargs["task_runner_state_handlers"] or ()
        if not _is_class(cls, DSTaskRunner):
            if cls not in under_way.left_alone:
                under_way.left_alone.add(cls)
                base = _TASK_RUNNERS[CloudTaskRunner if is_cloud else TaskRunner]
                self.logger.warning(
                    "DSExecutor leaves the task runner class %s as it is: nothing is stored or "
                    "loaded. For that, let it inherit from prefect_ds.%s.",
                    getattr(cls, "__name__", cls), base.__name__,
                )  # fmt: skip
        elif not is_cloud and checkpoint_handler not in handlers:
            kwargs["task_runner_state_handlers"] = [*handlers, checkpoint_handler]
        if kwargs["task"] in under_way.spread:
            # It names the task, as flows within that inherit its context.
            kwargs["context"] = {**context, _SPREADS: (context["flow_name"], context["task_slug"])}


#: By what `DSExecutor` replaces Prefect's own.
_TASK_RUNNERS = {TaskRunner: DSTaskRunner, CloudTaskRunner: _DSCloudTaskRunner}


class _UnderWay(NamedTuple):
    """A flow run on a `DSExecutor`."""

    run: Any  # what takes the calls
    spread: set  # tasks that are downstream of one that is computed again, if that spreads
    left_alone: set  # task runner classes that are not ours


def _is_class(cls, base):
    return isinstance(cls, type) and issubclass(cls, base)


# When a result may go ------------------------------------------------------------------------
# It goes when its last reader has read for good: by `_release_inputs` and `_release` of `_Run`,
# within a piece of work by `_run_steps`, and in the end by `_Run._close`.


def _has_result(state):
    """Whether a state holds a result that can be dropped."""
    if not isinstance(state, State) or not state.is_successful():
        return False
    if state.is_mapped() or state.is_skipped() or state._result is PurgedResult:
        return False
    return not _is_unread(state._result) or state._result.source.holds_data()


def _stays(outcome):
    """Whether an outcome holds a result that is not certain to be small."""
    if not isinstance(outcome, State):
        return not _is_small(outcome)
    if not _has_result(outcome) or _is_in_file(outcome._result):
        return False
    return _is_unread(outcome._result) or not _is_small(outcome.result)


def _is_small(value):
    if isinstance(value, (list, tuple, str, bytes)) and len(value) > 1000:
        return False
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, (int, float, type(None))) for item in value)
    return isinstance(value, (int, float, str, bytes, type(None)))


def _drop(state, is_kept=False):
    """Drop a state's result: what is in its file can be read again; others are purged, or kept."""
    if not _has_result(state):
        return
    if _is_in_file(state._result):
        state._result.let_go()
    elif not is_kept:
        state._result = PurgedResult
        # Python keeps attributes small unless they are deleted, or asked for as a dictionary.
        setattr(state, _ORIGIN, None)


def _callers_own(given):
    """The state that was given, or None if an earlier round has made it."""
    return None if getattr(given, _FOR_NEXT_ROUND, False) else given


def _is_read(edge):
    """Whether the downstream task may look at the result that comes through this edge."""
    if edge.key is not None or edge.mapped:
        return True
    # Prefect's own triggers look at the type of a state only; others may look at its result.
    return getattr(edge.downstream_task.trigger, "__module__", None) != "prefect.triggers"


def _has_read_for_good(outcome):
    """Whether a task run that came to this will never read its inputs again."""
    if not isinstance(outcome, State):
        return True
    # A later round runs a Cached task again, to see whether its inputs are still the same; not
    # so if there was a file at its target.
    return outcome.is_finished() and (not outcome.is_cached() or getattr(outcome, _FOUND, False))


def _children_of(state):
    return state.map_states if isinstance(state, Mapped) else ()


def _states_behind(edge, upstream):
    """The states that a task run sees through an edge: those of the children, if it reduces."""
    return upstream.map_states if upstream.is_mapped() and not edge.mapped else [upstream]


def _states_seen(upstream_states):
    """Pairs of an edge and a state that a task run sees through it."""
    for edge, upstream in upstream_states.items():
        for state in _states_behind(edge, upstream):
            yield edge, state


class _TaskRecord:
    """What is known, during one flow run, of a task and the calls that run it."""

    def __init__(self, flow, task):
        downstream = {edge.downstream_task for edge in flow.edges_from(task)}
        #: by how many edges its results are read
        self.readers: int = sum(map(_is_read, flow.edges_from(task)))
        is_kept = (
            not self.readers
            or task in flow.reference_tasks()
            or _KEEP in task.tags
            or task.cache_for is not None
        )
        #: whether the children of a map share what it returns
        self.is_shared: bool = any(
            not edge.mapped and any(e.mapped for e in flow.edges_to(edge.downstream_task))
            for edge in flow.edges_from(task)
        )
        #: whether its results stay; with a file, they stay there
        self.is_kept: bool = is_kept
        #: the edges through which it reads
        self.reads: List[Edge] = [edge for edge in flow.edges_to(task) if _is_read(edge)]
        #: how many of its calls may still read
        self.reading: int = 0
        #: whether Prefect runs it again in every later round
        self.restarts: bool = isinstance(task, _RESTARTED)
        #: the run of the task itself, then those of its mapped children
        self.calls: List[_Call] = []
        #: keyword arguments that its calls share
        self.common: dict = {}
        self.upstream: List[_TaskRecord] = []
        #: how many tasks, of itself and those downstream, may still get calls
        self.unknown: int = 1 + len(downstream)
        #: whether the flow runner waits for its result before it maps another task
        self.is_awaited: bool = any(e.mapped for t in downstream for e in flow.edges_to(t))


# What runs next ------------------------------------------------------------------------------


class _Call:
    """A call that the flow runner has submitted: a task run, or a small helper of Prefect's."""

    __slots__ = ("record", "readers", "pending", "value")

    def __init__(self, record):
        self.record: Optional[_TaskRecord] = record  # of the task; a helper has none
        #: by how many edges its result is still to be read
        self.readers: int = record.readers if record else 0
        self.pending: Any = None  # a `_Pending`, until it is done
        self.value: Any = None  # what it came to: a state, or for a helper whatever that returns

    @property
    def is_done(self):
        return self.pending is None

    @property
    def has_begun(self):
        return self.is_done or self.pending.piece is not None


class _Pending:
    """What a call needs until it is done: its arguments, and what goes before and after it."""

    __slots__ = (
        "number", "index", "given", "function", "args", "common", "folded",
        "needs", "size", "missing", "dependents", "is_wanted", "piece",
    )  # fmt: skip

    def __init__(self, number, index, given, function, args, common, folded):
        self.number: int = number  # in the order of submission
        self.index: int = index  # among the children of a mapped task; -1: the task itself
        self.given: Optional[State] = given  # the caller's own, with which it may end
        self.function: Callable = function
        self.args: tuple = args
        self.common: dict = common  # keyword arguments that it shares with other calls of its task
        #: by `_folded`: the other ones, its upstream states, its context, and its extra context
        self.folded: tuple = folded

        self.needs: List[_Call] = []  # what it cannot begin without, the first one last
        self.size = self.missing = 0  # how many these were, and how many still are in its way
        self.dependents: List[_Call] = []  # what cannot begin without it
        self.is_wanted: bool = False
        self.piece: Optional[_Piece] = None  # what it is under way with

    @property
    def kwargs(self):
        own, upstream_states, _, _ = _unfolded(self.folded)
        if upstream_states is not None:
            own["upstream_states"] = upstream_states
        return {**self.common, **own}

    @property
    def context(self):
        """What its context does not share with that of all calls; None if it has none."""
        return _unfolded(self.folded)[2]

    @property
    def extra_context(self):
        """What Dask is told."""
        return _unfolded(self.folded)[3] or {}


def _folded(mappings, known):
    """Dictionaries as one tuple: a third of their memory, as thousands of calls may wait.

    Many have the same keys, which are `known` once for all of them.
    """
    keys = tuple(mapping if mapping is None else tuple(mapping) for mapping in mappings)
    values = (value for mapping in mappings if mapping for value in mapping.values())
    return (known.setdefault(keys, keys), *values)


def _unfolded(folded):
    keys, *values = folded
    rest = iter(values)
    return [None if names is None else dict(zip(names, rest)) for names in keys]


class _Order:
    """Which call comes next: deep before wide.

    Whatever a call has made possible comes first; then what the call furthest along still misses;
    then the oldest. So a partition goes through all its mapped stages before the next one starts,
    as in Dask's ordering (https://docs.dask.org/en/stable/order.html).
    """

    def __init__(self):
        self._heap = []
        self._turns = itertools.count()

    def want(self, calls):
        """Let these calls have their turn, with all that they need."""
        stack = list(calls)
        while stack:
            call = stack.pop()
            if call.has_begun or call.pending.is_wanted:
                continue
            pending = call.pending
            pending.is_wanted = True
            stack.extend(pending.needs)
            if not pending.needs:
                heappush(self._heap, (1, pending.number, call))
            elif pending.missing < pending.size:
                self._push(call)

    def clear(self, call):
        """Note that this call is no longer in the way of those that need it."""
        for dependent in reversed(call.pending.dependents):
            dependent.pending.missing -= 1
            if dependent.pending.is_wanted:
                self._push(dependent)

    def _push(self, call):
        # Of equals, what needs less lets go sooner; then what has begun last.
        pending = call.pending
        heappush(self._heap, (0, pending.missing, pending.size, -next(self._turns), call))

    def next(self):
        """The call that comes next, or None as long as all that could are under way."""
        while self._heap:
            is_blocked, rank, *_, call = self._heap[0]
            if not call.has_begun and (is_blocked or rank == call.pending.missing):
                leaf = self._leaf(call)
                if leaf is not None:
                    return leaf
            heappop(self._heap)
        return None

    def _leaf(self, call):
        """Straight down to what this call cannot begin without."""
        while call.pending.missing:
            needs = call.pending.needs
            while needs and needs[-1].has_begun:
                needs.pop()
            if not needs:
                return None
            call = needs[-1]
        return call


class _Run:
    """An executor that puts calls off until `wait`, and drops what nobody will read any more.

    A result has as many readers as edges through which it is read. An edge does not count any
    more when the task run behind it, for a mapped edge the child of the same index, has read for
    good. Without readers, the result goes: Kedro's count of readers per dataset
    (`_release_datasets` of its `AbstractRunner`), for calls that are not all known from the start.
    """

    _prefect_ds_reads_on_demand = True

    def __init__(self, flow, executor, backend, logger):
        self._executor = executor
        self._backend = backend
        self._progress = _Progress(logger)
        self._order = _Order()
        self._numbers = itertools.count()
        self._records = {task: _TaskRecord(flow, task) for task in flow.sorted_tasks()}
        for edge in flow.edges:
            upstream = self._records[edge.downstream_task].upstream
            if self._records[edge.upstream_task] not in upstream:
                upstream.append(self._records[edge.upstream_task])
        self._terminal = [self._records[task] for task in flow.terminal_tasks()]
        self._flow = flow
        self._to_come = [self._records[task] for task in reversed(flow.sorted_tasks())]
        self._current = None  # the call that runs in this thread
        self._free = []  # calls that may run before the flow runner asks for them
        self._given_ends: List[State] = []  # what tasks came to in earlier rounds
        self._under_way = 0
        self._context = {}  # what the contexts of all calls have in common
        self._known_keys = {}  # of what calls are submitted with
        self._given = set()  # the calls that came to a state of the caller's own
        self._is_reported = False  # given states come from a backend: they are nobody else's
        #: in the end: that two task runs had one file, in words
        self.conflict: Optional[str] = None
        #: in the end: whether there will be no other round
        self.is_finished: bool = False

    def __getattr__(self, name):
        return getattr(self._executor, name)

    @contextmanager
    def start(self):
        # Not with the first call that has a context: a later round may begin by flattening.
        self._context = dict(prefect.context)
        with self._executor.start(), self._backend.start(self._flow):
            try:
                yield
                self._close()
            finally:
                self._progress.close(self._count)
                if self.is_finished:
                    ends = (call.value for call in self._calls())
                    self.conflict = _settle_claims(itertools.chain(self._given_ends, ends))
                    _forget_flow_run()
                # A call and its record refer to each other.
                for record in self._records.values():
                    record.calls.clear()
                self._free.clear()

    # -- what the flow runner asks for

    def submit(self, fn, *args, extra_context=None, **kwargs):
        self._is_reported |= _is_class(kwargs.get("task_runner_cls"), CloudTaskRunner)
        record = self._record_of(kwargs.get("task"))
        given = kwargs.get("state", args[0] if args else None)
        if isinstance(given, Mapped) and any(
            getattr(s, _FOR_NEXT_ROUND, False) for s in given.map_states
        ):
            given.result = None  # What the children hold: the flow runner put it there, too.
        index = len(record.calls) - 1 if record else -1
        call = self._new_call(record)
        needed = {}
        for argument in (*args, *map(kwargs.get, _UPSTREAM_KEYWORDS)):
            for edge, upstream in _through_edges(argument):
                self._note_given(edge, upstream)
                needed.update(dict.fromkeys(_calls_in(upstream)))
        context, common = kwargs.pop("context", None), {}
        if context is not None:
            context = _difference(context, self._context)
        if "task" in kwargs:
            record.common = record.common or {k: kwargs[k] for k in {*kwargs} - _OWN_KEYWORDS}
            common = record.common
        upstream_states = kwargs.pop("upstream_states", None)
        own = _difference(kwargs, common)
        folded = _folded((own, upstream_states, context, extra_context), self._known_keys)
        own_state = _callers_own(given)
        call.pending = _Pending(next(self._numbers), index, own_state, fn, args, common, folded)
        self._connect(call, needed)
        if self._current is not None:
            self._order.want([call])
        elif record is not None and record.is_awaited and index == -1:
            self._free.append(call)
        return call

    def map(self, fn, *args):
        return [self.submit(fn, *arguments) for arguments in zip(*args)]

    def wait(self, futures):
        if self._current is None:
            if isinstance(futures, dict) and all(isinstance(key, Task) for key in futures):
                # All tasks are submitted: the flow runner is about to end.
                self._given_ends = [s for s in _with_children(futures) if isinstance(s, State)]
                self._go_on_to(None)
                wanted = self._records if self._backend.runs_all else futures
                self._order.want(call for task in wanted for call in self._records[task].calls)
                self._free.clear()
                self._advance(None)
            else:
                asked = [call for call in _calls_in(futures) if not call.is_done]
                self._order.want(asked)
                if self._backend.is_concurrent:
                    self._order.want(self._free)
                    self._free.clear()
                self._advance(asked)
        # Otherwise a task run waits for the children that it has just submitted (their turn
        # comes later), or for those that it reduces (they are done).
        return self._backend.resolve(futures)

    # -- what depends on what

    def _record_of(self, task):
        if task is None:
            return self._current.record if self._current else None
        self._go_on_to(self._records[task])
        return self._records[task]

    def _go_on_to(self, record):
        """Note that all calls of the tasks before are known, and which may run for that.

        What is run before its readers are known would be kept for them, and could not travel
        with them. So a call waits until all that may come of it is known.
        """
        while self._to_come and self._to_come[-1] is not record:
            known = [self._to_come.pop()]
            while known:
                passed = known.pop()
                passed.unknown -= 1
                if not passed.unknown:
                    self._free.extend(passed.calls)
                    known.extend(passed.upstream)

    def _new_call(self, record):
        call = _Call(record)
        if record is not None:
            record.calls.append(call)
            record.reading += 1
        return call

    def _note_given(self, edge, upstream):
        """Stand a call that is done for a state that the flow runner has had from the start."""
        record = self._records.get(edge.upstream_task) if edge else None
        if record is not None and not record.calls and isinstance(upstream, State):
            for state in (upstream, *_children_of(upstream)):
                self._end(self._new_call(record), state, _callers_own(state))

    def _connect(self, call, needed):
        needed = [other for other in needed if not self._is_out_of_the_way(other)]
        for other in needed:
            other.pending.dependents.append(call)
        call.pending.needs[:0] = reversed(needed)
        call.pending.missing += len(needed)
        call.pending.size += len(needed)

    def _is_out_of_the_way(self, call):
        return call.has_begun if self._backend.schedules else call.is_done

    # -- what runs

    def _advance(self, asked):
        """Run calls until these are done (None: until all that are wanted are)."""
        while asked is None or asked:
            while self._backend.has_room(self._under_way):
                calls = self._next_calls()
                if not calls:
                    break
                self._begin(calls)
            if not self._under_way:
                break
            for piece, outcomes in self._backend.finished():
                self._under_way -= 1
                for call, outcome in zip(piece.calls, outcomes):
                    self._finish(call, outcome)
            piece = outcomes = calls = call = outcome = None
            while asked and asked[-1].is_done:
                asked.pop()

    def _next_calls(self):
        """The next call and those that travel with it, in the order in which they run."""
        call = self._order.next()
        if call is None or not self._backend.takes_chains:
            return [call] if call else []
        return _of_one_index(call, self._backend.workers) or _chain(call)

    def _begin(self, calls):
        piece = _Piece(calls)
        self._under_way += 1
        for call in calls:
            call.pending.piece = piece
        if self._backend.schedules:
            for call in calls:
                self._order.clear(call)
        self._current = calls[0]
        try:
            self._backend.begin(piece, self._context)
        finally:
            self._current = None

    def _end(self, call, outcome, given):
        call.value = outcome
        if self._is_reported:
            return
        # What becomes of the children of a map that is the caller's goes into that map.
        is_child = call.record is not None and call.record.calls[0] in self._given
        if is_child or (given is not None and outcome is given):
            self._given.add(call)

    def _finish(self, call, outcome):
        self._end(call, outcome, call.pending.given)
        if call.record is not None and call.record.is_shared and call.pending.index == -1:
            _share(outcome)
        children = [c for c in _children_of(outcome) if isinstance(c, _Call)]
        if children:
            for dependent in call.pending.dependents:
                edges = [edge for edge, upstream in _inputs(dependent) if upstream is call]
                if not all(edge.mapped for edge in edges):
                    self._connect(dependent, children)
        if not self._backend.schedules:
            self._order.clear(call)
        if call.record is not None:
            is_over = _has_read_for_good(outcome)
            if self._is_reported and not is_over:
                self._keep_what_has_no_file(call)
            if (self._is_reported or is_over) and not call.record.restarts:
                self._release_inputs(call)
            else:
                for upstream in _edges_read(call):  # It can be read again, where it has a file.
                    if upstream not in self._given:
                        _drop(upstream.value, is_kept=True)
        call.pending = None
        if call.record is not None:
            self._release([call], 0)
        self._progress.tell(self._count)

    def _keep_what_has_no_file(self, call):
        """A call that is not over goes on in another process, which reads its inputs from files."""
        for _, other in _calls_read(call):
            if _has_result(other.value) and _location_of(other.value._result) is None:
                other.readers = float("inf")

    def _release_inputs(self, call):
        record = call.record
        record.reading -= 1
        if isinstance(call.value, Mapped):
            return  # Its children read.
        for edge in record.reads:
            upstream = self._records[edge.upstream_task]
            if _flattens(edge) and len(upstream.calls) > 1:
                continue  # In each round, Prefect asks all children for their lengths.
            index = call.pending.index
            if edge.mapped and index >= 0 and len(upstream.calls) > 1:
                self._release(upstream.calls[index + 1 : index + 2])
                if not record.reading:
                    # What is left over if another map over which it goes is shorter.
                    self._release(upstream.calls[len(record.calls) :])
            elif not record.reading:
                upstream.readers -= 1
                self._release(upstream.calls)

    def _release(self, calls, readers=1):
        for call in calls:
            call.readers -= readers
            if call.is_done and call.readers <= 0 and call not in self._given:
                _drop(call.value, call.record.is_kept)

    def _close(self):
        """If there will be no other round, drop what was held for one; else mark it."""
        ends = [call.value for record in self._terminal for call in record.calls]
        self.is_finished = all(isinstance(state, State) and state.is_finished() for state in ends)
        for record in self._records.values():
            made = [call.value for call in record.calls if call not in self._given]
            made = [state for state in made if isinstance(state, State)]
            for state in made:
                _drop(state, record.is_kept or not self.is_finished)
                if not self.is_finished:
                    setattr(state, _FOR_NEXT_ROUND, True)
                elif hasattr(state, _FOR_NEXT_ROUND):
                    delattr(state, _FOR_NEXT_ROUND)
            if any(state._result is PurgedResult for state in made):
                _forget_dropped_children(record.calls[0].value)

    def _calls(self):
        return (call for record in self._records.values() for call in record.calls)

    def _count(self):
        """How many mapped task runs there are, how many are done, and other counts by name."""
        children = [call for record in self._records.values() for call in record.calls[1:]]
        done = [call.value for call in children if call.is_done and call.value.is_finished()]
        found = [s for s in done if s.is_cached() or getattr(s, _FOUND, False)]
        read = sum(_is_in_file(s._result) and s._result.source.was_read for s in found)
        others = {"found": len(found), "read": read} if found else {}
        others["failed"] = sum(state.is_failed() for state in done)
        others["results alive"] = sum(
            _has_result(call.value) for call in self._calls() if call not in self._given
        )
        return len(children), len(done), others


def _new_run(flow, executor, logger):
    """What puts the flow's calls in order; None on an executor that is to do so itself."""
    for pattern in _recompute_patterns():
        if pattern == _OUT_OF_DATE or any(_matches(pattern, task) for task in flow.tasks):
            continue
        message = (
            f"recompute={pattern!r} matches no task of this flow. It has: {_names(flow.tasks)}."
        )
        if not _is_recompute_inherited():
            raise ValueError(message)
        logger.warning(message)
    # Below 0.12 the context has only those parameters that were passed.
    parameters = dict(prefect.context.get("parameters") or {})
    for parameter in flow.parameters():
        if not parameter.required:
            parameters.setdefault(parameter.name, parameter.default)
    prefect.context["parameters"] = parameters
    backend = _backend_for(executor, logger)
    return _Run(flow, executor, backend, logger) if backend else None


def _forget_dropped_children(state):
    """Let a map hold of its children's results what they themselves hold."""
    children = _children_of(state)
    # Under a backend, a map that was given tells no children.
    if children and all(isinstance(child, State) for child in children):
        state.result = [c._result if _is_unread(c._result) else c.result for c in children]


#: The arguments of a task run in which calls stand for states.
_UPSTREAM_KEYWORDS = ("upstream_states", "upstream_mapped_states")

#: The arguments that no two calls have in common.
_OWN_KEYWORDS = {"state", "context", "is_mapped_parent", *_UPSTREAM_KEYWORDS}


def _share(outcome):
    if isinstance(outcome, State) and _is_in_file(outcome._result):
        outcome._result.source.is_shared = True


def _difference(new, common):
    return {k: v for k, v in new.items() if k not in common or common[k] is not v}


def _inputs(call):
    """Pairs of an edge (None for a helper's) and what a call gets through it."""
    kwargs = call.pending.kwargs
    for argument in (*call.pending.args, *map(kwargs.get, _UPSTREAM_KEYWORDS)):
        yield from _through_edges(argument)


def _edges_read(call):
    """The calls that this one reads, once for each edge."""
    pairs = [(edge, up) for edge, up in _inputs(call) if edge and isinstance(up, _Call)]
    return [upstream for edge, upstream in pairs if _is_read(edge)]


def _calls_read(call):
    """Pairs of an edge and a call that is read through it: of a reduced map, each child."""
    for edge, upstream in _inputs(call):
        if edge and _is_read(edge):
            for other in _calls_in(upstream):
                yield edge, other


def _through_edges(argument):
    if isinstance(argument, dict):
        return argument.items()
    return [(None, argument)] if isinstance(argument, _Call) else ()


def _calls_in(futures):
    if isinstance(futures, _Call):
        yield futures
    elif isinstance(futures, (dict, list, tuple, set)):
        for future in futures.values() if isinstance(futures, dict) else futures:
            yield from _calls_in(future)


def _replace(futures, kinds, replacement):
    """A copy of nested dicts and lists in which other things stand for those of these kinds."""
    if isinstance(futures, kinds):
        return replacement(futures)
    if isinstance(futures, dict):
        return {key: _replace(future, kinds, replacement) for key, future in futures.items()}
    if isinstance(futures, (list, tuple, set)):
        return type(futures)(_replace(future, kinds, replacement) for future in futures)
    return futures


def _flattens(edge):
    return getattr(edge, "flattened", False)


# How far it is -------------------------------------------------------------------------------


class _Progress:
    """How far the mapped tasks of a flow are: a line in the log, and on a terminal a bar."""

    SECONDS_BETWEEN_LINES = 30
    SECONDS_BETWEEN_LOOKS = 1
    #: The more there is to see, the longer a look takes: pause for this many times as long.
    PAUSE_PER_LOOK = 50

    def __init__(self, logger):
        self._logger = logger
        self._bar = None
        self._has_lines = False
        self._next_look = time.monotonic() + self.SECONDS_BETWEEN_LOOKS
        self._next_line = time.monotonic() + self.SECONDS_BETWEEN_LINES

    def tell(self, look):
        """If it is time to, look how far they are, and say so."""
        begin = time.monotonic()
        if begin < self._next_look:
            return
        self._show(look(), begin >= self._next_line)
        end = time.monotonic()
        pause = max(self.SECONDS_BETWEEN_LOOKS, self.PAUSE_PER_LOOK * (end - begin))
        self._next_look = end + pause

    def close(self, look):
        """Say where they have ended, if anything was said before."""
        if self._bar is not None or self._has_lines:
            self._show(look(), self._has_lines)
        if self._bar is not None:
            self._bar.close()

    def _show(self, counts, is_line_due):
        total, done, others = counts
        if not total:
            return
        if self._bar is None and tqdm is not None and sys.stderr and sys.stderr.isatty():
            self._bar = tqdm(desc="mapped task runs", unit="")
        if self._bar is not None:
            self._bar.total, self._bar.n = total, done
            self._bar.set_postfix(others)
        if is_line_due:
            self._has_lines = True
            self._next_line = time.monotonic() + self.SECONDS_BETWEEN_LINES
            details = ", ".join(f"{count} {name}" for name, count in others.items())
            self._logger.info("Mapped task runs: %d of %d done, %s", done, total, details)


# A piece of work -----------------------------------------------------------------------------
# As Dask fuses tasks (https://docs.dask.org/en/stable/optimize.html): what one of its calls returns
# is handed to the next and dropped, and never leaves the place where they run.


def _chain(call):
    """This call, and those of which each but feeds the next."""
    calls = [call]
    while len(call.pending.dependents) == 1 and not _lets_go_of_others(call, calls):
        (dependent,) = call.pending.dependents
        is_alone = _needed_with(dependent, {call}, call) == {dependent}
        if not is_alone or _edges_read(dependent).count(call) != call.readers:
            break
        calls.append(dependent)
        call = dependent
    return calls


def _of_one_index(call, workers):
    """All that is done with one item of maps that part or meet, if they have many items."""
    if call.pending.index < 0 or len(call.record.calls) <= 2 * workers():
        return None
    calls, ahead = {call}, [call]
    while ahead:
        for dependent in ahead.pop().pending.dependents:
            new = _needed_with(dependent, calls, call)
            calls |= new
            ahead += new
    # What is read outside, too, would have to go there with all that is left of the others.
    inner = Counter(up for c in calls for up in _edges_read(c) if up in calls)
    if any(number != up.readers for up, number in inner.items()):
        return None
    if any(_lets_go_of_others(c, calls) for c in calls):
        return None
    return sorted(calls, key=lambda c: c.pending.number)


def _lets_go_of_others(call, calls):
    """Whether results of other pieces go when it has read. They stay until its piece ends."""
    return any(
        other not in calls and (not other.is_done or _is_held(other.value))
        for edge, other in _calls_read(call)
        if edge.mapped or call.record.reading == 1
    )


def _needed_with(call, calls, like):
    """What must join these calls for this one to wait for no other; nothing if it has to.

    All of them are of the same index, and ask for the same resources, as `like`.
    """
    needed, stack = set(), [call]
    while stack:
        other = stack.pop()
        if other.is_done or other in calls or other in needed:
            continue
        if (
            other.has_begun
            or not other.pending.is_wanted
            or other.record is None
            or other.record.restarts
            or other.pending.index != like.pending.index
            or _resources(other) != _resources(like)
        ):
            return set()
        needed.add(other)
        stack.extend(c for _, upstream in _inputs(other) for c in _calls_in(upstream))
    return needed


def _resources(call):
    """The tags by which a task asks for a place on the cluster."""
    tags = call.pending.extra_context.get("task_tags") or ()
    return {tag for tag in tags if tag.lower().startswith("dask-resource")}


class _Piece:
    """Calls that travel together, in the order in which they run."""

    __slots__ = (
        "calls",
        "positions",  # of these calls
        "future",  # of their outcomes, while they are under way on a cluster
    )

    def __init__(self, calls):
        self.calls = calls
        self.positions = {call: position for position, call in enumerate(calls)}
        self.future = None


class _At(namedtuple("_At", "source position")):
    """Stands for a state: an outcome of another piece, or of this one if `source` is None."""


def _steps(piece):
    """The steps of a piece, and the futures of other pieces that they need."""
    sources: dict = {}

    def stand_in(upstream):
        if isinstance(upstream, _Call):
            if not upstream.is_done:
                other = upstream.pending.piece
                where = None if other is piece else source(other.future)
                return _At(where, other.positions[upstream])
            upstream = upstream.value
        if isinstance(upstream, Mapped):
            # A task that reduces a map hangs all results into the state it is handed.
            return copy.copy(upstream)
        if isinstance(upstream, State) and isinstance(upstream._result, _Elsewhere):
            return _At(source(upstream._result.future), upstream._result.position)
        return upstream

    def source(future):
        return sources.setdefault(id(future), (len(sources), future))[0]

    steps = []
    for call in piece.calls:
        pending = call.pending
        kwargs = pending.kwargs
        for key in _UPSTREAM_KEYWORDS:
            if key in kwargs:
                kwargs[key] = _replace(kwargs[key], (_Call, State), stand_in)
        args = [_replace(arg, (_Call, State), stand_in) for arg in pending.args]
        reads = [piece.positions[up] for up in _edges_read(call) if up in piece.positions]
        is_kept = call.record is None or call.record.is_kept
        steps.append(
            (pending.function, args, kwargs, pending.context, call.readers, is_kept, reads)
        )
    return steps, [future for _, future in sources.values()]


def _run_steps(context, steps, sources=()):
    """Run the calls of a piece one after the other; return their outcomes."""
    outcomes: list = []
    readers: list = []

    def state_at(at):
        return (outcomes if at.source is None else sources[at.source])[at.position]

    for function, args, kwargs, own_context, readers_left, _, reads in steps:
        kwargs = dict(kwargs)
        for key in _UPSTREAM_KEYWORDS:
            if key in kwargs:
                kwargs[key] = _replace(kwargs[key], _At, state_at)
        if own_context is not None:
            kwargs["context"] = dict(context, **own_context)
        outcome = _run_call(function, _replace(args, _At, state_at), kwargs)
        outcomes.append(outcome)
        readers.append(readers_left)
        is_read = reads if _has_read_for_good(outcome) else []
        for position in is_read:
            readers[position] -= 1
        for position in (*is_read, len(outcomes) - 1):
            if readers[position]:
                continue
            _, _, inputs, _, _, is_kept, _ = steps[position]
            if outcomes[position] is not _callers_own(inputs.get("state")):
                _drop(outcomes[position], is_kept)
    return outcomes


def _run_call(function, args, kwargs):
    """Run a call, and let its outcome hold no inputs but those that will be read again.

    Up to Prefect 0.12.0 every state holds them, in case that it is retried.
    """
    outcome = _run_without_merging(function, args, kwargs)
    if isinstance(outcome, State):
        _let_go_of_data(_at_hand(outcome._result), _values_read(args, kwargs))
        if _has_read_for_good(outcome):
            outcome.cached_inputs = {}
    return outcome


def _values_read(args, kwargs):
    for argument in (*args, kwargs.get("upstream_states")):
        for edge, upstream in _through_edges(argument):
            for state in _states_behind(edge, upstream):
                yield _at_hand(state._result)


# Where calls run: here, in pools, on Dask ----------------------------------------------------
# Dask's schedulers of threads and processes are not used: they would keep all results.


def _backend_for(executor, logger):
    """Where the calls run that are meant for this executor; None if it is to run them itself."""
    if isinstance(executor, LocalExecutor):
        base, backend, passed_over = LocalExecutor, _Here, ["map"]
    elif isinstance(executor, DaskExecutor):
        base, backend, passed_over = DaskExecutor, _OnCluster, ["map"]
    elif isinstance(executor, LocalDaskExecutor):
        base, backend, passed_over = LocalDaskExecutor, _InThreads, ["submit", "map", "wait"]
        if executor.scheduler.startswith(("sync", "single")):
            backend = _HereByItself
        elif executor.scheduler in ("processes", "multiprocessing"):
            backend = _InProcesses
    else:
        logger.warning(
            "Of the executor %s nothing is known. So it runs the flow by itself, as without "
            "prefect_ds, and keeps all results.", type(executor).__name__,
        )  # fmt: skip
        return None
    if issubclass(backend, _Concurrent) and not _FLOW_RUNNER_MAPS:
        return None  # Tasks submit their own children, from wherever they run.
    kind = type(executor)
    own = [name for name in passed_over if getattr(kind, name, 0) is not getattr(base, name, 0)]
    if own:
        logger.warning(
            "%s has a %s of its own, which would be passed over. So the flow runs as without "
            "prefect_ds, and keeps all results.", kind.__name__, " and a ".join(own),
        )  # fmt: skip
        return None
    return backend(executor)


class _Here:
    """Calls run one by one, in this thread."""

    is_concurrent = False  # calls go on while the flow runner submits
    takes_chains = False  # calls that feed one another travel together
    schedules = False  # takes calls before those that they need are done
    runs_all = True  # in the end, also what nobody has asked for

    def __init__(self, executor):
        self._executor = executor
        self._finished: list = []

    @contextmanager
    def start(self, flow):
        yield

    def has_room(self, under_way):
        return not under_way

    def begin(self, piece, context):
        steps, _ = _steps(piece)
        outcomes = self._executor.wait(self._executor.submit(_run_steps, context, steps))
        self._finished.append((piece, outcomes))

    def finished(self):
        """Pairs of a piece that has run and its outcomes."""
        finished, self._finished = self._finished, []
        return finished

    def resolve(self, futures):
        """The states for calls that are done."""
        return _replace(futures, _Call, lambda call: call.value if call.is_done else call)


class _HereByItself(_Here):
    """As `_Here`, but not by `LocalDaskExecutor`: it keeps every result until it is left."""

    #: Dask computes what is asked for, and what that needs.
    runs_all = not _FLOW_RUNNER_MAPS

    def begin(self, piece, context):
        self._finished.append((piece, _run_steps(context, _steps(piece)[0])))


class _Concurrent(_Here):
    """Calls run at the same time, and each piece of them tells when it is done."""

    is_concurrent = takes_chains = True

    def __init__(self, executor):
        super().__init__(executor)
        self._done: queue.Queue = queue.Queue()

    def _tell(self, piece, future):
        future.add_done_callback(lambda done: self._done.put((piece, done)))

    def _told(self):
        """Pairs of a piece and a future that is done; waits for at least one."""
        yield self._done.get()
        while not self._done.empty():
            yield self._done.get()


class _InThreads(_Concurrent):
    """Calls run in threads, as many as `LocalDaskExecutor` asks for."""

    runs_all = _HereByItself.runs_all

    @contextmanager
    def start(self, flow):
        import dask.config
        from dask.system import CPU_COUNT

        self._width = dask.config.get("num_workers", None) or CPU_COUNT
        self._packer = _Packer(flow)
        pool = getattr(self._executor, "_pool", None)
        if isinstance(pool, concurrent.futures.Executor):
            self._pool = pool
            yield
        else:
            with self._new_pool() as self._pool:
                yield

    def _new_pool(self):
        return concurrent.futures.ThreadPoolExecutor(self._width)

    def workers(self):
        return self._width

    def has_room(self, under_way):
        return under_way < self._width

    def begin(self, piece, context):
        self._tell(piece, self._pool.submit(_run_steps, context, _steps(piece)[0]))

    def finished(self):
        for piece, future in self._told():
            yield piece, future.result()


class _InProcesses(_InThreads):
    """Calls run in processes, as many as `LocalDaskExecutor` asks for."""

    def _new_pool(self):
        from dask.multiprocessing import get_context

        return concurrent.futures.ProcessPoolExecutor(self._width, get_context())

    def has_room(self, under_way):
        # One waits in front of a process, which else would wait while a message is on its way.
        return under_way <= self._width

    def begin(self, piece, context):
        steps, _ = _steps(piece)
        if all(call.pending.kwargs.get("is_mapped_parent") for call in piece.calls):
            # All that comes of it is "Mapped": not worth to send what its children will read.
            future: Any = concurrent.futures.Future()
            future.set_result(cloudpickle.dumps(_run_steps(context, steps)))
        else:
            future = self._pool.submit(_run_pickled, *self._packer.dumps(context, steps))
        self._tell(piece, future)

    def finished(self):
        for piece, outcomes in super().finished():
            yield piece, self._packer.received(cloudpickle.loads(outcomes))


class _OnCluster(_Concurrent):
    """Calls run on the cluster of a `DaskExecutor`, which decides where and when.

    What is small comes to the client as soon as it is there; for the rest a digest comes, and the
    results stay on the cluster until they are wanted.
    """

    schedules = True

    @contextmanager
    def start(self, flow):
        self._packer = _Packer(flow)
        self._payload = None
        self._threads = None  # asked once for all that is submitted in one go
        self._priority = itertools.count(1)
        yield

    def workers(self):
        if self._threads is None:
            self._threads = sum(self._executor.client.nthreads().values())
        return self._threads

    def has_room(self, under_way):
        return True

    def begin(self, piece, context):
        steps, sources = _steps(piece)
        payload, work = self._packer.dumps(context, steps)
        if self._payload is None:
            # Once for all calls, to all workers; what is lost with a worker, Dask makes anew.
            self._payload = self._submit(_payload_here, payload.pickled)
            self._executor.client.replicate([self._payload])
        extra_context = _name_together(piece.calls)
        piece.future = self._submit(
            _run_on_worker,
            self._payload,
            work,
            *sources,
            extra_context=extra_context,
            priority=-next(self._priority),
        )
        self._tell(piece, piece.future)

    def _submit(self, function, *args, extra_context=None, priority=1):
        return _submit_to_cluster(
            self._executor, function, *args, extra_context=extra_context, priority=priority
        )

    def finished(self):
        small = []
        self._threads = None
        for piece, future in self._told():
            if future.status != "finished":
                future.result()
            if future is piece.future and future.type is not _Small:
                self._tell(piece, self._submit(_without_what_stays, future))
            else:
                small.append((piece, future))
        answers = self._executor.wait([future for _, future in small]) if small else []
        for (piece, future), outcomes in zip(small, answers):
            if future is not piece.future:
                outcomes = [
                    _elsewhere(outcome, piece.future, position) if stays else outcome
                    for position, (outcome, stays) in enumerate(outcomes)
                ]
            piece.future = None
            yield piece, self._packer.received(outcomes)

    def resolve(self, futures):
        # The flow runner hands on what it does not map over.
        looked_at = futures
        if isinstance(futures, dict):
            looked_at = [f for key, f in futures.items() if getattr(key, "mapped", True)]
        # Each once: a map may go over one list twice.
        values = {id(call.value): call.value for call in _calls_in(looked_at)}.values()
        states = [s for s in values if isinstance(s, State) and isinstance(s._result, _Elsewhere)]
        where = {id(state._result.future): state._result.future for state in states}
        answers = self._executor.wait(list(where.values())) if where else []
        found = dict(zip(where, answers))
        for state in states:
            state._result = found[id(state._result.future)][state._result.position]._result
        return super().resolve(futures)


class _Small(list):
    """The outcomes of a piece, of which none holds much: the type comes with the news of it."""


class _Elsewhere(Result):
    """Stands, on the client, for a result that stays on the cluster."""

    def __init__(self, future, position):
        super().__init__(None)
        self.future = future
        self.position = position


def _elsewhere(state, future, position):
    state._result = _Elsewhere(future, position)
    return state


def _is_held(state):
    """Whether a state holds a result, here or on the cluster, that may be large."""
    if not _has_result(state):
        return False
    is_elsewhere = isinstance(state._result, _Elsewhere)
    return is_elsewhere or _is_in_file(state._result) or _stays(state)


def _without_what_stays(outcomes):
    """The outcomes of a piece without what stays where it is, and whether that is so."""
    digest = []
    for outcome in outcomes:
        stays = _stays(outcome)
        if stays:
            outcome = copy.copy(outcome)
            outcome._result = PurgedResult
        digest.append((outcome, stays))
    return digest


def _name_together(calls):
    """What the dashboard shows: names joined as Dask's `fuse` does."""
    contexts = [call.pending.extra_context for call in calls]
    if len(calls) == 1:
        return contexts[0]
    names = [context.get("task_name", "") for context in contexts]
    return dict(contexts[0], task_name="-".join(filter(None, names)))


# What travels to another process -------------------------------------------------------------


class _Packer:
    """Pickles pieces of work: what all calls have in common once, to which they only refer."""

    def __init__(self, flow):
        self.tasks = _Tasks(here=flow.tasks)
        self._payload = None

    def dumps(self, context, steps):
        """The payload, the same for all, and the pickle of these steps."""
        if self._payload is None:
            self._payload = _Payload(cloudpickle.dumps((context, self.tasks.each_pickled())))
        return self._payload, self.tasks.dumps(steps)

    def received(self, outcomes):
        """Outcomes from another process, ready for whoever reads their files in this one."""
        for file in _files_of(outcomes):
            if file.again is not None:
                file.again.tasks = self.tasks
        return outcomes


class _Tasks:
    """The tasks of a flow, to which what is pickled in a flow run refers by their numbers.

    Each piece of work loads its own, as with Prefect: tasks may change themselves.
    """

    def __init__(self, pickles=(), here=()):
        self._pickles: List[bytes] = pickles
        self._here: Dict[int, Task] = dict(enumerate(here))
        self.numbers: Dict[int, int] = {id(task): n for n, task in self._here.items()}
        #: those that were in what was loaded
        self.shared_files: List[_File] = []

    def each_pickled(self):
        return [cloudpickle.dumps(task) for task in self._here.values()]

    def __getitem__(self, number):
        if number not in self._here:
            task = self._here[number] = pickle.loads(self._pickles[number])
            self.numbers[id(task)] = number
        return self._here[number]

    def dumps(self, thing):
        return self._dump(io.BytesIO(), thing, tells_again=True)

    def dumps_again(self, again):
        """What can travel of it: a `_PickledAgain`, if that is small, or None."""
        with suppress(Exception):  # There may be anything in a task's inputs and context.
            # How its inputs came to be is not told, too: it would be the whole flow before it.
            return _PickledAgain(self._dump(_SmallFile(), tuple(again), tells_again=False))
        return None

    def _dump(self, file, thing, tells_again):
        with file:
            _Pickler(file, self.numbers, tells_again).dump(thing)
            return file.getvalue()

    def loads(self, pickled):
        with io.BytesIO(pickled) as file:
            return _Unpickler(file, self).load()


class _Pickler(cloudpickle.CloudPickler):
    def __init__(self, file, numbers, tells_again):
        super().__init__(file)
        self._numbers = numbers
        self._tells_again = tells_again

    def persistent_id(self, thing):
        if type(thing) is _PickledAgain:
            return thing.pickled if self._tells_again else b""
        if type(thing) is _File and thing.is_shared:
            return thing.__reduce__()[1]
        return self._numbers.get(id(thing))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, tasks):
        super().__init__(file)
        self._tasks = tasks

    def persistent_load(self, found):
        if isinstance(found, bytes):
            return _PickledAgain(found) if found else None
        if isinstance(found, tuple):
            self._tasks.shared_files.append(_file_here(*found))
            return self._tasks.shared_files[-1]
        return self._tasks[found]


class _PickledAgain:
    """An `_Again` that travels with its file, from where that was found or written."""

    MAX_BYTES = 2**16

    #: `tasks`: what the piece of work that is under way has; the client has them in the end, too
    _in_thread = threading.local()

    def __init__(self, pickled):
        self.pickled: bytes = pickled
        self.tasks: Optional[_Tasks] = None

    def __reduce__(self):
        return _PickledAgain, (self.pickled,)

    @classmethod
    @contextmanager
    def at_hand(cls, tasks):
        cls._in_thread.tasks = tasks
        try:
            yield
        finally:
            cls._in_thread.tasks = None

    def load(self):
        """The `_Again`; None if the tasks are not at hand."""
        tasks = getattr(self._in_thread, "tasks", None) or self.tasks
        return tasks and _Again(*tasks.loads(self.pickled))


class _SmallFile(io.BytesIO):
    def write(self, data):
        if self.tell() + len(data) > _PickledAgain.MAX_BYTES:
            raise OverflowError
        return super().write(data)


class _Payload:
    """What all calls of a flow run have in common, in a process that runs some of them.

    On a cluster it is there as long as the client holds it: for this flow run.
    """

    def __init__(self, pickled):
        self.pickled: bytes = pickled
        self._loaded: Any = None
        #: by thread, the shared files of its last piece: with the next one, they are often the same
        self.last_files: Dict[int, List[_File]] = {}

    def __reduce__(self):
        return _payload_here, (self.pickled,)

    def load(self):
        """The context, and pickles of the tasks."""
        if self._loaded is None:
            self._loaded = pickle.loads(self.pickled)
        return self._loaded


#: Those that are held in this process, by their pickles.
_payloads_here: Any = weakref.WeakValueDictionary()


def _payload_here(pickled):
    return _payloads_here.setdefault(pickled, _Payload(pickled))


#: Files that several pieces of work in this process may read, as long as one of them is held.
_files_here: Any = weakref.WeakValueDictionary()


def _file_here(storage, place, written, again):
    file = _File(storage, place, written, again)
    if written is not None:
        file = _files_here.setdefault((place, written, repr(storage.read_kwargs)), file)
    file.is_shared = True
    return file


#: The one of the last call in a process of a pool, which gets it with each call.
_payload_of_pool: list = [None]


def _run_pickled(payload, work):
    _payload_of_pool[0] = payload
    return cloudpickle.dumps(_run_work(payload, work))


def _run_on_worker(payload, work, *sources):
    outcomes = _run_work(payload, work, *sources)
    for outcome in outcomes:
        if isinstance(outcome, State):
            _drop(outcome, is_kept=True)
            # A traceback does not travel; on the worker it would keep all that the task has read.
            for error in _errors_behind(_at_hand(outcome._result)):
                error.__traceback__ = None
    return outcomes if any(map(_stays, outcomes)) else _Small(outcomes)


def _run_work(payload, work, *sources):
    context, pickles = payload.load()
    tasks = _Tasks(pickles)
    steps = tasks.loads(work)
    payload.last_files[threading.get_ident()] = tasks.shared_files
    with _PickledAgain.at_hand(tasks):
        outcomes = _run_steps(context, steps, sources)
    for file in _files_of(outcomes):
        if isinstance(file.again, _Again):
            file.again = tasks.dumps_again(file.again)
    return outcomes


def _files_of(outcomes):
    for outcome in outcomes:
        if isinstance(outcome, State) and _is_in_file(outcome._result):
            yield outcome._result.source


# What Prefect's context costs ----------------------------------------------------------------


def _run_without_merging(function, args, kwargs):
    """Run a call without what Prefect spends most of its time on: merging its configuration.

    `prefect.context(...)` merges the configuration that it is handed into the one that is there,
    key by key, several times per task run. Merged once and put in place, it can be left out.
    """
    context = dict(kwargs.get("context") or {})
    if "config" not in context:
        return function(*args, **kwargs)
    own = prefect.context.get("config")
    config = _merge_config(own, context.pop("config"))
    if _CONTEXT_CONFIGURES:
        context.setdefault("checkpointing", config["flows"]["checkpointing"])
    prefect.context["config"] = config
    try:
        return function(*args, **dict(kwargs, context=context))
    finally:
        prefect.context["config"] = own


#: The last merge in each thread: what was merged, and the outcome.
_last_merge = threading.local()


def _merge_config(own, config):
    if config is own:
        return own
    key, merged = getattr(_last_merge, "key_and_outcome", (None, None))
    if key is None or key[0] is not own or not (key[1] is config or key[1] == config):
        key, merged = (own, config), merge_dicts(own, config)
        _last_merge.key_and_outcome = key, merged
    return merged


# The modules of the original prefect_ds, so that its import lines go on to work, under whatever
# name this file was imported.
for _name in (
    "pandas_result_handler",
    "checkpoint_handler",
    "task_runner",
    "flow_runner",
    "result",
):
    sys.modules[f"{__name__}.{_name}"] = sys.modules[__name__]
