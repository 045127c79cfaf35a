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
`PurgedResult`
    What a dropped result is replaced with.

What differs between Prefect's releases is settled in the first section. Below it, nothing asks
for a version. The internals of Prefect that this file relies on are listed, and held, by
`test_touches_only_these_internals` in `test_prefect_ds.py`.
"""

import concurrent.futures
import copy
import datetime
import errno
import fnmatch
import glob
import inspect
import itertools
import os
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
from collections import ChainMap, Counter
from contextlib import contextmanager, suppress
from heapq import heappop, heappush

import cloudpickle
import pandas
import prefect
from prefect.core import Task
from prefect.engine import flow_runner as _prefect_flow_runner
from prefect.engine.flow_runner import FlowRunner
from prefect.engine.result import NoResult, Result
from prefect.engine.runner import ENDRUN
from prefect.engine.state import Cached, Failed, Finished, Mapped, State, Success
from prefect.engine.task_runner import TaskRunner
from prefect.utilities.collections import merge_dicts

try:
    from tqdm import tqdm
except ImportError:  # There is no progress bar then.
    tqdm = None

__version__ = "1.0.0"

__all__ = [
    "PandasResultHandler",
    "PandasResult",
    "checkpoint_handler",
    "DSTaskRunner",
    "DSFlowRunner",
    "PurgedResult",
]


# What the installed Prefect offers ----------------------------------------------------------

#: From 0.11 on a task keeps a `Result`, which knows its location; before, a `ResultHandler`.
_HAS_LOCATIONS = "result_handler" not in inspect.signature(TaskRunner.__init__).parameters

#: Tasks opt out of checkpoints by `checkpoint=False`; not where that is the default (0.9.0).
_CAN_OPT_OUT = "checkpoint" not in prefect.config.tasks.defaults

#: From 0.12 on the flow runner submits mapped children itself, by the function `run_task`, and
#: executors take futures apart. Before, tasks submit their own children to the executor.
_FLOW_RUNNER_MAPS = hasattr(_prefect_flow_runner, "run_task")

#: From 0.13 on the configuration in the context decides on checkpointing; before, the process's.
_CONTEXT_CONFIGURES = tuple(map(int, prefect.__version__.split(".")[:2])) >= (0, 13)

try:
    from prefect.executors import DaskExecutor, LocalDaskExecutor, LocalExecutor
except ImportError:  # below 0.14
    from prefect.engine.executors import DaskExecutor, LocalDaskExecutor, LocalExecutor

#: Tasks that Prefect runs again in every later round of an unfinished flow, where it has them.
_RESTARTED: tuple = (getattr(prefect.tasks.secrets, "SecretBase", ()),)
if hasattr(prefect.tasks.core, "resource_manager"):
    _RESTARTED += (
        prefect.tasks.core.resource_manager.ResourceSetupTask,
        prefect.tasks.core.resource_manager.ResourceCleanupTask,
    )

if "task_name" in inspect.signature(DaskExecutor._prep_dask_kwargs).parameters:  # up to 0.12.0

    def _submit_to_cluster(executor, function, *args, extra_context):
        """Not by `DaskExecutor.submit`: it asks the cluster to keep what it submits."""
        extra_context = extra_context or {}
        kwargs = executor._prep_dask_kwargs(
            extra_context.get("task_full_name", ""), extra_context.get("task_tags", [])
        )
        return executor.client.submit(function, *args, **kwargs)

else:

    def _submit_to_cluster(executor, function, *args, extra_context):
        return executor.submit(function, *args, extra_context=extra_context)


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
            new = self.format(**kwargs)
            new.value = value_
            self._save(value_, new.location)
            return new

    def _storage_of(task_runner):
        return task_runner.result

    def _stored(storage, location, frame):
        result = storage.from_value(frame)
        result.location = location
        return result

    def _is_stored(state):
        return state._result.location is not None

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

    def _storage_of(task_runner):
        return task_runner.result_handler

    def _stored(storage, location, frame):
        result = Result(frame, result_handler=storage)
        result.safe_value = SafeResult(location, result_handler=storage)
        return result

    def _is_stored(state):
        return state._result.safe_value != NoResult

    def _accept_as_result_handler(cls):
        """It is one."""


# Where a frame is stored: the template in the path ------------------------------------------


class _Arguments:
    """What the template in the path may use of one task run: its arguments.

    It lives in `prefect.context` while the task runs, so Prefect ends its life, in any thread
    and in any process. It stays behind when a context is pickled: the arguments of one task are
    of no use to another, and may be large.
    """

    KEY = "prefect_ds_arguments"

    def __init__(self, task=None, inputs=None, edges=(), storage=None):
        self.task = task
        self.storage = storage
        self.inputs = inputs or {}
        self.distinct = sorted(edge.key for edge in edges if edge.mapped and edge.key)
        self.task_full_name = prefect.context.get("task_full_name")
        self.location = None

    def __reduce__(self):
        return _Arguments, ()

    @classmethod
    def current(cls):
        """Those of the task run that is under way, if a `DSTaskRunner` runs it, else None."""
        arguments = prefect.context.get(cls.KEY)
        # A flow that a task runs inherits the context of that task.
        if arguments and arguments.task_full_name == prefect.context.get("task_full_name"):
            return arguments
        return None

    def values(self):
        """The arguments by name, with the defaults of the signature for those not passed."""
        parameters = inspect.signature(self.task.run).parameters.values() if self.task else ()
        values = {p.name: p.default for p in parameters if p.default is not p.empty}
        values.update((key, result.value) for key, result in self.inputs.items())
        return values

    def check_distinct(self, template):
        """Raise if the children of a mapped task would all fill the template alike."""
        distinct = {"map_index", "task_full_name", "task_run_id", *self.distinct}
        is_known = self.storage is not None or not template.fields
        if is_known and not distinct.intersection(template.fields):
            raise ValueError(
                f"The path {template.path!r} is the same for every child of this mapped task, so "
                "that they would share one file. These fields would tell them apart: "
                f"{', '.join(sorted(distinct))}."
            )


class _Template(string.Formatter):
    """A path with fields, filled as by `str.format`, but never with a value that leads astray."""

    def __init__(self, path):
        self.path = path
        parts = list(self.parse(path))
        #: names of the fields, without attributes and items
        self.fields = sorted(
            {re.split(r"[.\[]", name)[0] for _, name, _, _ in parts if name is not None}
        )
        #: what stands before the first field: no value may lead out of its folder
        self.head = parts[0][0] if parts else ""

    def fill(self, values):
        try:
            filled = self.vformat(self.path, (), values)
        except Exception as exc:
            reason = f"the field {exc} is missing" if isinstance(exc, KeyError) else exc
            known = ", ".join(sorted(k for k in map(str, values) if "prefect_ds" not in k))
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


def _is_inside(folder, path):
    if _is_url(path):
        below = path[len(folder) :] if _is_url(folder) and path.startswith(folder + "/") else ".."
        return os.pardir not in below.split("/")
    folder, path = os.path.abspath(folder), os.path.abspath(path)
    return path.startswith(os.path.join(folder, ""))


def _is_url(path):
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


# How a frame is stored: what pandas can read and write --------------------------------------


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
    return found


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

#: What makes a frame come back as it was: keyword arguments of the writer, and of the reader.
_DEFAULTS: dict = {
    "csv": (
        {"index": False},
        {"keep_default_na": False, "na_values": [""], **_EXACT_FLOATS},
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


#: How much of a frame is written and read back to see what its file type does not keep.
_SAMPLE_ROWS = 50


def _is_numbered(frame):
    return frame.index.equals(pandas.RangeIndex(len(frame)))


def _kind_of(frame):
    """What frames have in common that a file type keeps alike."""
    return len(frame) > 0, _is_numbered(frame), tuple(zip(frame.columns, map(str, frame.dtypes)))


def _sample(frame):
    """The first and the last rows of a frame, numbered from 0 if those of the frame are."""
    if len(frame) <= _SAMPLE_ROWS:
        return frame
    half = _SAMPLE_ROWS // 2
    sample = frame.iloc[[*range(half), *range(-half, 0)]]
    return sample.reset_index(drop=True) if _is_numbered(frame) else sample


_REMEDIES = (
    " read_kwargs={'dtype': ..., 'parse_dates': [...]} for columns, and write_kwargs="
    "{'index': True} with read_kwargs={'index_col': 0} for the index"
)


def _losses(frame, restored):
    """Sentences on what differs in a frame that was written and read back."""
    losses = []
    if not restored.index.equals(frame.index) and len(frame):
        losses.append(f"the index comes back as {restored.index[:3]!r}")
    if list(restored.columns) != list(frame.columns):
        losses.append(f"the columns come back as {list(restored.columns)}")
        return losses
    for number, name in enumerate(frame.columns):
        before, after = frame.iloc[:, number], restored.iloc[:, number]
        before, after = before.reset_index(drop=True), after.reset_index(drop=True)
        try:
            pandas.testing.assert_series_equal(before, after)
        except AssertionError:
            losses.append(
                f"column {name!r} ({before.dtype}) comes back as {after.dtype}"
                if before.dtype != after.dtype
                else f"values of column {name!r} change"
            )
    return losses


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


# How a file appears: whole or not at all ----------------------------------------------------


def _filesystem(path, storage_options):
    """The file system of fsspec for a URL, and the path in it."""
    try:
        import fsspec
    except ImportError:
        raise ImportError(
            f"The path {path!r} is remote, and that takes the package fsspec, with what it needs "
            "for this protocol: pip install fsspec"
        ) from None
    filesystem = fsspec.filesystem(path.partition("://")[0], **storage_options)
    return filesystem, filesystem._strip_protocol(path)


def _exists(path, storage_options):
    if _is_url(path):
        filesystem, path = _filesystem(path, storage_options)
        return filesystem.exists(path) and not filesystem.exists(_mark_of_upload(path))
    return os.path.exists(os.path.expanduser(path))


@contextmanager
def _existing_file(path, storage_options):
    """A local path under which pandas can read what is at `path`."""
    if not _is_url(path):
        yield os.path.expanduser(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, os.path.basename(path))
        filesystem, path = _filesystem(path, storage_options)
        filesystem.get(path, local, recursive=filesystem.isdir(path))
        yield local


@contextmanager
def _new_file(path, storage_options, unreadable=False):
    """A local path under which pandas can write what then appears, whole, at `path`.

    A local file is written beside its place and then renamed, as Luigi's `AtomicLocalFile` does:
    http://luigi.readthedocs.io/en/stable/api/luigi.local_target.html
    """
    if _is_url(path):
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, os.path.basename(path))
            yield local
            filesystem, path = _filesystem(path, storage_options)
            if unreadable and filesystem.exists(path):
                filesystem.mv(path, _aside(path), recursive=filesystem.isdir(path))
            mark, is_folder = _mark_of_upload(path), os.path.isdir(local)
            if is_folder:
                # Its files arrive one by one: it is not there until all of them are.
                filesystem.touch(mark)
                for earlier in filesystem.find(path):
                    filesystem.rm(earlier)
            filesystem.put(local, path, recursive=is_folder)
            if filesystem.exists(mark):
                filesystem.rm(mark)
        return
    path = os.path.expanduser(path)
    folder, name = os.path.split(path)
    os.makedirs(folder or os.curdir, exist_ok=True)
    _remove_leftovers(folder, name)
    _, dot, extensions = name.partition(".")
    mark = f"{_mark_of_this_host(name)}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    partial = os.path.join(folder, mark + dot + extensions)
    try:
        yield partial
        _flush_to_disk(partial)
        if unreadable and os.path.lexists(path):
            os.replace(path, _aside(path))
        _rename(partial, path)
    finally:
        _remove(partial)


def _rename(partial, path):
    """Rename a file or folder over the earlier one, if any. Of two writers one wins, whole."""
    earlier = f"{partial}-earlier"
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
    _remove(earlier)


def _mark_of_upload(path):
    """A file beside a remote folder that is there while the folder is not whole."""
    folder, _, name = path.rstrip("/").rpartition("/")
    return f"{folder}/.{name}~upload"


def _aside(path):
    """Another name for `path`, with another extension, that no later one takes."""
    return f"{path}.unreadable-{datetime.datetime.now():%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"


def _flush_to_disk(path):
    files = glob.glob(os.path.join(glob.escape(path), "**"), recursive=True)
    for file in files if os.path.isdir(path) else [path]:
        if os.path.isfile(file):
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())


def _remove(path):
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.remove(path)


#: When each large folder was last searched for leftovers (`time.monotonic`).
_searched: dict = {}


def _remove_leftovers(folder, name):
    """Remove what writers of this path left behind when they were killed."""
    folder = os.path.abspath(folder)
    if time.monotonic() - _searched.get(folder, -60) < 60:
        return
    start = _mark_of_this_host(name)
    siblings = os.listdir(folder)
    for sibling in siblings:
        if sibling.startswith(start) and not _is_alive(sibling[len(start) :].partition("-")[0]):
            _remove(os.path.join(folder, sibling))
    if len(siblings) > 1000:
        # With thousands of files a search before each write would cost more than the writing.
        _searched[folder] = time.monotonic()


def _mark_of_this_host(name):
    stem, host = name.partition(".")[0], socket.gethostname().partition(".")[0]
    return f".{stem}~{host}-"


def _is_alive(pid):
    if os.name == "nt":
        return True  # signal 0 would end the process there
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        pass
    return True


def _check_path(path):
    path = os.fspath(path)
    if not isinstance(path, str):
        raise TypeError(f"A path is a str or a PathLike of str, not {path!r}.")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)", path):
        raise ValueError(f"{path!r} was a URL before pathlib took a slash: pass a str.")
    if any(
        name is not None and not name[:1].isidentifier()
        for _, name, _, _ in string.Formatter().parse(path)
    ):
        raise ValueError(f"The fields of {path!r} need names, as in 'data_{{id}}.csv'.")
    return path


#: In `prefect.context`: the location whose file was there but could not be read in this task run.
_UNREADABLE = "prefect_ds_unreadable"


def _age(path):
    """How old a local file is, in words, or nothing."""
    try:
        seconds = time.time() - os.path.getmtime(os.path.expanduser(path))
    except OSError:
        return ""
    return f", written {datetime.timedelta(seconds=max(0, int(seconds)))} ago"


def _task_name():
    return prefect.context.get("task_full_name", "")


# The storage of a task ----------------------------------------------------------------------


class PandasResult(_Storage):
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
        be left out where the task has a `target`. A URL that fsspec understands is a path, too.
    file_type : str, optional
        Which pair of pandas' `read_*` and `to_*` to use: "csv", "parquet", ... If left out, it
        follows from the extension of the path, with or without a compression (".csv.gz").
    read_kwargs, write_kwargs : dict, optional
        Keyword arguments for pandas' reader and writer. They go before the defaults, which leave
        out the index in csv, excel, html, stata and xml. `storage_options` are for fsspec.
    **kwargs
        What Prefect's `Result` takes beside a location.

    Raises
    ------
    ValueError
        If the file type is unknown, or if the path has no extension to tell it; if a field of
        the path has no name; if a URL went through `pathlib`, which breaks it.

    Examples
    --------
    >>> PandasResult("data/{month:02}.parquet").file_type
    'parquet'
    """

    def __init__(self, path=None, file_type=None, read_kwargs=None, write_kwargs=None, **kwargs):
        path = kwargs.pop("location", None) if path is None else path
        if path is None and not _HAS_LOCATIONS:
            raise ValueError(f"{type(self).__name__} needs a path.")
        if path is not None and not callable(path):
            path = _check_path(path)
        if file_type is not None or isinstance(path, str):
            _check_file_type(file_type, path)
        super().__init__(path, **kwargs)
        self._file_type = file_type
        self.read_kwargs = dict(read_kwargs or {})
        self.write_kwargs = dict(write_kwargs or {})
        self._checked_kinds = set()

    def __repr__(self):
        return f"<{type(self).__name__}: {self.location or self._formatter}>"

    @property
    def path(self):
        """str or callable: the template of the path."""
        return self.location or self._formatter

    @property
    def file_type(self):
        """str: the type that was given or that the path tells, None as long as there is neither."""
        if self._file_type is None and self.location is None:
            return None
        return _check_file_type(self._file_type, self.location)

    @property
    def _storage_options(self):
        options = self.write_kwargs.get("storage_options") or {}
        return dict(options, **(self.read_kwargs.get("storage_options") or {}))

    def _locate(self, values):
        """Fill the template; for the task's own storage, once: a task may change its arguments."""
        arguments = _Arguments.current() or _Arguments()
        if arguments.storage is not self:
            return self._fill(arguments, values)
        if arguments.location is None:
            arguments.location = self._fill(arguments, values)
        return arguments.location

    def _fill(self, arguments, values):
        is_own = arguments.storage is self
        # Prefect passes its whole context along: given is what differs from that.
        offered = dict(prefect.context)
        given = {k: v for k, v in values.items() if k not in offered or v is not offered[k]}
        # In Prefect's context None means that there is no such thing.
        context = {k: v for k, v in offered.items() if v is not None}
        first = (arguments.values(), given) if is_own else (given, arguments.values())
        fields = ChainMap(*first, context.get("parameters", {}), context)
        if callable(self.path):
            # As on Prefect's own results: what there is not, is None.
            return _check_path(self.path(**ChainMap(fields, offered)))
        if self.path is None:
            raise ValueError("There is no path: give one to PandasResult, or a target to the task.")
        template = _Template(self.path)
        if "map_index" in context:
            (arguments if is_own else _Arguments()).check_distinct(template)
        return template.fill(fields)

    def _load(self, location):
        with _existing_file(location, self._storage_options) as path:
            frame = self._read(path, location)
        if not isinstance(frame, pandas.DataFrame):
            raise TypeError(f"{location} holds a {type(frame).__name__}, not a pandas DataFrame.")
        self.logger.info("Task '%s': Loaded %s%s", _task_name(), location, _age(location))
        return frame

    def _read(self, path, location):
        reader, kwargs = self._pandas(location, 0, self.read_kwargs)
        frame = reader(path, **kwargs)
        # `read_html` returns the tables of a page; a page that we wrote has one.
        return frame[0] if isinstance(frame, list) else frame

    def _save(self, frame, location):
        if not isinstance(frame, pandas.DataFrame):
            raise TypeError(
                f"{type(self).__name__} stores a pandas DataFrame, but the task returned "
                f"{type(frame).__name__}. Nothing was written to {location}."
            )
        unreadable = prefect.context.get(_UNREADABLE) == location
        with _new_file(location, self._storage_options, unreadable) as path:
            writer, kwargs = self._pandas(location, 1, self.write_kwargs)
            writer(frame, path, **kwargs)
        self.logger.info("Task '%s': Wrote %s", _task_name(), location)
        self._warn_of_losses(frame, location)

    def _warn_of_losses(self, frame, location):
        """Say, once per kind of frame, what will not come back as it was."""
        kind = _kind_of(frame)
        if kind in self._checked_kinds:
            return
        self._checked_kinds.add(kind)
        sample = _sample(frame)
        writer, kwargs = self._pandas(location, 1, self.write_kwargs)
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, os.path.basename(location))
                writer(sample, path, **kwargs)
                losses = _losses(sample, self._read(path, location))
        except Exception as exc:
            losses = [f"some rows cannot be read back: {type(exc).__name__}: {exc}"]
        if losses:
            self.logger.warning(
                "Task '%s': %s does not keep all of the frame: %s. The file types parquet and "
                "pickle keep more, or try%s.",
                _task_name(), location, "; ".join(losses), _REMEDIES,
            )  # fmt: skip

    def _pandas(self, location, direction, kwargs):
        """The function of pandas for this file, and its keyword arguments."""
        file_type = _check_file_type(self._file_type, location)
        defaults = _DEFAULTS.get(file_type, ({}, {}))[1 - direction]
        kwargs = {**defaults, **kwargs}
        kwargs.pop("storage_options", None)
        return _FILE_TYPES[file_type][direction], kwargs


PandasResultHandler = PandasResult
_accept_as_result_handler(PandasResult)


# A task whose file is there is not run ------------------------------------------------------


def checkpoint_handler(task_runner, old_state, new_state):
    """Load a task's result instead of running it, if its file is there; else write the file.

    A state handler for `task_runner_state_handlers`. It acts on tasks that store their result by
    `PandasResult`, unless they have `checkpoint=False`, and leaves all others alone. Prefect's
    own checkpointing may be on or off: each file is written once.

    Parameters
    ----------
    task_runner : prefect.engine.TaskRunner
        A `DSTaskRunner`, if the path has fields.
    old_state, new_state : prefect.engine.state.State
        On Pending to Running the file is tried: if it can be read, the task's state becomes
        Success with the frame; if there is none, the task runs; if there is one that cannot be
        read, this is a warning, the task runs, and the file is kept beside the new one, with
        ".unreadable-" and the time behind its name. On Running to Success the file is written.

    Returns
    -------
    prefect.engine.state.State
        `new_state`; Success with what was loaded; or Failed, with the exception as its result,
        if the path cannot be filled, the value is not a DataFrame, or writing fails. A Failed
        task is retried as its `max_retries` say.

    Examples
    --------
    >>> flow.run(
    ...     runner_cls=DSFlowRunner, task_runner_state_handlers=[checkpoint_handler]
    ... )  # doctest: +SKIP
    """
    storage = _storage_of(task_runner)
    opts_out = _CAN_OPT_OUT and task_runner.task.checkpoint is False
    if opts_out or not isinstance(storage, PandasResult):
        return new_state
    try:
        if old_state.is_pending() and new_state.is_running():
            return _load_checkpoint(storage, new_state)
        if old_state.is_running() and new_state.is_successful() and not new_state.is_skipped():
            return _write_checkpoint(storage, new_state)
    except Exception as exc:
        if prefect.context.get("raise_on_exception"):
            raise
        message = f"Task '{_task_name()}', path {storage.path}: {type(exc).__name__}: {exc}"
        task_runner.logger.error(message)
        # The task's own handlers have seen `new_state`, so they must hear of the failure.
        return task_runner.call_runner_target_handlers(new_state, Failed(message, result=exc))
    return new_state


def _load_checkpoint(storage, running):
    location = _checkpoint_location(storage)
    if prefect.context.get(_RECOMPUTES) or not _exists(location, storage._storage_options):
        return running
    try:
        frame = storage._load(location)
    except Exception as exc:
        prefect.context[_UNREADABLE] = location
        storage.logger.warning(
            "Task '%s': %s is there, but cannot be read, so the task runs. Its new file will "
            "take this name; the old one is kept beside it, as %s.unreadable-<time>. Reason: "
            "%s: %s",
            _task_name(), location, location, type(exc).__name__, exc,
        )  # fmt: skip
        return running
    loaded = Success(f"Loaded from {location}", result=_stored(storage, location, frame))
    setattr(loaded, _LOADED, True)
    return loaded


def _write_checkpoint(storage, success):
    if not _is_stored(success):
        location = _checkpoint_location(storage)
        frame = success.result
        storage._save(frame, location)
        success.result = _stored(storage, location, frame)
    return success


def _checkpoint_location(storage):
    has_fields = callable(storage.path) or _Template(storage.path or "").fields
    if has_fields and not _Arguments.current():
        raise TypeError(
            f"The path {storage.path!r} is filled from the task's arguments, which only "
            "DSTaskRunner makes available: run the flow with task_runner_cls=DSTaskRunner, or "
            "with runner_cls=DSFlowRunner, which includes it."
        )
    return storage._locate({})


#: In `prefect.context`: which tasks to run though their file is there, set by the user.
_RECOMPUTE = "recompute"

#: In `prefect.context`: whether this task run is among them.
_RECOMPUTES = "prefect_ds_recomputes"

#: In `prefect.context`: the upstream tasks whose results this task run misses.
_PURGED_INPUTS = "prefect_ds_purged_inputs"

#: In `prefect.context` and on states: whether all tasks downstream are, too.
_SPREADS = "_prefect_ds_recompute_spreads"


def _recompute_patterns():
    patterns = prefect.context.get(_RECOMPUTE) or ()
    if isinstance(patterns, str):
        patterns = patterns.split(",")
    return [pattern.strip() for pattern in patterns if pattern.strip()]


def _matches(pattern, task):
    return fnmatch.fnmatchcase(task.name, pattern.rstrip("+"))


class DSTaskRunner(TaskRunner):
    """A `TaskRunner` that lets the task's arguments fill the template in the path.

    Plain and mapped tasks, constants, and defaults of the signature alike. It also refuses to
    run a task on a result that was purged.

    `recompute` in `prefect.context` makes tasks run though their file is there, for one run:
    names of tasks, with `*` for any characters, separated by commas. A `+` behind a name means
    all tasks downstream as well: `flow.run(context={"recompute": "load+"})`, or
    `PREFECT__CONTEXT__RECOMPUTE="load+"` in the environment; `*` is the whole flow.

    Examples
    --------
    >>> FlowRunner(flow, task_runner_cls=DSTaskRunner).run(
    ...     task_runner_state_handlers=[checkpoint_handler]
    ... )  # doctest: +SKIP
    """

    def check_upstream_finished(self, state, upstream_states):
        """As Prefect's; moreover, note what the upstream states say about this run."""
        state = super().check_upstream_finished(state, upstream_states=upstream_states)
        seen = [
            (edge, upstream_state)
            for edge, upstream in upstream_states.items()
            for upstream_state in _states_behind(edge, upstream)
        ]
        purged = {
            edge.upstream_task.name
            for edge, upstream_state in seen
            if _is_read(edge) and upstream_state._result is PurgedResult
        }
        prefect.context[_PURGED_INPUTS] = ", ".join(map(repr, sorted(purged)))
        maps = any(edge.mapped for edge in upstream_states)
        if maps and prefect.context.get("map_index") is None and not state.is_mapped():
            self._check_inputs(state)
        matching = [p for p in _recompute_patterns() if _matches(p, self.task)]
        prefect.context[_SPREADS] = any(p.endswith("+") for p in matching) or any(
            getattr(upstream_state, _SPREADS, False) for _, upstream_state in seen
        )
        prefect.context[_RECOMPUTES] = bool(matching) or prefect.context[_SPREADS]
        return state

    def set_task_to_running(self, state, inputs):
        """As Prefect's, if no input was purged."""
        self._check_inputs(state)
        return super().set_task_to_running(state, inputs=inputs)

    def _check_inputs(self, state):
        purged = prefect.context.get(_PURGED_INPUTS)
        if purged and not state.is_finished():
            message = (
                f"Task '{_task_name()}' needs the result of {purged}, which was purged when its "
                "last reader had finished. Run the upstream task again (leave its state out of "
                f"task_states), give it a checkpoint, or keep its result with the tag {_KEEP!r}."
            )
            failed = Failed(message, result=ValueError(message))
            raise ENDRUN(self.handle_state_change(state, failed))

    def call_runner_target_handlers(self, old_state, new_state):
        """As Prefect's; moreover, pass on that this task is recomputed, and let go of errors."""
        new_state = super().call_runner_target_handlers(old_state, new_state)
        if new_state.is_retrying():
            _forget_frames(old_state.result)
        if prefect.context.get(_SPREADS):
            setattr(new_state, _SPREADS, True)
        return new_state

    def get_task_inputs(self, state, upstream_states):
        """As Prefect's; moreover, offer the inputs to the path's template."""
        inputs = super().get_task_inputs(state, upstream_states=upstream_states)
        prefect.context[_Arguments.KEY] = _Arguments(
            self.task, inputs, upstream_states, _storage_of(self)
        )
        return inputs


# Results that nobody needs any more ---------------------------------------------------------


class _PurgedResultType(type(NoResult)):  # type: ignore[misc]
    """The type of `PurgedResult`."""

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

#: On a state: its result was loaded by `checkpoint_handler`.
_LOADED = "_prefect_ds_loaded"

#: On a state: its result was kept for a reader that has not finished, for the next round.
_HELD = "_prefect_ds_held"


def _is_read(edge):
    """Whether the downstream task gets data through this edge."""
    return edge.key is not None or edge.mapped


def _states_behind(edge, upstream):
    """The states that a task run sees through an edge: those of the children, if it reduces."""
    return upstream.map_states if upstream.is_mapped() and not edge.mapped else [upstream]


class _Call:
    """A call that the flow runner has submitted: a task run, or a small helper of Prefect's."""

    __slots__ = (
        "number",  # in the order of submission
        "record",  # of the task that it runs, None for a helper
        "function",
        "args",
        "kwargs",
        "extra_context",
        "given",  # the state that a task run starts from
        "needs",  # the calls that must be done before
        "cursor",  # all before it in `needs` are started
        "missing",  # how many of `needs` are not done
        "dependents",  # pairs of a call that needs this one and the edge between
        "reads",  # the calls whose results this one reads
        "readers",  # how many calls that are not done read this one's result
        "is_held",  # whether a reader has ended unfinished, so that it will read again
        "started",
        "done",
        "value",  # a state, or a future of one
    )

    def __init__(self, number, record, function, args, kwargs, extra_context):
        self.number = number
        self.record = record
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.extra_context = extra_context
        self.given = kwargs.get("state", args[0] if args else None)
        self.needs = []
        self.cursor = self.missing = self.readers = 0
        self.dependents = []
        self.reads = []
        self.is_held = self.started = self.done = False
        self.value = None

    def upstreams(self):
        """Pairs of an edge (None for a helper) and what the call gets through it."""
        for argument in itertools.chain(self.args, map(self.kwargs.get, _UPSTREAM_KEYWORDS)):
            if isinstance(argument, dict):
                yield from argument.items()
            elif isinstance(argument, _Call):
                yield None, argument

    def release(self):
        """Let go of all that only a call that is not done needs."""
        self.function = self.args = self.kwargs = self.extra_context = None
        self.needs, self.dependents = [], []
        if self.record is not None:
            self.reads = []
        if self.given is not self.value:
            self.given = None


#: The arguments of a task run in which calls stand for states.
_UPSTREAM_KEYWORDS = ("upstream_states", "upstream_mapped_states")


class _TaskRecord:
    """What is known, during one flow run, of a task and the calls that run it."""

    __slots__ = ("keep", "restarts", "calls", "is_passed", "open_edges", "edges_to")

    def __init__(self, flow, task, terminal):
        self.restarts = isinstance(task, _RESTARTED)
        self.keep = task in terminal or _KEEP in task.tags or task.cache_for is not None
        self.edges_to = [edge for edge in flow.edges_to(task) if _is_read(edge)]
        #: edges through which there may still come readers that are not submitted
        self.open_edges = sum(map(_is_read, flow.edges_from(task)))
        #: the run of the task itself, then those of its mapped children
        self.calls = []
        #: whether the flow runner has gone on to a later task
        self.is_passed = False


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


class _DepthFirstExecutor:
    """An executor that puts calls off until `wait`, and then goes deep before it goes wide.

    Whatever a call has made possible comes next; then what the call furthest along still
    misses; then the oldest. So a partition goes through all its mapped stages before the next
    one starts, as in Dask's ordering (https://docs.dask.org/en/stable/order.html).

    A result is purged when no call that is submitted or may still be submitted reads it. This is
    Kedro's count of readers per dataset (`AbstractRunner._release_datasets`), kept while the flow
    runner still submits.
    """

    def __init__(self, executor, backend, flow, task_states, logger):
        self._progress = _Progress(logger)
        self._executor = executor
        self._backend = backend
        self._task_states = task_states
        terminal = flow.terminal_tasks()
        self._records = {task: _TaskRecord(flow, task, terminal) for task in flow.sorted_tasks()}
        self._not_passed = list(reversed(flow.sorted_tasks()))
        self._calls = []
        self._first = 0  # all calls before it, of those that are to be run, are started
        self._ready = []
        self._blocked = []  # a heap
        self._clock = itertools.count()
        self._current = None

    def __getattr__(self, name):
        return getattr(self._executor, name)

    @contextmanager
    def start(self):
        with self._executor.start(), self._backend.start():
            yield

    def submit(self, fn, *args, extra_context=None, **kwargs):
        record = self._record_of(kwargs.get("task"))
        call = _Call(len(self._calls), record, fn, args, kwargs, extra_context)
        for edge, upstream in call.upstreams():
            for needed in self._calls_behind(edge, upstream):
                self._connect(call, needed, edge)
        if record is not None:
            record.calls.append(call)
        self._calls.append(call)
        return call

    def map(self, fn, *args):
        return [self.submit(fn, *arguments) for arguments in zip(*args)]

    def wait(self, futures):
        if self._current is None:
            if isinstance(futures, dict) and all(isinstance(key, Task) for key in futures):
                # All tasks are submitted, so all calls will be needed, whatever is waited for.
                self._pass(None)
                self._run()
            else:
                self._run(self._all_needed_for(futures))
        # Otherwise a task run waits for the children that it has just submitted (their turn
        # comes later), or for those that it reduces (they are done).
        return self._backend.resolve(futures)

    # -- what depends on what

    def _record_of(self, task):
        if task is None:
            return self._current.record if self._current else None
        record = self._records[task]
        if not record.calls:
            self._pass(task)
        return record

    def _calls_behind(self, edge, upstream):
        if isinstance(upstream, list):
            return [call for call in upstream if isinstance(call, _Call)]
        if isinstance(upstream, _Call):
            return [upstream] + ([] if upstream.record else self._calls_done(edge, upstream))
        return self._calls_done(edge, upstream)

    def _calls_done(self, edge, upstream):
        """The calls behind a state that the flow runner, or a helper of it, has got already."""
        record = self._records.get(edge.upstream_task) if edge else None
        if record is None:
            return []
        given = self._task_states.get(edge.upstream_task)
        if not record.calls and isinstance(given, State):
            record.calls.append(self._call_done_before(record, given))
        is_reduced = isinstance(upstream, Mapped) and not edge.mapped
        return record.calls if is_reduced else record.calls[:1]

    def _call_done_before(self, record, state):
        call = _Call(-1, record, None, (), {"state": state}, None)
        call.started = call.done = True
        call.value = state
        return call

    def _connect(self, call, needed, edge):
        if not needed.done:
            call.needs.append(needed)
            call.missing += 1
            needed.dependents.append((call, edge))
        if edge is None or _is_read(edge):
            # What a helper hands on was read from others, who may have to be asked again.
            for read in [needed] + (needed.reads if needed.record is None else []):
                call.reads.append(read)
                read.readers += 1

    def _pass(self, task):
        """Note that all tasks before `task` are submitted, with all their mapped children."""
        while self._not_passed and self._not_passed[-1] is not task:
            record = self._records[self._not_passed.pop()]
            record.is_passed = True
            self._close_edges_to(record)

    def _close_edges_to(self, record):
        """If all readers that this task stands for are submitted, purge what nobody reads."""
        if not record.is_passed or (record.calls and not record.calls[0].done):
            return
        if record.calls:
            self._backend.forget_inputs(record.calls[0])
        # Prefect maps again in the next round, and then there may be some.
        has_no_children = len(record.calls) == 1 and self._backend.is_mapped(record.calls[0])
        for edge in record.edges_to:
            upstream = self._records[edge.upstream_task]
            if has_no_children and upstream.calls:
                self._hold(upstream.calls[0])
            upstream.open_edges -= 1
            for call in upstream.calls if not upstream.open_edges else ():
                self._purge_if_unread(call)
        record.edges_to = ()

    def _purge_if_unread(self, call):
        record = call.record
        if record is None or record.keep or record.open_edges:
            return
        if call.done and not (call.readers or call.is_held):
            self._backend.purge(call)

    # -- what comes next

    def _run(self, wanted=None):
        """Run these calls, by number (None: all), and what they make possible."""
        oldest_first = self._calls if wanted is None else [self._calls[n] for n in sorted(wanted)]
        self._first = 0
        unwanted: list = []
        running = 0
        while True:
            while running < self._backend.width():
                call = self._next_ready() or self._next_blocked(wanted, unwanted)
                call = call or self._next_unstarted(oldest_first)
                if call is None:
                    break
                call.started = True
                running += 1
                self._current = call
                try:
                    self._backend.begin(call)
                finally:
                    self._current = None
            call = None
            if not running:
                break
            for done, outcome in self._backend.finished():
                running -= 1
                self._finish(done, outcome)
            done = outcome = None
        for entry in unwanted:
            heappush(self._blocked, entry)

    def _next_ready(self):
        """What the call that was done last has made possible."""
        while self._ready:
            call = self._ready.pop()
            if not call.started:
                return call
        return None

    def _next_blocked(self, wanted, unwanted):
        """What is still missing for the call that misses least, of those that have begun."""
        while self._blocked:
            entry = heappop(self._blocked)
            rank, call = entry
            if call.started or call.missing != rank[0]:
                continue
            if wanted is not None and call.number not in wanted:
                unwanted.append(entry)
                continue
            leaf = self._leaf(call)
            if leaf is not None:
                return leaf
        return None

    def _next_unstarted(self, oldest_first):
        while self._first < len(oldest_first) and oldest_first[self._first].started:
            self._first += 1
        later = map(oldest_first.__getitem__, range(self._first, len(oldest_first)))
        unstarted = (call for call in later if not call.started)
        for call in itertools.islice(unstarted, self._look_ahead):
            leaf = self._leaf(call)
            if leaf is not None:
                return leaf
        return None

    @property
    def _look_ahead(self):
        """How many calls to ask for one that can start, before it is taken that there is none."""
        return 4 * self._backend.width() + 4

    def _leaf(self, call):
        """A call that can start now and without which `call` cannot."""
        stack = [call]
        while stack:
            call = stack.pop()
            if call.started:
                continue
            if not call.missing:
                return call
            while call.needs[call.cursor].started and call.cursor < len(call.needs) - 1:
                call.cursor += 1
            ahead = call.needs[call.cursor : call.cursor + self._look_ahead]
            stack.extend(reversed(ahead))
        return None

    def _all_needed_for(self, futures):
        stack = list(_calls_in(futures))
        needed = set()
        while stack:
            call = stack.pop()
            if not call.done and call.number not in needed:
                needed.add(call.number)
                stack.extend(call.needs)
        return needed

    def _finish(self, call, outcome):
        is_finished = self._backend.take(call, outcome)
        call.done = True
        if call.is_held:
            self._backend.hold(call)
        children = [c for c in _children_of(call.value) if isinstance(c, _Call)]
        for dependent, edge in reversed(call.dependents):
            if children and edge is not None and not edge.mapped:
                for child in children:
                    self._connect(dependent, child, edge)
            dependent.missing -= 1
            if not dependent.missing:
                self._ready.append(dependent)
            else:
                # Of equals, what needs less lets go sooner; then what has begun last.
                rank = (dependent.missing, len(dependent.needs), -next(self._clock))
                heappush(self._blocked, (rank, dependent))
        for read in call.reads:
            read.readers -= 1
            if not is_finished or self._is_asked_again(call, read):
                self._hold(read)
            self._purge_if_unread(read)
        record = call.record
        call.release()
        if record is not None:
            if call is record.calls[0]:
                self._close_edges_to(record)
            self._purge_if_unread(call)
        self._progress.tell(self._count)

    def _count(self):
        """How many mapped task runs there are, how many are done, and other counts by name."""
        children = [call for record in self._records.values() for call in record.calls[1:]]
        endings = Counter(self._backend.ending(call) for call in children if call.done)
        done = sum(endings.values()) - endings["unfinished"]
        others = {"loaded": endings["loaded"]} if endings["loaded"] else {}
        others["failed"] = endings["failed"]
        others["results alive"] = sum(map(self._backend.has_result, self._calls))
        return len(children), done, others

    def _hold(self, read):
        """Keep what will be read in another round: from a mapped task, what all children return."""
        is_top = read.record is not None and read is read.record.calls[0]
        for call in read.record.calls if is_top else [read]:
            call.is_held = True
            if call.done:
                self._backend.hold(call)

    def _is_asked_again(self, call, read):
        """Whether Prefect makes this call again if the flow takes another round, come what may."""
        if call.record is None:
            # It counts what the children of a map that is flattened have returned.
            return read.record is not None and read is not read.record.calls[0]
        return call.record.restarts

    def close(self, is_finished):
        """Purge what was held for another round, if there will be none, and let go of all calls."""
        self._progress.close(self._count)
        for record in self._records.values():
            for call in record.calls if is_finished and not record.keep else ():
                if call.is_held:
                    self._backend.purge(call)
            # A call and its record refer to each other: only the cycle collector would free them.
            record.calls.clear()


def _calls_in(futures):
    if isinstance(futures, _Call):
        yield futures
    elif isinstance(futures, (dict, list, tuple, set)):
        for future in futures.values() if isinstance(futures, dict) else futures:
            yield from _calls_in(future)


def _replace_calls(futures, values):
    if isinstance(futures, _Call):
        return values(futures)
    if isinstance(futures, dict):
        return {key: _replace_calls(future, values) for key, future in futures.items()}
    if isinstance(futures, (list, tuple, set)):
        return type(futures)(_replace_calls(future, values) for future in futures)
    return futures


def _children_of(state):
    return state.map_states if isinstance(state, Mapped) else ()


# Where calls run ----------------------------------------------------------------------------


class _Here:
    """Calls run one by one, in this thread."""

    def __init__(self, executor):
        self._executor = executor
        self._width = 1
        self._finished: list = []

    @contextmanager
    def start(self):
        yield

    def width(self):
        """How many calls can run at a time."""
        return self._width

    def begin(self, call):
        self._finished.append((call, _run_call(*self._arguments(call))))

    def finished(self):
        """Pairs of a call that has run and its outcome; waits for at least one."""
        finished, self._finished = self._finished, []
        return finished

    def take(self, call, outcome):
        """Keep the outcome of a call; return whether its task run has read its inputs for good."""
        call.value = outcome
        if not isinstance(outcome, State):
            return True
        _forget_frames(outcome.result)
        # A later round runs a Cached task again, to see whether its inputs are still the same.
        return outcome.is_finished() and not outcome.is_cached()

    def _kind(self, call):
        """The type of the state of a call that is done."""
        return type(call.value)

    def is_mapped(self, call):
        return issubclass(self._kind(call), Mapped)

    def hold(self, call):
        """Let the next round know that this result is to be purged in the end."""
        if call.given is not call.value:
            setattr(call.value, _HELD, True)

    def ending(self, call):
        """Whether a task run was loaded, has failed, is unfinished, or none of these."""
        kind = self._kind(call)
        if not issubclass(kind, Finished):
            return "unfinished"
        if issubclass(kind, Failed):
            return "failed"
        is_loaded = issubclass(kind, Cached) or getattr(call.value, _LOADED, False)
        return "loaded" if is_loaded else "run"

    def has_result(self, call):
        """Whether a task run has a result that can be purged."""
        state = call.value
        if not call.done or call.record is None or not state.is_successful():
            return False
        return not (state.is_mapped() or state.is_skipped() or state._result is PurgedResult)

    def purge(self, call):
        state = call.value
        if call.given is state and not getattr(state, _HELD, False):
            return  # It belongs to whoever passed it in.
        if self.has_result(call):
            state._result = PurgedResult
            setattr(state, _HELD, False)

    def forget_inputs(self, call):
        """Drop what the state of a mapped task has of its children from an earlier round."""
        state = call.value
        if any(getattr(child, _HELD, False) for child in _children_of(state)):
            state.result = None

    def resolve(self, futures):
        return _replace_calls(futures, lambda call: call.value if call.done else call)

    def _arguments(self, call):
        """The arguments of a call with states for calls."""
        kwargs = dict(call.kwargs)
        for name in _UPSTREAM_KEYWORDS:
            if name in kwargs:
                kwargs[name] = self._states(kwargs[name])
        args = [self._states(arg) if isinstance(arg, (dict, _Call)) else arg for arg in call.args]
        return call.function, args, kwargs

    def _states(self, upstream):
        states = _replace_calls(upstream, lambda call: call.value)
        if isinstance(states, dict):
            for edge, state in states.items():
                if isinstance(state, Mapped):
                    # A task that reduces a map hangs all results into the state it is handed.
                    states[edge] = copy.copy(state)
        return states


class _InPool(_Here):
    """Calls run in the threads or processes that `LocalDaskExecutor` asks for.

    Not by Dask: it keeps every result until the executor is left.
    """

    def __init__(self, executor):
        super().__init__(executor)
        self._outcomes: queue.Queue = queue.Queue()

    @contextmanager
    def start(self):
        import dask.config
        from dask.multiprocessing import get_context
        from dask.system import CPU_COUNT

        self._width = dask.config.get("num_workers", None) or CPU_COUNT
        self._is_remote = self._executor.scheduler in ("processes", "multiprocessing")
        pool = getattr(self._executor, "_pool", None)
        if isinstance(pool, concurrent.futures.Executor):
            self._pool = pool
            yield
        elif self._is_remote:
            with concurrent.futures.ProcessPoolExecutor(self._width, get_context()) as self._pool:
                yield
        else:
            with concurrent.futures.ThreadPoolExecutor(self._width) as self._pool:
                yield

    def begin(self, call):
        work = self._arguments(call)
        if self._is_remote:
            future = self._pool.submit(_run_pickled, cloudpickle.dumps(work))
        else:
            future = self._pool.submit(_run_call, *work)
        future.add_done_callback(lambda done: self._outcomes.put((call, done)))

    def finished(self):
        yield self._outcomes.get()
        while not self._outcomes.empty():
            yield self._outcomes.get()

    def take(self, call, future):
        outcome = future.result()
        return super().take(call, cloudpickle.loads(outcome) if self._is_remote else outcome)


class _OnCluster(_InPool):
    """Calls run on the cluster of a `DaskExecutor`; results stay there until they are wanted."""

    #: how long the number of threads in the cluster is believed, in seconds
    PATIENCE = 1

    def __init__(self, executor):
        super().__init__(executor)
        self._asked = -float("inf")
        self._fetched = {}  # states that are held, by the number of their call
        self._stood_in_for = {}  # pairs of a stand-in and its call, by the id of the stand-in

    @contextmanager
    def start(self):
        yield

    def width(self):
        now = time.monotonic()
        if now - self._asked > self.PATIENCE:
            self._width = max(1, sum(self._executor.client.nthreads().values()))
            self._asked = now
        return self._width

    def begin(self, call):
        future = _submit_to_cluster(
            self._executor, _run_on_worker, *self._arguments(call), extra_context=call.extra_context
        )
        future.add_done_callback(lambda done: self._outcomes.put((call, done)))

    def take(self, call, future):
        if future.status != "finished":
            future.result()
        call.value = future
        # The cluster tells the type of a result. Asking for more would move the result.
        kind = future.type or type(self._executor.wait(future))
        if not issubclass(kind, State):
            return True
        return issubclass(kind, Finished) and not issubclass(kind, Cached)

    def _kind(self, call):
        if isinstance(call.value, State):
            return super()._kind(call)
        return call.value.type or State

    def ending(self, call):
        ending = super().ending(call)
        # What was loaded only the workers know.
        return "run" if ending == "loaded" else ending

    def has_result(self, call):
        if isinstance(call.value, State):
            return super().has_result(call)
        return call.done and self._kind(call) is Success

    def hold(self, call):
        pass  # `resolve` does it: the state is not here yet.

    def purge(self, call):
        call.value = self._fetched.get(call.number, call.value)
        if isinstance(call.value, State):
            super().purge(call)
        elif self.has_result(call):
            call.value = Success("Purged when its last reader had finished.", result=PurgedResult)

    def resolve(self, futures):
        calls = {call.number: call for call in _calls_in(futures)}
        stand_ins = self._stand_ins(futures) if isinstance(futures, dict) else {}
        values = self._executor.wait(
            {number: call.value for number, call in calls.items() if number not in stand_ins}
        )
        for number, state in values.items():
            if calls[number].is_held:
                self._fetched[number] = state
                setattr(state, _HELD, True)
        values.update(stand_ins)
        return _replace_calls(futures, lambda call: values[call.number])

    def _stand_ins(self, futures):
        """States by the number of the call for which they stand.

        The flow runner waits for all inputs of a mapped task, but looks only into those that it
        maps over. The others are spared the way to the client and back.
        """
        stand_ins = {}
        calls = {edge: call for edge, call in futures.items() if isinstance(call, _Call)}
        looked_into = {call.number for edge, call in calls.items() if getattr(edge, "mapped", True)}
        for call in calls.values():
            kind = getattr(call.value, "type", None)
            if call.number not in looked_into and kind is not None and kind is Success:
                stand_in = stand_ins[call.number] = Success(result=PurgedResult)
                self._stood_in_for[id(stand_in)] = stand_in, call
        return stand_ins

    def _states(self, upstream):
        states = super()._states(upstream)
        if isinstance(states, dict):
            for edge, state in states.items():
                if id(state) in self._stood_in_for:
                    states[edge] = self._stood_in_for[id(state)][1].value
        return states


def _run_call(function, args, kwargs):
    """Run a call, and let its outcome hold no inputs but those that will be read again.

    Up to Prefect 0.12.0 every state holds them, in case that it is retried.
    """
    outcome = _run_without_merging(function, args, kwargs)
    if isinstance(outcome, State) and outcome.is_finished() and not outcome.is_cached():
        outcome.cached_inputs = {}
    return outcome


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


def _run_pickled(work):
    return cloudpickle.dumps(_run_call(*cloudpickle.loads(work)))


def _run_on_worker(function, args, kwargs):
    outcome = _run_call(function, args, kwargs)
    if isinstance(outcome, State):
        # A traceback does not travel; on the worker it would keep all that the task has read.
        for error in _errors_behind(outcome.result):
            error.__traceback__ = None
    return outcome


def _errors_behind(error):
    """An error, and those that led to it."""
    seen = set()
    while isinstance(error, BaseException) and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _forget_frames(error):
    """Let go of the local variables, and so of the frames of data, that an error has seen.

    A traceback keeps the calls that it names, and through them those that led there.
    """
    for behind in _errors_behind(error):
        traceback.clear_frames(behind.__traceback__)
        caller = behind.__traceback__ and behind.__traceback__.tb_frame.f_back
        while caller is not None:
            try:
                caller.clear()
            except RuntimeError:
                break  # It is under way, and so are all behind it.
            caller = caller.f_back


class DSFlowRunner(FlowRunner):
    """A `FlowRunner` that drops each result as soon as its last reader has finished.

    A flow then needs the memory of its working set: with `LocalExecutor` a map of any width,
    through any number of stages, needs two partitions alive at a time. It gives the same states
    and terminal results as Prefect's `FlowRunner`.

    Kept are the results of terminal tasks, of tasks with the tag "prefect-ds:keep", of tasks with
    `cache_for`, and whatever a task run that is not finished (Retrying, Paused, ...) will read
    again. All others are replaced by `PurgedResult`. Results that come with states passed in by
    the caller (`task_states`) are never touched.

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
    and `DaskExecutor`. On other executors the flow runs as without this class.

    Examples
    --------
    >>> flow.run(
    ...     runner_cls=DSFlowRunner, task_runner_state_handlers=[checkpoint_handler]
    ... )  # doctest: +SKIP
    """

    def __init__(self, flow, task_runner_cls=None, state_handlers=None):
        super().__init__(
            flow=flow,
            task_runner_cls=task_runner_cls or DSTaskRunner,
            state_handlers=state_handlers,
        )

    def get_flow_run_state(self, state, executor, **kwargs):
        """As Prefect's, on an executor that goes deep first and purges as it goes."""
        for pattern in _recompute_patterns():
            if not any(_matches(pattern, task) for task in self.flow.tasks):
                raise ValueError(
                    f"recompute={pattern!r} matches no task of this flow. It has: "
                    f"{', '.join(sorted({task.name for task in self.flow.tasks}))}."
                )
        # Below 0.12 the context has only those parameters that were passed.
        parameters = dict(prefect.context.get("parameters") or {})
        for parameter in self.flow.parameters():
            parameters.setdefault(parameter.name, parameter.default)
        prefect.context["parameters"] = parameters
        backend = _backend_for(executor)
        if backend is not None:
            executor = _DepthFirstExecutor(
                executor, backend, self.flow, kwargs["task_states"], self.logger
            )
        try:
            state = super().get_flow_run_state(state, executor=executor, **kwargs)
        finally:
            if backend is not None:
                executor.close(state.is_finished())
        return state


def _backend_for(executor):
    if isinstance(executor, LocalExecutor):
        return _Here(executor)
    if isinstance(executor, LocalDaskExecutor):
        if executor.scheduler.startswith(("sync", "single")):
            return _Here(executor)
        return _InPool(executor) if _FLOW_RUNNER_MAPS else None
    if isinstance(executor, DaskExecutor):
        return _OnCluster(executor) if _FLOW_RUNNER_MAPS else None
    return None


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
