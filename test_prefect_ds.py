"""The facts about prefect_ds, on the Prefect and pandas installed: `pytest test_prefect_ds.py`."""

import builtins
import concurrent.futures
import copy
import datetime
import functools
import gc
import importlib
import inspect
import io
import json
import logging
import multiprocessing.forkserver
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import uuid
import warnings
import weakref
import zipfile
import zlib
from collections import ChainMap, Counter, namedtuple
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import ANY, patch
from urllib.request import urlopen

import cloudpickle
import dask
import pandas
import pendulum
import prefect
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from prefect import Flow, Parameter, Task, task, triggers, unmapped
from prefect.engine import FlowRunner, TaskRunner, signals, state
from prefect.engine.cloud import CloudFlowRunner
from prefect.engine.result import Result
from prefect.engine.state import Mapped, Pending, Success
from prefect.schedules import Schedule
from prefect.schedules.clocks import DatesClock
from prefect.tasks import control_flow
from prefect.tasks.secrets import EnvVarSecret
from prefect.utilities.collections import DotDict
from prefect.utilities.configuration import set_temporary_config
from prefect.utilities.debug import raise_on_exception

import prefect_ds
from prefect_ds import (
    DaskExecutor,
    DSExecutor,
    DSFlowRunner,
    DSTaskRunner,
    LocalDaskExecutor,
    LocalExecutor,
    PandasResult,
    PandasResultHandler,
    PurgedResult,
    checkpoint_handler,
)

try:
    from prefect.engine.results import LocalResult
except ImportError:  # below 0.11
    LocalResult = None

try:
    from prefect.environments import LocalEnvironment
except ImportError:  # from 0.14 on
    LocalEnvironment = None

try:
    from prefect.storage import Local
except ImportError:  # below 0.14
    from prefect.environments.storage import Local

try:
    from prefect.run_configs import LocalRun
except ImportError:  # below 0.13.1
    LocalRun = None

#: The keyword by which the installed Prefect's `task` takes storage.
STORAGE = "result" if prefect_ds._HAS_LOCATIONS else "result_handler"

#: Whether results are purged on Dask's executors, too.
PURGES_ON_DASK = prefect_ds._FLOW_RUNNER_MAPS

#: Whether a flow has an executor; before, its environment has one.
HAS_EXECUTORS = "executor" in inspect.signature(Flow.__init__).parameters


def _as_dot_dict(section):
    if not isinstance(section, dict):
        return section
    return DotDict({key: _as_dot_dict(value) for key, value in section.items()})


if "self.copy()" in inspect.getsource(type(prefect.context).__call__):
    # Each use of Prefect's context, several per task run, copies the whole configuration: in 1 to
    # 5 ms as it is, in 0.2 ms as Prefect's other kind of dictionary.
    prefect.context.config = _as_dot_dict(prefect.config)
    sys.modules["prefect.utilities.context"].config = prefect.context.config

FRAME = pandas.DataFrame({"one": [1, 2, 3], "two": [4.5, 5.5, 6.5], "three": ["x", "y", "z"]})


def stored(*args, **kwargs):
    return {STORAGE: PandasResultHandler(*args, **kwargs)}


def run(flow, **kwargs):
    kwargs.setdefault("task_runner_state_handlers", [checkpoint_handler])
    return flow.run(runner_cls=DSFlowRunner, **kwargs)


@functools.lru_cache(maxsize=None)
def shared_cluster():
    """A cluster in this process, with two threads; one for all, as to start it takes 1 to 2 s."""
    from distributed import LocalCluster

    return LocalCluster(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None)


@pytest.fixture(scope="session", autouse=True)
def close_shared_cluster():
    yield
    if shared_cluster.cache_info().currsize:
        shared_cluster().close()


def dask_executor():
    """An executor with a cluster of its own, in this process, with two threads."""
    cluster = {"n_workers": 1, "threads_per_worker": 2}
    if "cluster_kwargs" in inspect.signature(prefect_ds.DaskExecutor.__init__).parameters:
        cluster.update(processes=False, dashboard_address=None)
        return DaskExecutor(cluster_kwargs=cluster)
    return DaskExecutor(local_processes=False, **cluster)


EXECUTORS = {
    "local": LocalExecutor,
    "synchronous": lambda: LocalDaskExecutor(scheduler="synchronous"),
    "threads": lambda: LocalDaskExecutor(scheduler="threads", num_workers=2),
    "dask": lambda: DaskExecutor(address=shared_cluster().scheduler_address),
}

on_local_and_threads = pytest.mark.parametrize("executor", ["local", "threads"])
on_each_executor = pytest.mark.parametrize("executor", EXECUTORS.values(), ids=list(EXECUTORS))
on_each_that_purges = pytest.mark.parametrize(
    "executor", ["local", *(["threads", "dask"] if PURGES_ON_DASK else [])]
)


@pytest.fixture(scope="module")
def processes():
    from dask.multiprocessing import get_context

    with concurrent.futures.ProcessPoolExecutor(2, get_context()) as pool:
        yield pool


class InOnePool(LocalDaskExecutor):
    """Runs in processes that are there: to start some for each flow would take seconds."""

    def __init__(self, pool):
        super().__init__(scheduler="processes")
        self._pool = pool

    @contextmanager
    def start(self):
        yield


takes_posix = pytest.mark.skipif(os.name == "nt", reason="takes fork, setuid or SIGKILL")
takes_flatten = pytest.mark.skipif(
    not hasattr(prefect, "flatten"), reason="This Prefect flattens nothing."
)
purges_on_dask = pytest.mark.skipif(
    not PURGES_ON_DASK, reason="Below Prefect 0.12 Dask's executors run as without prefect_ds."
)
from_0_11 = pytest.mark.skipif(
    not prefect_ds._HAS_LOCATIONS, reason="Below Prefect 0.11 results have no location."
)
has_executors = pytest.mark.skipif(
    not HAS_EXECUTORS, reason="Below Prefect 0.13.10 a flow has no executor."
)
from_0_12 = pytest.mark.skipif(
    not prefect_ds._FLOW_RUNNER_MAPS,
    reason="Below Prefect 0.12 locations and targets are not callable.",
)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def log(caplog):
    """The text of what prefect_ds logs; Prefect's logger does not propagate by itself."""
    logger = logging.getLogger("prefect")
    logger.addHandler(caplog.handler)
    # Where it does, each record is there twice.
    yield lambda level: "\n".join(
        r.getMessage()
        for r in dict.fromkeys(caplog.records)
        # A cluster of an earlier test may still have something to say.
        if r.levelno == level and r.name.startswith("prefect")
    )
    logger.removeHandler(caplog.handler)


def assert_identical(frame, expected):
    """`check_exact` of pandas took numbers only, once."""
    assert_frame_equal(frame, expected)
    assert frame.equals(expected)


def files(folder="."):
    return sorted(name for name in os.listdir(str(folder)) if name != "dask-worker-space")


class Calls(list):
    """Which task runs have taken place; shared by all threads."""

    def make(self, name="make", **kwargs):
        @task(name=name, **kwargs)
        def make(id=0):
            self.append(id)
            return FRAME.assign(id=id)

        return make


class Numbered:
    def __init__(self, n):
        self.n = n


def failed(state, result):
    state = state.result[result]
    assert state.is_failed()
    return state.result


def storing(calls, name="make", **kwargs):
    """A task that notes its runs in `calls` and in the frames that it returns."""

    @task(name=name, **kwargs)
    def make(x, y=None):
        calls.append((name, type(x).__name__, len(calls)))
        return FRAME.assign(run=" ".join(map(str, calls[-1])))

    return make


def written():
    """The runs that are noted in the files of this folder."""
    return [pandas.read_csv(str(path)).run[0] for path in Path().rglob("*.csv") if path.is_file()]


EXTENSIONS = {"excel": "xlsx", "hdf": "h5", "pickle": "pkl", "stata": "dta"}


def for_processes(**variables):
    """The environment of processes that import this file or prefect_ds."""
    folders = [os.path.dirname(os.path.abspath(f)) for f in (__file__, prefect_ds.__file__)]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(folders), **variables)


@functools.lru_cache(maxsize=None)
def new_processes():
    """Starts processes, of one that has imported this file: to import it again takes seconds.

    It has no threads, so that those who come of it may fork.
    """
    if os.name == "nt":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_prefect_ds"])
    with patch.dict(os.environ, for_processes()):
        multiprocessing.forkserver.ensure_running()
    return context


def in_another_process(call):
    """What a function of this file prints in a process of its own, in this folder."""
    with concurrent.futures.ProcessPoolExecutor(1, new_processes()) as pool:
        return pool.submit(_printed_by, call).result(timeout=300)


def _printed_by(call):
    with redirect_stdout(io.StringIO()) as printed:
        exec(call, globals())
    return printed.getvalue().splitlines()


@pytest.fixture
def impatient(monkeypatch):
    for name in ("SECONDS_BETWEEN_LINES", "SECONDS_BETWEEN_LOOKS", "PAUSE_PER_LOOK"):
        monkeypatch.setattr(prefect_ds._Progress, name, 0)


def note(line, file="noted"):
    """Add a line to a file: whole, whatever other threads and processes add."""
    descriptor = os.open(str(file), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def noted(file="noted"):
    return Path(file).read_text().splitlines() if os.path.exists(file) else []


def wait_until(condition, timeout=60):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


# Counting what is alive ----------------------------------------------------------------------

tables = []


def table(frame=None):
    """A frame that is counted while it is alive."""
    new = pandas.DataFrame({"x": [1]})
    tables.append(weakref.ref(new))
    return new


def tables_alive():
    return sum(ref() is not None for ref in tables)


@pytest.fixture
def counted_tables(counted):
    tables.clear()


#: What the tasks below have made and is still referenced.
alive = weakref.WeakSet()
peak = []


class Part:
    """Stands for a large frame: counted while it is alive."""

    def __init__(self):
        alive.add(self)
        peak[:] = [max([len(alive), *peak])]

    def __reduce__(self):
        return Part, ()  # so that it is counted in another process, too


def new_part(part=None):
    assert part is None or isinstance(part, Part)
    return Part()


@task
def load(i):
    return new_part()


@task
def step(part):
    return new_part(part)


@task
def both(one, other):
    return new_part(one)


@task
def count(part):
    assert isinstance(part, Part)
    return 1


def parts_alive():
    return len(alive)


@task
def here_alive(part):
    return parts_alive()


@task
def total(counts):
    return sum(counts)


@task
def numbers(n):
    return list(range(n))


@pytest.fixture
def counted():
    """Only reference counting may free; what waits for the cycle collector counts as alive."""
    gc.collect()
    alive.clear()
    peak.clear()
    gc.disable()
    logging.disable(logging.CRITICAL)  # pytest keeps what is logged, with its errors
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


def chain(length):
    with Flow("chain") as flow:
        part = load(0)
        for _ in range(length - 1):
            part = step(part)
        count(part)
    return flow


def mapped(width, stages=4):
    with Flow("map") as flow:
        part = load.map(numbers(width))
        for _ in range(stages - 1):
            part = step.map(part)
        flow.total = total(count.map(part))
    return flow


@task
def pass_on(x):
    return x


# What of Prefect the module relies on --------------------------------------------------------

#: name (of an attribute of an instance behind `()`), parameters that must be there, what depends
#: on it. Not each release has the following, and where it is missing there is nothing to do:
#: `LocalDaskExecutor()._pool` as an `Executor` of `concurrent.futures`, `Edge().flattened`,
#: `prefect.tasks.secrets.SecretBase`, `prefect.tasks.core.resource_manager`, `State.load_result`,
#: `State.load_cached_results`, `prefect.context["caches"]`, and `CONVERSIONS` of result handlers.
INTERNALS = [
    (
        "prefect.engine.flow_runner.FlowRunner.__init__",
        "flow task_runner_cls state_handlers",
        "DSFlowRunner.__init__",
    ),
    (
        "prefect.engine.flow_runner.FlowRunner.get_flow_run_state",
        "state task_states task_contexts return_tasks task_runner_state_handlers executor",
        "DSFlowRunner: the executor is replaced here; _HAND_ON",
    ),
    (
        "prefect.engine.task_runner.TaskRunner.check_upstream_finished",
        "state upstream_states",
        "DSTaskRunner: purged inputs, recompute",
    ),
    (
        "prefect.engine.task_runner.TaskRunner.__init__",
        "task state_handlers",
        "DSTaskRunner: storage of its own",
    ),
    (
        "prefect.engine.task_runner.TaskRunner.run.__wrapped_func__",
        None,
        "DSTaskRunner.run: loops go through it",
    ),
    (
        "prefect.engine.task_runner.TaskRunner.check_task_is_cached",
        "state inputs",
        "DSTaskRunner: recompute",
    ),
    ("prefect.tasks.core.function.FunctionTask", None, "_unless_prefects"),
    (
        "prefect.engine.task_runner.TaskRunner.set_task_to_running",
        "state inputs",
        "DSTaskRunner: purged inputs",
    ),
    (
        "prefect.engine.runner.Runner.handle_state_change",
        "old_state new_state",
        "DSTaskRunner: purged inputs",
    ),
    (
        "prefect.engine.task_runner.TaskRunner.get_task_inputs",
        "state upstream_states",
        "DSTaskRunner: arguments for the path",
    ),
    (
        "prefect.engine.runner.Runner.call_runner_target_handlers",
        "old_state new_state",
        "checkpoint_handler, DSTaskRunner: handlers hear of failures and recomputing",
    ),
    ("prefect.engine.runner.ENDRUN", "state", "DSTaskRunner.check_upstream_finished"),
    ("prefect.engine.result.Result.__init__", "value", "PandasResult, PurgedResult"),
    ("prefect.engine.result.NoResult", None, "PurgedResult"),
    (
        "prefect.engine.task_runner.TaskRunner.get_task_run_state",
        "state inputs",
        "DSTaskRunner: stored inputs are read here",
    ),
    ("prefect.engine.state.State.result.fget.__code__", None, "_who_asks"),
    ("prefect.tasks.core.collections.List.run", "task_results", "_COLLECTIONS"),
    ("prefect.tasks.core.collections.Tuple.run", "task_results", "_COLLECTIONS"),
    ("prefect.tasks.core.collections.Dict.run", "keys values", "_COLLECTIONS"),
    ("prefect.tasks.core.operators.GetItem", None, "_PURE"),
    ("prefect.engine.state.State.result", None, "what a purged state shows"),
    ("prefect.engine.state.Success()._result", None, "what is purged"),
    ("prefect.engine.state.Success().cached_inputs", None, "_run_call"),
    ("prefect.engine.state.Mapped.__init__", "map_states", "reduce over a map"),
    (
        "prefect.core.Edge.__init__",
        "upstream_task downstream_task key mapped",
        "who reads whose result",
    ),
    ("prefect.core.flow.Flow.edges_to", "task", "who reads whose result"),
    ("prefect.core.flow.Flow.edges_from", "task", "who reads whose result"),
    ("prefect.core.flow.Flow.sorted_tasks", "", "when all readers are submitted"),
    ("prefect.core.flow.Flow.terminal_tasks", "", "whether there will be another round"),
    ("prefect.core.flow.Flow.reference_tasks", "", "what is kept"),
    ("prefect.utilities.collections.merge_dicts", "d1 d2", "_merge_config"),
    ("prefect.context.config.flows.checkpointing", None, "_run_without_merging"),
    ("prefect_ds.Executor.start", "", "DSExecutor"),
    ("prefect.tasks.core.constants.Constant", None, "DSExecutor: edges that no flow has"),
    (
        "prefect.engine.cloud.CloudTaskRunner.call_runner_target_handlers",
        "old_state new_state",
        "_DSCloudTaskRunner: the checkpoint comes before the report",
    ),
    ("prefect_ds.LocalExecutor.submit", "fn", "_Here"),
    ("prefect_ds.LocalDaskExecutor.__init__", "scheduler", "_InThreads"),
    ("prefect_ds.LocalDaskExecutor().scheduler", None, "_backend_for"),
    ("prefect.context.get", "key", "_key and others: names of what runs, scheduled_start_time"),
    ("prefect.triggers.all_successful", None, "_is_read: Prefect's own triggers read no result"),
    ("prefect.tasks.control_flow", None, "_unless_prefects"),
    ("prefect.tasks.core", None, "_unless_prefects"),
    ("prefect.tasks.secrets", None, "_RESTARTED"),
    ("prefect_ds.DaskExecutor.submit", "fn", "_OnCluster"),
    ("prefect_ds.DaskExecutor.wait", "futures", "_OnCluster"),
    ("prefect_ds.DaskExecutor._prep_dask_kwargs", "", "_submit_to_cluster"),
    ("distributed.Client.nthreads", "", "_OnCluster.workers"),
    ("distributed.Client.replicate", "futures", "_OnCluster.begin"),
    ("distributed.Future.add_done_callback", "fn", "_OnCluster.begin"),
    ("distributed.Future.type", None, "_OnCluster.finished"),
]

if prefect_ds._FLOW_RUNNER_MAPS:
    INTERNALS += [
        (
            "prefect.engine.flow_runner.run_task",
            "task state upstream_states context upstream_mapped_states is_mapped_parent",
            "_Run, _HAND_ON",
        ),
        (
            "prefect.engine.flow_runner.run_task",
            "task upstream_states context task_runner_cls task_runner_state_handlers",
            "DSExecutor",
        ),
        (
            "prefect.engine.cloud.CloudTaskRunner.load_results",
            "state upstream_states",
            "_DSCloudTaskRunner: only what is read is loaded",
        ),
        ("prefect.engine.result.Result.copy", "", "PandasResult"),
        (
            "prefect.engine.task_runner.TaskRunner.check_task_ready_to_map",
            "state upstream_states",
            "_HAND_ITEMS_ON",
        ),
        (
            "prefect.utilities.executors.prepare_upstream_states_for_mapping",
            "state upstream_states",
            "_HAND_ITEMS_ON",
        ),
    ]
else:
    INTERNALS += [
        (
            "prefect.engine.flow_runner.FlowRunner.run_task",
            "task state upstream_states context executor",
            "_Run, _HAND_ON",
        ),
        (
            "prefect.engine.task_runner.TaskRunner.run_mapped_task",
            "state upstream_states context executor",
            "_Run.map, _HAND_ITEMS_ON",
        ),
        (
            "prefect.engine.task_runner.TaskRunner.wait_for_mapped_task",
            "state executor",
            "_Run.wait",
        ),
    ]
if prefect_ds._HAS_LOCATIONS:
    INTERNALS += [
        ("prefect.engine.result.Result.format", "", "PandasResult"),
        (
            "prefect.engine.task_runner.TaskRunner.check_target",
            "state inputs",
            "DSTaskRunner: files of targets, recompute",
        ),
        ("prefect.engine.result.Result.from_value", "value", "PandasResult, checkpoint_handler"),
        ("prefect.engine.result.Result.read", "location", "PandasResult"),
        ("prefect.engine.result.Result.write", "", "PandasResult"),
        ("prefect.engine.result.Result.exists", "location", "PandasResult"),
    ]
else:
    INTERNALS += [
        ("prefect.engine.result_handlers.ResultHandler.read", "loc", "PandasResultHandler"),
        ("prefect.engine.result_handlers.ResultHandler.write", "result", "PandasResultHandler"),
        ("prefect.engine.result.SafeResult.__init__", "value result_handler", "checkpoint_handler"),
    ]


@pytest.mark.parametrize("name, parameters, dependent", INTERNALS, ids=[i[0] for i in INTERNALS])
def test_touches_only_these_internals(name, parameters, dependent):
    complaint = f"Prefect {prefect.__version__} changed {name}, on which this depends: {dependent}"
    found = importlib.import_module(name.split(".")[0])
    imported = found.__name__
    for part in name.split(".")[1:]:
        part, call, _ = part.partition("()")
        imported += "." + part
        if not hasattr(found, part):
            try:
                importlib.import_module(imported)
            except ImportError:
                pytest.fail(complaint + ": it is gone")
        found = getattr(found, part)
        found = found() if call else found
    if parameters is not None:
        missing = set(parameters.split()) - set(inspect.signature(found).parameters)
        assert not missing, complaint + ": it no longer takes " + ", ".join(sorted(missing))


def test_a_dask_executor_that_is_started_has_a_client():
    executor = dask_executor()
    with executor.start():
        client = getattr(executor, "client", None)
        assert client, f"Prefect {prefect.__version__} changed it; this depends on it: _OnCluster"


def test_flow_runner_waits_for_tasks_at_the_end_and_for_edges_before(monkeypatch):
    waited = []

    class Spy(prefect_ds._Run):
        def wait(self, futures):
            if self._current is None and isinstance(futures, dict):
                waited.append({type(key) for key in futures})
            return super().wait(futures)

    monkeypatch.setattr(prefect_ds, "_Run", Spy)
    with Flow("map") as flow:
        Calls().make().map([1, 2])
    assert run(flow).is_successful()
    ends = waited.pop()
    assert all(issubclass(kind, Task) for kind in ends), "the flow runner ends by another wait"
    assert all(kinds <= {prefect.core.Edge} for kinds in waited)


# Names ---------------------------------------------------------------------------------------


def test_exports_these_names():
    assert sorted(prefect_ds.__all__) == [
        "DSExecutor",
        "DSFlowRunner",
        "DSTaskRunner",
        "PandasResult",
        "PandasResultHandler",
        "PurgedResult",
        "checkpoint_handler",
    ]
    assert PandasResult is PandasResultHandler


def test_import_lines_of_the_original_work():
    from prefect_ds.checkpoint_handler import checkpoint_handler as handler
    from prefect_ds.flow_runner import DSFlowRunner as flow_runner
    from prefect_ds.pandas_result_handler import PandasResultHandler as result_handler
    from prefect_ds.result import PurgedResult as purged
    from prefect_ds.task_runner import DSTaskRunner as task_runner

    assert handler is checkpoint_handler
    assert (flow_runner, task_runner) == (DSFlowRunner, DSTaskRunner)
    assert result_handler is PandasResultHandler
    assert purged is PurgedResult


def test_version_is_stated_once():
    metadata = pytest.importorskip("importlib.metadata")
    try:
        installed = metadata.version("prefect_ds")
    except metadata.PackageNotFoundError:
        pytest.skip("prefect_ds was copied, not installed")
    assert installed == prefect_ds.__version__


VENDORED = """
import os, sys
import pandas, prefect
from prefect import Flow, task
from myproject.vendor.prefect_ds import DSFlowRunner, checkpoint_handler
from myproject.vendor.prefect_ds.pandas_result_handler import PandasResultHandler
from myproject.vendor import prefect_ds

@task(**{"%s": PandasResultHandler("data_{id}.csv", "csv")})
def make(id):
    return pandas.DataFrame({"id": [id]})

@task
def total(frames):
    return int(sum(frame.id.sum() for frame in frames))

if __name__ == "__main__":
    with Flow("vendored") as flow:
        result = total(make.map([1, 2, 3]))
    %s
    state = flow.run(
        executor=executor,
        runner_cls=DSFlowRunner,
        task_runner_state_handlers=[checkpoint_handler],
    )
    print(state.result[result].result, sorted(f for f in os.listdir(".") if f.endswith("csv")))
"""


def vendor(folder, executor):
    package = folder / "myproject" / "vendor"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    shutil.copy(prefect_ds.__file__, str(package / "prefect_ds.py"))
    (folder / "script.py").write_text(VENDORED % (STORAGE, executor))
    environment = dict(os.environ, PYTHONPATH=str(folder), PREFECT__LOGGING__LEVEL="ERROR")
    return subprocess.run(
        [sys.executable, "script.py"], cwd=str(folder), env=environment, timeout=120,
        stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip


def test_can_be_vendored(empty_folder):
    out = vendor(empty_folder, "executor = None")
    assert out == "6 ['data_1.csv', 'data_2.csv', 'data_3.csv']\n"


def test_can_be_vendored_on_dask_workers(empty_folder):
    cluster = "dict(processes=True, n_workers=1, threads_per_worker=1)"
    if "cluster_kwargs" in inspect.signature(prefect_ds.DaskExecutor.__init__).parameters:
        executor = f"prefect_ds.DaskExecutor(cluster_kwargs={cluster})"
    else:
        executor = "prefect_ds.DaskExecutor(local_processes=True, n_workers=1)"
    out = vendor(empty_folder, "executor = " + executor)
    assert out == "6 ['data_1.csv', 'data_2.csv', 'data_3.csv']\n"


def test_prefect_settings_switch_it_on(empty_folder):
    script = """
        import prefect, prefect_ds
        from prefect import Flow, task
        @task
        def one(): return 1
        @task
        def add(x): return x + 1
        with Flow("settings") as flow:
            first = one()
            second = add(first)
        state = flow.run()
        print(state.result[first]._result, state.result[second].result)
    """
    environment = for_processes(
        PREFECT__ENGINE__FLOW_RUNNER__DEFAULT_CLASS="prefect_ds.DSFlowRunner",
        PREFECT__ENGINE__TASK_RUNNER__DEFAULT_CLASS="prefect_ds.DSTaskRunner",
        PREFECT__LOGGING__LEVEL="ERROR",
    )
    out = subprocess.check_output(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, timeout=120
    )
    assert out.decode().strip() == "PurgedResult 2"


# The template in the path --------------------------------------------------------------------


class Config:
    name = "berlin"


@pytest.mark.parametrize(
    "path, file",
    [
        ("data_{id}.csv", "data_7.csv"),
        (Path("data_{id}.csv"), "data_7.csv"),
        ("{day:%Y-%m}/{id:03}.csv", "2020-02/007.csv"),
        ("{config.name}/{row[id]}.csv", "berlin/8.csv"),
        ("{default}_{task_name}_{flow_name}.csv", "usual_write_fields.csv"),
        ("{today}.csv", None),
        ("{parameter}.csv", "given.csv"),
        ("{{{id}}}.csv", "{7}.csv"),
    ],
)
def test_fields_are_filled(path, file):
    @task(name="write", **stored(path))
    def write(id, day, config, row, untouched, default="usual"):
        return FRAME

    class Untouchable:
        def __format__(self, spec):
            raise AssertionError("an argument that the path does not name was touched")

    with Flow("fields") as flow:
        flow.add_task(Parameter("parameter", default="given"))
        write(7, datetime.date(2020, 2, 3), Config(), {"id": 8}, Untouchable())
    state = run(flow)
    assert state.is_successful()
    file = (
        file
        or prefect.context.get("today", datetime.datetime.utcnow().strftime("%Y-%m-%d")) + ".csv"
    )
    assert_frame_equal(pandas.read_csv(file), FRAME)


def test_arguments_go_before_what_prefect_offers():
    @task(**stored("{today}_{p}.csv"))
    def write(today, p):
        return FRAME

    with Flow("precedence") as flow:
        flow.add_task(Parameter("p", default="parameter"))
        write("now", "argument")
    assert run(flow).is_successful()
    assert files() == ["now_argument.csv"]


def test_mapped_tasks_fill_their_own_fields():
    with Flow("mapped") as flow:
        calls = Calls()
        result = calls.make(**stored("data_{id}.csv")).map([1, 2, 3])
        other = calls.make(name="other", **stored("other_{map_index}.csv")).map([5, 6])
    state = run(flow)
    assert files() == sorted(
        ["data_1.csv", "data_2.csv", "data_3.csv", "other_0.csv", "other_1.csv"]
    )
    assert [frame.id[0] for frame in state.result[result].result] == [1, 2, 3]
    assert [frame.id[0] for frame in state.result[other].result] == [5, 6]


def test_threads_that_run_the_same_task_do_not_mix_arguments():
    @task(**stored("data_{id}.csv"))
    def write(id):
        time.sleep(random.random() / 100)
        return FRAME.assign(id=id)

    with Flow("threads") as flow:
        write.map(list(range(40)))
    executor = LocalDaskExecutor(scheduler="threads", num_workers=8)
    assert run(flow, executor=executor).is_successful()
    for id in range(40):
        assert set(pandas.read_csv(f"data_{id}.csv").id) == {id}


def test_an_argument_that_the_task_changes_does_not_move_the_file():
    @task(**stored("{row[id]}.csv"))
    def write(row):
        row["id"] = "changed"
        return FRAME

    with Flow("mutable") as flow:
        write({"id": "entry"})
    assert run(flow).is_successful()
    assert files() == ["entry.csv"]


def test_a_field_that_nothing_provides_fails_the_task():
    with Flow("missing") as flow:
        result = Calls().make(**stored("{nowhere}.csv"))(3)
    error = failed(run(flow), result)
    assert isinstance(error, ValueError)
    assert "'nowhere'" in str(error) and "id, " in str(error) and "task_name" in str(error)
    assert files() == []


@pytest.mark.parametrize(
    "path, value",
    [
        ("in/{id}.csv", "../out"),
        ("in/{id}.csv", "a/../../out"),
        ("in/{id}/data.csv", ".."),
        ("in/data_{id}.csv", "/../../out"),
        ("{id}.csv", "/tmp/out"),
        ("{id}.csv", "memory://out"),
        ("memory://in/{id}.csv", "../out"),
        ("{id}.csv", "~/out"),
        ("{id}/data.csv", "~"),
        ("~{id}/data.csv", "root"),
        ("{id}.csv", "file:///tmp/out"),
        ("{id}/data.csv", "local:///tmp/out"),
        ("file://{id}.csv", "/tmp/out"),
        ("in/{{raw}}/{id}.csv", "../out"),
    ],
)
def test_a_value_cannot_lead_out_of_the_folder(path, value):
    with Flow("outside") as flow:
        calls = Calls()
        result = calls.make(**stored(path))(value)
    error = failed(run(flow), result)
    assert "leads out of the folder" in str(error)
    assert calls == [] and files() == []


def test_a_value_may_name_a_folder_below():
    with Flow("below") as flow:
        Calls().make(**stored("in/{id}.csv"))("a/b")
    assert run(flow).is_successful()
    assert os.path.exists("in/a/b.csv")


def test_children_of_a_map_do_not_share_a_file():
    with Flow("shared") as flow:
        calls = Calls()
        result = calls.make(**stored("data.csv")).map([1, 2])
        other = calls.make(name="other", **stored("{task_name}.csv")).map(id=[1, 2])
    state = run(flow)
    for task_ in (result, other):
        for child in state.result[task_].map_states:
            assert child.is_failed()
            assert "tell them apart: id, map_index" in str(child.result)
    assert calls == [] and files() == []


def test_a_plain_task_runner_cannot_fill_a_template():
    with Flow("plain") as flow:
        result = Calls().make(**stored("data_{id}.csv"))(1)
    state = FlowRunner(flow).run(
        return_tasks=[result], task_runner_state_handlers=[checkpoint_handler]
    )
    error = failed(state, result)
    assert isinstance(error, TypeError) and "DSTaskRunner" in str(error)


def test_a_plain_task_runner_does_for_a_plain_path():
    with Flow("plain") as flow:
        Calls().make(**stored("data.csv"))(1)
    state = FlowRunner(flow).run(task_runner_state_handlers=[checkpoint_handler])
    assert state.is_successful() and files() == ["data.csv"]


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        (("data",), {}, "tells no file type"),
        (("data.xyz",), {}, "tells no file type"),
        (("data.{id}",), {}, "tells no file type"),
        (("data.csv", "cvs"), {}, "no file type 'cvs'.*csv.*parquet"),
        (("data_{}.csv",), {}, "need names"),
        (("data_{0}.csv",), {}, "need names"),
        ((Path("s3://bucket/data.csv"),), {}, "pass a str"),
    ],
)
def test_bad_storage_is_refused_when_it_is_made(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        PandasResultHandler(*args, **kwargs)


# Files ---------------------------------------------------------------------------------------


def round_trip(file_type, frame, **kwargs):
    path = "data." + EXTENSIONS.get(file_type, file_type)
    storage = PandasResult(path, file_type, **kwargs)
    try:
        storage._save(frame, path)
        return storage._load(path)
    except ImportError as missing:
        pytest.skip(f"pandas needs another package for {file_type}: {missing}")


@pytest.mark.parametrize("file_type", sorted(prefect_ds._FILE_TYPES))
def test_a_frame_comes_back_as_it_was(file_type):
    numbers = "int32" if file_type == "stata" else "int64"
    frame = FRAME.astype({"one": numbers})
    assert_frame_equal(round_trip(file_type, frame), frame)
    assert [name for name in files() if name.startswith(".")] == []


@pytest.mark.parametrize("file_type", ["csv", "excel"])
def test_words_that_pandas_takes_for_missing_come_back(file_type):
    frame = pandas.DataFrame({"word": ["NA", "null", "None", None], "number": [1.5, None, 2.5, 3]})
    assert_frame_equal(round_trip(file_type, frame), frame, check_dtype=False)


def test_floats_come_back_exactly_from_csv_without_a_warning():
    dice = random.Random(0)
    frame = pandas.DataFrame({"x": [dice.random() * 10 ** dice.randrange(9) for _ in range(9999)]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored = round_trip("csv", frame)
    assert (restored.x == frame.x).all()


@pytest.mark.parametrize("compression", ["gz", "bz2", "zip", "xz"])
def test_compression_follows_from_the_extension(compression):
    path = "data.csv." + compression
    storage = PandasResult(path)
    storage._save(FRAME, path)
    assert_frame_equal(storage._load(path), FRAME)
    assert_frame_equal(
        pandas.read_csv(path, compression=compression if compression != "gz" else "gzip"), FRAME
    )


def test_file_types_are_those_of_pandas():
    assert {"csv", "json", "parquet", "feather", "pickle", "excel", "hdf", "stata", "html"} <= set(
        prefect_ds._FILE_TYPES
    )
    assert not {"sql", "gbq", "clipboard", "iceberg"} & set(prefect_ds._FILE_TYPES)
    assert PandasResult("data.x", "CSV").file_type == "csv"


def test_keyword_arguments_of_the_user_win():
    frame = FRAME.set_index("three")
    restored = round_trip("csv", frame, write_kwargs={"index": True}, read_kwargs={"index_col": 0})
    assert_frame_equal(restored, frame)


def test_says_what_a_file_type_does_not_keep(log):
    frame = pandas.DataFrame(
        {"day": pandas.to_datetime(["2020-01-01", "2020-01-02"]), "code": ["01", "02"]},
        index=["a", "b"],
    )
    storage = PandasResult("data.csv")
    for _ in range(3):
        storage._save(frame, "data.csv")
    (warning,) = set(log(logging.WARNING).splitlines())
    for part in (
        "column 'day' (datetime64",
        "column 'code'",
        "int64",
        "the index",
        "parquet",
        "dtype",
    ):
        assert part in warning


@pytest.mark.parametrize("file_type", ["csv", "stata"])
def test_says_that_an_index_is_not_kept_that_is_numbered_only_at_first(file_type, log):
    storage = PandasResult("data", file_type)
    for frame in (FRAME, pandas.concat([pandas.concat([FRAME] * 40, ignore_index=True)] * 2)):
        assert "the index comes back" not in log(logging.WARNING)
        storage._save(frame, "data")
    assert "the index comes back" in log(logging.WARNING)


def test_says_nothing_where_all_is_kept(log):
    pytest.importorskip("pyarrow")
    for frame in (FRAME, pandas.concat([FRAME] * 40, ignore_index=True)):
        for name in ("data.csv", "data.json", "data.parquet"):
            PandasResult(name)._save(frame, name)
    PandasResult("data.pkl")._save(FRAME.set_index("three"), "data.pkl")
    assert log(logging.WARNING) == ""


def test_folders_are_made():
    PandasResult("a/b/c.csv")._save(FRAME, "a/b/c.csv")
    assert_frame_equal(pandas.read_csv("a/b/c.csv"), FRAME)


def test_a_folder_of_files_is_replaced_whole():
    pytest.importorskip("pyarrow")
    storage = PandasResult("data.parquet", write_kwargs={"partition_cols": ["three"]})
    for frame in (FRAME, FRAME[:2]):
        storage._save(frame, "data.parquet")
        assert len(storage._load("data.parquet")) == len(frame)
    assert files() == ["data.parquet"]


def test_a_write_that_fails_leaves_the_earlier_file():
    class Unwritable:
        def __reduce_ex__(self, protocol):
            raise OSError(28, "No space left on device")

    storage = PandasResult("data.pkl")
    storage._save(FRAME, "data.pkl")
    with pytest.raises(OSError, match="No space left"):
        storage._save(pandas.DataFrame({"bad": [Unwritable()]}), "data.pkl")
    assert files() == ["data.pkl"]
    assert_frame_equal(storage._load("data.pkl"), FRAME)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes a tmpfs")
def test_a_full_disk_fails_the_task_and_leaves_the_earlier_file(empty_folder):
    small = empty_folder / "small"
    small.mkdir()
    mounted = subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], stderr=subprocess.DEVNULL
    )
    if mounted != 0:
        pytest.skip("mounting a small disk takes root")
    try:
        large = pandas.DataFrame({"x": [random.random() for _ in range(20000)]})

        @task(**stored("small/data.csv"))
        def fill():
            return large

        PandasResult("small/data.csv")._save(FRAME, "small/data.csv")
        with Flow("full") as flow:
            result = fill()
        state = run(flow, context={"recompute": "fill"})
        assert "No space left" in str(failed(state, result))
        assert files("small") == ["data.csv"]
        assert_frame_equal(pandas.read_csv("small/data.csv"), FRAME)
    finally:
        subprocess.check_call(["umount", str(small)])


@takes_posix
def test_a_killed_writer_leaves_a_whole_file_or_none():
    seed = random.randrange(10**6)
    kills = int(os.environ.get("PREFECT_DS_KILLS", 25))
    # Forking is safe only where there are no threads.
    leftovers = in_another_process(f"kill_writers({kills}, {seed})")[-1]
    assert int(leftovers), f"no kill hit a write; seed {seed}"
    assert files() == ["data.csv"], f"seed {seed}"


def kill_writers(kills, seed):
    dice = random.Random(seed)
    logging.disable(logging.CRITICAL)
    frame = pandas.DataFrame({"x": range(20000), "y": "some text"})
    storage = PandasResult("data.csv")
    PandasResult._check = lambda *args: {}  # It would take longer than the writing.
    leftovers = 0
    for _ in range(kills):
        writer = os.fork()
        if writer == 0:
            while True:
                storage._save(frame, "data.csv")
        time.sleep(dice.random() * 0.1)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        leftovers += any(name.startswith(".") for name in files())
        if os.path.exists("data.csv"):
            assert len(pandas.read_csv("data.csv")) == 20000, f"seed {seed}"
    storage._save(frame, "data.csv")
    print(leftovers)


def test_two_writers_of_one_path_leave_one_whole_file():
    frames = [pandas.DataFrame({"x": [number] * 5000}) for number in range(8)]
    storage = PandasResult("data.csv")

    def write(frame):
        for _ in range(10):
            storage._save(frame, "data.csv")
            assert len(storage._load("data.csv")) == 5000

    threads = [threading.Thread(target=write, args=(frame,)) for frame in frames]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files() == ["data.csv"]
    assert storage._load("data.csv").x.nunique() == 1


def folder_of_files(name, path="data.parquet"):
    """A frame of six parts with a name in each, and storage that makes a folder of it."""
    frame = pandas.DataFrame({"part": list("abcdef"), "name": name})
    return frame, PandasResult(path, write_kwargs={"partition_cols": ["part"]})


def parts(folder="data.parquet"):
    """The contents of the files in a folder, without pyarrow, which starts threads."""
    contents = [path.read_bytes() for path in Path(folder).glob("part=*/*")]
    assert all(content[-4:] == b"PAR1" for content in contents)
    return contents


def test_a_folder_that_fails_halfway_leaves_the_earlier_one():
    pytest.importorskip("pyarrow")
    frame, storage = folder_of_files("earlier")
    storage._save(frame, "data.parquet")
    with pytest.raises((OSError, AssertionError)):  # pyarrow of 2020 asserts
        storage._save(frame.assign(part=[*"abcde", "too long for a file" * 20]), "data.parquet")
    assert files() == ["data.parquet"]
    assert storage._load("data.parquet").name.tolist() == ["earlier"] * 6


def test_a_folder_that_cannot_be_renamed_leaves_the_earlier_one(monkeypatch):
    pytest.importorskip("pyarrow")
    frame, storage = folder_of_files("earlier")
    storage._save(frame, "data.parquet")
    replace = os.replace

    def fail(source, target):
        if os.path.basename(target) == "data.parquet" and not source.endswith("earlier"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        storage._save(frame[:1], "data.parquet")
    assert files() == ["data.parquet"] and len(parts()) == 6


@takes_posix
def test_a_killed_writer_leaves_a_whole_folder_or_none():
    pytest.importorskip("pyarrow.parquet")
    seed = random.randrange(10**6)
    found = in_another_process(f"kill_writers_of_a_folder({seed})")[-1]
    assert "whole" in found, f"seed {seed}"
    assert files() == ["data.parquet"] and len(parts()) == 6, f"seed {seed}"


def kill_writers_of_a_folder(seed):
    import pyarrow.parquet  # noqa: F401, which takes longer than the writers have

    dice = random.Random(seed)
    logging.disable(logging.CRITICAL)
    frame, storage = folder_of_files("any")
    PandasResult._check = lambda *args: {}  # It would take longer than the writing.
    found = []
    for _ in range(12):
        writer = os.fork()
        if writer == 0:
            while True:
                storage._save(frame, "data.parquet")
        # On a busy machine the first folder takes its time.
        until = time.monotonic() + 60
        while not os.path.exists("data.parquet") and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(dice.random() * 0.1)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        is_there = os.path.exists("data.parquet")
        assert not is_there or len(parts()) == 6, f"seed {seed}"
        found.append("whole" if is_there else "none")
    storage._save(frame, "data.parquet")
    print(found)


def test_of_two_processes_that_write_one_path_one_wins_whole():
    names = ["one", "other"]
    with concurrent.futures.ProcessPoolExecutor(2, new_processes()) as pool:
        assert list(pool.map(write_for_long, names, timeout=120)) == [None, None]
    assert files() == ["data.csv", "folder", "one", "other"]
    restored = PandasResult("data.csv")._load("data.csv")
    assert len(restored) == 6 and restored.name.nunique() == 1
    assert files("folder") in (["one0", "one1", "one2"], ["other0", "other1", "other2"])


def write_for_long(name):
    logging.disable(logging.CRITICAL)
    frame, _ = folder_of_files(name)
    storage = PandasResult("data.csv")
    Path(name).touch()
    while len({"one", "other"}.intersection(files())) < 2:
        time.sleep(0.001)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        storage._save(frame, "data.csv")
        for _ in range(50):
            with prefect_ds._new_file("folder", {}) as path:
                for number in range(3):
                    os.makedirs(f"{path}/{name}{number}")


def _put(filesystem):
    """The name of the command that uploads one file."""
    return "put_file" if hasattr(filesystem, "put_file") else "put"


def test_remote_files():
    fsspec = pytest.importorskip("fsspec")
    filesystem = fsspec.filesystem("memory")
    with Flow("remote") as flow:
        calls = Calls()
        calls.make(**stored("memory://folder/data_{id}.csv")).map([1, 2])
    try:
        for _ in range(2):
            assert run(flow).is_successful()
        assert sorted(calls) == [1, 2]
        found = sorted(os.path.basename(path) for path in filesystem.find("/folder"))
        assert found == ["data_1.csv", "data_2.csv"]
    finally:
        filesystem.store.clear()


def test_a_remote_folder_is_replaced_whole():
    pytest.importorskip("pyarrow")
    filesystem = pytest.importorskip("fsspec").filesystem("memory")
    frame, storage = folder_of_files("any", "memory://folder/data.parquet")
    try:
        for part in (frame, frame[:1]):
            storage._save(part, storage.path)
            assert len(filesystem.find("/folder")) == len(part)
    finally:
        filesystem.store.clear()


def test_a_remote_folder_is_not_there_until_it_is_whole(monkeypatch):
    pytest.importorskip("pyarrow")
    filesystem = pytest.importorskip("fsspec").filesystem("memory")
    put = _put(filesystem)
    original = getattr(type(filesystem), put)

    def put_in_part(self, local, remote, **kwargs):
        if "part=f" in local:
            raise OSError("no connection")
        original(self, local, remote, **kwargs)

    frame, storage = folder_of_files("any", "memory://folder/data.parquet")
    try:
        storage._save(frame, storage.path)
        monkeypatch.setattr(type(filesystem), put, put_in_part)
        with pytest.raises(OSError, match="no connection"):
            storage._save(frame, storage.path)
        assert len(filesystem.find("/folder/data.parquet")) == 5
        assert not prefect_ds._exists(storage.path, {})
        monkeypatch.setattr(type(filesystem), put, original)
        storage._save(frame, storage.path)
        assert len(filesystem.find("/folder")) == 6
    finally:
        filesystem.store.clear()


def test_a_file_takes_the_place_of_a_remote_folder_that_was_not_whole():
    filesystem = pytest.importorskip("fsspec").filesystem("memory")
    path = "memory://folder/data.csv"
    _, path_there = prefect_ds._filesystem(path, {})
    try:
        filesystem.touch(prefect_ds._mark_of_upload(path_there))
        PandasResult(path)._save(FRAME, path)
        assert prefect_ds._exists(path, {}) and len(filesystem.find("/folder")) == 1
    finally:
        filesystem.store.clear()


def test_an_upload_that_fails_fails_the_task_and_leaves_the_earlier_file(monkeypatch):
    filesystem = pytest.importorskip("fsspec").filesystem("memory")
    path = "memory://folder/data.csv"

    def fail(*args, **kwargs):
        raise OSError("no connection")

    with Flow("upload") as flow:
        result = Calls().make(**stored(path))(1)
    try:
        PandasResult(path)._save(FRAME, path)
        monkeypatch.setattr(type(filesystem), _put(filesystem), fail)
        error = failed(run(flow, context={"recompute": "make"}), result)
        assert str(error) == "no connection"
        assert_frame_equal(PandasResult(path)._load(path), FRAME)
    finally:
        filesystem.store.clear()


@pytest.fixture
def s3(monkeypatch):
    """The address of a server that speaks S3, with an empty bucket."""
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs", reason="takes s3fs, which speaks S3")
    server = pytest.importorskip("moto.server", reason="takes moto[server], which serves S3")
    for name, value in [("ACCESS_KEY_ID", "any"), ("SECRET_ACCESS_KEY", "any")]:
        monkeypatch.setenv("AWS_" + name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    served = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    urlopen(endpoint + "/moto-api/reset", data=b"")
    filesystem = fsspec.filesystem("s3", client_kwargs={"endpoint_url": endpoint})
    filesystem.mkdir("bucket")
    yield endpoint
    served.stop()
    type(filesystem).clear_instance_cache()


def on_s3(s3, **kwargs):
    options = {"storage_options": {"client_kwargs": {"endpoint_url": s3}}}
    return stored("s3://bucket/in/{id}.csv", read_kwargs=options, write_kwargs=options, **kwargs)


def test_an_object_on_s3_is_written_once_and_then_loaded(s3):
    with Flow("s3") as flow:
        calls = Calls()
        made = calls.make(**on_s3(s3)).map([1, 2])
    for _ in range(2):
        state = run(flow)
        for id, frame in enumerate(state.result[made].result, 1):
            assert_frame_equal(frame, FRAME.assign(id=id))
    assert calls == [1, 2]


def test_an_object_on_s3_that_cannot_be_replaced_stays(s3):
    ((_, storage),) = on_s3(s3).items()
    path = "s3://bucket/in/1.csv"
    storage._save(FRAME, path)

    class Unwritable:
        def __str__(self):
            raise OSError("no")

    with pytest.raises(OSError):
        storage._save(pandas.DataFrame({"x": [1, Unwritable()]}), path)
    assert_frame_equal(storage._load(path), FRAME)


def test_an_object_on_s3_that_cannot_be_read_is_kept_beside_the_new_one(s3, log):
    ((_, storage),) = on_s3(s3).items()
    filesystem, _ = prefect_ds._filesystem("s3://", storage._storage_options)
    filesystem.pipe("bucket/in/1.csv", b"")
    with Flow("s3") as flow:
        calls = Calls()
        calls.make(**on_s3(s3))(1)
    assert run(flow).is_successful() and calls == [1]
    assert "s3://bucket/in/1.csv is there, but cannot be read" in log(logging.WARNING)
    new, kept = sorted(filesystem.find("bucket"))
    assert new == "bucket/in/1.csv" and filesystem.cat(kept) == b""


@from_0_11
def test_an_object_on_s3_is_a_result_of_prefects(s3):
    ((_, storage),) = on_s3(s3).items()
    path = "s3://bucket/in/{id}.csv"
    assert not storage.exists(path, id=1)
    assert storage.write(FRAME, id=1).location == "s3://bucket/in/1.csv"
    assert storage.exists(path, id=1) and not storage.exists(path, id=2)
    assert_frame_equal(storage.read("s3://bucket/in/1.csv").value, FRAME)


def test_what_a_web_server_has_is_loaded(empty_folder):
    pytest.importorskip("fsspec.implementations.http", reason="takes fsspec")
    pytest.importorskip("aiohttp", reason="takes aiohttp, which speaks HTTP for fsspec")
    FRAME.to_csv("1.csv", index=False)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(empty_folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            with Flow("web") as flow:
                calls = Calls()
                path = f"http://127.0.0.1:{server.server_port}/{{id}}.csv"
                result = calls.make(**stored(path))(1)
            loaded = run(flow).result[result].result
        finally:
            server.shutdown()
    assert calls == []
    assert_frame_equal(loaded, FRAME)


def test_threads_read_and_write_hdf_one_at_a_time():
    pytest.importorskip("tables")
    # Where they do not, the process ends.
    assert in_another_process("use_hdf_in_threads()")[-1] == "[24, 24]"


def use_hdf_in_threads():
    with Flow("hdf") as flow:
        made = Calls().make(**stored("{id}.h5")).map(list(range(24)))
    logging.disable(logging.CRITICAL)
    loaded = []
    for _ in range(2):
        executor = LocalDaskExecutor(scheduler="threads", num_workers=8)
        loaded.append(len([f for f in run(flow, executor=executor).result[made].result if len(f)]))
    print(loaded)


def test_a_text_column_of_digits_comes_back_as_one_type_from_a_long_csv():
    frame = pandas.DataFrame({"code": ["1"] * 600_000 + ["x"]})
    assert set(map(type, round_trip("csv", frame).code)) == {str}


@pytest.mark.parametrize(
    "read, write",
    [
        ({"engine": "python"}, {}),
        ({"engine": "c"}, {}),
        ({"engine": "pyarrow"}, {}),
        ({"sep": None, "engine": "python"}, {}),
        ({"sep": None}, {}),
        ({"sep": "[;]"}, {"sep": ";"}),
        ({"delimiter": "[;]"}, {"sep": ";"}),
        ({"sep": r"\s+"}, {"sep": "\t"}),
        ({"sep": "\t"}, {"sep": "\t"}),
        ({"sep": "§"}, {"sep": "§"}),
        ({"skipfooter": 0}, {}),
        ({"skipfooter": 1}, {}),
        ({"quotechar": "§"}, {"quotechar": "§"}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Falling back")
def test_any_engine_and_separator_of_csv_is_taken(read, write):
    if read.get("engine") == "pyarrow":
        pytest.importorskip("pyarrow", "4")
        if pandas.__version__ < "1.4":
            pytest.skip("pandas has no such engine yet")
    restored = round_trip("csv", FRAME, read_kwargs=read, write_kwargs=write)
    assert_frame_equal(restored, FRAME[: len(FRAME) - read.get("skipfooter", 0)])


def in_the_middle(usual, cell, rows=1000):
    """A column of text or numbers that are kept, but for one."""
    column = [*usual] * (rows // len(usual))
    column[rows // 2] = cell
    return pandas.DataFrame({"x": column, "other": range(len(column))})


@pytest.mark.parametrize(
    "file_type, usual, cell",
    [
        ("csv", ["a", "b"], ""),
        ("csv", ["a", "b"], 7),
        ("csv", ["a", "b"], 2**70),
        ("csv", [1, 2], 2**70),
        ("csv", ["a", "b"], datetime.date(2020, 2, 3)),
        ("csv", ["a", "b"], ["a", "b"]),
        ("excel", [1, 2], 1234567890123456789),
        ("excel", ["a", "b"], ""),
        ("excel", ["a", "b"], "=1+1"),
        ("xml", ["a", "b"], "NA"),
        ("xml", ["a", "b"], ""),
        ("html", ["a", "b"], "two  spaces"),
        ("json", [0.5, 0.25], 1e-20),
        ("json", [0.5, 0.25], 0.1234567890123456789),
        ("stata", ["a", "b"], None),
        ("parquet", ["a", "b"], None),
    ],
)
def test_says_so_of_a_cell_in_the_middle(file_type, usual, cell, log):
    if file_type not in prefect_ds._FILE_TYPES:
        pytest.skip("This pandas has no such file type.")
    frame = in_the_middle(usual, cell)
    if file_type == "stata":
        frame = frame.astype({"other": "int32"})
    path = "data." + EXTENSIONS.get(file_type, file_type)
    storage = PandasResult(path)
    try:
        is_kept = storage._save(frame, path)
    except ImportError as missing:
        pytest.skip(f"pandas needs another package for {file_type}: {missing}")
    restored = storage._load(path)
    try:
        assert_identical(restored, frame)
        expected = list(map(type, restored.x)) == list(map(type, frame.x))
    except AssertionError:
        expected = False
    if cell is None and file_type == "parquet":
        expected = True
    assert is_kept == expected
    assert ("'x'" in log(logging.WARNING)) == (not expected)


@pytest.mark.parametrize("file_type", sorted({*prefect_ds._FILE_TYPES} - {"fwf"}))
def test_says_nothing_of_a_long_frame_that_is_kept(file_type, log):
    words = ["01", "NA", "x", "a b", "true"] if file_type not in ("xml",) else ["01", "x", "true"]
    frame = pandas.DataFrame(
        {
            "word": words * 400,
            "number": range(len(words) * 400),
            "half": [0.5, 1.0, 2.25, 3.0] * (len(words) * 100),
        }
    )
    frame.loc[600:, "word"] = "later"
    frame = frame.astype({"number": "int32" if file_type == "stata" else "int64"})
    restored = round_trip(file_type, frame)
    assert_identical(restored, frame)
    assert log(logging.WARNING) == ""


def test_says_so_of_each_child_that_loses_something_else(log):
    def make(i):
        return pandas.DataFrame({"code": [["x", "y"], ["01", "02"], ["", "y"], ["03", "04"]][i]})

    with Flow("codes") as flow:
        task(make, **stored("{i}.csv")).map([0, 1, 2, 3])
    assert run(flow).is_successful()
    lines = sorted(set(log(logging.WARNING).splitlines()))
    assert len(lines) == 2 and "int64" in lines[0] and "values of column 'code'" in lines[1]


class Kind(pandas.DataFrame):
    """A frame of another type."""


@pytest.mark.parametrize(
    "frame, sentence",
    [
        (FRAME.rename_axis(index="id"), "names [None], not ['id']"),
        (FRAME.rename_axis(columns="field"), "the names ['field'] of the columns"),
        (FRAME.assign(two=1.0 + 1e-9).assign(two=lambda f: f.two.astype("float32")), "float32"),
        (FRAME.rename(columns={"one": 1}), "the columns come back as ['1', 'two', 'three']"),
        (Kind(FRAME), "Kind comes back as DataFrame"),
    ],
)
def test_says_so_of_names_and_types(frame, sentence, log):
    assert not PandasResult("data.csv")._save(frame, "data.csv")
    assert sentence in log(logging.WARNING)


_NOT_KEPT = {
    "return.csv": "x\ry",
    "accent.html": "Z\xfcrich",
    "thousands.html": "1,234",
    "error.xlsx": "#REF!",
    "formula.xlsx": "=1+1",
    "long.xlsx": "x" * 40_000,
    "label.h5": "nan",
}


@pytest.mark.parametrize("rows", [300, 250_000])
@pytest.mark.parametrize("name", _NOT_KEPT)
def test_says_so_of_one_cell_in_the_middle_that_is_not_kept(name, rows, log):
    if rows > 300 and not name.endswith(".csv"):
        pytest.skip("To write it takes too long.")
    text = [f"text {n}" for n in range(rows)]
    text[150] = _NOT_KEPT[name]
    frame = pandas.DataFrame({"a": text})
    if name == "label.h5":
        frame = pandas.DataFrame({"a": range(rows)}, index=text)
    storage = PandasResult(name)
    try:
        is_kept = storage._save(frame, name)
    except ImportError as missing:
        pytest.skip(f"pandas needs another package: {missing}")
    except ValueError:
        return  # It is not written, then.
    assert is_kept == storage._load(name).equals(frame)
    assert ("does not keep all" in log(logging.WARNING)) == (not is_kept)


_DAY = pandas.Timestamp("2020-01-01")

#: The cell that is repeated, and the one in the middle.
_ODD_CELLS = {
    "tiny": (1.5, 1.234e-7),
    "digits of a float": (1.5, 0.12345678901234568),
    "missing float": (1.5, float("nan")),
    "fraction": (1.0, 1.5),
    "large": (1, 2**60 + 1),
    "time": (_DAY, pandas.Timestamp("2020-01-01 10:20:30")),
    "nanoseconds": (_DAY, pandas.Timestamp("2020-01-01 10:20:30.123456789")),
    "early": (_DAY, pandas.Timestamp("1850-01-01")),
    "no time": (_DAY, pandas.NaT),
    "no boolean": (True, None),
    "number among text": ("a", 1),
    "beyond 64 bits": (1, 2**70),
    "digits among text": ("a", "01"),
    "text among digits": ("01", "a"),
    "word": ("a", "NA"),
    "blank": ("a", "a "),
    "return": ("a", "a\rb"),
    "missing text": ("a", float("nan")),
}


#: Columns in which one sort of cells comes before another.
_ODD_COLUMNS = {
    "infinite among fractions": [1 / 3] * 150 + [float("inf")] + [2 / 3] * 149,
    "digits after what is missing": [None] * 150 + [0.1234567890123456789] * 100 + [1.0] * 50,
    "fraction after what is missing": [None] * 150 + [1.5] + [1.0] * 149,
}


@pytest.mark.parametrize("name", ["data.csv", "data.json", "data.xlsx"])
def test_a_sample_of_a_large_frame_tells_the_same_as_all_of_it(name, monkeypatch):
    columns = dict(_ODD_COLUMNS)
    for odd, (cell, other) in _ODD_CELLS.items():
        columns[odd] = [cell] * 150 + [other] + [cell] * 149
    frames = {
        odd: pandas.Series(column, dtype=object if odd == "missing text" else None).to_frame("x")
        for odd, column in columns.items()
    }
    # What is settled in one column is not in the other.
    digits = columns["digits of a float"]
    frames["digits in two columns"] = pandas.DataFrame({"x": [0.1] * 300, "y": digits})
    told = {}
    for cells, key in ((10**9, "all"), (0, "sample")):
        monkeypatch.setattr(prefect_ds, "_MAX_CELLS", cells)
        for odd, frame in frames.items():
            try:
                told[odd, key] = PandasResult(name)._save(frame, name)
            except ImportError as missing:
                pytest.skip(f"pandas needs another package: {missing}")
            except (ValueError, OverflowError):
                told[odd, key] = "It cannot be written and read back."
    assert [odd for odd in frames if told[odd, "all"] != told[odd, "sample"]] == []


@pytest.mark.parametrize(
    "column",
    [
        [{"x": 1}] * 150 + [{"y": 2}] + [{"x": 1}] * 149,
        [None] * 150 + [[1, 2]] + [None] * 149,
        [datetime.datetime(2020, 1, 1)] * 300,
    ],
    ids=["dicts", "lists", "datetimes"],
)
def test_says_so_of_objects_in_the_middle_of_a_parquet_file(column, log):
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"a": pandas.Series(column, dtype=object)})
    try:
        PandasResult("data.parquet")._save(frame, "data.parquet")
    except Exception as exc:  # Old releases of pyarrow do not write it.
        pytest.skip(str(exc))
    restored = PandasResult("data.parquet")._load("data.parquet")
    is_equal = list(map(repr, restored.a)) == list(map(repr, frame.a))
    assert (log(logging.WARNING) == "") == (is_equal and restored.a.dtype == object)


def test_says_so_of_attrs_and_of_the_frequency_of_an_index(log):
    index = pandas.date_range("2020", periods=3, freq="D")
    PandasResult("freq.json")._save(pandas.DataFrame({"x": [1, 2, 3]}, index=index), "freq.json")
    assert "the frequency <Day> of the index is lost" in log(logging.WARNING)
    frame = FRAME.copy()
    if hasattr(frame, "attrs"):
        frame.attrs["unit"] = "kg"
        assert not PandasResult("attrs.csv")._save(frame, "attrs.csv")
        assert "its attrs are lost" in log(logging.WARNING)


def test_says_so_of_each_type_of_categories(log):
    pytest.importorskip("pyarrow")
    kept = []
    for name, values in [("words", ["x", "y"]), ("numbers", [1, 2])]:
        frame = pandas.DataFrame({"c": pandas.Categorical(values)})
        kept.append(PandasResult("{n}.parquet")._save(frame, name + ".parquet"))
        restored = PandasResult("{n}.parquet")._load(name + ".parquet")
        assert kept[-1] == prefect_ds._is_same(restored.dtypes["c"], frame.dtypes["c"])


def _of(values, **kwargs):
    return pandas.DataFrame({"c": pandas.Series(values, **kwargs)})


def _with_index(values, **kwargs):
    return _of([1, 2]).set_index(pandas.Series(values, **kwargs)).rename_axis("i")


#: Frames that are much alike, but for what a file may keep of the one, and not of the other.
_ALIKE = {
    "strings": [
        lambda: _of(["a", "b"], dtype="string[python]"),
        lambda: _of(["a", "b"], dtype="string[pyarrow]"),
    ],
    "labels": [
        lambda: pandas.DataFrame([[1, 2]], columns=[0, 1]),
        lambda: pandas.DataFrame([[1, 2]], columns=[False, True]),
        lambda: pandas.DataFrame([[1, 2]], columns=[0.0, 1.0]),
        lambda: pandas.DataFrame([[1, 2]], columns=pandas.CategoricalIndex([0, 1])),
    ],
    "order": [
        lambda: _of(pandas.Categorical(["a", "b"])),
        lambda: _of(pandas.Categorical(["a", "b"], ordered=True)),
    ],
    "levels": [
        lambda: _with_index([1, 2]).set_index(pandas.Series([1, 2]), append=True),
        lambda: _with_index([1, 2]).set_index(pandas.Categorical(["a", "b"]), append=True),
        lambda: _with_index([1, 2]).set_index(pandas.Series(["a", 2]), append=True),
    ],
    "index": [
        lambda: _with_index(["a", "b"], dtype=object),
        lambda: _with_index([datetime.date(2020, 1, 1)] * 2, dtype=object),
        lambda: _with_index(pandas.Categorical(["a", "b"])),
    ],
}


@pytest.mark.parametrize("extension", ["parquet", "feather", "h5"])
@pytest.mark.parametrize("name", _ALIKE)
def test_what_is_kept_of_one_frame_is_not_said_of_another(name, extension, monkeypatch):
    told, path = {}, f"data.{extension}"
    numbered = list(enumerate(_ALIKE[name]))
    for order in (1, -1):
        monkeypatch.setattr(prefect_ds, "_checked", {})
        for number, make in numbered[::order]:
            try:
                told[number, order] = PandasResult(path)._save(make(), path)
            except Exception as exc:  # It is not made, or not written, with these packages.
                told[number, order] = type(exc)
    assert [told[n, 1] for n, _ in numbered] == [told[n, -1] for n, _ in numbered]


@pytest.mark.parametrize("name", ["data.csv", "data.json", "data.xml", "data.xlsx"])
def test_says_so_of_labels_of_another_type(name, log):
    columns = pandas.CategoricalIndex(["a", "b"])
    try:
        assert not PandasResult(name)._save(pandas.DataFrame([[1, 2]], columns=columns), name)
    except (ImportError, ValueError) as missing:
        pytest.skip(f"pandas does not write it: {missing}")
    assert "the labels of the columns (category) come back as" in log(logging.WARNING)
    assert PandasResult(name)._save(pandas.DataFrame([[1, 2]], columns=["a", "b"]), name)


def test_compares_floats_exactly(log):
    frame = pandas.DataFrame({"x": [0.123456789, 2.5]})
    assert not PandasResult("data.csv", write_kwargs={"float_format": "%.6f"})._save(
        frame, "data.csv"
    )
    assert "values of column 'x' change" in log(logging.WARNING)


def test_says_that_lists_come_back_as_arrays(log):
    pytest.importorskip("pyarrow")
    storage = PandasResult("{n}.parquet")
    for n, cell in enumerate(["text", [1, 2]]):
        is_kept = storage._save(pandas.DataFrame({"x": [cell]}), f"{n}.parquet")
        assert is_kept == (n == 0) and ("values of column 'x'" in log(logging.WARNING)) == (n == 1)


def test_compares_columns_even_if_their_order_changed(log):
    if pytest.importorskip("pyarrow").__version__.startswith("1."):
        pytest.skip("This release of pyarrow makes a column of the index.")
    frame = pandas.DataFrame({"part": [1, 2], "x": [1, 2]})
    storage = PandasResult("data.parquet", write_kwargs={"partition_cols": ["part"]})
    assert not storage._save(frame, "data.parquet")
    warning = log(logging.WARNING)
    assert "in another order" in warning and "column 'part' (int64) comes back as" in warning
    assert "'x'" not in warning


def test_says_a_loss_once_in_a_process_however_often_the_storage_is_pickled(log):
    frame = FRAME.set_index("three")
    for n in range(3):
        storage = pickle.loads(pickle.dumps(PandasResult("{n}.csv")))
        assert not storage._save(frame, f"{n}.csv")
    PandasResult("other.csv")._save(frame, "other.csv")
    lines = sorted(set(log(logging.WARNING).splitlines()))
    assert ["0.csv" in lines[0], "other.csv" in lines[1]] == [True, True] and len(lines) == 2


def test_many_columns_are_compared_at_once(log):
    frame = pandas.DataFrame({f"c{n}": range(5) for n in range(10_000)})
    started = time.process_time()
    losses = prefect_ds._losses(frame, frame.copy())
    assert not losses and time.process_time() - started < 0.5
    losses = prefect_ds._losses(frame, frame.astype(float))
    assert list(losses) == ["column {} (int64) comes back as float64"]
    PandasResult("data.csv")._warn_of_losses(losses, "data.csv")
    assert "'c4' and 9995 more" in log(logging.WARNING)


@pytest.mark.parametrize(
    "path, frame, kwargs",
    [
        (path, frame, {})
        for path in ("data.csv", "data.html", "data.xml", "data.json", "data.xlsx", "data.parquet")
        for frame in (FRAME[:0], pandas.DataFrame(), pandas.DataFrame(index=[0, 1]))
    ]
    + [("data.parquet", FRAME[:0], {"partition_cols": ["three"]})],
)
def test_a_frame_that_cannot_be_read_back_fails_when_it_is_written(path, frame, kwargs):
    if prefect_ds._EXTENSIONS.get(path[5:], path[5:]) not in prefect_ds._FILE_TYPES:
        pytest.skip("This pandas has no such file type.")
    storage = PandasResult(path, write_kwargs=kwargs)
    Path(path).write_bytes(b"earlier")
    try:
        storage._save(frame, path)
    except ImportError as missing:
        pytest.skip(str(missing))
    except Exception as exc:
        assert Path(path).read_bytes() == b"earlier" and files() == [path]
        assert path in str(exc) or "could not be read back" not in str(exc)
    else:
        assert isinstance(storage._load(path), pandas.DataFrame)


def test_a_frame_without_columns_fails_with_a_message_that_says_why():
    with pytest.raises(ValueError, match=r"data\.csv was not written, since it could not be read"):
        PandasResult("data.csv")._save(pandas.DataFrame(), "data.csv")
    assert files() == []


def test_keyword_arguments_that_need_many_rows_are_checked_on_all_of_them(log):
    frame = pandas.concat([FRAME] * 200, ignore_index=True)
    storage = PandasResult("data.csv", read_kwargs={"skiprows": range(1, 400)})
    assert not storage._save(frame, "data.csv")
    assert "rows" in log(logging.WARNING)


def test_one_unreadable_file_is_kept_at_most():
    Path("data.pkl.unreadable-mine").write_bytes(b"mine")
    with Flow("damaged") as flow:
        Calls().make(**stored("data.pkl"))(1)
    for content in (b"one", b"two"):
        Path("data.pkl").write_bytes(content)
        assert run(flow).is_successful()
        mine, kept = sorted(set(files()) - {"data.pkl"}, reverse=True)
        assert Path(kept).read_bytes() == content and mine == "data.pkl.unreadable-mine"


LONG_NAME = "é" * 120 + "n" * 11  # 251 bytes, and ".csv"


def test_names_may_be_as_long_as_the_file_system_takes():
    with Flow("long") as flow:
        calls = Calls()
        calls.make(**stored("{id}.csv"))(LONG_NAME)
    assert run(flow).is_successful() and files() == [LONG_NAME + ".csv"]
    Path(LONG_NAME + ".csv").write_bytes(b"")
    assert run(flow).is_successful() and len(calls) == 2
    assert len(files()) == 2


def test_an_extension_may_be_in_capitals():
    pytest.importorskip("openpyxl")
    PandasResult("A.XLSX")._save(FRAME, "A.XLSX")
    assert files() == ["A.XLSX"]
    assert_frame_equal(PandasResult("A.XLSX")._load("A.XLSX"), FRAME)


@pytest.mark.skipif(pandas.__version__ < "1", reason="pandas takes no name for what is in a zip")
def test_the_member_of_a_zip_has_the_name_of_the_file():
    PandasResult("in/data.csv.zip")._save(FRAME, "in/data.csv.zip")
    assert zipfile.ZipFile("in/data.csv.zip").namelist() == ["data.csv"]


@takes_posix
def test_replacing_a_file_keeps_its_mode_and_a_link_to_it():
    storage = PandasResult("link.csv")
    os.mkdir("there")
    os.symlink(os.path.join("there", "data.csv"), "link.csv")
    for mode in (None, 0o640, 0o444):
        if mode:
            os.chmod("there/data.csv", mode)
        storage._save(FRAME, "link.csv")
        assert os.path.islink("link.csv") and files("there") == ["data.csv"]
        umask = os.umask(0)
        os.umask(umask)
        assert os.stat("there/data.csv").st_mode & 0o777 == (mode or 0o666 & ~umask)


@takes_posix
def test_a_link_with_another_extension_leads_to_what_was_written():
    os.symlink("data.csv.gz", "link.csv")
    storage = PandasResult("link.csv")
    storage._save(FRAME, "link.csv")
    assert_identical(storage._load("link.csv"), FRAME)


def test_a_path_may_leave_a_folder_that_is_not_there():
    calls = Calls()
    with Flow("dots") as flow:
        calls.make(**stored("data/folder/../{id}.csv"))(1)
    for _ in range(2):
        assert run(flow).is_successful() and files("data") == ["1.csv"]
    assert calls == [1]


def test_a_relative_path_is_where_it_was_when_the_task_began():
    os.mkdir("elsewhere")

    @task(**stored("out/{id}.csv"))
    def move(id):
        os.chdir("elsewhere")
        return FRAME

    with Flow("moves") as flow:
        result = move(1)
    state = run(flow)
    os.chdir(os.pardir)
    assert state.is_successful() and files("elsewhere") == [] and files("out") == ["1.csv"]
    if prefect_ds._HAS_LOCATIONS:
        assert state.result[result]._result.location == "out/1.csv"


@from_0_12
@pytest.mark.parametrize("kwargs", [{"target": "1.csv"}, {}], ids=["target", "location"])
def test_a_relative_path_stays_with_the_checkpointing_of_prefect(kwargs):
    os.mkdir("elsewhere")

    @task(result=PandasResult(None if kwargs else "1.csv"), **kwargs)
    def move():
        os.chdir("elsewhere")
        return FRAME

    with Flow("moves") as flow:
        move()
    assert DSFlowRunner(flow).run(context={"checkpointing": True}).is_successful()
    os.chdir(os.pardir)
    assert files() == ["1.csv", "elsewhere"] and files("elsewhere") == []


def test_a_url_of_a_local_file_is_a_local_path(empty_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)  # It takes no fsspec.
    for protocol in ("file", "local"):
        url = f"{protocol}://{empty_folder}/new/{protocol}.csv"
        with Flow("local") as flow:
            calls = Calls()
            calls.make(**stored(url))(1)
        assert run(flow).is_successful() and run(flow).is_successful()
        assert calls == [1] and protocol + ".csv" in files("new")
        with pytest.raises(OSError), prefect_ds._new_file(url, {}) as path:
            Path(path).write_bytes(b"half")
            raise OSError("killed")
        assert_frame_equal(pandas.read_csv(f"new/{protocol}.csv"), FRAME.assign(id=1))


def test_a_bucket_cannot_be_a_field():
    with pytest.raises(ValueError, match=r"bucket or host of .* has a field"):
        PandasResult("s3://{bucket}/x.csv")
    for path in ("s3://bucket/{x}.csv", "s3://{{bucket/{x}.csv", "file://{x}.csv"):
        PandasResult(path)


@pytest.fixture
def memory():
    filesystem = pytest.importorskip("fsspec").filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    getattr(filesystem, "pseudo_dirs", []).clear()


@pytest.mark.parametrize("name", ["[ab]", "a*", "a?"])
def test_names_of_remote_files_are_literal(name, memory):
    with Flow("literal") as flow:
        calls = Calls()
        made = calls.make(**stored("memory://folder/{id}.pkl")).map([name, "ab", "a"])
    for _ in range(2):
        state = run(flow)
        assert [frame.id[0] for frame in state.result[made].result] == [name, "ab", "a"]
    assert len(calls) == 3
    for id in (name, "ab"):
        with memory.open(f"folder/{id}.pkl", "wb") as opened:
            opened.write(b"damaged")
    assert run(flow).is_successful() and len(calls) == 5
    assert len(memory.find("/folder")) == 5
    assert run(flow).is_successful() and len(calls) == 5


@pytest.mark.parametrize("name", ["[ab]", "a*"])
def test_names_of_remote_folders_are_literal(name, memory):
    pytest.importorskip("pyarrow")
    for count in (6, 2):
        for other in ("ab", name):
            frame, storage = folder_of_files(other, f"memory://folder/{other}/data.parquet")
            storage._save(frame[:count], storage.path)
            assert set(storage._load(storage.path).name) == {other}
    assert len(memory.find("/folder")) == 4


def test_one_unreadable_remote_file_is_kept_at_most(memory):
    with Flow("damaged") as flow:
        Calls().make(**stored("memory://folder/[a].pkl"))(1)
    for content in (b"one", b"two"):
        with memory.open("folder/[a].pkl", "wb") as opened:
            opened.write(content)
        assert run(flow).is_successful()
        _, kept = sorted(memory.find("/folder"))
        with memory.open(kept.lstrip("/"), "rb") as opened:
            assert opened.read() == content


@pytest.mark.parametrize("happens", ["before", "within"])
def test_of_two_writers_of_a_remote_folder_one_wins_whole(happens, memory, monkeypatch):
    """The second one writes all when the first one uploads its third file: before, or within."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("fsspec", "0.8", reason="Before, there were no folders in memory.")
    frame, storage = folder_of_files("one", "memory://folder/data.parquet")
    put, seen = _put(memory), []
    original = getattr(type(memory), put)

    def put_and_meet(self, local, remote, *args, **kwargs):
        seen.append(remote)
        if happens == "within":
            original(self, local, remote, *args, **kwargs)
        if len(seen) == 3:
            storage._save(frame.assign(name="other")[:4], storage.path)
        original(self, local, remote, *args, **kwargs)

    monkeypatch.setattr(type(memory), put, put_and_meet)
    storage._save(frame, storage.path)
    assert prefect_ds._exists(storage.path, {})
    restored = storage._load(storage.path)
    assert restored.name.nunique() == 1 and len(restored) in (4, 6)
    assert len(memory.find("/folder")) == len(restored)


def test_a_writer_of_a_remote_folder_yields_to_one_that_is_under_way(memory, monkeypatch):
    pytest.importorskip("pyarrow")
    frame, storage = folder_of_files("one", "memory://folder/data.parquet")
    mark = prefect_ds._mark_of_upload(prefect_ds._filesystem(storage.path, {})[1])
    put = _put(memory)
    original = getattr(type(memory), put)

    def put_and_be_late(self, local, remote, *args, **kwargs):
        with memory.open(mark, "wb") as opened:
            opened.write(b"other")
        original(self, local, remote, *args, **kwargs)

    monkeypatch.setattr(type(memory), put, put_and_be_late)
    storage._save(frame, storage.path)
    assert not prefect_ds._exists(storage.path, {})
    assert memory.find("/folder/data.parquet") == []


def test_two_threads_that_write_one_remote_folder_leave_one_whole(memory):
    pytest.importorskip("pyarrow")
    frame, storage = folder_of_files("any", "memory://folder/data.parquet")
    names = [f"writer {n}" for n in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: storage._save(frame.assign(name=name), storage.path), names))
    if prefect_ds._exists(storage.path, {}):
        restored = storage._load(storage.path)
        assert restored.name.nunique() == 1 and len(restored) == 6


@pytest.fixture
def disk(empty_folder):
    """A file system of fsspec that renames, as those on disks do, and remembers listings."""
    fsspec = pytest.importorskip("fsspec", "0.8")
    from fsspec.implementations.local import LocalFileSystem

    class Disk(LocalFileSystem):
        protocol = "disk"
        local_file = False

        @classmethod
        def _strip_protocol(cls, path):
            return str(empty_folder) + "/" + path[len("disk://") :] if "://" in path else path

        def mv(self, path1, path2):
            if os.path.exists(path2):
                raise OSError("It is there.")
            os.rename(path1, path2)

        def put_file(self, lpath, rpath, **kwargs):
            assert os.path.basename(rpath)[0] == "." or "/." in rpath, "It is not hidden."
            shutil.copy(lpath, rpath)

    fsspec.register_implementation("disk", Disk, clobber=True)
    return Disk


def test_where_an_upload_is_not_atomic_it_is_renamed(disk, monkeypatch):
    pytest.importorskip("pyarrow")
    whole, storage = folder_of_files("any", "disk://new/folder.parquet")
    for frame in (whole, whole[:2]):
        for path in ("disk://new/a[b].csv", storage.path):
            (storage if path == storage.path else PandasResult(path))._save(frame, path)
            restored = PandasResult(path)._load(path)
            assert len(restored) == len(frame)
    assert files("new") == ["a[b].csv", "folder.parquet"]

    def fail(self, path1, path2):
        if not path2.endswith("-earlier"):
            raise OSError("no connection")
        os.rename(path1, path2)

    move = disk.mv
    monkeypatch.setattr(
        disk,
        "mv",
        lambda self, a, b: (fail if "/." in a and not a.endswith("-earlier") else move)(self, a, b),
    )
    with pytest.raises(OSError, match="no connection"):
        PandasResult("disk://new/a[b].csv")._save(FRAME, "disk://new/a[b].csv")
    assert files("new") == ["a[b].csv", "folder.parquet"]
    assert len(pandas.read_csv("new/a[b].csv")) == 2


def test_what_others_delete_and_write_is_seen(memory, monkeypatch):
    """As on S3, whose file system remembers listings."""
    pytest.importorskip("pyarrow")
    cls = type(memory)
    remembered = {}
    info, find = cls.info, cls.find

    def info_from_memory(self, path, **kwargs):
        if path not in remembered:
            try:
                remembered[path] = info(self, path, **kwargs)
            except FileNotFoundError:
                remembered[path] = None
        if remembered[path] is None:
            raise FileNotFoundError(path)
        return remembered[path]

    def exists(self, path, **kwargs):
        try:
            return bool(info_from_memory(self, path))
        except FileNotFoundError:
            return False

    def find_in_memory(self, path, **kwargs):
        if ("find", path) not in remembered:
            remembered["find", path] = find(self, path, **kwargs)
        return remembered["find", path]

    monkeypatch.setattr(cls, "exists", exists)
    monkeypatch.setattr(cls, "find", find_in_memory)
    monkeypatch.setattr(cls, "invalidate_cache", lambda self, path=None: remembered.clear())
    frame, storage = folder_of_files("any", "memory://folder/data.parquet")
    storage._save(frame, storage.path)
    assert prefect_ds._exists(storage.path, {})
    memory.store.clear()
    getattr(memory, "pseudo_dirs", []).clear()
    assert not prefect_ds._exists(storage.path, {})
    storage._save(frame, storage.path)
    assert prefect_ds._exists(storage.path, {}) and len(storage._load(storage.path)) == 6


def test_a_folder_on_s3_that_was_deleted_by_another_is_stored_again(s3):
    pytest.importorskip("pyarrow")
    options = {"storage_options": {"client_kwargs": {"endpoint_url": s3}}}
    path = "s3://bucket/[in]/data.parquet"
    frame = pandas.DataFrame({"part": list("abc"), "n": range(3)})
    storage = PandasResult(
        path, read_kwargs=options, write_kwargs={"partition_cols": ["part"], **options}
    )
    other = type(prefect_ds._filesystem(path, storage._storage_options)[0])(
        client_kwargs={"endpoint_url": s3}, skip_instance_cache=True
    )
    for _ in range(2):
        storage._save(frame, path)
        assert prefect_ds._exists(path, storage._storage_options)
        assert len(storage._load(path)) == 3
        other.invalidate_cache()
        for file in other.find("bucket"):
            other.rm_file(file)
        assert not prefect_ds._exists(path, storage._storage_options)


def test_protocols_may_be_joined(memory):
    pytest.importorskip("fsspec", "0.8.5")
    with Flow("joined") as flow:
        calls = Calls()
        made = calls.make(**stored("simplecache::memory://folder/{id}.csv")).map([1, 2])
    for _ in range(2):
        state = run(flow)
        assert [frame.id[0] for frame in state.result[made].result] == [1, 2]
    assert sorted(calls) == [1, 2] and len(memory.find("/folder")) == 2
    with Flow("outside") as flow:
        result = Calls().make(**stored("simplecache::memory://folder/{id}.csv"))("../x")
    assert "leads out of the folder" in str(failed(run(flow), result))


# What is stored lives in its file ------------------------------------------------------------


def files_read(log):
    """The names of the files that were read, in their order."""
    lines = [line for line in log(logging.INFO).splitlines() if ": Loaded " in line]
    return [os.path.basename(line.partition(": Loaded ")[2]) for line in lines]


def run_by_prefects(flow, **kwargs):
    """By Prefect's own flow runner, and `DSTaskRunner`."""
    return FlowRunner(flow, task_runner_cls=DSTaskRunner).run(
        return_tasks=flow.tasks, task_runner_state_handlers=[checkpoint_handler], **kwargs
    )


def two_maps_and_more():
    """Maps, a reduce, a list and a dictionary of tasks, of which each is stored."""

    def make(name, path):
        @task(name=name, **stored(path))
        def made(x=0):
            return pandas.DataFrame({"sum": [sum_of(x)]})

        return made

    with Flow("stored") as flow:
        load = make("load", "load_{map_index}.pkl").map([1, 2, 3])
        clean = make("clean", "clean_{map_index}.pkl").map(load)
        total = make("total", "total.pkl")(clean)
        in_list = make("list", "list.pkl")([load, total])
        flow.last = make("dict", "dict.pkl")({"a": in_list, "b": [total]})
    return flow


def sum_of(x):
    """The sum of all numbers in frames, and in collections of them."""
    if isinstance(x, pandas.DataFrame):
        return int(x.to_numpy().sum())
    if isinstance(x, dict):
        return sum_of(list(x.values()))
    return sum(map(sum_of, x)) if isinstance(x, (list, tuple)) else x


@pytest.mark.parametrize("run_by", [run, run_by_prefects])
@on_each_executor
def test_reads_only_what_a_task_that_runs_asks_for(executor, run_by, log):
    flow = two_maps_and_more()
    first = run_by(flow, executor=executor())
    assert sum_of(first.result[flow.last].result) == 18
    for deleted, expected in [
        ([], []),
        (["list.pkl"], ["load_0.pkl", "load_1.pkl", "load_2.pkl", "total.pkl"]),
        (["clean_1.pkl"], ["load_1.pkl"]),
        (["clean_2.pkl", "total.pkl"], ["clean_0.pkl", "clean_1.pkl", "load_2.pkl"]),
    ]:
        for name in deleted:
            os.remove(name)
        before = len(files_read(log))
        state = run_by(flow, executor=executor())
        read = set(files_read(log)[before:])
        # On a cluster, what is written is read again by those who need it.
        read -= set(deleted) if executor is EXECUTORS["dask"] else set()
        assert sorted(read) == expected
        assert state.is_successful() and sum_of(state.result[flow.last].result) == 18
        assert files_read(log)[-1] == "dict.pkl"
    if executor is not EXECUTORS["dask"]:
        lists = [s.result for t, s in state.result.items() if t.name == "clean"]
        assert sum_of(lists) == 6


@pytest.mark.parametrize("executor", ["local", "threads", "dask"])
def test_any_stored_flow_opens_only_what_it_must(executor, log):
    first_seed = int(os.environ.get("PREFECT_DS_SEED", 0))
    for seed in range(first_seed, first_seed + max(2, _EXAMPLES // 4)):
        os.mkdir(str(seed))
        os.chdir(str(seed))
        dice = random.Random(seed)
        flow, plan = drawn_flow(dice)
        ours = EXECUTORS[executor]()
        first = outcome_of(flow, run(flow, executor=ours))
        deleted = {name for name in files() if dice.random() < 0.3}
        for name in deleted:
            os.remove(name)
        before = len(files_read(log))
        second = run(flow, executor=EXECUTORS[executor]())
        read = set(files_read(log)[before:])
        needed = files_that_must_be_read(plan, deleted)
        # On a cluster, what is written is read again by those who need it.
        read -= deleted if executor == "dask" else set()
        assert read == needed, f"seed {seed}"
        assert outcome_of(flow, second) == first, f"seed {seed}"
        os.chdir("..")


_Drawn = namedtuple("_Drawn", "name is_mapped is_stored inputs")


def drawn_flow(dice):
    """A flow of tasks that are stored or not, and how it was drawn."""
    plan, results = [], []
    with Flow("drawn") as flow:
        for number in range(dice.randrange(3, 9)):
            inputs = dice.sample(range(number), min(number, dice.randrange(3)))
            is_mapped = dice.random() < 0.5
            is_stored = dice.random() < 0.6
            drawn = _Drawn(f"t{number}", is_mapped, is_stored, [plan[i] for i in inputs])
            path = drawn.name + ("_{map_index}.pkl" if is_mapped else ".pkl")

            @task(name=drawn.name, **(stored(path) if is_stored else {}))
            def made(n, x=0, y=0):
                return pandas.DataFrame({"sum": [n + sum_of(x) + sum_of(y)]})

            n = [number, 1, 2] if is_mapped else number
            arguments = {}
            for key, i in zip("xy", inputs):
                as_list = dice.random() < 0.3
                value = results[i]
                if not is_mapped or not plan[i].is_mapped:
                    value = [value, 1] if as_list else value
                    value = unmapped(value) if is_mapped else value
                arguments[key] = value
            results.append(made.map(n, **arguments) if is_mapped else made(n, **arguments))
            plan.append(drawn)
    return flow, plan


def files_that_must_be_read(plan, deleted):
    def runs(drawn):
        """Pairs of a name of a file and whether its task run takes place."""
        ends = [f"_{i}.pkl" for i in range(3)] if drawn.is_mapped else [".pkl"]
        names = [drawn.name + end for end in ends]
        return [(name, not drawn.is_stored or name in deleted) for name in names]

    needed = set()
    for drawn in plan:
        for index, (_, takes_place) in enumerate(runs(drawn)):
            for upstream in drawn.inputs if takes_place else []:
                items = runs(upstream)
                if drawn.is_mapped and upstream.is_mapped:
                    items = items[index : index + 1]
                needed |= {name for name, was_run in items if not was_run}
    return needed


def outcome_of(flow, state):
    terminal = flow.terminal_tasks()
    return {
        task.name: (type(s).__name__, sum_of(s.result) if task in terminal else None)
        for task, s in state.result.items()
        if not task.name.startswith(("List", "Constant"))
    }


@on_local_and_threads
def test_what_was_written_is_dropped_also_at_the_end_of_a_map(executor, counted_tables):
    peak = []

    @task(**stored("{i}.pkl"))
    def write(frame, i):
        peak.append(tables_alive())
        return table(frame)

    @task
    def load(i):
        return table()

    with Flow("writes") as flow:
        numbers = list(range(10))
        written = write.map(load.map(numbers), numbers)
    state = run(flow, executor=EXECUTORS[executor]())
    if executor == "local" or PURGES_ON_DASK:
        assert max(peak) <= (2 if executor == "local" else 6) and tables_alive() == 0
    assert [len(frame) for frame in state.result[written].result] == [1] * 10
    assert tables_alive() <= (0 if executor == "local" or PURGES_ON_DASK else 20)


def test_any_stored_result_is_there_after_the_run(counted_tables):
    make = task(table, name="make", **stored("make.pkl"))
    with Flow("any") as flow:
        plain = task(table)()
        first = make(plain)
        task(table)(first)
    state = run(flow)
    assert state.result[plain]._result is PurgedResult
    assert len(state.result[first].result) == 1


def test_what_a_file_does_not_keep_stays_in_memory(counted_tables):
    indexed = pandas.DataFrame({"x": [1]}, index=["a"])
    with Flow("stays") as flow:
        lossy = task(lambda: indexed, name="lossy", **stored("lossy.csv"))()
        tagged = task(table, name="tagged", tags=["prefect-ds:keep"], **stored("tagged.pkl"))()
    state = run(flow)
    assert state.result[lossy].result is indexed
    assert tables_alive() == 1 and len(state.result[tagged].result) == 1


def test_what_a_retry_reads_again_is_dropped_until_then(counted_tables):
    attempts, seen = [], []

    @task(**stored("{i}.pkl"))
    def load(i):
        return table()

    @task(max_retries=1, retry_delay=timedelta(0))
    def fit(frame):
        attempts.append(1)
        seen.append(tables_alive())
        if len(attempts) <= 5:
            raise ValueError("not yet")
        return len(frame)

    with Flow("retried") as flow:
        fitted = fit.map(load.map([1, 2, 3, 4, 5]))
    state = run(flow)
    assert state.result[fitted].result == [1] * 5 and max(seen) <= 1


def test_a_state_travels_as_a_place():
    with Flow("travels") as flow:
        result = Calls().make(**stored("data.pkl"))(1)
    for _ in range(2):
        there = pickle.loads(pickle.dumps(run(flow).result[result]))
        assert not isinstance(vars(there._result).get("_held"), pandas.DataFrame)
        assert_frame_equal(there.result, FRAME.assign(id=1))


@purges_on_dask
def test_stored_frames_do_not_come_to_the_client(processes):
    with Flow("processes") as flow:
        result = task(many_rows, **stored("{i}.pkl")).map([1, 2])
    for _ in range(2):
        children = run(flow, executor=InOnePool(processes)).result[result].map_states
        assert all(len(pickle.dumps(child)) < 10_000 for child in children)
        assert [prefect_ds._at_hand(child._result) for child in children] == [None, None]
        assert [len(child.result) for child in children] == [100_000] * 2


def many_rows(i):
    return pandas.DataFrame({"x": range(100_000)})


def test_two_readers_at_once_share_a_frame(counted_tables, log):
    logging.disable(logging.NOTSET)
    seen, both = [], threading.Barrier(2, timeout=30)

    @task
    def look(frame):
        seen.append(id(frame))
        both.wait()

    with Flow("share") as flow:
        frame = task(lambda: table(), name="make", **stored("data.pkl"))()
        look(frame)
        look(frame)
    for _ in range(2):
        seen.clear()
        executor = LocalDaskExecutor(scheduler="threads", num_workers=2)
        assert run(flow, executor=executor).is_successful()
        assert len(set(seen)) == 1
    assert files_read(log) == ["data.pkl"]


def test_an_item_of_a_stored_frame_is_nobodys_checkpoint():
    with Flow("item") as flow:
        frame = Calls().make(**stored("{task_name}_{id}.pkl"))(1)
        result = task(lambda ids: int(ids.sum()), name="total")(frame["id"])
    for _ in range(2):
        assert run(flow).result[result].result == 3


@on_each_that_purges
def test_what_several_children_read_is_read_once(executor, log, counted_tables):
    logging.disable(logging.NOTSET)
    with Flow("shared") as flow:
        frame = task(lambda: table(), name="make", **stored("data.pkl"))()
        lengths = task(lambda i, frame: len(frame), name="len")
        result = lengths.map([1, 2, 3], unmapped(frame))
    for _ in range(2):
        assert run(flow, executor=EXECUTORS[executor]()).result[result].result == [1, 1, 1]
        assert tables_alive() == 0
    # On a cluster, what is written is read again by those who need it.
    runs_that_read = 2 if executor == "dask" else 1
    read = files_read(log)
    assert set(read) == {"data.pkl"} and len(read) <= runs_that_read


@pytest.mark.parametrize("executor", ["local", pytest.param("threads", marks=purges_on_dask)])
def test_what_may_make_a_file_again_holds_no_frame(executor, counted_tables):
    with Flow("reduced") as flow:
        parts = task(lambda i: table(), name="make", **stored("{i}.pkl")).map([1, 2, 3])
        joined = task(lambda frames: table(), name="join", **stored("joined.pkl"))(parts)
        task(lambda frame: None, name="look")(joined)
    state = run(flow, executor=EXECUTORS[executor]())
    assert state.is_successful() and tables_alive() == 0


class CountsPickles:
    def __reduce__(self):
        peak.append(os.getpid())
        return CountsPickles, ()


@purges_on_dask
def test_what_only_children_read_does_not_travel_to_map_a_task(processes, counted):
    with Flow("unmapped") as flow:
        value = task(lambda: CountsPickles(), name="make")()
        result = task(lambda i, value: i, name="use").map([1, 2, 3], unmapped(value))
    assert run(flow, executor=InOnePool(processes)).result[result].result == [1, 2, 3]
    assert peak == [os.getpid()] * 3


@purges_on_dask
@pytest.mark.parametrize("where", ["pool", "cluster"])
def test_each_process_reads_once_what_several_children_read(where, processes, empty_folder):
    read_kwargs = {"converters": {"x": functools.partial(note_cell, str(empty_folder / "noted"))}}
    with Flow("shared") as flow:
        frame = task(
            lambda: FRAME, **stored(str(empty_folder / "data.csv"), read_kwargs=read_kwargs)
        )()
        numbers = task(lambda i: i).map(list(range(12)))
        result = task(lambda i, frame: frame.x[0] + i).map(numbers, unmapped(frame))
    Path("data.csv").write_text("x\n7\n")
    with two_processes(where, processes) as executor:
        assert run(flow, executor=executor).result[result].result == list(range(7, 19))
    assert 1 <= len(noted()) <= 2


@purges_on_dask
def test_workers_forget_what_children_have_shared(counted_tables):
    with Flow("shared") as flow:
        frame = task(lambda: table(), name="make", **stored("data.pkl"))()
        result = task(lambda i, frame: i + len(frame)).map([1, 2, 3], unmapped(frame))
    assert run(flow, executor=EXECUTORS["dask"]()).result[result].result == [2, 3, 4]
    wait_until(lambda: not prefect_ds._files_here and not tables_alive())


def note_cell(file, cell):
    note(cell, file)
    return int(cell)


def test_what_was_found_holds_nothing_that_it_was_made_from(counted_tables):
    with Flow("holds nothing") as flow:
        parts = task(lambda i: table(), name="make").map([1, 2, 3])
        joined = task(lambda parts: pandas.concat(parts), name="join", **stored("joined.pkl"))
        result = task(lambda frame: len(frame), name="len")(joined(parts))
        listed = task(lambda: [table(), table()], name="list")()
        copied = task(lambda frame: frame * 2, name="copy", **stored("{map_index}.pkl"))
        copied.map(listed)
    for _ in range(2):
        state = run(flow)
        assert state.result[result].result == 3
        del state.result[listed]
        assert tables_alive() == 0


def test_prefects_task_runner_gets_frames_from_our_states():
    with Flow("theirs") as flow:
        calls = Calls()
        frames = [calls.make(**stored("{id}.pkl"))(i) for i in (1, 2)]
        mapped = calls.make(name="mapped", **stored("mapped_{id}.pkl")).map([3, 4])
        kind = task(lambda x: type(x).__name__, name="kind")
        single, of_items = kind(frames[0]), kind.map(frames)
        reduced = task(lambda xs: [type(x).__name__ for x in xs], name="kinds")(mapped)
    for _ in range(2):
        state = run(flow)
    ends = {single, of_items, reduced}
    given = {t: s for t, s in state.result.items() if t not in ends}
    theirs = FlowRunner(flow).run(task_states=given, return_tasks=flow.tasks)
    assert theirs.result[single].result == "DataFrame"
    assert theirs.result[of_items].result == theirs.result[reduced].result == ["DataFrame"] * 2


def test_maps_over_a_list_of_stored_tasks_and_reads_each_once(log):
    with Flow("map over a list") as flow:
        calls = Calls()
        frames = [calls.make(**stored("{id}.pkl"))(i) for i in range(4)]
        lengths = task(lambda frame: int(frame.id[0]), name="look").map(frames)
    for _ in range(2):
        assert run(flow).result[lengths].result == [0, 1, 2, 3]
    assert files_read(log) == [f"{i}.pkl" for i in range(4)] and sorted(calls) == [0, 1, 2, 3]


def test_who_is_handed_a_state_may_read_what_is_in_its_file():
    seen = []

    def trigger(upstream_states):
        states = getattr(upstream_states, "values", lambda: upstream_states)()
        seen.extend(sum_of(s.result) for s in states)
        return True

    with Flow("trigger") as flow:
        many = task(lambda i: FRAME[["one"]] * i, name="many", **stored("many_{i}.pkl")).map([1, 2])
        plain = task(lambda: FRAME[["one"]], name="plain", **stored("plain.pkl"))()
        task(lambda a, b: None, name="last", trigger=trigger)(many, plain)
    for _ in range(2):
        assert run(flow).is_successful()
    assert sum(seen) == 2 * (6 + 18)  # below 0.12 child by child


def damage_the_middle(path):
    """So that only reading the whole file can tell."""
    Path(path).write_bytes(damage_the_middle_of(Path(path).read_bytes()))
    return Path(path).read_bytes()


def damage_the_middle_of(content):
    return content[:4] + b"?" * (len(content) - 8) + content[-4:]


@contextmanager
def two_processes(where, pool):
    """An executor for several flow runs in the same two processes."""
    if where == "pool":
        yield InOnePool(pool)
    else:
        with cluster_of_processes() as address:
            yield DaskExecutor(address=address)


@purges_on_dask
@pytest.mark.parametrize("where", ["pool", "cluster"])
def test_what_made_a_damaged_file_runs_again_where_it_is_read(where, processes, empty_folder):
    def path(name):
        return str(empty_folder / name)

    def make(number):
        note(f"make {number}", path("noted"))
        return pandas.DataFrame({"id": [number]})

    def each(frame, id):
        note(f"each {id}", path("noted"))
        return frame.assign(id=id)

    def damage():
        damage_the_middle(path("2.pkl")), damage_the_middle(path("other.pkl"))

    with Flow("damaged") as flow:
        made = task(make, **stored(path("made.pkl")))(1)
        many = task(each, **stored(path("{id}.pkl"))).map(unmapped(made), [2, 3])
        other = task(make, name="other", **stored(path("other.pkl")))(2)
        damaged = task(lambda many, now: now and damage(), name="damage")(
            [many, other], Parameter("now")
        )
        last = task(sum_of_ids, name="last")(many, upstream_tasks=[damaged])
        look = task(lambda i, frame: int(frame.id[0]) + i, name="look")
        looks = look.map([1, 2], unmapped(other), upstream_tasks=[unmapped(damaged)])
    with two_processes(where, processes) as executor:
        state = run(flow, executor=executor, parameters={"now": True})
        assert sorted(set(noted())) == ["each 2", "each 3", "make 1", "make 2"]
        assert noted().count("each 2") == 2 and noted().count("each 3") == 1
        assert state.result[last].result == 5 and state.result[looks].result == [3, 4]
        Path("noted").unlink()
        damage()
        state = run(flow, executor=executor, parameters={"now": False})
        assert sorted(set(noted())) == ["each 2", "make 2"] and noted().count("each 2") == 1
        assert state.result[last].result == 5 and state.result[looks].result == [3, 4]
    assert len([name for name in files() if ".unreadable-" in name]) == 2


@on_local_and_threads
def test_what_made_a_damaged_file_runs_again_when_it_is_read(executor, log):
    with Flow("damaged") as flow:
        calls, later = Calls(), Calls()
        first = calls.make(**stored("first_{id}.pkl")).map([1, 2])
        second = task(lambda frame: later.append(1) or frame, **stored("second_{map_index}.pkl"))
        second = second.map(first)
        last = task(sum_of_ids)(second)
    assert run(flow).result[last].result == 9
    contents = {name: damage_the_middle(name) for name in ("first_1.pkl", "second_0.pkl")}
    assert run(flow, executor=EXECUTORS[executor]()).result[last].result == 9
    assert sorted(calls) == [1, 1, 2] and later == [1, 1, 1]
    aside = [name for name in files() if ".unreadable-" in name]
    assert len(aside) == 2 and len(files()) == 6
    assert {Path(name).read_bytes() for name in aside} == set(contents.values())
    assert "The task run 'make[0]' takes place again" in log(logging.WARNING)
    assert run(flow).result[last].result == 9 and later == [1, 1, 1]


def sum_of_ids(frames):
    return sum(int(frame.id.sum()) for frame in frames)


def test_what_may_make_a_file_again_travels_only_if_it_is_small():
    def pickled_with(*values):
        upstream = {
            prefect.core.Edge(Task(), made, key=f"x{n}"): Success(result=value)
            for n, value in enumerate(values)
        }
        again = prefect_ds._Again.of(DSTaskRunner(made), upstream)
        return prefect_ds._Tasks(here=[made]).dumps_again(again)

    made = Calls().make()
    assert len(pickled_with("a", 1).pickled) < 2000
    assert pickled_with(*(f"{n:0900}" for n in range(100))) is None
    assert pickled_with(threading.Lock()) is not None  # It counts as purged.


@on_local_and_threads
def test_what_makes_a_damaged_file_again_has_its_small_inputs(executor):
    with Flow("small") as flow:
        calls = Calls()
        small = task(lambda i: i + 1, name="small")
        make = calls.make(**stored("{id}.pkl"))
        frames = [make(Parameter("p", default=1)), make(small(1))]
        mapped = make.map(small.map([2, 3]))
        reduced = task(lambda ids: FRAME.assign(id=sum(ids)), name="sum", **stored("sum.pkl"))
        frames.append(reduced(small.map([4, 5])))
        last = task(lambda a, b: sum_of_ids([*a, *b]), name="last")(frames, mapped)
    expected = run(flow, executor=EXECUTORS[executor]()).result[last].result
    names = files()
    for name in names:
        damage_the_middle(name)
    assert run(flow, executor=EXECUTORS[executor]()).result[last].result == expected
    assert sorted(calls) == [1, 1, 2, 2, 3, 3, 4, 4] and len(files()) == 2 * len(names)


def test_what_a_damaged_file_made_again_is_newer_than_what_was_made_of_it():
    state = {"number": 1}
    with Flow("newer") as flow:
        first = task(lambda: FRAME.assign(id=state["number"]), name="a", **stored("a.pkl"))()
        between = task(lambda frame: int(frame.id[0]), name="between")(first)
        second = task(lambda n: FRAME.assign(id=n), name="b", **stored("b.pkl"))(between)
        last = task(lambda n, frame: (n, int(frame.id[0])), name="last")(between, second)
    assert run(flow).result[last].result == (1, 1)
    state["number"] = 2
    damage_the_middle("a.pkl")
    os.utime("a.pkl", (1, 1))
    context = {"recompute": "out-of-date"}
    assert run(flow, context=context).result[last].result == (2, 2)


def test_a_reader_gets_no_signal_for_a_frame():
    again = []

    @task(**stored("data.pkl"))
    def make():
        if again:
            raise signals.SKIP("nothing today")
        return FRAME

    with Flow("skips") as flow:
        last = task(lambda frame: len(frame), name="last")(make())
    run(flow)
    again.append(True)
    damage_the_middle("data.pkl")
    state = run(flow)
    assert state.is_failed() and "but came to <Skipped" in state.result[last].message


def test_an_error_that_is_not_of_the_file_leaves_it_where_it_is(monkeypatch):
    with Flow("errors") as flow:
        last = task(lambda frame: len(frame), name="last")(Calls().make(**stored("data.csv"))(1))
    run(flow)
    content = Path("data.csv").read_bytes()
    for error in (OSError(5, "Input/output error"), MemoryError(), PermissionError(13, "no")):

        def fail(*args, error=error):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(PandasResult, "_read", fail)
            assert run(flow).result[last].is_failed()
        assert files() == ["data.csv"] and Path("data.csv").read_bytes() == content
    assert run(flow).result[last].result == 3


def test_a_damaged_remote_file_is_computed_again():
    fsspec = pytest.importorskip("fsspec")
    path = "memory://damaged/data.pkl"
    with Flow("remote") as flow:
        calls = Calls()
        last = task(lambda frame: len(frame), name="last")(calls.make(**stored(path))(1))
    run(flow)
    content = damage_the_middle_of(b"." * 90 + b".")
    with fsspec.open(path, "wb") as opened:
        opened.write(content)
    for _ in range(2):
        assert run(flow).result[last].result == 3 and calls == [1, 1]
    filesystem, place = prefect_ds._filesystem(path, {})
    there = [name for name in filesystem.find(os.path.dirname(place)) if "unread" in name]
    assert len(there) == 1
    with filesystem.open(there[0], "rb") as opened:
        assert opened.read() == content


def test_a_reader_of_a_damaged_file_says_so_where_its_task_cannot_run_again():
    with Flow("damaged") as flow:
        made = task(table)()
        copied = task(lambda frame: frame.copy(), name="copy", **stored("data.pkl"))(made)
        waits = task(lambda: None, name="wait")(upstream_tasks=[copied])
        last = task(lambda frame: len(frame), name="last")(copied, upstream_tasks=[waits])
    run(flow)
    damage_the_middle("data.pkl")
    state = run(flow)
    assert state.is_failed() and state.result[last].is_failed()
    message = str(state.result[last].message)
    assert os.path.abspath("data.pkl") in message and "Run the flow once more" in message
    assert len(files()) == 1 and ".unreadable-" in files()[0]
    state = run(flow)
    assert state.result[last].result == 1 and "data.pkl" in files()


@pytest.mark.parametrize("file_type", sorted({*prefect_ds._FILE_TYPES} & {*prefect_ds._ENDS}))
@pytest.mark.parametrize("damage_to", ["begin", "end", "all"])
def test_what_a_file_begins_and_ends_with_is_checked_when_it_is_found(file_type, damage_to, log):
    name = "data." + EXTENSIONS.get(file_type, file_type)
    frame = FRAME.astype({"one": "int32"})
    try:
        PandasResult(name)._save(frame, name)
    except ImportError as missing:
        pytest.skip(f"pandas needs another package for {file_type}: {missing}")
    PandasResult(name)._check_ends(name)
    content = Path(name).read_bytes()
    damaged = {"begin": b"\0" * 8 + content[8:], "end": content[:-3], "all": b""}[damage_to]
    begins, ends = prefect_ds._ENDS[file_type]
    if not {"begin": begins, "end": ends, "all": file_type != "json"}[damage_to]:
        pytest.skip("There are readable files of this type that begin or end in other ways.")
    Path(name).write_bytes(damaged)
    with Flow("damaged") as flow:
        made = task(lambda: frame, name="make", **stored(name))()
    assert "Found" not in run(flow).result[made].message
    assert f"{name} is there, but cannot be read" in log(logging.WARNING)


@pytest.mark.parametrize("compression", prefect_ds._COMPRESSIONS)
def test_compressed_files_begin_as_they_are_compressed(compression):
    name = "data.json." + compression
    try:
        PandasResult(name)._save(FRAME, name)
    except (ImportError, ValueError) as missing:
        pytest.skip(f"pandas cannot write it: {missing}")
    PandasResult(name)._check_ends(name)
    Path(name).write_text("neither this nor that")
    with pytest.raises(ValueError, match="begin and end"):
        PandasResult(name)._check_ends(name)


def make_older(*names):
    """Put the time at which files were written an hour back."""
    for name in names:
        os.utime(name, (time.time() - 3600,) * 2)


@on_each_executor
def test_says_what_is_out_of_date_and_computes_it_if_it_is_told_to(executor, log):
    with Flow("out of date") as flow:
        calls = Calls()
        first = calls.make(name="first", **stored("first_{id}.pkl")).map([1, 2])
        between = task(lambda x: x, name="between").map(first)
        second = task(lambda x: x, name="second", **stored("{map_index}.pkl")).map(between)
        last = task(lambda x: x[0], name="last", **stored("last.pkl"))(second)
    run(flow, executor=executor())
    assert "is older" not in log(logging.WARNING) and run(flow, executor=executor()).is_successful()
    make_older("0.pkl", "1.pkl")
    assert run(flow, executor=executor()).is_successful()
    said = [line for line in log(logging.WARNING).splitlines() if "is older than" in line]
    assert len(said) == 1 and said[0].startswith("Task 'second[")
    assert ".pkl is older than first_" in said[0] and "recompute='out-of-date'" in said[0]
    for written in (["0.pkl", "1.pkl", "last.pkl"], []):
        before = log(logging.INFO).count(": Wrote ")
        state = run(flow, executor=executor(), context={"recompute": "out-of-date"})
        lines = [line for line in log(logging.INFO).splitlines() if ": Wrote " in line][before:]
        assert sorted(line.partition(": Wrote ")[2] for line in lines) == written
        assert sum_of_ids([state.result[last].result]) == 3


def test_an_item_of_a_list_is_as_old_as_its_own_file(log):
    with Flow("items") as flow:
        firsts = [Calls().make(**stored("{id}.pkl"))(i) for i in (1, 2)]
        task(lambda x: x, name="second", **stored("second_{map_index}.pkl")).map(firsts)
    run(flow)
    for age, name in enumerate(["second_1.pkl", "2.pkl", "second_0.pkl", "1.pkl"]):
        os.utime(name, (10**9 - age,) * 2)
    assert run(flow).is_successful() and "is older" not in log(logging.WARNING)


def test_a_newer_file_in_a_folder_makes_what_was_made_of_it_out_of_date(log):
    with Flow("folder") as flow:
        kwargs = {"write_kwargs": {"partition_cols": ["one"]}, "file_type": "parquet"}
        pytest.importorskip("pyarrow")
        first = Calls().make(**stored("first", **kwargs))(1)
        task(lambda x: x[["two"]], name="second", **stored("second.pkl"))(first)
    run(flow)
    os.utime("second.pkl", (time.time() + 60,) * 2)
    assert run(flow).is_successful() and "is older" not in log(logging.WARNING)
    (file, *_) = prefect_ds._files("first")
    os.utime(file, (time.time() + 120,) * 2)
    assert run(flow).is_successful() and "is older than first" in log(logging.WARNING)


@pytest.mark.parametrize(
    "name, kwargs, frame",
    [
        ("old.pkl", {"write_kwargs": {"protocol": 0}}, FRAME),
        (
            "none.json",
            {
                "write_kwargs": {"orient": "records", "lines": True},
                "read_kwargs": {"orient": "records", "lines": True},
            },
            pandas.DataFrame({"x": []}),
        ),
    ],
    ids=["pickle", "no lines"],
)
def test_no_file_that_was_written_is_taken_for_a_damaged_one(name, kwargs, frame):
    storage = PandasResult(name, **kwargs)
    try:
        storage._save(frame, name)
    except ValueError:  # Some releases of pandas do not read what they have written.
        Path(name).touch()
    storage._check_ends(name)


@pytest.mark.parametrize(
    "name, content",
    [
        ("page.html", "\ufeff<html><table></table></html>\n"),
        ("text.html", "See: <table></table> and more"),
        ("blanks.json", " " * 20 + "[]" + "\n" * 100),
        ("bom.xml", "\ufeff<a></a>" + "\n" * 100),
        ("wide.csv", "a;b"),
    ],
    ids=["html", "text around html", "blanks around json", "xml", "csv"],
)
def test_a_readable_file_of_somebody_elses_is_not_taken_for_a_damaged_one(name, content):
    if name.rpartition(".")[2] not in prefect_ds._FILE_TYPES:
        pytest.skip("This pandas has no such file type.")
    Path(name).write_text(content, "utf-8")
    PandasResult(name)._check_ends(name)


def test_what_was_written_at_the_same_time_is_not_out_of_date(log):
    with Flow("same time") as flow:
        first = Calls().make(**stored("z.pkl"))(1)
        task(lambda x: x, name="second", **stored("a.pkl"))(first)
    run(flow)
    for name in files():
        os.utime(name, (1, 1))
    assert run(flow).is_successful() and "is older" not in log(logging.WARNING)


def test_a_function_for_a_path_gets_no_frame_that_it_does_not_name(log):
    if not prefect_ds._FLOW_RUNNER_MAPS:
        pytest.skip("Below Prefect 0.12 locations are not callable.")

    def path(i, **fields):
        assert fields["frame"] is None
        return f"{i}.pkl"

    with Flow("function") as flow:
        first = Calls().make(**stored("first.pkl"))(1)
        second = task(
            lambda frame, i: frame, name="second", **{STORAGE: PandasResult(path, "pickle")}
        )
        second(first, 7)
    for _ in range(2):
        assert run(flow).is_successful()
    assert files_read(log) == []


def test_a_file_is_found_again_after_a_task_has_changed_the_folder(empty_folder):
    with Flow("moves") as flow:
        made = Calls().make(**stored("data.pkl"))(1)
        moved = task(lambda: os.chdir("/"), name="move")(upstream_tasks=[made])
        last = task(lambda frame: len(frame), name="last")(made, upstream_tasks=[moved])
    for _ in range(2):
        os.chdir(str(empty_folder))
        assert run(flow).result[last].result == 3


# As a Result of Prefect's own ----------------------------------------------------------------


def month_file(**fields):
    return "out/{month}.bin".format(**fields)


def both_results(location, **kwargs):
    """Prefect's own, and ours, which differs in nothing but what is in the file."""
    return [
        LocalResult(dir=os.path.join(os.getcwd(), "local"), location=location, **kwargs),
        PandasResult(location=location, file_type="pickle", **kwargs),
    ]


def said_location(result):
    """Without the folder that is in front of what `LocalResult` has written."""
    folder = os.path.join(os.getcwd(), "local", "")
    return result.location and result.location.replace(folder, "")


@from_0_11
@pytest.mark.parametrize(
    "location",
    ["out/{month}.bin", "out/3.bin", pytest.param(month_file, marks=from_0_12)],
    ids=["template", "plain", "callable"],
)
@pytest.mark.parametrize("dumps", [None, pickle.dumps, cloudpickle.dumps], ids=str)
def test_a_result_does_what_prefects_does(location, dumps):
    said = []
    for result in both_results(location):
        if dumps:
            result = pickle.loads(dumps(result))
        path = "out/{month}.bin"
        before = result.exists(path, month=3)
        formatted = result.format(month=3)
        written = result.write(FRAME, month=3)
        read = result.read("out/3.bin")
        with_value = written.from_value(FRAME)
        twin = result.copy()
        said.append(
            [
                (before, result.exists(path, month=3), result.exists("out/3.bin")),
                [said_location(r) for r in (formatted, written, read, with_value, twin, result)],
                [type(r) is type(result) for r in (formatted, written, read, with_value, twin)],
                [r.value is FRAME for r in (formatted, written, with_value, twin, result)],
                (read.value is not FRAME, read.value.equals(FRAME)),
                twin is result,
            ]
        )
    assert said[0] == said[1]


def runs_on_prefect(build, result):
    """Of two runs on Prefect's own runners: types of states, frames, where they are."""
    told = []
    for _ in range(2):
        with Flow("plain") as flow:
            made = build(result)
        state = FlowRunner(flow).run(return_tasks=[made], context={"checkpointing": True})
        for end in getattr(state.result[made], "map_states", [state.result[made]]):
            assert end.is_successful(), repr(end.result)
            told.append((type(end).__name__, end.result.id[0], said_location(end._result)))
    return told


def by_id_and_index(id, map_index, **fields):
    return f"{id}_{map_index}.bin"


def at_a_location(result):
    return Calls().make(result=result)(3)


def at_a_target_of_context(result):
    return Calls().make(result=result, target="{task_name}.bin")(3)


def mapped_to_targets(result):
    return Calls().make(result=result, target="{map_index}.bin").map([3, 4])


def at_a_target_of_arguments(result):
    return Calls().make(result=result, target="{id}.bin")(3)


def at_a_callable_target(result):
    return Calls().make(result=result, target=lambda id, **fields: f"{id}.bin")(3)


PLACES = [
    at_a_target_of_context,
    mapped_to_targets,
    # Prefect 0.11 fills targets from its context only.
    pytest.param(at_a_target_of_arguments, marks=from_0_12),
    pytest.param(at_a_callable_target, marks=from_0_12),
]


@from_0_11
@pytest.mark.parametrize("build", PLACES)
def test_a_target_is_loaded_in_the_next_run_as_with_prefects(build):
    local, ours = (runs_on_prefect(build, result) for result in both_results(None))
    assert ours == local
    assert {"Success", "Cached"} == {kind for kind, _, _ in ours}


@from_0_11
@pytest.mark.parametrize(
    "location",
    ["{task_name}.bin", pytest.param(by_id_and_index, marks=from_0_12)],
    ids=["template", "callable"],
)
def test_a_location_is_filled_as_with_prefects(location):
    local, ours = (runs_on_prefect(at_a_location, result) for result in both_results(location))
    assert ours == local


@from_0_11
def test_storage_of_the_flow_is_a_result_of_prefects():
    with Flow("flow", result=PandasResult("{task_name}.csv")) as flow:
        made = Calls().make()(1)
    state = FlowRunner(flow).run(return_tasks=[made], context={"checkpointing": True})
    assert state.result[made]._result.location == "make.csv" and files() == ["make.csv"]
    assert_frame_equal(PandasResult().read("make.csv").value, FRAME.assign(id=1))


@from_0_11
def test_is_a_result_of_prefects_on_dask_processes():
    with Flow("processes") as flow:
        made = Calls().make(result=PandasResult(), target="{map_index}.csv").map([1, 2])
    with cluster_of_processes() as address:
        state = FlowRunner(flow).run(
            return_tasks=[made],
            executor=DaskExecutor(address=address),
            context={"checkpointing": True},
        )
    assert [frame.id[0] for frame in state.result[made].result] == [1, 2]
    assert [name for name in files() if not name.startswith("noted-")] == ["0.csv", "1.csv"]


@from_0_11
def test_the_file_type_follows_the_target():
    with Flow("types") as flow, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Prefect says that the target goes before the location.
        Calls().make(result=PandasResult("data.csv"), target="data.pkl")(1)
    assert FlowRunner(flow).run(context={"checkpointing": True}).is_successful()
    assert_frame_equal(pandas.read_pickle("data.pkl"), FRAME.assign(id=1))


@from_0_11
@pytest.mark.parametrize("runner", [DSFlowRunner, FlowRunner])
def test_a_target_cannot_lead_out_of_its_folder(runner):
    FRAME.to_csv("secret.csv")
    os.mkdir("in")
    with Flow("outside") as flow:
        calls = Calls()
        result = calls.make(result=PandasResult(), target="in/{who}.csv")(1)
    state = runner(flow).run(
        return_tasks=[result], context={"checkpointing": True, "who": "../secret"}
    )
    error = failed(state, result)
    assert "leads out of the folder" in str(error) and calls == []


@from_0_11
@on_local_and_threads
def test_a_callable_path_is_called_with_the_arguments(executor):
    with Flow("callable") as flow:
        calls = Calls()
        path = PandasResult(lambda id, task_name, **fields: f"{task_name}/{id}.csv")
        made = calls.make(result=path).map([1, 2])
    for _ in range(2):
        state = run(flow, executor=EXECUTORS[executor]())
        assert [frame.id[0] for frame in state.result[made].result] == [1, 2]
    assert sorted(calls) == [1, 2] and files("make") == ["1.csv", "2.csv"]


@from_0_11
def test_a_callable_path_that_fails_fails_the_task():
    with Flow("callable") as flow:
        calls = Calls()
        result = calls.make(result=PandasResult(lambda **fields: fields["nowhere"]))(1)
    assert isinstance(failed(run(flow), result), KeyError)
    assert calls == [] and files() == []


@from_0_11
def test_a_task_may_write_other_files_by_fields_of_its_own():
    @task(result=PandasResult("{id}.csv"))
    def write(id):
        other = PandasResult("other_{id}_{n}.csv")
        locations = [other.write(FRAME, n=n).location for n in (1, 2)]
        locations += [other.write(FRAME, n=3, id="given").location]
        assert locations == ["other_7_1.csv", "other_7_2.csv", "other_given_3.csv"]
        return FRAME

    with Flow("others") as flow:
        write.map([7])
    assert run(flow).is_successful()
    assert files() == ["7.csv", "other_7_1.csv", "other_7_2.csv", "other_given_3.csv"]


@from_0_12
def test_an_argument_that_is_none_is_filled_in_as_with_prefects():
    @task(name="made")
    def write(today):
        return FRAME.assign(id=1)

    def with_none(result):
        write.result = result
        return write(None)

    local, ours = (runs_on_prefect(with_none, r) for r in both_results("{today}.bin"))
    assert ours == local


with_and_without_handler = pytest.mark.parametrize(
    "handlers", [[], [checkpoint_handler]], ids=["checkpointing", "handler"]
)


@from_0_12
@on_local_and_threads
@pytest.mark.parametrize("is_ours", [True, False], ids=["ours", "Prefect's"])
def test_what_is_found_at_its_target_holds_no_inputs(is_ours, executor, counted_tables):
    storage = PandasResult() if is_ours else prefect.engine.results.LocalResult(dir=os.getcwd())
    seen, calls = [], []

    @task
    def look(frame):
        seen.append(tables_alive())

    @task(max_retries=1, retry_delay=timedelta(0))
    def fail_once(number):
        calls.append(number)
        if len(calls) % 2:
            raise ValueError("once")

    with Flow("target") as flow:
        n = pass_on([1, 2, 3, 4, 5, 6, 7, 8])
        made = task(lambda i: table(), name="make").map(n)
        fill = task(lambda frame, i: FRAME * i, name="fill", target="{i:02}.pkl", result=storage)
        filled = fill.map(made, n)
        look.map(filled)
        fail_once(total(task(lambda frame: len(frame), name="count").map(filled)))
    for _ in range(2):
        final = run(flow, executor=EXECUTORS[executor](), context={"checkpointing": True})
        assert final.is_successful()
    kinds = {type(child) for child in final.result[filled].map_states}
    assert kinds == {state.Cached}
    assert max(seen[:8]) <= 4 and max(seen[8:]) <= 4
    assert sorted(os.listdir()) == [f"{i:02}.pkl" for i in range(1, 9)] and len(calls) == 4


@from_0_11
def test_what_was_found_at_its_target_is_recomputed_though_its_state_is_given():
    calls = Calls()
    with Flow("target") as flow:
        made = calls.make(result=PandasResult(), target="data.pkl")(1)
    run(flow, context={"checkpointing": True})
    found = run(flow, context={"checkpointing": True}).result
    assert type(found[made]) is state.Cached and len(calls) == 1
    context = {"checkpointing": True, "recompute": "make"}
    final = DSFlowRunner(flow).run(return_tasks=[made], task_states=found, context=context)
    assert type(final.result[made]) is Success and len(calls) == 2


@from_0_11
@with_and_without_handler
def test_a_target_is_filled_from_defaults_and_loaded(handlers):
    @task(result=PandasResult(), target="{task_name}_{id}_{size}.csv")
    def make(id, size="large"):
        calls.append(id)
        return FRAME

    calls = []
    with Flow("defaults") as flow:
        plain, children = make(1), make.map([2, 3])
    kinds = []
    for _ in range(2):
        state = run(flow, context={"checkpointing": True}, task_runner_state_handlers=handlers)
        assert state.is_successful()
        assert_frame_equal(state.result[plain].result, FRAME)
        states = [state.result[plain], *state.result[children].map_states]
        kinds += [type(state).__name__ for state in states]
    assert kinds == ["Success"] * 3 + ["Cached"] * 3 and sorted(calls) == [1, 2, 3]
    assert files() == ["make_1_large.csv", "make_2_large.csv", "make_3_large.csv"]


@from_0_11
@with_and_without_handler
def test_the_file_of_a_target_belongs_to_one_task_run(handlers):
    shared = PandasResult()
    with Flow("shared") as flow:
        calls = []
        storing(calls, "a", result=shared, target="a.csv")(1)
        storing(calls, "b", result=shared, target="b.csv")(1)
        clash = storing(calls, "make", result=shared, target="c{x:.0f}.csv").map([1, 1.1])
    for _ in range(2):
        state = run(
            flow,
            executor=EXECUTORS["threads"](),
            context={"checkpointing": True},
            task_runner_state_handlers=handlers,
        )
        assert sum(child.is_failed() for child in state.result[clash].map_states) == 1
        assert "belongs to the task run 'make[" in "".join(
            str(child.result) for child in state.result[clash].map_states if child.is_failed()
        )
    assert len(calls) == 3 and files() == ["a.csv", "b.csv", "c1.csv"]
    for name in "ab":
        assert pandas.read_csv(name + ".csv").run[0].startswith(name)


@from_0_11
@with_and_without_handler
def test_a_damaged_file_of_a_target_is_kept_beside_the_new_one(handlers, log):
    Path("data.pkl").write_bytes(b"damaged")
    with Flow("damaged") as flow:
        calls = Calls()
        result = calls.make(result=PandasResult(), target="data.pkl")(1)
    for _ in range(2):
        state = run(flow, context={"checkpointing": True}, task_runner_state_handlers=handlers)
        assert_frame_equal(state.result[result].result, FRAME.assign(id=1))
    (kept,) = set(files()) - {"data.pkl"}
    assert Path(kept).read_bytes() == b"damaged" and calls == [1]
    assert log(logging.WARNING).count("data.pkl is there, but cannot be read") == 1


# Which file belongs to which task run --------------------------------------------------------


def mapping(path, *values):
    return lambda calls: storing(calls, **stored(path)).map(*map(list, values))


def two_tasks(calls):
    storing(calls, "a", **stored("out.csv"))(1)
    storing(calls, "b", **stored("out.csv"))(1)


def a_task_and_its_reader(calls):
    storing(calls, "b", **stored("out.csv"))(storing(calls, "a", **stored("out.csv"))(1))


def two_tasks_of_a_flow_with_storage(calls):
    setattr(prefect.context.flow, STORAGE, PandasResult("{x}.csv"))
    storing(calls, "clean")(1, y=storing(calls, "load")(1))


def one_task_twice(calls):
    make = storing(calls, **stored("out.csv"))
    make(1)
    make(2)


def one_task_twice_with_frames(calls):
    make = storing(calls, **stored("out.csv"))
    for n in (1, 2):
        make(Calls().make()(n))


def one_task_twice_with_large_constants(calls):
    make = storing(calls, **stored("out.csv"))
    for n in (1, 2):
        make(FRAME.assign(n=n))


def one_function_in_two_tasks(calls):
    make = storing(calls).run

    def making(n):
        return task(name="make", **stored("out.csv"))(lambda: make(n))

    making(1)()
    making(2)()


def one_function_with_other_keyword_arguments(calls):
    make = storing(calls).run
    for kwargs in ({}, {"read_kwargs": {"comment": "#"}}):
        task(make, name="make", **stored("out.csv", **kwargs))(1)


def tasks_with_other_attributes(calls):
    class Make(Task):
        def __init__(self, x, **kwargs):
            self.x = x
            super().__init__(**kwargs)

        def run(self):
            return storing(calls).run(self.x)

    for x in (1, "1"):
        prefect.context.flow.add_task(Make(x, **stored("out.csv")))


def a_linked_folder(calls):
    Path("real").mkdir()
    os.symlink("real", "link")
    storing(calls, "a", **stored("real/out.csv"))(1)
    storing(calls, "b", **stored("link/out.csv"))(1)


def a_linked_file(calls):
    os.symlink("out.csv", "link.csv")
    a = storing(calls, "a", **stored("out.csv"))(1)
    storing(calls, "b", **stored("link.csv"))(1, upstream_tasks=[a])


def two_spellings(calls):
    storing(calls, "a", **stored("out.csv"))(1)
    storing(calls, "b", **stored(os.path.abspath("out.csv")))(1)


def a_function_that_ignores_the_arguments(calls):
    storing(calls, **stored(lambda **fields: "out.csv")).map([1, 2])


CLASHES = {
    "width": mapping("{x:0<2}.csv", ["1", "10"]),
    "month": mapping("{x:%Y-%m}.csv", [datetime.date(2020, 2, 3), datetime.date(2020, 2, 4)]),
    "item": mapping("{x[region]}.csv", [{"region": 1, "id": 1}, {"region": 1, "id": 2}]),
    "joined": mapping("{x[0]}_{x[1]}.csv", [("x", "y_z"), ("x_y", "z")]),
    "type": mapping("{x}.csv", [1, "1"]),
    "rounded": mapping("{x:.2f}.csv", [0.001, 0.002]),
    "slashes": mapping("in/{x}.csv", ["a/b", "a//b"]),
    "unnamed": mapping("{x}.csv", [1, 1], [2, 3]),
    "objects": mapping("{x.n}.csv", [Numbered(1), Numbered(1)]),
}
CLASHES.update(
    (build.__name__, build)
    for build in (
        two_tasks,
        a_task_and_its_reader,
        two_tasks_of_a_flow_with_storage,
        one_task_twice,
        one_task_twice_with_frames,
        one_task_twice_with_large_constants,
        one_function_in_two_tasks,
        one_function_with_other_keyword_arguments,
        tasks_with_other_attributes,
        two_spellings,
    )
)
CLASHES.update(
    (build.__name__, pytest.param(build, marks=mark))
    for build, mark in (
        (a_linked_folder, takes_posix),
        (a_linked_file, takes_posix),
        (a_function_that_ignores_the_arguments, from_0_11),
    )
)


def all_states(flow_state):
    tops = flow_state.result.values()
    return [state for top in tops for state in getattr(top, "map_states", [top])]


@on_local_and_threads
@pytest.mark.parametrize("build", CLASHES.values(), ids=list(CLASHES))
def test_a_file_belongs_to_one_task_run(build, executor):
    calls = []
    with Flow("clash") as flow:
        build(calls)
    for _ in range(2):
        state = run(flow, executor=EXECUTORS[executor]())
        failures = [state for state in all_states(state) if state.is_failed()]
        assert state.is_failed() and len(failures) == 1
        assert "belongs to the task run" in str(failures[0].result)
        assert str(failures[0].result).count(".csv") == 1
        # Who came second neither ran nor wrote, not even in the second run.
        assert len(calls) == 1 and set(written()) == {" ".join(map(str, calls[0]))}


@on_local_and_threads
def test_the_same_task_with_equal_arguments_may_share_a_file(executor):
    anything = object()

    @task(name="join", **stored("joined.csv"))
    def join(parts, one, how=anything):
        return pandas.concat([*parts, one])

    with Flow("combined") as flow:
        parts = task(lambda: [FRAME, FRAME], name="parts")()
        for _ in range(2):
            join([parts[0], parts[1]], parts[0])
    for _ in range(2):
        assert run(flow, executor=EXECUTORS[executor]()).is_successful()
    with Flow("combined otherwise") as flow:
        parts = task(lambda: [FRAME, FRAME], name="parts")()
        join([parts[0], parts[1]], parts[0])
        join([parts[1], parts[0]], parts[0])
    state = run(flow, executor=EXECUTORS[executor]())
    failures = [state for state in all_states(state) if state.is_failed()]
    assert len(failures) == 1 and "belongs to the task run" in str(failures[0].result)
    Path("joined.csv").unlink()

    with Flow("shared") as flow:
        calls = Calls()
        make = calls.make(**stored("{id}.csv"))
        frame = storing(calls, "frame")(0)
        clean = storing(calls, "clean", **stored("clean.csv"))
        for _ in range(2):
            make(1)
            make.map([2, 2])
            make([{"x": 3}, datetime.date(2020, 2, 3), None])
            clean(frame)
    for _ in range(2):
        assert run(flow, executor=EXECUTORS[executor]()).is_successful()
    # Two that run at once may both run.
    told = {str(call[:2] if isinstance(call, tuple) else call) for call in calls}
    stored_calls = {call for call in told if "frame" not in call}
    assert len(stored_calls) == len(files()) == 4


def test_a_file_belongs_to_one_task_run_only_as_long_as_its_flow_runs():
    def claimed():
        every = [known.get("claims", {}) for known in prefect_ds._known.values()]
        return {claim.file for claims in every for _, claim in claims.values()}

    before = claimed()  # A worker in this process may still have those of the last flow runs.
    with Flow("parameter") as flow:
        calls = Calls()
        calls.make(**stored("out.csv"))(Parameter("id", default=0))
    for id in (1, 2):
        context = {"recompute": "make"}
        assert run(flow, parameters={"id": id}, context=context).is_successful()
        start = {"scheduled_start_time": pendulum.datetime(2020, 2, 3)}
        state = FlowRunner(flow, task_runner_cls=DSTaskRunner).run(
            parameters={"id": id},
            context={**context, **start},
            task_runner_state_handlers=[checkpoint_handler],
        )
        assert state.is_successful()
    del state, start
    gc.collect()
    assert calls == [1, 1, 2, 2] and claimed() <= before


def test_a_file_still_belongs_to_a_task_run_in_later_rounds():
    attempts = []

    @task(max_retries=1, retry_delay=timedelta(0))
    def flaky():
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError("not yet")
        return 2

    with Flow("rounds") as flow:
        calls = []
        make = storing(calls, **stored("out.csv"))
        first, second = make(1), make(flaky())
    state = run(flow)
    assert state.result[first].is_successful() and len(calls) == 1
    assert "belongs to the task run 'make'" in str(failed(state, second))


def test_a_plain_task_runner_cannot_tell_arguments_and_shares_no_file():
    with Flow("plain") as flow:
        calls = Calls()
        make = calls.make(**stored("data.csv"))
        made = [make(1), make(2)]
    state = FlowRunner(flow).run(return_tasks=made, task_runner_state_handlers=[checkpoint_handler])
    assert state.is_failed() and len(calls) == 1


def test_flows_that_run_at_once_do_not_take_files_from_each_other():
    with Flow("parameter") as flow:
        Calls().make(**stored("out.csv"))(Parameter("id"))

    def run_it(id):
        return run(flow, parameters={"id": id}, context={"recompute": "make"})

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(state.is_successful() for state in pool.map(run_it, range(24)))


def test_a_flow_within_a_task_has_files_of_its_own():
    calls = []

    @task(name="make", **stored("{x}.csv"))
    def outer(x):
        with Flow("outer") as inner:
            storing(calls, **stored("inner_{x}.csv"))(x + 1)
        assert run(inner).is_successful()
        with Flow("plain") as inner:
            storing(calls, **stored("plain.csv"))(x + 1)
        handlers = [checkpoint_handler]
        assert FlowRunner(inner).run(task_runner_state_handlers=handlers).is_successful()
        return FRAME

    with Flow("outer") as flow:
        outer.map([1])
    assert run(flow).is_successful()
    assert files() == ["1.csv", "inner_2.csv", "plain.csv"]


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps, copy.copy])
def test_states_tell_which_file_belongs_to_the_task_run(dumps):
    def states(build):
        with Flow("claims") as flow:
            build([])
        state = run(flow)
        copies = [dumps(state) for state in all_states(state)]
        return [pickle.loads(c) if isinstance(c, bytes) else c for c in copies]

    one, other = states(mapping("{x}.csv", [1, 2])), states(mapping("{x}.csv", [3, 4]))
    assert prefect_ds._settle_claims(one + one + other) is None
    again = states(mapping("{x}.csv", [1], [5]))
    message = prefect_ds._settle_claims(one + other + again)
    assert os.path.realpath("1.csv") in message and "'make[0]'" in message


@purges_on_dask
def test_a_file_of_two_task_runs_in_processes_fails_the_flow(processes, empty_folder):
    with Flow("processes") as flow:
        a = Calls().make("a", **stored(str(empty_folder / "out.csv")))(1)
        calls = Calls()
        b = calls.make("b", **stored(str(empty_folder / "out.csv")))(2, upstream_tasks=[a])
        calls.make("shared", **stored(str(empty_folder / "{id}.csv"))).map([1, 1])
    state = run(flow, executor=InOnePool(processes))
    # The process of `b` knows of `a` if that ran there; else it is noticed in the end.
    said = f"{state.message} {state.result[b].message}"
    assert state.is_failed() and "out.csv belongs to the task run 'a'" in said
    assert set(state.result) == flow.tasks and b in state.result
    flow.tasks.discard(a)
    flow.edges.clear()
    flow._cache.clear()
    assert run(flow, executor=InOnePool(processes)).is_successful()


@purges_on_dask
def test_a_file_of_two_task_runs_is_set_aside_in_the_end(empty_folder):
    path = str(empty_folder / "out.csv")
    started = str(empty_folder / "noted-")

    def make(name, id):
        # Each runs in a process of its own, and both have looked for the file before it is there.
        def made():
            Path(started + name).touch()
            wait_until(lambda: all(os.path.exists(started + n) for n in "ab"))
            return pandas.DataFrame({"x": [id]})

        return task(made, name=name, **stored(path))()

    @task(max_retries=1, retry_delay=timedelta(0))
    def flaky():  # so that there are two rounds
        if not os.path.exists(started + "flaky"):
            Path(started + "flaky").touch()
            raise ValueError("not yet")

    with Flow("two") as flow:
        make("a", 1), make("b", 2), flaky()
    executor = LocalDaskExecutor(scheduler="processes", num_workers=2)
    message = run(flow, executor=executor).message
    aside = re.search(r"It is now (.*\.unreadable-\S+), since", message).group(1)
    assert len(pandas.read_csv(aside)) == 1 and not os.path.exists(path)


def test_two_calls_of_one_task_with_one_path_are_told_apart():
    with Flow("two") as flow:
        twice = Calls().make(**stored("out.csv"))
        first, second = twice(1), twice(2)
    result = run(flow).result
    (message,) = [result[t].message for t in (first, second) if result[t].is_failed()]
    assert len(set(re.findall(r"task run 'make' \((.+?)\)", message))) == 2


def test_a_task_whose_file_is_gone_at_once_has_succeeded():
    class OnAMovingDisk(PandasResult):
        def _save(self, frame, location):
            gives_it_back = super()._save(frame, location)
            os.remove(location)
            return gives_it_back

    with Flow("gone") as flow:
        result = Calls().make(**{STORAGE: OnAMovingDisk("data.csv")})(1)
    state = run(flow)
    assert state.is_successful() and int(state.result[result].result.id[0]) == 1


@takes_flatten
@pytest.mark.parametrize("where", ["pool", "cluster"])
def test_what_begins_with_flattening_has_a_context(where, processes):
    with Flow("later round") as flow:
        lists = task(lambda: [[1], [2]], name="lists")()
        result = task(lambda x: prefect.context.get("flow_name")).map(prefect.flatten(lists))
    executor = InOnePool(processes) if where == "pool" else EXECUTORS["dask"]()
    given = {lists: Success(result=[[1], [2]])}
    state = DSFlowRunner(flow).run(task_states=given, return_tasks=[result], executor=executor)
    assert state.result[result].result == ["later round"] * 2


def test_what_is_known_of_a_task_run_is_not_in_what_prefect_pickles():
    seen = []

    def look(task_runner, old_state, new_state):
        if prefect.context.get("task_name") == "timed" and new_state.is_running():
            seen.append(prefect.context.to_dict())

    with Flow("timed") as flow:
        calls = Calls()
        calls.make("timed", timeout=60, **stored("{id}.csv"))(calls.make()(1))
    Path("unreadable.csv").touch()
    run(flow, task_runner_state_handlers=[checkpoint_handler, look])
    (context,) = seen
    assert not [key for key in context if "prefect_ds" in key]
    assert b"prefect_ds" not in cloudpickle.dumps(context)


# A task whose file is there is not run -------------------------------------------------------

FOUND = "Found {}, which is read when somebody asks for it."


@on_each_executor
def test_runs_a_task_once_and_then_loads_it(executor, log):
    with Flow("twice") as flow:
        calls = Calls()
        plain = calls.make(**stored("plain_{id}.csv"))(1)
        mapped = calls.make(name="mapped", **stored("mapped_{id}.csv")).map([2, 3])
    first = run(flow, executor=executor())
    second = run(flow, executor=executor())
    assert first.is_successful() and second.is_successful()
    assert_frame_equal(second.result[plain].result, first.result[plain].result)
    for before, after in zip(first.result[mapped].result, second.result[mapped].result):
        assert_frame_equal(before, after)
    assert second.result[plain].message == FOUND.format("plain_1.csv")
    assert files() == ["mapped_2.csv", "mapped_3.csv", "plain_1.csv"]
    assert sorted(calls) == [1, 2, 3] or executor is EXECUTORS["dask"]
    said = log(logging.INFO)
    for name, path in [("make", "plain_1.csv"), ("mapped[1]", "mapped_3.csv")]:
        assert f"Task '{name}': Wrote {path}" in said
        assert f"Task '{name}': Found {path}, written 0:00:0" in said
        assert f"Loaded {os.path.abspath(path)}" in said


def test_the_flow_runner_of_prefect_does_as_well():
    with Flow("prefect") as flow:
        calls = Calls()
        result = calls.make(**stored("data_{id}.csv")).map([1, 2])
    for _ in range(2):
        state = FlowRunner(flow, task_runner_cls=DSTaskRunner).run(
            return_tasks=[result], task_runner_state_handlers=[checkpoint_handler]
        )
        assert [frame.id[0] for frame in state.result[result].result] == [1, 2]
    assert calls == [1, 2]


def test_storage_of_the_flow_is_used():
    with Flow("storage", **stored("{task_name}_{id}.csv")) as flow:
        calls = Calls()
        calls.make()(1)
    for _ in range(2):
        assert run(flow).is_successful()
    assert calls == [1] and files() == ["make_1.csv"]


@pytest.mark.skipif(
    "result_handler" not in inspect.signature(Task.__init__).parameters,
    reason="From Prefect 0.14 on there is only result=.",
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_result_handler_is_taken_as_long_as_prefect_takes_it(checkpointing):
    with Flow("keyword") as flow:
        calls = Calls()
        result = calls.make(result_handler=PandasResultHandler("data_{id}.csv")).map([1, 2])
    for _ in range(2):
        state = run(flow, context={"checkpointing": checkpointing})
        assert [frame.id[0] for frame in state.result[result].result] == [1, 2]
    assert calls == [1, 2] and files() == ["data_1.csv", "data_2.csv"]


def raising(signal_):
    @task(**stored("data.csv"))
    def end():
        raise signal_

    return end


@pytest.mark.parametrize(
    "end",
    [signals.FAIL("no"), signals.SKIP("no"), signals.PAUSE("no"), ValueError("no")],
    ids=lambda error: type(error).__name__,
)
def test_nothing_is_written_for_a_task_that_did_not_succeed(end):
    with Flow("unsuccessful") as flow:
        result = raising(end)()
    state = DSFlowRunner(flow).run(
        return_tasks=[result], task_runner_state_handlers=[checkpoint_handler]
    )
    assert type(state.result[result]).__name__ in ("Failed", "Skipped", "Paused")
    assert files() == []


def test_nothing_is_written_for_a_task_that_timed_out():
    @task(timeout=1, **stored("data.csv"))
    def slow():
        time.sleep(5)
        return FRAME

    with Flow("timeout") as flow:
        result = slow()
    assert type(run(flow).result[result]).__name__ == "TimedOut"
    assert files() == []


def test_a_success_signal_is_written():
    with Flow("signal") as flow:
        raising(signals.SUCCESS("done", result=FRAME))()
    assert run(flow).is_successful()
    assert_frame_equal(pandas.read_csv("data.csv"), FRAME)


def test_a_retry_is_written_when_it_succeeds():
    attempts = []

    @task(max_retries=2, retry_delay=datetime.timedelta(0), **stored("data_{id}.csv"))
    def flaky(id):
        attempts.append(files())
        if len(attempts) < 3:
            raise ValueError("not yet")
        return FRAME

    with Flow("retry") as flow:
        flaky(1)
    assert run(flow).is_successful()
    assert attempts == [[], [], []] and files() == ["data_1.csv"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("between", [1, FRAME], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("handlers", [[], [checkpoint_handler]], ids=len)
def test_a_loop_is_written_in_its_last_round(handlers, between, checkpointing):
    rounds = []

    @task(**stored("data_{id}.csv"))
    def loop(id):
        last = prefect.context.get("task_loop_result")
        rounds.append((files(), last is not None))
        if len(rounds) < 3:
            raise signals.LOOP(result=between)
        return FRAME.assign(id=id)

    with Flow("loop") as flow:
        made = loop(1)
    writes = checkpointing or bool(handlers)
    for _ in range(2 if handlers else 1):
        state = run(
            flow, task_runner_state_handlers=handlers, context={"checkpointing": checkpointing}
        )
        assert_frame_equal(state.result[made].result, FRAME.assign(id=1))
    assert rounds == [([], False), ([], True), ([], True)]
    assert files() == (["data_1.csv"] if writes else [])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_loop_that_is_retried_goes_on_and_writes_nothing_in_between(checkpointing):
    rounds = []

    @task(max_retries=1, retry_delay=timedelta(0), **stored("data.csv"))
    def loop():
        rounds.append(files())
        if len(rounds) == 1:
            raise signals.LOOP(result=FRAME.assign(id=1))
        if len(rounds) == 2:
            raise ValueError("not yet")
        return prefect.context["task_loop_result"].assign(id=2)

    with Flow("loop") as flow:
        loop()
    assert run(flow, context={"checkpointing": checkpointing}).is_successful()
    assert rounds == [[], [], []]
    assert_frame_equal(pandas.read_csv("data.csv"), FRAME.assign(id=2))


@pytest.mark.parametrize("handlers", [[], [checkpoint_handler]], ids=len)
def test_what_prefect_cannot_write_fails_the_task_and_tells_its_handlers(handlers):
    heard = []
    with Flow("deaf") as flow:
        make = Calls().make(on_failure=lambda task, state: heard.append(state), **stored("a/b.csv"))
        result = make(1)
    Path("a").touch()
    context = {"checkpointing": True}
    state = run(flow, context=context, task_runner_state_handlers=handlers)
    assert isinstance(failed(state, result), OSError)
    assert heard == [state.result[result]] or not prefect_ds._HAS_LOCATIONS


@pytest.mark.parametrize("place", ["task", "flow"])
def test_a_handler_in_the_wrong_place_says_where_it_belongs(place):
    handlers = {"state_handlers": [checkpoint_handler]}
    with Flow("wrong", **(handlers if place == "flow" else {})) as flow:
        result = Calls().make(**(handlers if place == "task" else {}), **stored("data.csv"))(1)
    state = run(flow)
    state = state.result[result] if place == "task" else state
    assert state.is_failed() and isinstance(state.result, TypeError)
    assert "task_runner_state_handlers=[checkpoint_handler]" in str(state.result)


WITHOUT_HANDLER = "Nothing is stored, and nothing is loaded, for the tasks make: run the flow with"


@pytest.mark.parametrize("place", ["task", "flow"])
def test_says_that_nothing_is_stored_without_the_handler(place, log):
    storage = stored("data.csv")
    attempts = []

    @task(
        name="make", max_retries=1, retry_delay=timedelta(0), **(storage if place == "task" else {})
    )
    def make(numbers):
        attempts.append(1)
        if len(attempts) == 1:
            raise ValueError("not yet")

    with Flow("without", **(storage if place == "flow" else {})) as flow:
        make([Parameter("one", default=1)])
    assert run(flow, task_runner_state_handlers=None).is_successful()
    assert log(logging.WARNING).count(WITHOUT_HANDLER) == 1


def test_does_not_say_that_nothing_is_stored_where_it_is(log):
    with Flow("with", **stored("data.csv")) as flow:
        Calls().make()(Parameter("id", default=1))
    run(flow)
    run(flow, task_runner_state_handlers=None, context={"checkpointing": True})
    with Flow("none") as flow:
        Calls().make()(Parameter("id", default=1))
    run(flow, task_runner_state_handlers=None)
    assert "Nothing is stored" not in log(logging.WARNING)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_storage_of_the_flow_leaves_alone_what_prefect_puts_in_between(checkpointing):
    @task
    def join(frames, named, first, chosen):
        assert chosen is not None and len(named["b"]) == 3
        return pandas.concat(frames).assign(first=first)

    with Flow("between", **stored("{task_name}.csv")) as flow:
        calls = Calls()
        a, b = calls.make("a")(1), calls.make("b")(2)
        chosen = control_flow.merge(a, b)
        result = join([a, b], {"b": b}, a["one"], chosen)
    for _ in range(2):
        state = run(flow, context={"checkpointing": checkpointing})
        assert state.is_successful(), state.result
        assert len(state.result[result].result) == 6
    assert sorted(calls) == [1, 2] and files() == ["a.csv", "b.csv", "join.csv"]


@pytest.mark.skipif(not prefect_ds._CAN_OPT_OUT, reason="checkpoint=False is the default here")
def test_a_task_without_checkpoint_is_left_alone():
    with Flow("off") as flow:
        calls = Calls()
        calls.make(checkpoint=False, **stored("data.csv"))(1)
    FRAME.to_csv("data.csv")
    before = os.stat("data.csv").st_mtime_ns
    assert run(flow).is_successful()
    assert calls == [1] and os.stat("data.csv").st_mtime_ns == before


def test_tasks_without_our_storage_are_left_alone():
    @task
    def number():
        return 1

    with Flow("others") as flow:
        result = number()
    assert run(flow).result[result].result == 1
    assert files() == []


@pytest.mark.parametrize("runner", [DSFlowRunner, FlowRunner])
def test_works_together_with_the_checkpointing_of_prefect(runner, monkeypatch):
    writes = []
    save = PandasResult._save
    monkeypatch.setattr(PandasResult, "_save", lambda *args: writes.append(args[2]) or save(*args))
    with Flow("both") as flow:
        calls = Calls()
        result = calls.make(**stored("data_{id}.csv"))(1)
    for _ in range(2):
        state = runner(flow, task_runner_cls=DSTaskRunner).run(
            return_tasks=[result],
            task_runner_state_handlers=[checkpoint_handler],
            context={"checkpointing": True},
        )
        assert state.is_successful()
        assert_frame_equal(state.result[result].result, FRAME.assign(id=1))
    assert calls == [1] and writes == ["data_1.csv"] and files() == ["data_1.csv"]


@pytest.mark.parametrize("value", [None, 3, [FRAME], FRAME["one"]], ids=lambda v: type(v).__name__)
def test_what_is_not_a_frame_fails_the_task(value):
    @task(**stored("data.csv"))
    def wrong():
        return value

    with Flow("wrong") as flow:
        result = wrong()
    error = failed(run(flow), result)
    assert isinstance(error, TypeError) and type(value).__name__ in str(error)
    assert files() == []


def test_a_task_that_cannot_write_fails_and_tells_its_handlers(log):
    heard = []
    with Flow("deaf") as flow:
        make = Calls().make(on_failure=lambda task, state: heard.append(state), **stored("a/b.csv"))
        result = make(1)
    Path("a").touch()
    state = run(flow)
    assert isinstance(failed(state, result), OSError)
    assert heard == [state.result[result]]
    assert "Task 'make'" in log(logging.ERROR) and "a" in files()


def test_a_task_that_cannot_write_is_retried():
    folder = Path("a")
    folder.touch()
    attempts = []

    @task(max_retries=1, retry_delay=datetime.timedelta(0), **stored("a/b.csv"))
    def make():
        if attempts:
            folder.unlink()
        attempts.append(1)
        return FRAME

    with Flow("again") as flow:
        make()
    assert run(flow).is_successful()
    assert len(attempts) == 2 and files("a") == ["b.csv"]


def test_raises_on_exception_if_told_to():
    @task(**stored("data.csv"))
    def wrong():
        return 3

    with Flow("raise") as flow:
        wrong()
    with pytest.raises(TypeError, match="returned int"), raise_on_exception():
        run(flow)


def damage(path, dice):
    content = bytearray(Path(path).read_bytes())
    del content[dice.randrange(len(content) // 2) :]
    content.append(0)
    Path(path).write_bytes(bytes(content))
    return bytes(content)


def test_a_file_that_cannot_be_read_is_kept_beside_the_new_one(log):
    seed = random.randrange(10**6)
    with Flow("damaged") as flow:
        calls = Calls()
        result = calls.make(**stored("data.pkl"))(1)
    run(flow)
    content = damage("data.pkl", random.Random(seed))
    assert run(flow).is_successful(), f"seed {seed}"
    assert calls == [1, 1]
    kept = [name for name in files() if name != "data.pkl"]
    assert len(kept) == 1 and kept[0].startswith("data.pkl.unreadable-20")
    assert Path(kept[0]).read_bytes() == content
    assert "data.pkl is there, but cannot be read" in log(logging.WARNING)
    assert_frame_equal(run(flow).result[result].result, FRAME.assign(id=1))
    assert calls == [1, 1]


def test_a_file_that_cannot_be_read_is_kept_also_where_many_replace_it():
    all_of_them = threading.Barrier(4, timeout=60)

    @task(**stored("data.pkl"))
    def make():
        all_of_them.wait()
        return FRAME

    with Flow("many") as flow:
        for _ in range(4):
            make()
    executor = LocalDaskExecutor(scheduler="threads", num_workers=4)
    for _ in range(20):
        Path("data.pkl").write_bytes(b"damaged")
        os.chmod("data.pkl", 0o600)
        assert run(flow, executor=executor).is_successful()
        (aside,) = set(files()) - {"data.pkl"}
        assert Path(aside).read_bytes() == b"damaged"
        assert os.name == "nt" or os.stat("data.pkl").st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_read_stays_if_the_task_fails():
    @task(**stored("data.pkl"))
    def fail():
        raise ValueError("no")

    Path("data.pkl").write_bytes(b"damaged")
    with Flow("damaged") as flow:
        fail()
    assert run(flow).is_failed()
    assert Path("data.pkl").read_bytes() == b"damaged" and files() == ["data.pkl"]


def test_a_pickle_that_holds_no_frame_is_not_a_result(log):
    Path("data.pkl").write_bytes(pickle.dumps("no frame"))
    with Flow("damaged") as flow:
        calls = Calls()
        result = calls.make(**stored("data.pkl"))(1)
    assert isinstance(run(flow).result[result].result, pandas.DataFrame) and calls == [1]
    assert "data.pkl holds a str" in log(logging.WARNING)


@takes_posix
def test_a_damaged_file_neither_fails_the_flow_nor_gets_lost():
    seed = int(os.environ.get("PREFECT_DS_SEED", 0))  # the same damage each time, or another
    *_, loaded, recomputed, crashed = in_another_process(f"damage_each_file_type({seed})")
    assert loaded != "0" or recomputed != "0", crashed


def damage_each_file_type(seed):
    outcomes = Counter()
    logging.disable(logging.CRITICAL)
    for file_type in sorted(prefect_ds._FILE_TYPES):
        for how in ("flipped", "truncated"):
            # The libraries of some file types end the process on some damages.
            child = os.fork()
            if child == 0:
                code = 3
                try:
                    code = run_on_a_damaged_file(file_type, how, random.Random(seed))
                except ImportError:
                    code = 2
                except BaseException:
                    traceback.print_exc()
                os._exit(code)
            _, status = os.waitpid(child, 0)
            code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else "crashed"
            assert code != 3, f"{file_type}, {how}, seed {seed}"
            outcomes[code] += 1
    print(outcomes[0], outcomes[1], f"crashed: {outcomes['crashed']}", sep="\n")


def run_on_a_damaged_file(file_type, how, dice):
    """Whether the task ran again; fails where the flow does, or where the file is lost."""
    os.mkdir(file_type + how)
    os.chdir(file_type + how)
    frame = FRAME.astype({"one": "int32"})
    name = "data." + EXTENSIONS.get(file_type, file_type)
    PandasResult(name, file_type)._save(frame, name)
    content = bytearray(Path(name).read_bytes())
    place = dice.randrange(len(content))
    if how == "flipped":
        content[place] ^= dice.randrange(1, 256)
    else:
        del content[place:]
    Path(name).write_bytes(bytes(content))
    ran = []

    @task(**stored(name, file_type))
    def make():
        ran.append(1)
        return frame

    with Flow("damaged") as flow:
        result = make()
    state = run(flow)
    assert state.is_successful(), repr(state.result[result].result)
    assert isinstance(state.result[result].result, pandas.DataFrame)
    kept = sorted(files(), key=len)[-1]
    assert Path(kept).read_bytes() == content and len(files()) == 1 + len(ran)
    if ran:
        restored = PandasResult(name, file_type)._load(name)
        assert_frame_equal(restored, frame, check_dtype=False)
    return len(ran)


@takes_posix
def test_without_permission_nothing_is_lost():
    with tempfile.TemporaryDirectory() as reachable:
        os.chmod(reachable, 0o755)
        closed, unreadable = Path(reachable, "closed"), Path(reachable, "unreadable")
        for folder in (closed, unreadable):
            folder.mkdir()
            FRAME.to_csv(str(folder / "data.csv"), index=False)
        closed.chmod(0o555)
        unreadable.chmod(0o777)
        (unreadable / "data.csv").chmod(0)
        *_, message, kind, other_message, other_kind = in_another_process(
            f"run_as_nobody({str(closed)!r}, {str(unreadable)!r})"
        )
        assert kind == "PermissionError"
        assert "Task 'make'" in message and str(closed / "data.csv") in message
        assert files(closed) == ["data.csv"]
        assert_frame_equal(pandas.read_csv(str(closed / "data.csv")), FRAME)
        assert (other_message, other_kind) == ("Task run succeeded.", "DataFrame")
        new, kept = files(unreadable)
        (unreadable / kept).chmod(0o644)
        assert_frame_equal(pandas.read_csv(str(unreadable / new)), FRAME.assign(id=1))
        assert_frame_equal(pandas.read_csv(str(unreadable / kept)), FRAME)


def run_as_nobody(closed, unreadable):
    """Run where permissions count: not as root."""
    logging.disable(logging.CRITICAL)

    def make_in(folder, recompute=""):
        with Flow("nobody") as flow:
            result = Calls().make(**stored(folder + "/data.csv"))(1)
        return run(flow, context={"recompute": recompute}).result[result]

    for _ in range(2):
        make_in("warm")  # Nobody may not import what root has installed.
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    for end in (make_in(closed, "make"), make_in(unreadable)):
        print(end.message.replace("\n", " "))
        print(type(end.result).__name__)


@pytest.mark.parametrize("is_there", [False, True])
def test_without_its_engine_the_task_fails_and_the_file_stays(is_there, monkeypatch, log):
    storage = PandasResult("data.xlsx")
    pytest.importorskip("openpyxl")
    with Flow("engine") as flow:
        result = Calls().make(**stored("data.xlsx"))(1)
    if is_there:
        storage._save(FRAME, "data.xlsx")
    before = {name: Path(name).read_bytes() for name in files()}
    engines = ["openpyxl", "xlrd", "xlsxwriter"]
    for module in [*engines, *(name for name in sys.modules if name.startswith("openpyxl."))]:
        monkeypatch.setitem(sys.modules, module, None)
    state = run(flow)
    if is_there:
        with pytest.raises(ImportError, match=r"openpyxl|xlrd"):
            _ = state.result[result].result
    else:
        assert isinstance(failed(state, result), ImportError)
        message = state.result[result].message
        assert "Task 'make'" in message and "data.xlsx" in message and "openpyxl" in message
    assert log(logging.WARNING) == ""
    assert {name: Path(name).read_bytes() for name in files()} == before


def test_another_process_finds_the_files():
    for expected in ("[1, 2]", "[]"):
        assert in_another_process("run_two_children()")[-1] == expected


def run_two_children():
    with Flow("process") as flow:
        calls = Calls()
        calls.make(**stored("data_{id}.csv")).map([1, 2])
    assert run(flow).is_successful()
    print(calls)


@purges_on_dask
def test_processes_of_an_executor_write_and_find_the_files(processes, empty_folder):
    with Flow("processes") as flow:
        result = Calls().make(**stored(str(empty_folder / "data_{id}.csv"))).map([1, 2])
    for message in ("Task run succeeded.", "Found "):
        children = run(flow, executor=InOnePool(processes)).result[result].map_states
        assert [child.message.startswith(message) for child in children] == [True, True]
        assert [int(child.result.id[0]) for child in children] == [1, 2]
        assert files() == ["data_1.csv", "data_2.csv"]


# Recomputing ---------------------------------------------------------------------------------


def chain_of_files():
    calls = Calls()
    with Flow("chain") as flow:
        first = calls.make(name="first", **stored("first.csv"))("first")

        @task(name="between")
        def between(frame):
            return len(frame)

        @task(name="mapped", **stored("mapped_{id}.csv"))
        def mapped(id, length):
            calls.append("mapped")
            return FRAME

        mapped.map([1, 2], unmapped(between(first)))
        calls.make(name="other", **stored("other.csv"))("other")
    return flow, calls


@pytest.mark.parametrize(
    "recompute, computed",
    [
        ("first", ["first"]),
        ("first+", ["first", "mapped", "mapped"]),
        ("between+", ["mapped", "mapped"]),
        ("*", ["first", "mapped", "mapped", "other"]),
        ("other, mapped", ["mapped", "mapped", "other"]),
        (["o*"], ["other"]),
        ("", []),
    ],
)
@on_local_and_threads
def test_recomputes_for_one_run(recompute, computed, executor):
    flow, calls = chain_of_files()
    run(flow)
    del calls[:]
    for expected in (computed, []):
        state = run(
            flow,
            context={"recompute": recompute} if expected else {},
            executor=EXECUTORS[executor](),
        )
        assert state.is_successful()
        assert sorted(calls) == expected
        del calls[:]


@pytest.mark.parametrize(
    "recompute, computed",
    [
        ("load+", {"load", "load+", "after"}),
        (["load+"], {"load", "load+", "after"}),
        (["load++"], {"load+"}),
        (["a, b"], {"a, b"}),
        ("a, b", {"a", "b"}),
        (["[x]"], {"[x]"}),
        (("a", "l*d"), {"a", "load"}),
    ],
    ids=str,
)
def test_names_of_tasks_in_a_list_are_literal(recompute, computed):
    calls = []
    with Flow("names") as flow:
        for n, name in enumerate(["load+", "a, b", "a", "b", "[x]", "x", "load"]):
            made = storing(calls, name, **stored(f"{n}.csv"))(1)
        storing(calls, "after", **stored("after.csv"))(made)
    run(flow)
    del calls[:]
    assert run(flow, context={"recompute": recompute}).is_successful()
    assert {name for name, _, _ in calls} == computed


def test_what_was_cached_before_is_forgotten_when_it_is_recomputed(log):
    numbers, seen = [], []

    @task(cache_for=timedelta(hours=1))
    def raw():
        numbers.append(1)
        return len(numbers)

    @task(**stored("made.pkl"))
    def make(number):
        seen.append(number)
        return FRAME

    with Flow("forget") as flow:
        number = raw()
        make(number)
        look = task(lambda number: number, name="look")(number)
    looked = []
    for recompute in ("", "raw+", "", "raw", "", ""):
        state = run(flow, context={"recompute": recompute})
        looked.append(state.result[look].result)
    assert looked == [1, 2, 2, 3, 3, 3] and seen == [1, 2]


def test_the_caches_that_all_threads_share_keep_their_keys():
    @task(name="look", **stored("looked.pkl"))
    def look():
        # `TaskRunner.__init__` copies this dictionary: it must not change its size meanwhile.
        seen.append("look" in prefect.context.caches)
        return FRAME

    flow, seen = Flow("keys", tasks=[look]), []
    run(flow)
    assert run(flow, context={"recompute": "look"}).is_successful()
    assert seen[-1]


def test_recomputes_what_is_cached():
    attempts = []

    @task(max_retries=1, retry_delay=timedelta(0))
    def flaky(number):
        attempts.append(1)
        if len(attempts) % 2:
            raise ValueError("not yet")

    with Flow("cached") as flow:
        calls = Calls()
        make = calls.make(cache_for=timedelta(hours=1))
        made = make(1)
        flaky(made)
    for recompute, expected in [("", 1), ("make", 2), ("", 2), ("make+", 3)]:
        state = run(flow, context={"recompute": recompute})
        assert state.is_successful() and len(calls) == expected
        assert type(state.result[made]).__name__ == "Cached"
    # Of the state of an earlier run, too.
    state = run(flow, context={"recompute": "make"}, task_states={made: state.result[made]})
    assert len(calls) == 4 and len(attempts) == 10


@from_0_11
@pytest.mark.parametrize("result", [LocalResult, PandasResult], ids=["local", "pandas"])
def test_recomputes_what_has_a_target(result):
    result = result(dir=os.getcwd()) if result is LocalResult else result()
    with Flow("target") as flow:
        calls = Calls()
        calls.make(result=result, target="out.pkl")(1)
    for recompute, expected in [("", 1), ("", 1), ("make", 2), ("", 2)]:
        context = {"recompute": recompute, "checkpointing": True}
        assert run(flow, context=context, task_runner_state_handlers=[]).is_successful()
        assert len(calls) == expected and files() == ["out.pkl"]


def test_a_pattern_that_is_inherited_need_not_match(log):
    with Flow("inner") as inner:
        Calls().make(name="inside", **stored("inside.csv"))(1)
    with Flow("outer") as outer:
        result = task(lambda: run(inner).is_successful(), name="outside")()
    assert run(outer, context={"recompute": "outside"}).result[result].result is True
    assert "recompute='outside' matches no task" in log(logging.WARNING)


def test_flow_runs_in_one_task_are_flow_runs_of_their_own():
    @task
    def inner(x):
        with Flow("inner") as flow:
            made = Calls().make(**stored("inner.csv"))(Parameter("id"))
        end = DSFlowRunner(flow).run(
            parameters={"id": x},
            context={"recompute": "make"},
            return_tasks=[made],
            task_runner_state_handlers=[checkpoint_handler],
        )
        return int(end.result[made].result.id[0])

    with Flow("outer") as outer:
        first = inner(1)
        second = inner(2, upstream_tasks=[first])
    state = run(outer)
    assert (state.result[first].result, state.result[second].result) == (1, 2)


def test_recomputes_by_the_environment():
    assert in_another_process("run_two_children()")[-1] == "[1, 2]"
    code = "import test_prefect_ds; test_prefect_ds.run_two_children()"
    environment = for_processes(PREFECT__CONTEXT__RECOMPUTE="make")
    computed = subprocess.check_output([sys.executable, "-c", code], env=environment, timeout=120)
    assert computed.splitlines()[-1] == b"[1, 2]"


def test_recomputing_a_task_that_is_not_there_is_refused():
    flow, calls = chain_of_files()
    state = run(flow, context={"recompute": "frist+"})
    assert state.is_failed() and calls == []
    assert "'frist+' matches no task" in str(state.message) and "first" in str(state.message)


@pytest.mark.parametrize("recompute", [3, True, [3]])
def test_what_recompute_takes_is_said(recompute):
    flow, calls = chain_of_files()
    state = run(flow, context={"recompute": recompute})
    assert state.is_failed() and calls == []
    assert f"recompute={recompute!r} names no tasks" in str(state.message)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"path": "{a.csv"}, "'{a.csv' is no template for str.format"),
        ({"path": "a.csv", "read_kwargs": "a"}, "read_kwargs of the path 'a.csv' is no dictionary"),
        (
            {"path": "a.csv", "write_kwargs": [1]},
            "write_kwargs of the path 'a.csv' is no dictionary",
        ),
    ],
)
def test_storage_that_cannot_be_is_refused_with_its_path(arguments, said):
    with pytest.raises((TypeError, ValueError), match=re.escape(said)):
        PandasResult(**arguments)


def test_which_item_of_a_field_is_missing_is_said():
    with Flow("item") as flow:
        result = Calls().make(**stored("{id[x]}.csv"))({"y": 1})
    message = run(flow).result[result].message
    assert "cannot be filled: KeyError: 'x'" in message and "field 'x' is missing" not in message


def test_a_folder_named_as_a_pickle_does_not_make_its_files_pickles():
    assert prefect_ds._is_damage(MemoryError(), "pickle")
    assert not prefect_ds._is_damage(MemoryError(), "parquet")
    os.mkdir("run.pkl.d")
    path = "run.pkl.d/data.csv"
    read_kwargs = {"converters": {"x": lambda cell: importlib.import_module("not_installed")}}
    Path(path).write_text("x\n1\n")
    with Flow("package") as flow:
        frame = Calls().make(**stored(path, read_kwargs=read_kwargs))(1)
        result = task(lambda frame: len(frame))(frame)
    assert "not_installed" in run(flow).result[result].message
    assert files("run.pkl.d") == ["data.csv"]


# The executor, without a backend -------------------------------------------------------------


@task(**stored("{i}.csv"))
def write_and_note(i):
    note(i)
    return FRAME


@task
def how_many(frames):
    return len(frames)


def run_on(executor, flow, **kwargs):
    return flow.run(executor=DSExecutor(flow, executor), **kwargs)


@from_0_12
@pytest.mark.parametrize(
    "executor", [*EXECUTORS.values(), dask_executor], ids=[*EXECUTORS, "own cluster"]
)
def test_an_executor_is_enough(executor, log):
    with Flow("enough") as flow:
        frames = write_and_note.map([1, 2])
        result = how_many(frames)
    for _ in range(2):
        final = run_on(executor(), flow)
        assert final.result[result].result == 2
        assert sorted(noted()) == ["1", "2"]
    assert all(prefect_ds._is_unread(s._result) for s in final.result[frames].map_states)
    assert not log(logging.WARNING)


@has_executors
def test_a_flow_that_has_the_executor_takes_no_other_argument():
    calls = Calls()
    with Flow("has_it") as flow:
        calls.make(**stored("{id}.csv"))(1)
    flow.executor = DSExecutor(flow)
    for _ in range(2):
        assert flow.run().is_successful() and calls == [1]
    assert flow.run(context={"recompute": "make"}).is_successful() and calls == [1, 1]
    refused = flow.run(context={"recompute": "mkae"})
    assert refused.is_failed() and "'mkae' matches no task" in refused.message


@from_0_12
@pytest.mark.parametrize("build", [lambda: chain(9), lambda: mapped(20)], ids=["chain", "map"])
@pytest.mark.parametrize("executor", ["local", "synchronous", "threads", "dask"])
def test_frames_alive_on_the_executor(build, executor, counted):
    assert run_on(EXECUTORS[executor](), build()).is_successful()
    assert peak[0] <= (2 if executor in ("local", "synchronous") else 2 * 2 + 2)


@task
def wait_for_other(id, folder):
    note(id, folder / "noted")
    wait_until(lambda: len(noted(folder / "noted")) >= 2, 20)
    return FRAME


@from_0_12
def test_the_executor_around_processes(processes, empty_folder):
    with Flow("processes") as flow:
        make = wait_for_other.copy(**stored(str(empty_folder / "{id}.csv")))
        make.map([0, 1], unmapped(empty_folder))
    for _ in range(2):
        assert run_on(InOnePool(processes), flow).is_successful()
    assert files() == ["0.csv", "1.csv", "noted"] and sorted(noted()) == ["0", "1"]


@from_0_12
def test_the_executor_notices_a_file_of_two_task_runs_in_processes(processes, empty_folder):
    with Flow("clash") as flow:
        for name in ("a", "b"):
            make = wait_for_other.copy(name=name, **stored(str(empty_folder / "out.csv")))
            make(name, empty_folder)
    final = run_on(InOnePool(processes), flow)
    assert final.is_failed() and "out.csv belongs to the task run" in final.message


@from_0_12
@pytest.mark.parametrize(
    "executor", [LocalExecutor, EXECUTORS["threads"]], ids=["local", "threads"]
)
def test_the_executor_is_pickled_with_its_flow_and_without_a_run(executor, counted):
    pickles = []

    @task
    def dump(part):
        pickles.append(cloudpickle.dumps(executor))

    with Flow("pickled") as flow:
        dump(step(load(0)))
    executor = DSExecutor(flow, executor())
    assert flow.run(executor=executor).is_successful()
    copied = cloudpickle.loads(pickles[0])
    assert copied.flow.name == "pickled" and not copied._under_way and not alive
    assert copied.flow.run(executor=copied).is_successful()


@from_0_12
def test_the_executor_knows_what_was_added_to_the_flow(counted):
    flow = Flow("grows")
    executor = DSExecutor(flow)
    for _ in range(2):
        with flow:
            count(step(load(0)))
        assert flow.run(executor=executor).is_successful()
        assert peak == [2] and not alive


def with_another_task(flow):
    flow.add_task(task(lambda: 1, name="another"))


def with_another_edge(flow):
    flow.add_edge(*(flow.get_tasks(name)[0] for name in ("load", "count")))


def with_another_constant(flow):
    flow.constants[flow.get_tasks("load")[0]]["i"] = 7


@from_0_12
@pytest.mark.parametrize(
    "change, message",
    [
        (with_another_task, "has another task 'another'"),
        (with_another_edge, "has other edges to the task 'count'"),
        (with_another_constant, None),
    ],
)
@pytest.mark.parametrize("changes", ["copy", "original"])
def test_the_executor_says_that_it_does_not_know_a_copy(change, message, changes):
    flow = chain(2)
    executor = DSExecutor(flow)
    copied = flow.copy()
    assert copied.run(executor=executor).is_successful()
    change(copied if changes == "copy" else flow)
    final = copied.run(executor=executor)
    assert final.is_successful() is (message is None)
    if changes == "original" and change is with_another_task:
        message = "does not end with another"
    if message:
        assert message in final.message and "flow.executor = DSExecutor(flow)" in final.message
    assert copied.run(executor=DSExecutor(copied)).is_successful()


class OwnTaskRunner(TaskRunner):
    """Not ours."""


class OwnDSTaskRunner(DSTaskRunner):
    """Ours."""


@from_0_12
def test_a_task_runner_of_ones_own_is_left_as_it_is(log):
    used = []
    make = task(lambda i: used.append(prefect.context["logger"]) or FRAME, **stored("{i}.csv"))
    with Flow("own") as flow:
        make.map([1, 2])
    final = FlowRunner(flow, task_runner_cls=OwnTaskRunner).run(executor=DSExecutor(flow))
    assert final.is_successful() and files() == []
    assert log(logging.WARNING).count("leaves the task runner class OwnTaskRunner as it is") == 1
    assert "inherit from prefect_ds.DSTaskRunner" in log(logging.WARNING)
    final = FlowRunner(flow, task_runner_cls=OwnDSTaskRunner).run(executor=DSExecutor(flow))
    assert final.is_successful() and files() == ["1.csv", "2.csv"]
    assert "OwnDSTaskRunner" not in log(logging.WARNING)


@from_0_12
@pytest.mark.parametrize("handlers", [None, [checkpoint_handler]], ids=["none", "ours"])
def test_the_flow_runner_and_the_executor_go_together(handlers, counted):
    calls = Calls()
    with Flow("both") as flow:
        calls.make(**stored("{id}.csv"))(1)
        count(step(step(load(0))))
    for _ in range(2):
        final = run(flow, executor=DSExecutor(flow), task_runner_state_handlers=handlers)
        assert final.is_successful()
    assert calls == [1] and peak == [2]


@from_0_12
def test_a_task_that_runs_its_own_flow_on_the_executor():
    depths = []

    @task
    def recurse(depth):
        depths.append(depth)
        return [not depth or flow.run(depth=depth - 1, executor=executor).is_successful()]

    @task
    def check(is_fine):
        assert is_fine

    with Flow("recursive") as flow:
        check.map(recurse(Parameter("depth")))
    executor = DSExecutor(flow)
    assert flow.run(depth=2, executor=executor).is_successful()
    assert depths == [2, 1, 0]


@from_0_12
def test_runs_at_once_share_the_executor():
    with Flow("at_once") as flow:
        total([pass_on(pass_on(i)) for i in range(5)])
    executor = DSExecutor(flow)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        finals = pool.map(lambda _: flow.run(executor=executor), range(12))
        assert all(final.is_successful() for final in finals)


@from_0_12
def test_what_the_executor_does_not_take():
    flow = chain(1)
    for arguments in [(), (LocalExecutor(),), (flow, LocalDaskExecutor), (flow, flow)]:
        with pytest.raises(TypeError):
            DSExecutor(*arguments)
    with pytest.raises(TypeError, match=r"flow.executor = DSExecutor\(flow"):
        DSExecutor(LocalExecutor())


@pytest.mark.skipif(prefect_ds._FLOW_RUNNER_MAPS, reason="This Prefect has what it needs.")
def test_the_executor_says_which_prefect_it_needs():
    with pytest.raises(NotImplementedError, match=r"runner_cls=DSFlowRunner"):
        DSExecutor(chain(1))


# Under Prefect Server and Cloud --------------------------------------------------------------


class Backend:
    """A small Prefect Server: it answers what Prefect's client asks of it, over HTTP."""

    def __init__(self):
        self.flows, self.flow_runs, self.task_runs = {}, {}, {}
        #: which releases of Prefect have asked
        self.clients = set()
        self._lock = threading.Lock()
        backend = self

        class Handler(SimpleHTTPRequestHandler):
            def do_POST(self):
                backend.clients.add(self.headers["X-PREFECT-CORE-VERSION"])
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])).decode())
                variables = json.loads(body["variables"] or "null") or {}
                with backend._lock:
                    answer = backend._answer(body["query"], variables.get("input", {}))
                content = json.dumps({"data": answer}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = str(self.server.server_address[1])

    # -- what a user does

    def register(self, flow):
        """As `flow.register`, but for the project; return the id of the flow."""
        serialized = flow.serialize(build=True)
        flow_id = str(uuid.uuid4())
        tasks = {str(uuid.uuid4()): task["slug"] for task in serialized["tasks"]}
        self.flows[flow_id] = {
            **{key: serialized.get(key) for key in ("name", "environment", "run_config")},
            "storage": serialized["storage"],
            "version": 1,
            "id": flow_id,
            "core_version": prefect.__version__,
            "settings": {"heartbeat_enabled": False},
            "project": {"id": "project", "name": "project"},
            "tasks": tasks,
        }
        return flow_id

    def environment(self, **more):
        """That of an agent; labels and the like do not matter."""
        return for_processes(
            **{
                "PREFECT__BACKEND": "server",
                "PREFECT__SERVER__HOST": "http://127.0.0.1",
                "PREFECT__SERVER__PORT": self.port,
                "PREFECT__HOME_DIR": os.path.abspath("prefect"),
                "PREFECT__CLOUD__CHECK_CANCELLATION_INTERVAL": "0.2",
                "PREFECT__CLOUD__SEND_FLOW_RUN_LOGS": "false",
                "PREFECT__LOGGING__LOG_TO_CLOUD": "false",
                "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
                **more,
            }
        )

    def create(self, flow_id, **context):
        """As `client.create_flow_run(flow_id=..., context=...)`; return the id of the flow run."""
        return self.create_flow_run("", {"flow_id": flow_id, "context": context})["id"]

    def state(self, flow_run_id):
        return state.State.deserialize(self.flow_runs[flow_run_id]["serialized_state"])

    def history(self, flow_run_id, slug):
        """What was reported of a task, and of its children: lists of types and messages."""
        runs = [r for r in self.task_runs.values() if r["flow_run_id"] == flow_run_id]
        runs = [r for r in runs if r["task"]["slug"].rpartition("-")[0] == slug]
        return {r["map_index"]: r["history"] for r in runs}

    def let_retry_now(self, flow_run_id):
        """Let what waits for a later time have waited long enough."""
        earlier = pendulum.now("utc").subtract(seconds=10).isoformat()
        with self._lock:
            for run in self.task_runs.values():
                if run["flow_run_id"] == flow_run_id and run["serialized_state"].get("start_time"):
                    run["serialized_state"]["start_time"] = earlier

    def cancel(self, flow_run_id):
        with self._lock:
            self._set(self.flow_runs[flow_run_id], state.Cancelling("Stop it.").serialize())

    # -- what the client asks: each method is named as the field is

    def _answer(self, query, given):
        name = re.search(r"{\s*(\w+)", query).group(1)
        return {name: getattr(self, name)(query, given)}

    def hello(self, query, given):
        return "hello"

    def tenant(self, query, given):
        return [{"id": "tenant"}]

    def register_agent(self, query, given):
        return {"id": "agent"}

    def task_run(self, query, given):
        return []  # nothing is cached

    def write_run_logs(self, query, given):
        return {"success": True}

    update_flow_run_heartbeat = update_task_run_heartbeat = write_run_logs

    def create_flow_run(self, query, given):
        flow_run_id = str(uuid.uuid4())
        now = pendulum.now("utc")
        self.flow_runs[flow_run_id] = {
            "id": flow_run_id,
            "name": "run",
            "flow_id": given["flow_id"],
            "version": 0,
            "parameters": given.get("parameters", {}),
            "context": given.get("context", {}),
            "scheduled_start_time": now.isoformat(),
            "run_config": None,
            "history": [],
            "serialized_state": state.Scheduled(start_time=now).serialize(),
        }
        for task_id in self.flows[given["flow_id"]]["tasks"]:
            self._task_run(flow_run_id, task_id, -1)
        return {"id": flow_run_id}

    def get_runs_in_queue(self, query, given):
        ready = [i for i, run in self.flow_runs.items() if self._is_ready(run)]
        return {"flow_run_ids": ready}

    def flow_run(self, query, given):
        found = [run for i, run in self.flow_runs.items() if i in query]
        return [
            {
                **run,
                "state": run["serialized_state"]["type"],
                "flow": self.flows[run["flow_id"]],
                "task_runs": self._due(run),
            }
            for run in found
            if "_in" not in query or self._is_ready(run)
        ]

    def flow_run_by_pk(self, query, given):
        (run,) = [run for i, run in self.flow_runs.items() if i in query]
        known = {**run, "flow": self.flows[run["flow_id"]]}
        known["task_runs"] = [
            {key: r[key] for key in ("id", "task", "version", "serialized_state")}
            for r in self.task_runs.values()
            if r["flow_run_id"] == run["id"] and r["map_index"] == -1
        ]
        return {key: value for key, value in known.items() if re.search(rf"\b{key}\b", query)}

    def get_or_create_task_run_info(self, query, given):
        values = dict(re.findall(r'(\w+): "?([\w-]+)', query))
        key = values["flow_run_id"], values["task_id"], int(values["map_index"])
        return self._task_run(*key)

    def get_or_create_task_run(self, query, given):  # below 0.13
        return self.get_or_create_task_run_info(query, given)

    def task_run_by_pk(self, query, given):  # below 0.13
        return self.get_task_run_info(query, given)

    def get_task_run_info(self, query, given):
        (run,) = [run for i, run in self.task_runs.items() if i in query]
        return run

    def set_flow_run_states(self, query, given):
        return self._set_all(self.flow_runs, "flow_run_id", given["states"])

    def set_task_run_states(self, query, given):
        return self._set_all(self.task_runs, "task_run_id", given["states"])

    # -- what it knows

    def _task_run(self, flow_run_id, task_id, map_index):
        for run in self.task_runs.values():
            if (run["flow_run_id"], run["task"]["id"], run["map_index"]) == (
                flow_run_id, task_id, map_index,
            ):  # fmt: skip
                return run
        slug = self.flows[self.flow_runs[flow_run_id]["flow_id"]]["tasks"][task_id]
        run = {
            "id": str(uuid.uuid4()),
            "flow_run_id": flow_run_id,
            "map_index": map_index,
            "task": {"id": task_id, "slug": slug},
            "task_id": task_id,
            "version": 0,
            "serialized_state": state.Pending().serialize(),
            "history": [],
        }
        self.task_runs[run["id"]] = run
        return run

    def _set_all(self, runs, key, states):
        for new in states:
            self._set(runs[new[key]], new["state"])
        return {"states": [{"id": s[key], "status": "SUCCESS", "message": None} for s in states]}

    def _set(self, run, serialized_state):
        run["serialized_state"] = serialized_state
        run["version"] += 1
        run["history"].append((serialized_state["type"], serialized_state["message"]))

    def _due(self, flow_run):
        now = pendulum.now("utc").subtract(seconds=3)
        runs = [r for r in self.task_runs.values() if r["flow_run_id"] == flow_run["id"]]
        starts = [(r, r["serialized_state"].get("start_time")) for r in runs]
        return [run for run, start in starts if start and pendulum.parse(start) <= now]

    def _is_ready(self, flow_run):
        kind = flow_run["serialized_state"]["type"]
        return kind == "Scheduled" or (kind == "Running" and bool(self._due(flow_run)))


def prefect_cli(*arguments):
    return [sys.executable, "-c", "from prefect.cli import cli; cli()", *arguments]


@pytest.fixture
def backend(empty_folder):
    """A backend; whatever asks it has to be gone in the end."""
    try:
        Flow("any").serialize()
    except AttributeError as exc:
        pytest.skip(f"With this marshmallow, Prefect runs under no backend: {exc}")
    found = Backend()
    thread = threading.Thread(target=found.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield found
    left = [process for process in psutil.process_iter() if is_set_up_for(found, process)]
    for process in left:
        process.kill()
    found.server.shutdown()
    found.server.server_close()
    assert not left
    assert found.clients <= {prefect.__version__}


def is_set_up_for(backend, process):
    with suppress(psutil.Error):
        is_other = process.pid != os.getpid()
        return is_other and process.environ().get("PREFECT__SERVER__PORT") == backend.port


def heed_interrupts():
    """What a shell runs in the background ignores them, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def execute(backend, flow_run_id, timeout=60):
    """Execute a flow run in a process of its own, as agents do; return the state it has then."""
    environment = backend.environment(
        PREFECT__CONTEXT__FLOW_RUN_ID=flow_run_id,
        PREFECT__CLOUD__USE_LOCAL_SECRETS="false",
        PREFECT__ENGINE__FLOW_RUNNER__DEFAULT_CLASS="prefect.engine.cloud.CloudFlowRunner",
        PREFECT__ENGINE__TASK_RUNNER__DEFAULT_CLASS="prefect.engine.cloud.CloudTaskRunner",
    )
    done = subprocess.run(
        prefect_cli("execute", "flow-run" if HAS_EXECUTORS else "cloud-flow"),
        env=environment, timeout=timeout, preexec_fn=heed_interrupts,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout.decode())
    return backend.state(flow_run_id)


@contextmanager
def agent(backend):
    """Something that has a flow run executed by a real agent; it returns the final state."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with open("agent.log", "wb") as output:
        process = subprocess.Popen(
            prefect_cli(
                "agent", "local", "start", "--show-flow-logs", "--agent-address", address
            ),
            env=backend.environment(), stdout=output, stderr=output,
        )  # fmt: skip

        def execute(backend, flow_run_id, timeout=60):
            history = backend.flow_runs[flow_run_id]["history"]
            before = len(history)

            def has_begun():
                with suppress(OSError):  # The agent itself looks every few seconds.
                    urlopen(address + "/api/poke").close()
                return {kind for kind, _ in history[before:]} - {"Scheduled", "Submitted"}

            wait_until(has_begun, timeout)
            children = psutil.Process(process.pid).children
            wait_until(lambda: all(c.status() == "zombie" for c in children()), timeout)
            return backend.state(flow_run_id)

        try:
            yield execute
        finally:
            process.terminate()
            try:
                process.wait(20)
            finally:
                process.kill()
                process.wait()
                print(Path("agent.log").read_text())


def for_an_agent(flow, executor):
    """Let a flow have what it needs to be registered, and this executor."""
    if HAS_EXECUTORS:
        flow.executor = executor
        flow.run_config = LocalRun()  # On 0.13 only a flow with this uses its executor.
    else:
        if "executor" not in inspect.signature(LocalEnvironment.__init__).parameters:
            pytest.skip("On Prefect 0.12.0 an environment takes no executor.")
        flow.environment = LocalEnvironment(executor=executor)
    flow.storage = Local(directory=os.path.abspath("flows"))
    flow.result = flow.storage.result
    return flow


def flow_of(code):
    """The flow that this code makes; it is pickled whole, as if it were a script's."""
    names = {"__name__": "__main__", "STORAGE": STORAGE}
    exec(textwrap.dedent(IN_EACH_FLOW) + textwrap.dedent(code), names)
    flow = names["flow"]
    return for_an_agent(flow, names["executor"])


IN_EACH_FLOW = """
    import datetime, os, time, weakref
    import pandas, prefect, prefect_ds
    from prefect import Flow, task
    from prefect_ds import *

    def keep_count(thing):
        # Of what a script has itself, a copy travels with its flow.
        alive = vars(weakref).setdefault("counted", weakref.WeakValueDictionary())
        alive[id(thing)] = thing
        return len(alive)

    def note(*words):
        with open("noted", "a") as file:
            print(*words, file=file)

    def stored(path, **kwargs):
        return task(**{STORAGE: PandasResultHandler(path), **kwargs})

    minutes = lambda number: datetime.timedelta(minutes=number)
"""

#: What is computed depends on a file, and so does whether it fails.
STAGES = """
    @stored("load_{i}.csv")
    def load(i):
        note("load", i)
        return pandas.DataFrame({"x": [int(open("x").read()) + i]})

    @stored("clean_{i}.csv", max_retries=2, retry_delay=minutes(20))
    def clean(frame, i):
        note("clean", i, keep_count(frame))
        if os.path.exists("fails") and i in map(int, open("fails").read().split()):
            raise ValueError("Not yet.")
        return frame * 2

    @task
    def total(frames):
        note("total", sum(int(frame["x"].sum()) for frame in frames))

    with Flow("stages") as flow:
        ids = [0, 1, 2, 3]
        total(clean.map(load.map(ids), ids))
    executor = DSExecutor(flow)
"""


def write_text(name, text):
    Path(name).write_text(text)


def noted_since(before=0):
    """What the tasks have noted: the names of those that ran, sorted, and the total."""
    lines = [line.split() for line in noted()[before:]]
    totals = [int(line[1]) for line in lines if line[0] == "total"]
    return sorted(line[0] + line[1] for line in lines if line[0] != "total"), totals


def each(name, *ids):
    return [f"{name}{i}" for i in ids or range(4)]


@contextmanager
def by_hand(backend):
    yield execute


@from_0_12
def test_runs_loads_recomputes_and_retries_under_a_backend(backend):
    executing = agent if HAS_EXECUTORS else by_hand
    write_text("x", "1")
    flow_id = backend.register(flow_of(STAGES))
    with executing(backend) as execute:
        first = backend.create(flow_id)
        assert execute(backend, first).is_successful()
        assert noted_since() == (each("clean") + each("load"), [20])
        for name in ("load", "clean"):
            history = backend.history(first, name)
            assert [kind for kind, _ in history.pop(-1)] == ["Mapped"]
            assert set(map(str, history.values())) == {str(history[0])} and len(history) == 4
            assert [kind for kind, _ in history[0]] == ["Running", "Success"]

        seen = len(noted())
        second = backend.create(flow_id)
        assert execute(backend, second).is_successful()
        assert noted_since(seen) == ([], [20])
        for i in range(4):
            assert backend.history(second, "clean")[i] == [
                ("Success", FOUND.format(f"clean_{i}.csv"))
            ]

        write_text("x", "2")
        write_text("fails", "1 3")
        seen = len(noted())
        third = backend.create(flow_id, recompute="load+")
        assert execute(backend, third).is_running()
        assert noted_since(seen) == (each("clean") + each("load"), [])
        assert backend.history(third, "clean")[1][-1][0] == "Retrying"

        os.remove("fails")
        seen = len(noted())
        backend.let_retry_now(third)
        assert execute(backend, third).is_successful()
        assert noted_since(seen) == (each("clean", 1, 3), [28])
    assert prefect.__version__ in backend.clients


def run_here(backend, flow, **context):
    """Run a flow by Prefect's `CloudFlowRunner` in this process; return the id of the run."""
    flow_run_id = backend.create(backend.register(flow), **context)
    resume_here(backend, flow, flow_run_id)
    return flow_run_id


def resume_here(backend, flow, flow_run_id):
    api = f"http://127.0.0.1:{backend.port}"
    with set_temporary_config(
        {
            "backend": "server",
            "cloud.api": api,
            "cloud.graphql": api,
            "cloud.send_flow_run_logs": False,
            "logging.log_to_cloud": False,
        }
    ), prefect.context(flow_run_id=flow_run_id):
        executor = None if HAS_EXECUTORS else flow.environment.executor
        CloudFlowRunner(flow=flow).run(executor=executor)


def on_disk(flow):
    return for_an_agent(flow, DSExecutor(flow))


@from_0_12
@pytest.mark.parametrize("build", [lambda: chain(9), lambda: mapped(20)], ids=["chain", "map"])
def test_frames_alive_under_a_backend(build, backend, counted):
    flow_run_id = run_here(backend, on_disk(build()))
    assert backend.state(flow_run_id).is_successful()
    assert peak == [2] and not alive


_frames_read = weakref.WeakValueDictionary()


def read_at_second_try(frame):
    _frames_read[id(frame)] = frame
    note(f"{prefect.context['task_run_count']} {len(_frames_read)}")
    if prefect.context["task_run_count"] == 1:
        raise ValueError("Not yet.")


@from_0_12
def test_inputs_that_are_read_for_a_retry_are_dropped(backend, counted):
    make = Calls().make(**stored("{id}.csv"))
    read = task(read_at_second_try, max_retries=1, retry_delay=timedelta(minutes=20))
    with Flow("resumed") as flow:
        for i in range(4):
            read(make(i))
    flow_run_id = run_here(backend, on_disk(flow))
    assert backend.state(flow_run_id).is_running() and not _frames_read
    backend.let_retry_now(flow_run_id)
    resume_here(backend, flow, flow_run_id)
    assert backend.state(flow_run_id).is_successful()
    assert noted() == ["1 1"] * 4 + ["2 1"] * 4


@has_executors  # Below, Prefect refuses to register such a flow.
def test_inputs_of_a_retry_in_another_process_are_kept_if_they_have_no_file(backend, counted):
    fail_once = task(read_at_second_try, max_retries=1, retry_delay=timedelta(minutes=20))
    with Flow("kept") as flow:
        fail_once.map(load.map([1, 2, 3]))
    on_disk(flow).result = None
    flow_run_id = run_here(backend, flow)
    assert backend.state(flow_run_id).is_running()
    assert noted() == ["1 1", "1 2", "1 3"]


@from_0_12
def test_what_is_not_read_is_not_loaded_for_a_retry(backend, log):
    calls = Calls()
    make = calls.make(**stored("{id}.csv"))

    @task(max_retries=1, retry_delay=timedelta(minutes=20))
    def after():
        if prefect.context["task_run_count"] == 1:
            raise ValueError("Not yet.")

    with Flow("after") as flow:
        after(upstream_tasks=[make(1)])
    flow_run_id = run_here(backend, on_disk(flow))
    backend.let_retry_now(flow_run_id)
    resume_here(backend, flow, flow_run_id)
    assert backend.state(flow_run_id).is_successful() and calls == [1]
    assert "Wrote 1.csv" in log(logging.INFO) and "Loaded 1.csv" not in log(logging.INFO)


@from_0_12
@pytest.mark.parametrize("max_retries", [0, 1])
def test_a_write_that_fails_is_reported_once(max_retries, backend):
    heard = []

    @task(
        max_retries=max_retries,
        retry_delay=timedelta(0) if max_retries else None,
        state_handlers=[lambda task, old, new: heard.append(type(new).__name__)],
        **stored("{i}.csv"),
    )
    def make(i):
        return 3

    with Flow("fails") as flow:
        make(1)
    flow_run_id = run_here(backend, on_disk(flow))
    assert backend.state(flow_run_id).is_failed()
    (history,) = backend.history(flow_run_id, "make").values()
    reported = [kind for kind, _ in history]
    again = ["Retrying", "Running", "Failed"] if max_retries else []
    assert reported == ["Running", "Failed", *again]
    assert heard == reported
    assert "path {i}.csv: TypeError: PandasResult stores a pandas DataFrame" in history[1][1]


@from_0_12
def test_a_path_that_cannot_be_filled_is_reported_once(backend):
    heard = []

    @task(
        state_handlers=[lambda task, old, new: heard.append(type(new).__name__)],
        **stored("{missing}.csv"),
    )
    def make(i):
        return FRAME

    with Flow("fails") as flow:
        make(1)
    flow_run_id = run_here(backend, on_disk(flow))
    ((reported,),) = backend.history(flow_run_id, "make").values()
    assert reported[0] == "Failed" and "the field 'missing' is missing" in reported[1]
    assert heard == ["Running", "Failed"]


@from_0_12
def test_a_loop_is_written_once_under_a_backend(backend, log):
    @task(**stored("{start}.csv"))
    def count(start):
        so_far = prefect.context.get("task_loop_result", start)
        if so_far < 3:
            raise signals.LOOP(result=so_far + 1)
        return FRAME

    with Flow("loop") as flow:
        count(0)
    on_disk(flow)
    for _ in range(2):
        flow_run_id = run_here(backend, flow)
        assert backend.state(flow_run_id).is_successful()
    (history,) = backend.history(flow_run_id, "count").values()
    assert history == [("Success", FOUND.format("0.csv"))]
    assert log(logging.INFO).count("Wrote 0.csv") == 1


@from_0_12
def test_a_target_is_reported_as_loaded(backend, log):
    @task(target="{i}.csv", result=PandasResult())
    def make(i):
        return FRAME

    with Flow("target") as flow:
        make(1)
    on_disk(flow)
    for last in ("Success", "Cached"):
        flow_run_id = run_here(backend, flow)
        (history,) = backend.history(flow_run_id, "make").values()
        assert history[-1][0] == last
    assert history == [("Cached", FOUND.format("1.csv"))]
    assert log(logging.INFO).count("Wrote 1.csv") == 1


@from_0_12
def test_a_damaged_file_is_kept_beside_the_new_one_under_a_backend(backend):
    Path("1.parquet").write_text("damaged")
    calls = Calls()
    with Flow("damaged") as flow:
        calls.make(**stored("{id}.parquet"))(1)
    flow_run_id = run_here(backend, on_disk(flow))
    assert backend.state(flow_run_id).is_successful() and calls == [1]
    (aside,) = [name for name in files() if ".unreadable-" in name]
    assert Path(aside).read_text() == "damaged"
    assert_frame_equal(pandas.read_parquet("1.parquet"), FRAME.assign(id=1))


@from_0_12
def test_recomputing_a_task_that_is_not_there_is_refused_under_a_backend(backend):
    calls = Calls()
    with Flow("refused") as flow:
        calls.make()(1)
    flow_run_id = run_here(backend, on_disk(flow), recompute="mkae")
    final = backend.state(flow_run_id)
    assert final.is_failed() and calls == []
    assert "recompute='mkae' matches no task" in final.message


SLEEP = """
    @task
    def sleep(i):
        note("sleep", i)
        for _ in range(1500):
            time.sleep(0.1)

    with Flow("sleep") as flow:
        sleep.map([0, 1])
    executor = DSExecutor(flow, %s)
"""


@has_executors
@pytest.mark.parametrize(
    "executing, executor",
    [(agent, "None"), (by_hand, "prefect_ds.LocalDaskExecutor(num_workers=2)")],
    ids=["agent", "threads"],
)
def test_cancelling_ends_what_runs(executing, executor, backend):
    threads = LocalDaskExecutor()
    with threads.start():
        if executor != "None" and not isinstance(threads._pool, concurrent.futures.Executor):
            pytest.skip("Below Prefect 1.0 the flow run ends when its threads do.")
    flow_run_id = backend.create(backend.register(flow_of(SLEEP % executor)))

    def cancel():
        wait_until(noted)
        backend.cancel(flow_run_id)

    with executing(backend) as execute, concurrent.futures.ThreadPoolExecutor(1) as pool:
        cancelled = pool.submit(cancel)
        final = execute(backend, flow_run_id, timeout=100)  # Machines may be busy.
        cancelled.result()
    assert type(final) is state.Cancelled


# Results that nobody needs any more ----------------------------------------------------------


@pytest.mark.parametrize("executor", ["local", "synchronous"])
def test_a_chain_needs_two_frames(executor, counted):
    assert run(chain(9), executor=EXECUTORS[executor]()).is_successful()
    assert peak == [2] and not alive


@pytest.mark.parametrize("executor", ["local", "synchronous"])
def test_a_map_needs_two_frames(executor, counted):
    flow = mapped(20)
    state = run(flow, executor=EXECUTORS[executor]())
    assert state.result[flow.total].result == 20
    assert peak == [2] and not alive


@pytest.mark.parametrize("executor", ["threads", "dask"])
def test_a_map_needs_two_frames_for_each_worker(executor, counted):
    flow = mapped(30)
    state = run(flow, executor=EXECUTORS[executor]())
    assert state.result[flow.total].result == 30
    if PURGES_ON_DASK:
        assert peak[0] <= 2 * 2 + 2


@purges_on_dask
def test_frames_in_processes_never_come_to_the_process_that_runs_the_flow(counted):
    with Flow("processes") as flow:
        here = here_alive.map(step.map(load.map(numbers(20))))
    executor = LocalDaskExecutor(scheduler="processes", num_workers=2)
    children = run(flow, executor=executor).result[here].map_states
    assert [child.result for child in children] == [1] * 20, "on the workers"
    assert not peak, "in the process that runs the flow"


@takes_flatten
def test_a_map_that_is_flattened_is_as_wide_in_the_next_round():
    attempts.clear()

    @task(max_retries=1, retry_delay=timedelta(0))
    def flaky():
        fail_at_first(1, 1)

    with Flow("flattened") as flow:
        lists = task(lambda n: list(range(n)), name="lists").map([2, 3])
        result = task(lambda x: x, name="items").map(prefect.flatten(lists))
        flaky()
    states = run(flow).result
    assert states[result].result == [0, 1, 0, 1, 2]
    assert states[lists].result == [None] * 2, "nobody reads them any more"


def test_two_maps_that_meet_need_three_frames(counted):
    with Flow("zip") as flow:
        n = numbers(10)
        one, other = load.map(n), load.map(n)
        total(count.map(one))
        total(count.map(both.map(one, other)))
    assert run(flow).is_successful()
    assert peak == [3] and not alive


@takes_flatten
def test_a_map_that_is_flattened_is_dropped_in_the_end(counted):
    two = task(lambda i: [new_part(), new_part()], name="two")
    with Flow("flat") as flow:
        parts = two.map(numbers(2))
        count.map(prefect.flatten(parts))
    state = DSFlowRunner(flow).run(return_tasks=flow.tasks)
    assert state.is_successful() and peak == [4]
    assert state.result[parts].result == [None] * 2 and not alive

    del state
    given = [Part()]
    begun = Mapped(map_states=[Success(result=given), Pending()])
    state = DSFlowRunner(flow).run(return_tasks=flow.tasks, task_states={parts: begun})
    assert state.is_successful() and state.result[parts].result[0] == given
    assert [len(items) for items in state.result[parts].result] == [1, 2]
    assert len(alive) == 3, "what becomes of a child goes into the caller's own map"


@purges_on_dask
def test_what_ends_after_all_that_could_read_it_is_dropped(counted):
    has_begun, may_end = threading.Event(), threading.Event()

    @task
    def make(part, i):
        if i == 2:
            has_begun.set()
            assert may_end.wait(60)
        return new_part(part)

    @task
    def meet(one, other, i):
        assert i == 0 or has_begun.wait(60)
        return 1

    @task
    def end(counts):
        may_end.set()
        return sum(counts)

    with Flow("unequal") as flow:
        three, two = numbers(3), numbers(2)
        longer = make.map(load.map(three), three)
        end(meet.map(longer, load.map(two), two))
    executor = LocalDaskExecutor(scheduler="threads", num_workers=2)
    state = DSFlowRunner(flow).run(executor=executor, return_tasks=flow.tasks)
    assert state.is_successful()
    assert state.result[longer].result == [None] * 3 and not alive


def test_a_task_that_reduces_lets_go_of_all_frames(counted):
    @task
    def reduce(parts):
        return len(parts)

    with Flow("reduce") as flow:
        first = reduce(load.map(numbers(5)))
        load(first)
    state = run(flow)
    assert state.is_successful()
    assert peak == [5] and len(alive) == 1, "the terminal result is kept"


def test_a_list_that_is_mapped_over_is_dropped(counted):
    @task
    def parts():
        return [new_part() for _ in range(5)]

    with Flow("list") as flow:
        total(count.map(parts()))
    assert run(flow).is_successful()
    assert not alive


def test_a_frame_that_is_not_mapped_over_is_dropped_after_its_last_reader(counted):
    with Flow("unmapped") as flow:
        frame = load(0)
        first = total(count.map(both.map(load.map(numbers(4)), unmapped(frame))))
        load(first)
    state = run(flow)
    assert state.is_successful()
    assert peak == [3] and len(alive) == 1


@on_each_that_purges
def test_an_error_does_not_hold_the_frames_that_it_has_seen(executor, counted):
    @task
    def fail(part):
        local = [part]
        raise ValueError(len(local))

    with Flow("errors") as flow:
        failures = fail.map(load.map(numbers(20)))
    state = run(flow, executor=EXECUTORS[executor]())
    assert all(child.is_failed() for child in state.result[failures].map_states)
    assert peak[0] <= (2 if executor == "local" else 2 * 2 + 2)
    assert executor == "dask" or not alive


def test_a_skipped_task_does_not_hold_its_inputs(counted):
    @task
    def skip(part):
        raise signals.SKIP("no")

    with Flow("skip") as flow:
        skip.map(load.map(numbers(5)))
    assert run(flow).is_successful()
    assert peak[0] <= 2 and not alive


@on_each_executor
def test_purges_upstream_tasks(executor):
    with Flow("purge") as flow:
        initial = Calls().make()(1)
        doubled = double(initial)
        final = double(doubled)
    state = DSFlowRunner(flow).run(return_tasks=flow.tasks, executor=executor())
    if PURGES_ON_DASK or executor in (EXECUTORS["local"], EXECUTORS["synchronous"]):
        for purged in (initial, doubled):
            assert state.result[purged].is_successful()
            assert state.result[purged]._result is PurgedResult
            assert state.result[purged].result is None
    assert_frame_equal(state.result[final].result, FRAME.assign(id=1) * 4)


@task
def double(frame):
    return frame * 2


def test_keeps_what_is_tagged_cached_or_terminal():
    with Flow("keep") as flow:
        make = Calls().make
        tagged = make(tags=["prefect-ds:keep"])(1)
        cached = make(cache_for=datetime.timedelta(minutes=1))(2)
        purged = make()(3)
        final = [double(result) for result in (tagged, cached, purged)]
    state = run(flow)
    for kept in [tagged, cached, *final]:
        assert isinstance(state.result[kept].result, pandas.DataFrame)
    assert state.result[purged]._result is PurgedResult


attempts = []


def fail_at_first(i, fails):
    attempts.append(i)
    if i == 1 and attempts.count(1) <= fails:
        raise ValueError("not yet")


def retried(fails, width=3):
    """A map whose child number 1 fails at first, reading what was loaded for it."""
    attempts.clear()

    @task(max_retries=2, retry_delay=datetime.timedelta(0))
    def flaky(part, i):
        fail_at_first(i, fails)
        return new_part(part)

    with Flow("retry") as flow:
        n = numbers(width)
        flow.loaded = load.map(n)
        flow.flaky = flaky.map(flow.loaded, n)
        flow.total = total(count.map(flow.flaky))
    return flow


@pytest.mark.parametrize("fails", [1, 2])
@on_each_executor
def test_inputs_of_a_retry_are_kept_until_it_has_finished(executor, fails):
    flow = retried(fails)
    state = run(flow, executor=executor())
    assert state.result[flow.total].result == 3
    for child in state.result[flow.loaded].map_states if PURGES_ON_DASK else ():
        assert child._result is PurgedResult


@pytest.mark.parametrize("executor", ["local", pytest.param("threads", marks=purges_on_dask)])
def test_what_is_kept_in_files_is_dropped_in_a_later_round_too(executor, counted_tables):
    calls = []

    @task(max_retries=1, retry_delay=timedelta(0), **stored("{i}.pkl"))
    def make(i):
        calls.append(i)
        if i == 3 and calls.count(3) == 1:
            raise ValueError("once")
        return table()

    @task
    def read(frames):
        tables.extend(map(weakref.ref, frames))
        return len(frames)

    @task
    def look():
        return tables_alive()

    with Flow("kept") as flow:
        made = make.map([1, 2, 3, 4])
        looked = look(upstream_tasks=[read(made)])
    flow.set_reference_tasks([made, looked])
    final = run(flow, executor=EXECUTORS[executor]())
    assert sorted(calls) == [1, 2, 3, 3, 4] and final.is_successful()
    assert final.result[looked].result == 0


def test_inputs_of_a_retry_are_all_that_is_kept(counted):
    flow = retried(1)
    first = DSFlowRunner(flow).run(return_tasks=flow.tasks)
    assert first.is_running()
    loaded = [child._result is PurgedResult for child in first.result[flow.loaded].map_states]
    assert loaded == [True, False, True]
    second = DSFlowRunner(flow).run(return_tasks=flow.tasks, task_states=first.result)
    assert second.is_successful() and second.result[flow.total].result == 3
    del first, second
    assert not alive


def test_states_of_the_caller_are_not_touched():
    with Flow("caller") as flow:
        make = Calls().make()(1)
        final = double(make)
    given = Success(result=FRAME)
    state = DSFlowRunner(flow).run(return_tasks=[make, final], task_states={make: given})
    assert_frame_equal(given.result, FRAME)
    assert_frame_equal(state.result[final].result, FRAME * 2)


@from_0_12
@on_local_and_threads
def test_what_becomes_of_children_in_a_map_of_the_caller_stays(executor):
    with Flow("caller") as flow:
        parts = task(lambda i: FRAME, name="part").map([1, 2])
        result = task(lambda parts: len(parts), name="result")(parts)
    mine = state.Mapped(map_states=[Success(result=FRAME), state.Pending()])
    for _ in range(2):
        final = DSFlowRunner(flow).run(
            return_tasks=flow.tasks, task_states={parts: mine}, executor=EXECUTORS[executor]()
        )
        assert final.result[result].result == 2
        for child in mine.map_states:
            assert_frame_equal(child.result, FRAME)


def test_a_state_that_a_handler_returns_is_not_touched():
    known = Success("known", result=FRAME)

    def knows(task, old_state, new_state):
        return known if new_state.is_running() else new_state

    with Flow("known") as flow:
        one, other = (task(lambda: None, name=n, state_handlers=[knows])() for n in ("a", "b"))
        result = task(lambda one, other: one.equals(other), name="equals")(one, other)
    for _ in range(2):
        final = run(flow)
        assert final.result[result].result is True
        assert final.result[one]._result is PurgedResult
        assert_frame_equal(known.result, FRAME)


def test_a_map_of_the_caller_is_not_touched_though_its_children_were_purged():
    with Flow("caller") as flow:
        parts = load.map(numbers(2))
        total(count.map(parts))
    given = DSFlowRunner(flow).run(return_tasks=[parts]).result[parts]
    assert [child._result for child in given.map_states] == [PurgedResult] * 2
    given.result = ["the", "caller's"]
    DSFlowRunner(flow).run(task_states={parts: given})  # Prefect changes it if it is to return it.
    assert given.result == ["the", "caller's"]


def test_a_task_does_not_run_on_a_purged_result():
    ran = []

    @task
    def read(frame):
        ran.append(frame)

    with Flow("stale") as flow:
        make = Calls().make(name="source")(1)
        result = read(make)
    first = run(flow)
    heard = []
    result.state_handlers.append(lambda task, old, new: heard.append(new))
    state = DSFlowRunner(flow).run(return_tasks=[result], task_states={make: first.result[make]})
    assert state.is_failed() and len(ran) == 1
    message = str(state.result[result].message)
    assert "'source'" in message and "prefect-ds:keep" in message and "task_states" in message
    assert heard and heard[-1].is_failed()


def test_a_map_does_not_run_over_a_purged_list():
    with Flow("stale") as flow:
        source = numbers(3)
        result = load.map(source)
    first = run(flow)
    state = DSFlowRunner(flow).run(
        return_tasks=[result], task_states={source: first.result[source]}
    )
    assert state.is_failed() and state.result[result].is_failed()


def test_dependencies_without_data_are_kept():
    order = []

    @task
    def note(i):
        order.append(i)
        return new_part()

    with Flow("order") as flow:
        first = note(1)
        second = note(2, upstream_tasks=[first])
        note(3).set_upstream(second)
        note.map([4, 5], upstream_tasks=[unmapped(second)])
    assert run(flow).is_successful()
    assert order[:2] == [1, 2] and sorted(order[2:]) == [3, 4, 5]


def test_a_long_chain_does_not_recurse():
    with Flow("long") as flow:
        result = numbers(0)
        for _ in range(300):
            result = pass_on(result)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        state = run(flow)
    finally:
        sys.setrecursionlimit(limit)
    assert state.is_successful()


def test_other_executors_run_as_without_it():
    class Other(type(LocalExecutor()).__mro__[1]):
        def submit(self, fn, *args, extra_context=None, **kwargs):
            return fn(*args, **kwargs)

        def map(self, fn, *args):
            return [fn(*a) for a in zip(*args)]

        def wait(self, futures):
            return futures

    flow = mapped(3)
    assert run(flow, executor=Other()).result[flow.total].result == 3


@pytest.mark.parametrize("fresh", [0, 1])
def test_a_flow_within_a_task_runs_on_its_own(fresh):
    @task(**stored("{id}.csv"))
    def outer(id):
        with Flow("inner") as inner:
            Calls().make(name="inner", **stored("inner.csv"))(9)
        assert (
            FlowRunner(inner).run(task_runner_state_handlers=[checkpoint_handler]).is_successful()
        )
        return FRAME

    with Flow("outer") as flow:
        outer(1)
    assert run(flow).is_successful()
    assert files() == ["1.csv", "inner.csv"]


# -- errors, executors of one's own, and what is kept


def locals_of(error):
    """The local variables that a debugger shows of the call that has failed."""
    while error.__traceback__.tb_next is not None:
        error = error.with_traceback(error.__traceback__.tb_next)
    return error.__traceback__.tb_frame.f_locals


def test_a_debugger_shows_all_but_the_data():
    @task
    def fail(frame):
        factor, twice = 3, {"twice": [frame * 2]}
        raise ValueError((lambda: factor)(), len(twice))

    with Flow("debug") as flow:
        made = Calls().make()(1)
        failure = fail.map(frame=[1, 2], upstream_tasks=[unmapped(made)])
        alone = fail(made)
    state = run(flow)
    seen = locals_of(state.result[alone].result)
    assert "frame" not in seen or "DataFrame" in str(seen["frame"])
    assert not any(isinstance(value, pandas.DataFrame) for value in seen.values())
    assert all(child.is_failed() for child in state.result[failure].map_states)


class BrokenClient:
    """Keeps the error that broke it, and raises it for everyone."""

    error = ConnectionError("broken")

    def get(self):
        raise self.error


@pytest.mark.parametrize("has_closure", [False, True])
def test_an_error_takes_nothing_from_a_task_that_runs_in_another_thread(has_closure):
    client, caught, failed_there = BrokenClient(), threading.Event(), threading.Event()

    def fail():
        caught.wait(30)
        try:
            client.get()
        finally:
            threading.Timer(0.5, failed_there.set).start()

    def forgive(i):
        frame = pandas.DataFrame({"i": [i]})
        if i == 1:
            fail()
        with suppress(ConnectionError):
            client.get()
        caught.set()
        failed_there.wait(30)
        return frame

    def forgive_in_a_closure(i):
        frame = pandas.DataFrame({"i": [i]})
        if i == 1:
            fail()
        with suppress(ConnectionError):
            client.get()
        return [caught.set(), failed_there.wait(30), (lambda: frame)()][-1]

    with Flow("one error") as flow:
        result = task(forgive_in_a_closure if has_closure else forgive, name="get").map([0, 1])
    executor = LocalDaskExecutor(scheduler="threads", num_workers=2)
    good, bad = run(flow, executor=executor).result[result].map_states
    assert bad.is_failed() and isinstance(bad.result, ConnectionError)
    assert_frame_equal(good.result, pandas.DataFrame({"i": [0]}))


class Row:
    """An object that is not asked for what it has in ways that it does not expect."""

    __slots__ = ("columns",)

    def __init__(self, **columns):
        self.columns = columns

    def __getattr__(self, name):
        return self.columns[name]


def test_an_error_is_that_of_the_task_whatever_its_variables_are():
    @task
    def fail():
        row = Row(a=1)
        raise ValueError(row.a)

    with Flow("row") as flow:
        failure = fail()
    assert isinstance(failed(run(flow), failure), ValueError)


@pytest.mark.parametrize(
    "hide",
    [
        lambda frame: frame.to_numpy(),
        lambda frame: iter([frame]),
        lambda frame: functools.partial(pandas.concat, frame),
        lambda frame: frame.sum,
        lambda frame: Row(frame=frame),
        lambda frame: {1: {2: {3: {4: frame}}}},
        lambda frame: lambda: frame,
    ],
    ids=["array", "iterator", "partial", "method", "slots", "nested", "closure"],
)
def test_an_error_holds_no_data_wherever_it_is(hide, counted_tables):
    @task
    def fail(frame):
        hidden = hide(frame)
        raise ValueError(hidden is None)

    with Flow("hidden") as flow:
        failure = fail.map(task(lambda i: table(), name="make").map([1, 2, 3]))
    state = run(flow)
    assert state.is_failed() and len(state.result[failure].map_states) == 3
    assert tables_alive() == 0


def fail_over(*anything):
    raise ValueError(len(anything))


def raise_in_a_generator_expression(frame):
    return sum(fail_over(frame, cell) for cell in frame.columns)


def raise_in_a_generator(frame):
    def rows():
        yield fail_over(frame)

    return list(rows())


def raise_in_an_inner_function(frame):
    return frame.apply(lambda column: fail_over(frame, column))


def raise_with_a_cause(frame):
    try:
        fail_over(frame)
    except ValueError:
        raise RuntimeError("with a cause and a context") from KeyError("cause")


def raise_a_group(frame):
    errors = []
    for part in (frame, frame.copy()):
        try:
            fail_over(part)
        except ValueError as error:
            errors.append(error)
    group = getattr(builtins, "ExceptionGroup", lambda message, errors: errors[0])
    raise group("all", errors)


@pytest.mark.parametrize(
    "fail",
    [
        raise_in_a_generator_expression,
        raise_in_a_generator,
        raise_in_an_inner_function,
        raise_with_a_cause,
        raise_a_group,
    ],
)
def test_an_error_holds_no_data_wherever_it_was_raised(fail, counted_tables):
    with Flow("raised") as flow:
        failure = task(fail, name="fail").map(task(lambda i: table(), name="make").map([1, 2, 3]))
    state = run(flow)
    assert state.is_failed() and len(state.result[failure].map_states) == 3
    assert tables_alive() == 0


def test_a_function_that_has_raised_keeps_what_it_shares():
    kept = []

    @task
    def fail(frame):
        def inner():
            if "go on" in kept:
                return frame
            raise ValueError(len(frame))

        kept.append(inner)
        inner()

    @task
    def fail_in_another(frame):
        def inner():
            raise ValueError(len(frame))

        kept.append(lambda: frame)
        inner()

    with Flow("kept") as flow:
        frame = task(lambda: FRAME, name="make")()
        failures = [fail(frame), fail_in_another(frame)]
    final = run(flow)
    assert all(isinstance(failed(final, failure), ValueError) for failure in failures)
    kept.append("go on")
    for function in kept[:2]:
        assert_frame_equal(function(), FRAME)


def test_a_debugger_shows_what_is_not_data():
    @task
    def fail(frame, number):
        factor, frames = 3, [frame]
        raise ValueError(len(frames) * factor)

    with Flow("debug") as flow:
        failure = fail(Calls().make()(1), pass_on(7))
    seen = locals_of(run(flow).result[failure].result)
    assert (seen["factor"], seen["number"]) == (3, 7)
    assert seen["frame"] == "<DataFrame that the task had, let go of>"
    assert seen["frames"] == "<list that the task had, let go of>"


def test_a_generator_that_has_seen_an_error_goes_on():
    def careful():
        frame = FRAME
        for number in range(3):
            try:
                raise ValueError(number, len(frame))
            except ValueError as error:
                caught = error
            yield caught

    shared = careful()

    @task(max_retries=1, retry_delay=timedelta(0))
    def fail(part):
        raise RuntimeError("in the task") from next(shared)

    with Flow("generator") as flow:
        fail(pass_on(1))
    assert run(flow).is_failed()
    assert next(shared).args == (2, len(FRAME))


def test_an_error_that_is_being_handled_keeps_its_variables():
    def fail():
        frame = FRAME
        raise ValueError(len(frame))

    @task
    def fail_too():
        raise KeyError("in the flow")

    with Flow("handled") as flow:
        fail_too()
    try:
        fail()
    except ValueError as error:
        assert run(flow).is_failed()
        assert locals_of(error)["frame"] is FRAME


def with_a_submit_of_its_own(executor_cls):
    class Own(executor_cls):
        submitted = 0

        def submit(self, fn, *args, **kwargs):
            self.submitted += 1
            return super().submit(fn, *args, **kwargs)

    return Own


def test_an_executor_with_a_submit_of_its_own_is_used():
    flow, executor = mapped(3), with_a_submit_of_its_own(LocalExecutor)()
    assert run(flow, executor=executor).result[flow.total].result == 3
    assert executor.submitted >= 3 * 5


def test_an_executor_that_would_be_passed_over_runs_the_flow_itself(log):
    flow = mapped(3)
    executor = with_a_submit_of_its_own(LocalDaskExecutor)(scheduler="synchronous")
    assert run(flow, executor=executor).result[flow.total].result == 3
    assert executor.submitted > 0
    assert log(logging.WARNING).count("Own has a submit of its own") == 1


def test_an_executor_that_is_not_known_runs_the_flow_itself(log):
    class Other(prefect_ds.Executor):
        def submit(self, fn, *args, **kwargs):
            return fn(*args, **{k: v for k, v in kwargs.items() if k != "extra_context"})

        def map(self, fn, *args):
            return list(map(fn, *args))

        def wait(self, futures):
            return futures

    flow = mapped(3)
    assert run(flow, executor=Other()).result[flow.total].result == 3
    assert log(logging.WARNING).count("Of the executor Other nothing is known") == 1


def test_a_flow_that_cannot_begin_fails_as_prefects():
    with Flow("one") as flow:
        pass_on(1)
    with Flow("other"):
        stranger = pass_on(2)
    ours = DSFlowRunner(flow).run(return_tasks=[stranger])
    theirs = FlowRunner(flow).run(return_tasks=[stranger])
    assert ours.is_failed() and ours.message == theirs.message


def test_a_required_parameter_that_is_missing_is_missed():
    with Flow("required") as flow:
        result = pass_on(Parameter("x"))
    ours = DSFlowRunner(flow).run(return_tasks=[result])
    theirs = FlowRunner(flow).run(return_tasks=[result])
    assert ours.is_failed() and type(ours) is type(theirs)
    assert type(ours.result[result]) is type(theirs.result[result])


def test_a_trigger_of_ones_own_may_look_at_results():
    seen = []

    def look(upstream_states):
        states = getattr(upstream_states, "values", lambda: upstream_states)()
        seen.extend(upstream_state.result for upstream_state in states)
        return True

    with Flow("trigger") as flow:
        first = pass_on(1)
        pass_on(first)
        task(lambda: None, name="looking", trigger=look)(upstream_tasks=[first])
    assert run(flow).is_successful()
    assert seen == [1]


@on_each_executor
def test_what_no_other_task_reads_is_kept(executor):
    with Flow("kept") as flow:
        made = pass_on(1)
        result = pass_on(made)
        pass_on(0, upstream_tasks=[result])
        middle = pass_on(2)
        flow.set_reference_tasks([middle, pass_on(middle)])
    state = run(flow, executor=executor())
    assert state.result[result].result == 1 and state.result[middle].result == 2
    if PURGES_ON_DASK or executor in (EXECUTORS["local"], EXECUTORS["synchronous"]):
        assert state.result[made]._result is PurgedResult


def test_the_cleanup_of_a_resource_leaves_what_was_made_with_it():
    resource_manager = getattr(prefect, "resource_manager", None)
    if resource_manager is None:
        pytest.skip("This release has no resource managers.")

    class Connection:
        def setup(self):
            return [1, 2]

        def cleanup(self, resource):
            pass

    with Flow("resource") as flow, resource_manager(Connection)() as connection:
        result = total(connection)
    assert run(flow).result[result].result == 3


@purges_on_dask
@pytest.mark.parametrize("executor", ["synchronous", "threads"])
def test_runs_only_what_is_asked_for_where_prefect_does(executor):
    def computed(flow_runner_cls):
        calls = Calls()
        with Flow("subset") as flow:
            made = calls.make().map([1, 2, 3])
            result = task(lambda frame, number: number, name="zip").map(made, [1])
        state = flow_runner_cls(flow).run(return_tasks=[result], executor=EXECUTORS[executor]())
        assert [child.result for child in state.result[result].map_states] == [1]
        return calls

    assert computed(DSFlowRunner) == computed(FlowRunner) == [1]


@on_each_executor
def test_maps_over_one_list_twice(executor):
    with Flow("twice") as flow:
        parts = task(lambda: [FRAME, FRAME + FRAME], name="parts")()
        both_ways = task(lambda one, other: one.equals(other)).map(parts, other=parts)
    state = run(flow, executor=executor())
    assert state.is_successful() and state.result[both_ways].result == [True, True]


@purges_on_dask
def test_a_purged_state_keeps_its_message_on_a_cluster():
    @task
    def say():
        raise signals.SUCCESS("said so", result=[1])

    with Flow("message") as flow:
        said = say()
        pass_on(pass_on(said))
    purged = run(flow, executor=dask_executor()).result[said]
    assert purged._result is PurgedResult and purged.message == "said so"


@on_each_that_purges
def test_what_a_reduce_has_read_does_not_wait_for_the_tasks_behind_it(executor, counted):
    with Flow("behind") as flow:
        reduced = task(lambda parts: new_part(), name="reduce")(load.map(numbers(10)))
        # On a cluster, what nobody needs is gone some time later.
        wait = task(lambda part: wait_until(lambda: parts_alive() <= 2, timeout=5), name="wait")
        wait(step(step(reduced)))
    assert run(flow, executor=EXECUTORS[executor]()).is_successful()


@on_each_that_purges
def test_a_width_that_is_waited_for_keeps_no_frames_alive(executor, counted):
    with Flow("widths") as flow:
        parts = [load.map(list(range(10))) for _ in range(3)]
        for part in parts:
            total(count.map(step.map(part)))
            total(pass_on.map(numbers(total(numbers(3)))))
    assert run(flow, executor=EXECUTORS[executor]()).is_successful()
    assert peak[0] <= (2 if executor == "local" else 2 * 2 + 2)


# Progress ------------------------------------------------------------------------------------


def map_of_four():
    @task(**stored("{id}.csv"))
    def make(id):
        if id == 2:
            raise ValueError(id)
        return FRAME

    with Flow("progress") as flow:
        make.map([0, 1, 2, 3])
    return flow


@on_each_executor
def test_says_how_far_a_long_map_is(executor, log, impatient):
    FRAME.to_csv("1.csv")
    ours = executor()
    run(map_of_four(), executor=ours)
    lines = [line for line in log(logging.INFO).splitlines() if line.startswith("Mapped task runs")]
    if prefect_ds._backend_for(ours, logging.getLogger()) is None:
        assert not lines
    else:
        assert len(lines) > 1
        assert (
            lines[-1] == "Mapped task runs: 4 of 4 done, 1 found, 0 read, 1 failed, 0 results alive"
        )


def test_says_nothing_of_a_short_map(log):
    run(map_of_four())
    assert "Mapped task runs" not in log(logging.INFO)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="There are no terminals of this kind.")
@pytest.mark.parametrize("is_terminal", [True, False])
def test_shows_a_bar_on_a_terminal(is_terminal, impatient, monkeypatch):
    pytest.importorskip("tqdm")
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    readable, pipe = os.pipe()
    with open(terminal if is_terminal else pipe, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        run(map_of_four())
        stderr.write("end")
        stderr.flush()
        shown = b""
        while not shown.endswith(b"end"):
            shown += os.read(controller if is_terminal else readable, 10_000)
    for descriptor in (controller, readable, pipe if is_terminal else terminal):
        os.close(descriptor)
    assert (b"mapped task runs: 100%" in shown) == is_terminal


# Faults, and flows that run long -------------------------------------------------------------


def two_stages(width=10, rows=2000, fault=lambda name: None):
    """A flow with a file for each task run, which notes the name of the file when it computes."""

    def compute(name, x):
        note(name)
        fault(name)
        return pandas.DataFrame({"x": x})

    @task(**stored("one_{i}.csv"))
    def one(i):
        return compute(f"one_{i}.csv", range(i, i + rows))

    @task(**stored("two_{i}.csv"))
    def two(frame, i):
        assert len(frame) == rows
        return compute(f"two_{i}.csv", frame.x * 2)

    @task(**stored("total.csv"))
    def total(frames):
        assert [len(frame) for frame in frames] == [rows] * width
        return compute("total.csv", [sum(int(frame.x.sum()) for frame in frames)])

    with Flow("two stages") as flow:
        ids = list(range(width))
        flow.total = total(two.map(one.map(ids), ids))
    return flow


def contents():
    """Of all files, those of the tests' own book-keeping left out."""
    return {n: Path(n).read_bytes() for n in files() if os.path.isfile(n) and "noted" not in n}


def contents_of_a_run(flow, **kwargs):
    """What a run leaves in a folder in which nothing has happened before."""
    os.mkdir("fresh")
    os.chdir("fresh")
    try:
        assert run(flow, **kwargs).is_successful()
        return contents()
    finally:
        os.chdir("..")
        shutil.rmtree("fresh")


def fork(call):
    """Call a function in a new process, whose exit status is 0 if it returns True."""
    process = os.fork()
    if not process:
        status = 1
        try:
            status = 0 if call() else 1
        finally:
            sys.stderr.flush()
            os._exit(status)
    return process


@takes_posix
def test_a_flow_that_was_killed_goes_on_where_it_was():
    seed = random.randrange(10**6)
    kills = in_another_process(f"kill_flows({seed})")[-1]
    assert int(kills), f"no kill hit the flow; seed {seed}"


def kill_flows(seed):
    dice = random.Random(seed)
    logging.disable(logging.CRITICAL)
    flow = two_stages()
    whole = contents_of_a_run(flow)
    kills, status = 0, None
    while status != 0:
        finished, start = contents(), len(noted())
        process = fork(lambda: run(flow).is_successful())
        victim = start + dice.randrange(1, 7)
        done = 0
        while not done and len(noted()) < victim:
            done, status = os.waitpid(process, os.WNOHANG)
            time.sleep(0.0005)
        if not done:
            time.sleep(dice.random() * 0.02)
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
        assert status == 0 or os.WIFSIGNALED(status), f"it failed after {kills} kills; seed {seed}"
        kills += status != 0
        computed = noted()[start:]
        assert not finished.keys() & set(computed), f"seed {seed}"
        assert len(set(computed) - contents().keys()) <= 1, f"only one is under way; seed {seed}"
    assert contents() == whole, f"seed {seed}"
    print(kills)


@contextmanager
def cluster_of_processes(**environment):
    """The address of a scheduler with two workers: each a process that runs Dask's own command."""
    common = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", "noted-cluster.json"]
    processes = []

    def start(name, *options):
        command = (f"distributed.cli.dask_{name}", *common, *options)
        args = (command, f"noted-{name}.log", environment)
        processes.append(new_processes().Process(target=_run_module, args=args))
        processes[-1].start()

    from distributed import Client
    from distributed.utils import json_load_robust

    start("scheduler", "--port", "0")
    try:
        for _ in range(2):
            start(
                "worker", "--nthreads", "1", "--no-nanny", "--local-directory", "dask-worker-space"
            )
        while not os.path.exists("noted-cluster.json"):
            assert processes[0].is_alive(), Path("noted-scheduler.log").read_text()
            time.sleep(0.01)
        # The file may be there before it is written to the end.
        address = json_load_robust("noted-cluster.json")["address"]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2)
        yield address
    finally:
        for process in reversed(processes):
            process.kill()
            process.join()


def _run_module(command, log, environment):
    """What `python -m` does with the command."""
    with open(log, "ab") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    dask.config.refresh()
    sys.argv[1:] = command[1:]
    runpy.run_module(command[0], run_name="__main__")


def die_once(victim):
    def die(name):
        if name == victim and not os.path.exists("noted-death"):
            note(os.getpid(), "noted-death")
            os.kill(os.getpid(), signal.SIGKILL)

    return die


@takes_posix
@pytest.mark.parametrize("allowed_failures", [0, 3])
def test_a_flow_whose_worker_was_killed_goes_on_where_it_was(allowed_failures, impatient):
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    whole = contents_of_a_run(two_stages())
    flow = two_stages(fault=die_once(dice.choice(["one", "two"]) + f"_{dice.randrange(10)}.csv"))
    failures = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(allowed_failures)}
    with cluster_of_processes(**failures) as address:
        first = run(flow, executor=DaskExecutor(address=address))
        assert len(noted("noted-death")) == 1
        finished, start = contents(), len(noted())
        if allowed_failures:
            assert first.is_successful(), f"seed {seed}"
        else:
            # Below 0.12 the task fails that has asked for what was lost, else the flow.
            assert first.is_failed() and "KilledWorker" in f"{first.message} {first.result}"
        second = run(flow, executor=DaskExecutor(address=address))
        assert second.is_successful(), f"seed {seed}"
    assert not finished.keys() & set(noted()[start:]), f"seed {seed}"
    assert contents() == whole, f"seed {seed}"


#: How many flow runs begin at once.
RUNS = 100

#: Of files that others write meanwhile, some are newer than what was made from them.
BY_OTHERS = "is older than"


def test_many_runs_at_once_in_threads(log):
    flow = two_stages(width=2)
    whole = contents_of_a_run(flow)
    start = threading.Barrier(RUNS)
    totals = []

    def once():
        start.wait()
        totals.append(int(run(flow).result[flow.total].result.x[0]))

    threads = [threading.Thread(target=once) for _ in range(RUNS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(totals) == RUNS and len(set(totals)) == 1
    assert contents() == whole
    assert log(logging.ERROR) == ""
    assert [text for text in log(logging.WARNING).splitlines() if BY_OTHERS not in text] == []


@takes_posix
def test_many_runs_at_once_in_processes():
    in_another_process("run_at_once()")


def run_at_once():
    flow = two_stages(width=2)
    whole = contents_of_a_run(flow)
    warned = []
    handler = logging.Handler(logging.WARNING)
    handler.addFilter(lambda record: BY_OTHERS not in record.getMessage())
    handler.emit = warned.append
    logging.getLogger("prefect").handlers = [handler]
    waiting, go = os.pipe()

    def once():
        os.close(go)
        os.read(waiting, 1)  # until all are there
        total = run(flow).result[flow.total].result
        return total.to_csv(index=False).encode() == whole["total.csv"] and not warned

    processes = [fork(once) for _ in range(RUNS)]
    os.close(go)
    assert [os.waitpid(process, 0)[1] for process in processes] == [0] * RUNS
    assert contents() == whole


#: The width of the long run.
LONG = int(os.environ.get("PREFECT_DS_LONG", 3000))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes /proc")
def test_memory_is_flat_in_a_long_run():
    early, late = map(int, in_another_process("run_long()")[-1].split())
    assert late - early < 40, f"{early} MB after {LONG // 20} children, {late} MB after {LONG}"


def run_long():
    logging.disable(logging.CRITICAL)
    used = []

    @task
    def make(i):
        return pandas.DataFrame(0.5, index=range(125000), columns=["x"])  # 1 MB

    @task
    def use(frame):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used.append(pages * os.sysconf("SC_PAGE_SIZE") // 2**20)
        return len(frame)

    with Flow("long") as flow:
        result = total(use.map(make.map(numbers(LONG))))
    assert run(flow).result[result].result == LONG * 125000
    print(used[LONG // 20 - 1], used[-1])


#: What is alive of the class below in this process.
_tables = weakref.WeakValueDictionary()


class Table(pandas.DataFrame):
    """A frame that notes in which process it arrives, and that can be counted."""

    def __init__(self, name):
        super().__init__({"name": [name], "x": 1})
        _tables[id(self)] = self

    def __reduce__(self):
        return _arrive, (self["name"][0],)


def _arrive(name):
    note(f"{os.getpid()} {name}", "noted-arrivals")
    return Table(name)


def new_table(name):
    """A table; noted are its name, the process, and how many are alive there."""
    table = Table(name)
    note(f"{name} {os.getpid()} {len(_tables)}")
    return table


_Distributed = namedtuple("_Distributed", "first second arrivals files")


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """Two runs of a flow on a cluster: what was computed in each, and what arrived where."""
    width = 16

    @task
    def look_up():
        return new_table("look_up")

    @task(**stored("data/load_{i:02}.pkl"))
    def load(i):
        return new_table("load")

    @task(**stored("data/join_{i:02}.pkl"))
    def join(frame, other, i):
        return new_table("join")

    @task
    def measure(frame):
        return len(frame)

    @task
    def last(other):
        return new_table("last")

    with Flow("distributed") as flow:
        ids = list(range(width))
        other = look_up()
        result = total(measure.map(join.map(load.map(ids), unmapped(other), ids)))
        end = last(other)

    folder = os.getcwd()
    os.chdir(str(tmp_path_factory.mktemp("cluster")))
    try:
        computed = []
        with cluster_of_processes() as address:
            for _ in range(2):
                before = len(noted())
                states = run(flow, executor=DaskExecutor(address=address)).result
                assert states[result].result == width
                assert list(states[end].result["name"]) == ["last"]
                computed.append([line.split() for line in noted()[before:]])
        arrivals = [line.split() for line in noted("noted-arrivals")]
        return _Distributed(*computed, arrivals, files("data"))
    finally:
        os.chdir(folder)


def test_workers_started_by_hand_share_the_work_and_the_files(distributed):
    processes = {process for _, process, _ in distributed.first}
    assert len(processes) == 2 and str(os.getpid()) not in processes
    assert distributed.files == [f"{n}_{i:02}.pkl" for n in ("join", "load") for i in range(16)]
    first, second = (Counter(name for name, *_ in computed) for computed in distributed[:2])
    assert first == {"look_up": 1, "load": 16, "join": 16, "last": 1}
    assert second == {"look_up": 1, "last": 1}


@purges_on_dask
def test_results_stay_on_the_workers_unless_they_are_terminal(distributed):
    here = [name for process, name in distributed.arrivals if process == str(os.getpid())]
    assert here == ["last", "last"]
    assert "look_up" in {name for _, name in distributed.arrivals}


@purges_on_dask
def test_workers_let_go_of_what_was_purged(distributed):
    assert max(int(alive_there) for *_, alive_there in distributed.first) <= 8


# Single features run as on Prefect's FlowRunner ----------------------------------------------


def timing_out():
    @task(timeout=1)
    def slow():
        time.sleep(3)

    @task(trigger=triggers.any_failed)
    def after(x):
        return "after"

    after(slow())


def at_a_target():
    @task(target="{x}.bin", result=LocalResult(dir=os.getcwd()), checkpoint=True)
    def write(x):
        return [x, 1]

    total(write(5))


def with_many_outputs():
    @task(nout=2)
    def pair():
        return 1, 2

    one, two = pair()
    total([one, two])


def interrupted():
    @task
    def interrupt(x):
        raise KeyboardInterrupt

    pass_on(interrupt(numbers(2)))


FEATURES = [timing_out, interrupted]
FEATURES += [at_a_target] if "target" in inspect.signature(Task.__init__).parameters else []
FEATURES += [with_many_outputs] if "nout" in inspect.signature(Task.__init__).parameters else []


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
def test_runs_a_feature_as_prefect_does(feature, tmp_path, monkeypatch):
    outcomes = []
    for flow_runner_cls in (FlowRunner, DSFlowRunner):
        folder = tmp_path / flow_runner_cls.__name__
        folder.mkdir()
        monkeypatch.chdir(folder)
        with Flow("feature") as flow:
            feature()
        for _ in range(2):
            try:
                with prefect.context(checkpointing=True):
                    final = flow.run(runner_cls=flow_runner_cls)
            except KeyboardInterrupt:
                outcomes.append("interrupted")
                continue
            states = {t.name: type(s).__name__ for t, s in (final.result or {}).items()}
            results = [final.result[t].result for t in flow.terminal_tasks() if final.result]
            outcomes.append((type(final), states, list(map(repr, results)), files()))
    assert outcomes[:2] == outcomes[2:]


def runs_on_a_schedule(flow_runner_cls, seconds):
    soon = pendulum.now("utc").add(seconds=seconds)
    calls = Calls()
    dates = [soon, soon.add(seconds=seconds)]
    with Flow("schedule", schedule=Schedule([DatesClock(dates)])) as flow:
        result = calls.make()(1)
    assert flow.run(runner_cls=flow_runner_cls).result[result].is_successful()
    return calls


def test_runs_on_a_schedule_as_prefect_does():
    for seconds in (2, 6, 18):
        runs = [runs_on_a_schedule(runner, seconds) for runner in (FlowRunner, DSFlowRunner)]
        if runs == [[1, 1], [1, 1]]:
            break  # Else a busy machine has missed a date, which Prefect leaves out.
    assert runs == [[1, 1], [1, 1]]


# Any flow runs as on Prefect's FlowRunner ----------------------------------------------------
# A plan is drawn, in plain data; a flow is built of it, twice, and run on the one runner and on
# the other. PREFECT_DS_EXAMPLES says how many plans; executors that are slower get fewer.

_EXAMPLES = int(os.environ.get("PREFECT_DS_EXAMPLES", 16))

#: `parameter` is passed if it is not None, and is required if "missing"; `given` are states by
#: the number of their task;
#: `references`: every how manieth task is a reference task, None for Prefect's choice.
_Plan = namedtuple("_Plan", "steps parameter entry given raise_on_exception references")

#: A step adds one task or a few. Child i of a map plays `scripts[i % len(scripts)]`.
_Step = namedtuple("_Step", "kind reads scripts options")

#: What a task reads, or waits for: the task that was added `back` tasks before, None: a constant.
_Read = namedtuple("_Read", "back part how")

#: What a task does when it is run first, second, ...; from then on it does the last.
_SCRIPTS = [
    ("number",),
    ("list of 2",),
    ("list of 3",),
    ("list of 1",),
    ("list of 0",),
    ("list of 4",),
    ("nested",),
    ("None",),
    ("True",),
    ("False",),
    ("raise",),
    ("raise", "number"),
    ("raise", "raise", "list of 2"),
    ("FAIL",),
    ("FAIL", "number"),
    ("SKIP",),
    ("SUCCESS",),
    ("LOOP", "LOOP", "number"),
    ("LOOP", "raise", "number"),
    ("LOOP", "SKIP"),
    ("RETRY", "number"),
    ("RETRY", "RETRY", "raise"),
]

_TRIGGERS = [
    triggers.all_failed,
    triggers.all_finished,
    triggers.any_failed,
    triggers.any_successful,
    triggers.not_all_skipped,
    triggers.some_failed(at_least=1),
    triggers.some_successful(at_least=1, at_most=2),
]


def _look_at_results(upstream_states):
    """A trigger of one's own: it may read what no argument does."""
    states = getattr(upstream_states, "values", lambda: upstream_states)()
    seen = [repr(s.result) for s in states if not (s.is_mapped() or s.is_failed())]
    note(sorted(seen), _file_of_notes("transitions"))
    return True


_TRIGGERS += [_look_at_results] * 2

_KINDS = ["task", "filter", "ifelse", "switch", "merge", "secret", "end"]
if "mapped" in inspect.signature(control_flow.merge).parameters:
    _KINDS += ["mapped ifelse", "mapped switch", "mapped merge"]
_KINDS += ["case"] if hasattr(control_flow, "case") else []
_KINDS += [name for name in ("resource_manager", "apply_map") if hasattr(prefect, name)]
_HOWS = ["data", "mapped", "waits", "mapped waits"]
_HOWS += ["flat", "flat mapped"] if hasattr(prefect, "flatten") else []


def _forgive(task, old_state, new_state):
    return state.Success(result="forgiven") if new_state.is_failed() else new_state


def _protest(task, old_state, new_state):
    if new_state.is_successful():
        raise ValueError("protest")
    return new_state


_OPTIONS = [
    {"max_retries": 1, "retry_delay": timedelta(0)},
    {"max_retries": 2, "retry_delay": timedelta(0)},
    {"skip_on_upstream_skip": False},
    {"cache_for": timedelta(days=1)},
    {"tags": ["prefect-ds:keep"]},
    {"state_handlers": [_forgive]},
    {"state_handlers": [_protest]},
]

_GIVEN = {
    "Success": lambda: state.Success(result=[1, 2]),
    "Skipped": lambda: state.Skipped(result=3),
    "Failed": lambda: state.Failed(result=ValueError("given")),
    "Pending": state.Pending,
    "Mapped": lambda: state.Mapped(map_states=[state.Success(result=4), state.Pending()]),
}


def _plans(pausing, caching):
    """Plans; those with tasks that pause do not run by `flow.run`, which would ask the user."""
    all_options = [o for o in _OPTIONS if caching or "cache_for" not in o]
    reads = st.builds(
        _Read,
        back=st.one_of(st.integers(0, 4), st.integers(0, 1), st.none()),
        part=st.sampled_from(["all", "all", "all", "all", "[0]", "in a list"]),
        how=st.sampled_from(["data", "mapped", *_HOWS]),
    )
    scripts = st.sampled_from(_SCRIPTS[:6] * 4 + _SCRIPTS + [("PAUSE", "number")] * pausing)
    all_triggers = _TRIGGERS + [triggers.manual_only] * pausing
    options = st.sampled_from(all_options + [{"trigger": trigger} for trigger in all_triggers])
    steps = st.builds(
        _Step,
        kind=st.sampled_from(["task"] * 3 * len(_KINDS) + _KINDS),
        reads=st.lists(reads, min_size=1, max_size=2),
        scripts=st.lists(scripts, min_size=1, max_size=3),
        options=st.lists(options, max_size=2).map(lambda chosen: dict(ChainMap(*chosen))),
    )
    return st.builds(
        _Plan,
        steps=st.lists(steps, min_size=2, max_size=10),
        parameter=st.sampled_from([[1, 2], 3, None, None, "missing"]),
        entry=st.sampled_from(["FlowRunner", "return_tasks"] if pausing else ["flow.run"]),
        given=st.dictionaries(st.integers(0, 9), st.sampled_from(sorted(_GIVEN)), max_size=1),
        raise_on_exception=st.sampled_from([False] * 9 + [True]),
        references=st.sampled_from([None, None, 2]),
    )


def _file_of_notes(name):
    """Where all processes note what they do: the context goes with the task runs."""
    return os.path.join(prefect.context.folder_of_notes, name)


def _note_call(*key):
    """Note that a task, or a child, is run; return how often it was before."""
    calls = _file_of_notes("calls")
    before = noted(calls).count(repr(key))
    note(key, calls)
    return before


class _Play(Task):
    def __init__(self, scripts, **kwargs):
        super().__init__(**kwargs)
        self.scripts = scripts

    def run(self, x=None, y=None):
        index = prefect.context.get("map_index")
        script = self.scripts[(index or 0) % len(self.scripts)]
        does = script[min(_note_call(self.name, index), len(script) - 1)]
        number = zlib.crc32(repr((self.name, index, x, y)).encode())
        if does == "raise":
            raise ValueError(number)
        if does in ("LOOP", "SUCCESS"):
            raise getattr(signals, does)(str(number), result=number)
        if hasattr(signals, does):
            raise getattr(signals, does)(str(number))
        if does.startswith("list of"):
            return [number + i for i in range(int(does[-1]))]
        values = {"number": number, "nested": [[number], [], [1, 2]], "None": None}
        return values.get(does, does == "True")


class _Resource(namedtuple("_Resource", "x")):
    def setup(self):
        if self.x is None:
            raise ValueError("no resource")
        return [self.x]

    def cleanup(self, resource):
        _note_call("cleanup", resource)


class _SteadyFlow(Flow):
    """A flow in which nothing depends on chance: neither a name, nor the order of inputs."""

    def add_task(self, task):
        if task not in self.tasks and not isinstance(task, Parameter):
            namesakes = [t for t in self.tasks if t.name.startswith(task.name)]
            task.name = f"{task.name} {len(namesakes) + 1}"
        return super().add_task(task)

    def edges_to(self, task):
        """In one order: Prefect's own is that of a set, and some failures depend on it."""
        edges = super().edges_to(task)
        return sorted(edges, key=lambda edge: (edge.upstream_task.name, edge.key or ""))


def _note(noted, old_state, new_state):
    name = getattr(noted, "task", noted).name
    index = prefect.context.get("map_index")
    transition = (name, index, type(old_state).__name__, type(new_state).__name__)
    note(transition, _file_of_notes("transitions"))
    return new_state


def _build(plan):
    """The flow of a plan, and its tasks in the order in which the plan adds them."""
    tasks, blocks = [], []
    with _SteadyFlow("planned", state_handlers=[_note]) as flow:
        default = {} if plan.parameter == "missing" else {"default": [5, 6, 7]}
        tasks.append(flow.add_task(Parameter("p", required=not default, **default)))
        for step in plan.steps:
            if step.kind == "end" and blocks:
                blocks.pop().__exit__(None, None, None)
            added = _add(step, [_source(read, tasks) for read in step.reads], blocks)
            tasks.extend(task for task in added if task is not None)
        while blocks:
            blocks.pop().__exit__(None, None, None)
    if plan.references:
        flow.set_reference_tasks(tasks[:: plan.references])
    return flow, tasks


def _source(read, tasks):
    source = [[8], [9, 10]] if read.back is None else tasks[-1 - read.back % len(tasks)]
    if read.part == "all":
        return source
    return source[0] if read.part == "[0]" else [source, tasks[0]]


def _add(step, sources, blocks):
    """Add a step to the flow that is being built; the tasks that later steps may read."""
    first = sources[0]
    kind = step.kind.split()[-1]
    mapped = {"mapped": True} if kind != step.kind else {}
    if kind == "task":
        return [_bind(_play(step), step.reads, sources)]
    if kind == "filter":
        return [control_flow.FilterTask().bind(task_results=first)]
    if kind in ("ifelse", "switch"):
        yes, no = (_bind(_play(step), step.reads[1:], sources[1:]) for _ in range(2))
        if kind == "ifelse":
            control_flow.ifelse(first, yes, no, **mapped)
        else:
            control_flow.switch(first, {True: yes, False: no}, **mapped)
        return [yes, no]
    if kind == "merge":
        return [control_flow.merge(*sources, **mapped)]
    if kind == "secret":
        return [EnvVarSecret("HOME").bind(upstream_tasks=[first])]
    if kind == "apply_map":
        mapped_over = _bind(_play(step), step.reads, sources)
        return [prefect.apply_map(lambda x: _branch(x, step), mapped_over)]
    if kind == "case":
        blocks.append(control_flow.case(first, True))
        return [blocks[-1].__enter__()]
    if kind == "resource_manager":
        blocks.append(prefect.resource_manager(_Resource)(first))
        return [blocks[-1].__enter__()]
    return []


def _play(step, name="play"):
    return _Play(step.scripts, name=name, **dict({"state_handlers": [_note]}, **step.options))


def _bind(task, reads, sources):
    data, waits = {}, []
    is_mapped = any("mapped" in read.how for read in reads)
    for key, read, source in zip("xy", reads, sources):
        if "flat" in read.how and sources.count(source) == 1:
            source = prefect.flatten(source)
        if is_mapped and "mapped" not in read.how:
            source = unmapped(source)
        if "waits" in read.how:
            waits.append(source)
        else:
            data[key] = source
    return task.bind(mapped=is_mapped, upstream_tasks=waits, **data)


def _branch(x, step):
    condition = _play(step, "condition").bind(x=x)
    with control_flow.case(condition, True):
        yes = _play(step, "branch").bind(x=condition)
    return control_flow.merge(yes, x)


def _outcomes(plan, flow_runner_cls, executor):
    """What the rounds of a run of the plan come to, as far as two runs must agree."""
    flow, tasks = _build(plan)
    mapped = {edge.downstream_task for edge in flow.edges if edge.mapped}
    given = {
        tasks[i]: _GIVEN[name]()
        for i, name in plan.given.items()
        if i < len(tasks) and (name != "Mapped" or tasks[i] in mapped)
    }
    # Prefect itself replaces the children of a Mapped state.
    owned = [s for given_state in given.values() for s in _children(given_state) or [given_state]]
    run = {
        "executor": executor(),
        "parameters": {"p": plan.parameter} if plan.parameter not in (None, "missing") else {},
        "task_runner_state_handlers": [_note],
        "context": {"raise_on_exception": True} if plan.raise_on_exception else {},
        "task_states": given,
    }
    rounds = 3 if plan.entry == "FlowRunner" else 1
    if plan.entry == "flow.run":
        rounds += any("cache_for" in step.options for step in plan.steps)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, prefect.context(
        caches={}, folder_of_notes=folder
    ):
        for _ in range(rounds):
            try:
                if plan.entry == "flow.run":
                    final = flow.run(runner_cls=flow_runner_cls, **run)
                else:
                    run["return_tasks"] = tasks[::2] if plan.entry == "return_tasks" else flow.tasks
                    final = flow_runner_cls(flow).run(**run)
            except Exception:
                return [*outcomes, "raised"]
            if not isinstance(final.result, dict):
                return [*outcomes, type(final)]
            outcomes.append(_outcome(flow, final, owned))
            run["task_states"] = {}
            if plan.entry == "FlowRunner":
                if final.is_finished():
                    break
                run["task_states"] = {t: _resumed(s) for t, s in final.result.items()}
    return outcomes


def _resumed(task_state):
    if task_state.is_mapped():
        task_state.map_states = [_resumed(child) for child in task_state.map_states]
    return state.Resume() if isinstance(task_state, state.Paused) else task_state


def _outcome(flow, final, owned):
    read = {edge.upstream_task for edge in flow.edges if prefect_ds._is_read(edge)}
    kept = (flow.tasks - read) | flow.reference_tasks()
    return {
        "final state": type(final),
        "states": {
            task.name: [type(s).__name__ for s in [task_state, *_children(task_state)]]
            for task, task_state in final.result.items()
        },
        "results": {
            task.name: [_result(s, task in kept) for s in [task_state, *_children(task_state)]]
            for task, task_state in final.result.items()
        },
        "dropped by a child, held by the map": [
            task.name
            for task, task_state in final.result.items()
            if task_state.is_mapped()
            for child, item in zip(task_state.map_states, task_state.result or [])
            if child._result is PurgedResult and item is not None
        ],
        "given": [repr(s.result) for s in owned],
        "calls": Counter(noted(_file_of_notes("calls"))),
        "transitions": Counter(noted(_file_of_notes("transitions"))),
    }


def _children(task_state):
    return list(task_state.map_states) if task_state.is_mapped() else []


def _result(task_state, is_kept):
    if not is_kept and (task_state.is_mapped() or task_state._result is PurgedResult):
        return ANY
    return repr(task_state.result)


class OwnExecutor(LocalExecutor):
    """A user's own, which is to be used."""

    def submit(self, fn, *args, **kwargs):
        self.has_submitted = True
        return super().submit(fn, *args, **kwargs)

    def wait(self, futures):
        assert self.has_submitted
        return super().wait(futures)


class AsInProcesses(LocalDaskExecutor):
    """Prefect's own, in one process, that shares no Mapped state with the task runs.

    Who flattens a map changes its state in place; in one process this would be the state that the
    flow returns, if it happens as late as that, which depends on the order of a set of tasks.
    """

    def __init__(self):
        super().__init__(scheduler="synchronous")

    def wait(self, futures):
        answers = super().wait(futures)
        if isinstance(answers, dict):
            return {key: copy.copy(answer) for key, answer in answers.items()}
        return copy.copy(answers)


class InThreadsToTheEnd(LocalDaskExecutor):
    """Prefect's own, but threads are not interrupted when the flow runner fails.

    Prefect raises KeyboardInterrupt in them, even in one that holds the lock of a log handler. It
    holds it ever after, and whoever logs next waits for it.
    """

    def _interrupt_pool(self):
        self._pool.shutdown(wait=True)


@pytest.mark.parametrize("pausing", [False, True])
@pytest.mark.parametrize(
    "name, share",
    [
        ("local", 1),
        ("own", 3),
        ("synchronous", 2),
        pytest.param("threads", 3, marks=purges_on_dask),
        pytest.param("processes", 4, marks=purges_on_dask),
        pytest.param("cluster", 5, marks=purges_on_dask),
    ],
)
def test_runs_any_flow_as_prefect_does(name, share, pausing, request):
    pool = request.getfixturevalue("processes") if name == "processes" else None
    executor = {
        "local": LocalExecutor,
        "own": OwnExecutor,
        "synchronous": lambda: LocalDaskExecutor(scheduler="synchronous"),
        "threads": lambda: InThreadsToTheEnd(scheduler="threads"),
        "processes": lambda: InOnePool(pool),
        "cluster": EXECUTORS["dask"],
    }[name]

    # Dask computes what is asked for. In threads, children would share Prefect's Mapped states;
    # Prefect 0.12.0 computes on it, each time that it waits, all that it has computed before.
    is_dask = name in ("synchronous", "threads", "processes") and PURGES_ON_DASK
    is_comparable = hasattr(LocalDaskExecutor(), "callback")
    prefects = AsInProcesses if is_dask and is_comparable else LocalExecutor

    @settings(
        max_examples=max(1, _EXAMPLES // share // 2),
        deadline=None,
        print_blob=True,
        # The same plans each time, unless more are asked for.
        derandomize="PREFECT_DS_EXAMPLES" not in os.environ,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    # What one process puts into Prefect's cache, another one does not see.
    @given(plan=_plans(pausing, caching=name != "processes"))
    def compare(plan):
        # Where a task pauses, workers that are free compute children that nobody asks for yet.
        runs_ahead = pausing and name in ("threads", "processes")
        if is_dask and (runs_ahead or not is_comparable) and plan.entry == "return_tasks":
            plan = plan._replace(entry="FlowRunner")
        theirs = _outcomes(plan, FlowRunner, prefects)
        ours = _outcomes(plan, DSFlowRunner, executor)
        assert ours == theirs

    compare()


class OnDSExecutor(FlowRunner):
    """Prefect's, on a `DSExecutor`."""

    def get_flow_run_state(self, state, executor, **kwargs):
        executor = DSExecutor(self.flow, executor)
        return super().get_flow_run_state(state, executor=executor, **kwargs)


@from_0_12
@pytest.mark.parametrize("pausing", [False, True])
def test_the_executor_runs_any_flow_as_prefect_does(pausing):
    @settings(
        max_examples=max(1, _EXAMPLES // 4),
        deadline=None,
        print_blob=True,
        derandomize="PREFECT_DS_EXAMPLES" not in os.environ,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(plan=_plans(pausing, caching=True))
    def compare(plan):
        theirs = _outcomes(plan, FlowRunner, LocalExecutor)
        assert _outcomes(plan, OnDSExecutor, LocalExecutor) == theirs

    compare()


# The marker ----------------------------------------------------------------------------------


def test_there_is_one_purged_result():
    for same in (
        copy.copy(PurgedResult),
        copy.deepcopy(PurgedResult),
        pickle.loads(pickle.dumps(PurgedResult)),
        cloudpickle.loads(cloudpickle.dumps(PurgedResult)),
        PurgedResult.copy() if hasattr(Result, "copy") else PurgedResult,
    ):
        assert same is PurgedResult
    assert repr(PurgedResult) == "<Purged result>" and str(PurgedResult) == "PurgedResult"
    assert copy.deepcopy(Success(result=PurgedResult))._result is PurgedResult


# The README ----------------------------------------------------------------------------------

README = Path(__file__).with_name("README.md")


@pytest.mark.skipif(not README.exists(), reason="takes the README beside this file")
def test_snippets_of_the_readme_print_what_it_says(capsys):
    logging.disable(logging.CRITICAL)
    snippets = re.findall(
        "```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README.read_text("utf-8"), re.DOTALL
    )
    assert len(snippets) >= 5
    names = {"__name__": "readme"}
    without_executors = {
        "flow.executor = DSExecutor(flow)": "",
        "flow.run()": "flow.run(runner_cls=DSFlowRunner, "
        "task_runner_state_handlers=[checkpoint_handler])",
        "DSExecutor, ": "DSFlowRunner, checkpoint_handler, ",
    }
    try:
        for code, printed in snippets:
            code = code.replace("result=PandasResultHandler", STORAGE + "=PandasResultHandler")
            if not HAS_EXECUTORS:  # as the README says
                for line, replaced in without_executors.items():
                    code = code.replace(line, replaced)
            exec(code, names)
            said = [line for line in capsys.readouterr().out.splitlines() if "| " not in line]
            assert said == printed.splitlines(), code
    finally:
        logging.disable(logging.NOTSET)
