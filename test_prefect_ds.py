"""The facts about prefect_ds, on the Prefect and pandas installed: `pytest test_prefect_ds.py`.

The sections have the names and the order of those in `prefect_ds.py`. Random tests say the seed
with which they fail: `PREFECT_DS_SEED=7 pytest -k killed` starts there. What takes long, and says
the same everywhere, runs on three releases of Prefect, elsewhere with `PREFECT_DS_SLOW=1`.
"""

import concurrent.futures
import copy
import datetime
import functools
import gc
import inspect
import io
import json
import logging
import multiprocessing.forkserver
import os
import pickle
import pydoc
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import uuid
import weakref
import zlib
from collections import ChainMap, Counter, namedtuple
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import ANY, Mock, patch
from urllib.request import urlopen

import cloudpickle
import numpy
import pandas
import pendulum
import prefect
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from prefect import Flow, Parameter, Task, task, triggers, unmapped
from prefect.engine import FlowRunner, TaskRunner, signals, state
from prefect.engine.cloud import CloudFlowRunner
from prefect.engine.state import Mapped, Pending, Success
from prefect.tasks import control_flow
from prefect.tasks.secrets import EnvVarSecret
from prefect.utilities.collections import DotDict
from prefect.utilities.configuration import set_temporary_config
from prefect.utilities.debug import raise_on_exception
from prefect.utilities.tasks import defaults_from_attrs

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

#: Slow tests run on these releases, with the packages of their day, unless they are asked for.
IS_SLOW_ONE = prefect.__version__ in ("0.9.8", "0.13.19", "1.4.1") and sys.version_info < (3, 11)
IS_SLOW_ONE = IS_SLOW_ONE or bool(os.environ.get("PREFECT_DS_SLOW"))

#: The first seed of random tests.
SEED = int(os.environ.get("PREFECT_DS_SEED", 0))

#: The keyword by which the installed Prefect's `task` takes storage.
STORAGE = "result" if prefect_ds._HAS_LOCATIONS else "result_handler"

#: Whether results are purged on Dask's executors, too.
PURGES_ON_DASK = prefect_ds._FLOW_RUNNER_MAPS


def _as_dot_dict(section):
    is_dict = isinstance(section, dict)
    return DotDict({k: _as_dot_dict(v) for k, v in section.items()}) if is_dict else section


if "self.copy()" in inspect.getsource(type(prefect.context).__call__):
    # Each use of Prefect's context, several per task run, copies the whole configuration: in 1 to
    # 5 ms as it is, in 0.2 ms as Prefect's other kind of dictionary.
    prefect.context.config = _as_dot_dict(prefect.config)
    sys.modules["prefect.utilities.context"].config = prefect.context.config

FRAME = pandas.DataFrame({"one": [1, 2, 3], "two": [4.5, 5.5, 6.5], "three": ["x", "y", "z"]})


#: Whether a flow has an executor; before, its environment has one.
HAS_RUN_NAMES = "task_run_name" in inspect.signature(Task.__init__).parameters
HAS_EXECUTORS = "executor" in inspect.signature(Flow.__init__).parameters


def with_labels(labels, axis):
    frame = FRAME.copy()
    setattr(frame, ("index", "columns")[axis], labels)
    return frame


def stored(*args, **kwargs):
    return {STORAGE: PandasResultHandler(*args, **kwargs)}


def run(flow, **kwargs):
    kwargs.setdefault("task_runner_state_handlers", [checkpoint_handler])
    return flow.run(runner_cls=DSFlowRunner, **kwargs)


def run_by_prefects(flow, **kwargs):
    """By Prefect's own flow runner, and `DSTaskRunner`."""
    kwargs.setdefault("task_runner_state_handlers", [checkpoint_handler])
    runner = FlowRunner(flow, task_runner_cls=kwargs.pop("task_runner_cls", DSTaskRunner))
    return runner.run(return_tasks=flow.tasks, **kwargs)


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


slow = pytest.mark.skipif(not IS_SLOW_ONE, reason="It runs on three releases of Prefect.")
takes_posix = pytest.mark.skipif(os.name == "nt", reason="takes fork, setuid or SIGKILL")
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
    reason="Below Prefect 0.12 files are read when they are found, and targets are no functions.",
)

HANDLER, CHECKPOINTING = [checkpoint_handler], {"context": {"checkpointing": True}}
by_handler_or_prefect = pytest.mark.parametrize(
    "options",
    [
        {"task_runner_state_handlers": HANDLER},
        {"task_runner_state_handlers": HANDLER, **CHECKPOINTING},
        pytest.param({"task_runner_state_handlers": [], **CHECKPOINTING}, marks=from_0_11),
    ],
    ids=["handler", "both", "Prefect"],
)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def log(caplog):
    """The text of what prefect_ds logs: Prefect's logger does not propagate, or does so twice."""
    logger = logging.getLogger("prefect")
    logger.addHandler(caplog.handler)
    yield lambda level: "\n".join(
        r.getMessage()
        for r in dict.fromkeys(caplog.records)
        # A cluster of an earlier test may still have something to say.
        if r.levelno == level and r.name.startswith("prefect")
    )
    logger.removeHandler(caplog.handler)


def files(folder="."):
    return sorted(name for name in os.listdir(str(folder)) if name != "dask-worker-space")


def files_read(log):
    """The names of the files that were read, in their order."""
    lines = [line for line in log(logging.INFO).splitlines() if ": Loaded " in line]
    return [os.path.basename(line.partition(": Loaded ")[2]) for line in lines]


def write_file(frame, path, *args, **kwargs):
    return PandasResult(path, *args, **kwargs).write(frame)


def read_file(path, *args, **kwargs):
    found = PandasResult(path, *args, **kwargs).read(path)
    return found.value if prefect_ds._HAS_LOCATIONS else found


class Calls(list):
    """Which task runs have taken place; shared by all threads."""

    def make(self, name="make", **kwargs):
        @task(name=name, **kwargs)
        def make(id=0):
            self.append(id)
            return FRAME.assign(id=id)

        return make


def flow_of(*args, value=1, **kwargs):
    """A flow of a task that is stored so, and of one that reads it; both tasks, and their runs."""
    calls = Calls()
    with Flow("one") as flow:
        made = calls.make(**stored(*args), **kwargs)(value)
        last = task(lambda frame: len(frame), name="last")(made)
    return flow, made, last, calls


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


def flaky(run, name="flaky"):
    """A task that fails each other time that it runs, and is retried at once."""
    attempts = []

    @task(name=name, max_retries=1, retry_delay=timedelta(0))
    def fail_and_run(x=None):
        attempts.append(1)
        if len(attempts) % 2:
            raise ValueError("not yet")
        return run(x)

    return fail_and_run


def ids_in(frames):
    """The sum of all ids in frames, and in collections of them."""
    if isinstance(frames, pandas.DataFrame):
        return int(frames.id.sum())
    return sum(map(ids_in, frames)) if isinstance(frames, (list, tuple)) else frames


def for_processes(**variables):
    """The environment of processes that import this file or prefect_ds."""
    folders = [os.path.dirname(os.path.abspath(f)) for f in (__file__, prefect_ds.__file__)]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(folders), **variables)


@functools.lru_cache(maxsize=None)
def new_processes():
    """Starts processes, which may fork, of one that has imported this file and has no threads."""
    if os.name == "nt":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
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
    for name in ("SECONDS_BETWEEN_LINES", "SECONDS_BEFORE_BAR"):
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


def _counted(part):
    assert isinstance(part, Part)
    return 1


load = task(lambda i: new_part(), name="load")
step = task(lambda part: new_part(part), name="step")
both = task(lambda one, other: new_part(one), name="both")
count = task(_counted, name="count")
total = task(lambda counts: sum(counts), name="total")
numbers = task(lambda n: list(range(n)), name="numbers")
pass_on = task(lambda x: x, name="pass_on")


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
        count(part), count(part)
    return flow


def mapped(width, stages=4):
    with Flow("map") as flow:
        part = load.map(numbers(width))
        for _ in range(stages - 1):
            part = step.map(part)
        flow.total = total(count.map(part))
    return flow


# What of Prefect the module relies on --------------------------------------------------------

#: Modules and classes (`()` is an instance), with the attributes that must be there, and the
#: parameters that these must have. Not each release has the following, and where it is missing
#: there is nothing to do: `LocalDaskExecutor()._pool` as an `Executor` of `concurrent.futures`,
#: `Edge().flattened`, `prefect.tasks.secrets.SecretBase`, `prefect.tasks.core.resource_manager`,
#: `set_task_run_name task_inputs`, `prefect.context["caches"]`, `CONVERSIONS` of result handlers.
INTERNALS = """
prefect.engine.flow_runner.FlowRunner: __init__ flow task_runner_cls state_handlers,
    get_flow_run_state state task_states task_runner_state_handlers executor
prefect.engine.task_runner.TaskRunner: __init__ task state_handlers, run.__wrapped_func__,
    check_upstream_finished state upstream_states, get_task_inputs state upstream_states,
    set_task_to_running state inputs, get_task_run_state state inputs
prefect.engine.runner.Runner: handle_state_change old_state new_state,
    call_runner_target_handlers old_state new_state
prefect.engine.runner: ENDRUN state, Runner().state_handlers
prefect.engine.result: Result.__init__ value, NoResult
prefect.engine.state: State.result, Success()._result, Success().cached_inputs,
    Mapped.__init__ map_states
prefect.core.Edge: __init__ upstream_task downstream_task key mapped
prefect.core.flow.Flow: edges_to task, sorted_tasks, reference_tasks
prefect.context: config.flows.checkpointing, get key
prefect.triggers: all_successful
prefect.tasks: control_flow, core.function.FunctionTask, core.constants.Constant, secrets
prefect.engine.cloud.CloudTaskRunner: call_runner_target_handlers old_state new_state
prefect_ds: Executor.start, LocalExecutor.submit fn, LocalDaskExecutor.__init__ scheduler,
    LocalDaskExecutor().scheduler, DaskExecutor.submit fn, DaskExecutor.wait futures
distributed: Client.nthreads, Client.replicate futures, Future.add_done_callback fn, Future.type
"""

if prefect_ds._FLOW_RUNNER_MAPS:
    INTERNALS += """
prefect.engine.flow_runner: run_task task state upstream_states context task_runner_cls
    task_runner_state_handlers is_mapped_parent
prefect.engine.cloud.CloudTaskRunner: load_results state upstream_states
prefect.engine.result.Result: copy
"""
else:
    INTERNALS += """
prefect.engine.flow_runner.FlowRunner: run_task task state upstream_states context executor
"""

if prefect_ds._HAS_LOCATIONS:
    INTERNALS += """
prefect.engine.task_runner.TaskRunner: check_target state inputs
prefect.engine.result.Result: from_value value, read location, write, exists location
"""
else:
    INTERNALS += """
prefect.engine.result_handlers.ResultHandler: read loc, write result
prefect.engine.result: SafeResult.__init__ value result_handler
"""


def test_touches_only_these_internals():
    for line in INTERNALS.replace("\n    ", " ").strip().splitlines():
        owner, _, attributes = line.partition(": ")
        for name, *parameters in map(str.split, attributes.split(",") if owner else []):
            complaint = f"Prefect {prefect.__version__} changed {owner}.{name}"
            path, _, attribute = f"{owner}.{name}".partition("().")
            found = pydoc.locate(path)
            found = getattr(found(), attribute, None) if attribute else found
            assert found is not None, complaint + ": it is gone"
            taken = inspect.signature(found).parameters if parameters else ()
            assert set(parameters) <= set(taken), f"{complaint}: it takes {list(taken)}"


# What the installed Prefect offers: names, and how the file is installed ---------------------


@pytest.mark.parametrize(
    "line",
    [
        "from prefect_ds.checkpoint_handler import checkpoint_handler as c; assert c is handler",
        "import prefect_ds.checkpoint_handler as c; assert c.checkpoint_handler is handler",
        "from prefect_ds import checkpoint_handler as c; assert c.checkpoint_handler is handler",
        "from prefect_ds.flow_runner import DSFlowRunner as c; assert c is d.DSFlowRunner",
        "import prefect_ds.flow_runner as c; assert c.DSFlowRunner is d.DSFlowRunner",
        "from prefect_ds.task_runner import DSTaskRunner as c; assert c is d.DSTaskRunner",
        "import prefect_ds.pandas_result_handler as c; assert c.PandasResultHandler",
        "from prefect_ds.result import PurgedResult as c; assert c is d.PurgedResult",
        "from prefect_ds.result import PurgedResultType as c; assert c is type(d.PurgedResult)",
        "from prefect_ds import *; assert DSExecutor and PandasResult is PandasResultHandler",
    ],
)
def test_import_lines_of_the_original_work(line):
    exec(line, {"handler": checkpoint_handler, "d": prefect_ds})


VENDORED = """
import numpy
import pandas
from prefect import Flow, task
from myproject.vendor import prefect_ds
from myproject.vendor.prefect_ds import DSFlowRunner, checkpoint_handler
from myproject.vendor.prefect_ds.pandas_result_handler import PandasResultHandler

@task(**{"%s": PandasResultHandler("data_{id}.csv", "csv")})
def make(id):
    return pandas.DataFrame({"id": [id]})

if __name__ == "__main__":
    with Flow("vendored") as flow:
        result = make.map([1, 2, 3])
    handlers = [checkpoint_handler]
    state = flow.run(executor=%s, runner_cls=DSFlowRunner, task_runner_state_handlers=handlers)
    print([int(frame.id[0]) for frame in state.result[result].result])
"""


@pytest.mark.parametrize("executor", ["none", pytest.param("dask", marks=slow)])
def test_can_be_vendored(executor, empty_folder):
    cluster = "processes=True, n_workers=1, threads_per_worker=1"
    if "cluster_kwargs" in inspect.signature(prefect_ds.DaskExecutor.__init__).parameters:
        dask = f"prefect_ds.DaskExecutor(cluster_kwargs=dict({cluster}))"
    else:
        dask = f"prefect_ds.DaskExecutor(local_{cluster})"
    package = empty_folder / "myproject" / "vendor"
    package.mkdir(parents=True)
    shutil.copy(prefect_ds.__file__, str(package / "prefect_ds.py"))
    Path("script.py").write_text(VENDORED % (STORAGE, dask if executor == "dask" else None))
    environment = dict(os.environ, PYTHONPATH=str(empty_folder), PREFECT__LOGGING__LEVEL="ERROR")
    command = [sys.executable, "script.py"]
    out = subprocess.check_output(command, env=environment, timeout=120)
    assert out.decode().strip() == "[1, 2, 3]" and os.path.exists("data_3.csv")


# Where a frame is stored: the template in the path -------------------------------------------


class Config:
    name = "berlin"

    def __format__(self, spec):
        raise AssertionError("an argument that the path does not name was touched")


LONG_NAME = "é" * 120 + "n" * 11  # 251 bytes, and ".csv"


# fmt: off
FILLED = [
    ("data_{id}.csv", "data_7.csv"), (Path("data_{id}.csv"), "data_7.csv"),
    ("{day:%Y-%m}/{id:03}.csv", "2020-02/007.csv"), ("{today}.csv", "{today}.csv"),
    ("{config.name}/{row[id]}.csv", "berlin/8.csv"), ("{{{id}}}.csv", "{{7}}.csv"),
    ("{default}_{task_name}_{flow_name}.csv", "usual_write_fields.csv"),
    # Arguments go before parameters, and these before the rest of the context.
    ("{parameter}_{both}_{task_tags}.csv", "given_argument_parameter.csv"),
    ("{map_index}.csv", "argument.csv"), ("in/{row[below]}.csv", "in/a/b.csv"),
    ("data/folder/../{id}.csv", "data/7.csv"), ("{row[long]}.csv", LONG_NAME + ".csv"),
    ("file://<here>/in/{id}.csv", "in/7.csv"), ("local://<here>/in/{id}.csv", "in/7.csv"),
    pytest.param(lambda id, **others: f"{id}{others['both']}.csv", "7argument.csv", marks=from_0_11)
]
# fmt: on


@pytest.mark.parametrize("path, file", FILLED, ids=str)
def test_fields_are_filled(path, file, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)  # What is local takes no fsspec.
    path = path.replace("<here>", os.getcwd()) if isinstance(path, str) else path
    row = {"id": 8, "below": "a/b", "long": LONG_NAME}

    @task(name="write", **stored(path))
    def write(id, day, config, row, both, map_index, default="usual"):
        note(id)
        return FRAME

    with Flow("fields") as flow:
        for name, value in [("parameter", "given"), ("both", "no"), ("task_tags", "parameter")]:
            flow.add_task(Parameter(name, default=value))
        write(7, datetime.date(2020, 2, 3), Config(), row, "argument", "argument")
    today = prefect.context.get("today", datetime.datetime.utcnow().strftime("%Y-%m-%d"))
    for _ in range(2):
        assert run(flow).is_successful() and noted() == ["7"]
        assert_frame_equal(pandas.read_csv(file.format(today=today)), FRAME)


def times(factor):
    class Times(Task):
        def __init__(self, region, **kwargs):
            super().__init__(**kwargs)
            self.region = region

        @defaults_from_attrs("region")
        def run(self, region=None):
            return FRAME * factor

    return Times


def test_attributes_of_a_task_are_its_defaults_and_its_class_is_what_it_computes():
    with Flow("classes") as flow:
        for factor, region in [(1, "north"), (2, "north"), (3, "south")]:
            times(factor)(region, **stored("{region}.pkl"))()
    assert [s.is_failed() for s in all_states(run(flow))].count(True) == 1
    assert len(files()) == 2 and pandas.read_pickle("south.pkl").equals(FRAME * 3)


@on_local_and_threads
def test_mapped_tasks_fill_their_own_fields(executor):
    with Flow("mapped") as flow:
        Calls().make(**stored("data_{id}.csv")).map(list(range(20)))
        Calls().make(**stored("other_{map_index}.csv")).map([5, 6])
    assert run(flow, executor=EXECUTORS[executor]()).is_successful()
    expected = {**{f"data_{id}.csv": id for id in range(20)}, "other_0.csv": 5, "other_1.csv": 6}
    assert {name: pandas.read_csv(name).id[0] for name in files()} == expected


#: Paths and values with which they would lead out of the folder before the first field.
OUTSIDE = """
in/{id}.csv ../out; in/{id}.csv a/../../out; in/{id}/data.csv ..; in/data_{id}.csv /../../out;
{id}.csv /tmp/out; {id}.csv ~/out; {id}/data.csv ~; ~{id}/data.csv root; {id}.csv file:///tmp/out;
{id}/data.csv local:///tmp/out; file://{id}.csv /tmp/out; in/{{raw}}/{id}.csv ../out;
{id}.csv memory://out; memory://in/{id}.csv ../out; simplecache::memory://in/{id}.csv ../out;
memory://in/{id}.csv 2001:db8::1; memory://{id}/data.csv ../out
"""


@pytest.mark.parametrize(
    "path, value, sentences",
    [
        ("{nowhere}.csv", 3, ["'nowhere'", "id, ", "task_name"]),
        ("{id[x]}.csv", {"y": 1}, ["KeyError: 'x'"]),
        ("s_{id}.csv", FRAME, ["'id'", "DataFrame"]),
        ("s_{id[one]}.csv", FRAME, ["'id[one]'", "Series"]),
        ("s_{id.index}.csv", FRAME, ["'id.index'", "Index"]),
        ("s_{id.values}.csv", FRAME, ["'id.values'", "array"]),
        *([*pair.split(), ["leads out of the folder"]] for pair in OUTSIDE.split(";")),
    ],
)
def test_a_path_that_cannot_be_filled_fails_the_task(path, value, sentences):
    flow, made, _, calls = flow_of(path, value=value)
    error = str(failed(run(flow), made))
    assert [sentence for sentence in sentences if sentence not in error] == []
    assert calls == [] and files() == []


def test_children_of_a_map_do_not_share_a_file():
    with Flow("shared") as flow:
        calls = Calls()
        made = calls.make(**stored("{task_name}.csv")).map(id=[1, 2])
    for child in run(flow).result[made].map_states:
        assert child.is_failed() and "tell them apart: id, map_index" in str(child.result)
    assert calls == [] and files() == []


def test_a_task_runner_of_prefects_knows_no_arguments():
    with Flow("plain") as flow:
        plain, template = (Calls().make(**stored(path)) for path in ("data.csv", "data_{id}.csv"))
        made, clash, filled = plain(1), plain(2), template(3)
    state = run_by_prefects(flow, task_runner_cls=None)
    failures = [str(failed(state, t)) for t in (made, clash) if state.result[t].is_failed()]
    assert len(failures) == 1 and "belongs to the task run" in failures[0]
    assert "DSTaskRunner" in str(failed(state, filled)) and files() == ["data.csv"]


# fmt: off
REFUSED = [
    ("data", {}, "tells no file type"), ("data.xyz", {}, "tells no file type"),
    ("data.{id}", {}, "tells no file type"), ("data_{}.csv", {}, "need names"),
    ("data.csv", {"file_type": "cvs"}, "no file type 'cvs'.*csv.*parquet"),
    ("data_{0}.csv", {}, "need names"), ("{a.csv", {}, r"'\{a.csv' is no template for str.format"),
    (Path("s3://bucket/data.csv"), {}, "pass a str"),
    ("a.csv", {"read_kwargs": {"chunksize": 3}}, "'a.csv'.*chunksize"),
    ("a.csv", {"read_kwargs": {"iterator": True}}, "'a.csv'.*iterator"),
]
# fmt: on


@pytest.mark.parametrize("path, kwargs, message", REFUSED, ids=str)
def test_storage_that_cannot_be_is_refused_when_it_is_made(path, kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PandasResultHandler(path, **kwargs)


@pytest.mark.parametrize("place", ["task", "flow", pytest.param("executor", marks=has_executors)])
def test_a_class_instead_of_an_instance_is_refused_with_what_to_do(place):
    storage = {STORAGE: PandasResultHandler}
    try:
        with Flow("class", **(storage if place == "flow" else {})) as flow:
            result = Calls().make(**(storage if place == "task" else {}))(1)
        if place == "executor":
            flow.executor = DSExecutor
        state = flow.run() if place == "executor" else run(flow)
        is_told_by_task = isinstance(state.result, dict)
        message = str(state.result[result].message if is_told_by_task else state.message)
    except TypeError as exc:
        message = str(exc)
    expected = "DSExecutor(flow)" if place == "executor" else "PandasResult"
    assert expected in message and "instance" in message and "'self'" not in message


# How a frame is stored: what pandas can read and write ---------------------------------------

OTHER_TYPES = set(prefect_ds._FILE_TYPES) - {"csv", "parquet"}
EXTENSIONS = {"excel": "xlsx", "hdf": "h5", "pickle": "pkl", "stata": "dta"}

#: One file for each type, and for what extensions mean besides; what these begin with.
NAMES = {
    **{f"data.{EXTENSIONS.get(t, t)}": b"" for t in sorted(prefect_ds._FILE_TYPES)},
    **dict.fromkeys(["data.csv.gz", "data.tsv.gz"], b"\x1f\x8b"),
    **dict(zip(["data.csv.bz2", "data.csv.xz", "data.csv.zip"], [b"BZh", b"\xfd7zXZ", b"PK"])),
    **dict.fromkeys(["data.jsonl", "data.ndjson"], b'{"one":1,"two":'),
    **dict.fromkeys(["data.parq", "data.pq", "data.parquet.gzip"], b"PAR1"),
    "data.tsv": b"one\ttwo",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_frame_comes_back_as_it_was(name, log):
    words = ["x", "01", "true", *([] if "xml" in name else ["NA", "a b", "null"])]
    frame = pandas.concat([FRAME] * 40, ignore_index=True)
    frame["word"] = [words[n % len(words)] for n in range(len(frame))]
    frame = frame.astype({"one": "int32" if "dta" in name else "int64"})
    path = os.path.abspath(name)
    try:
        where = write_file(frame, path)
    except ImportError as missing:
        pytest.skip(f"pandas needs another package: {missing}")
    assert_frame_equal(read_file(path), frame)
    assert read_file(path).equals(frame) and log(logging.WARNING) == ""
    assert files() == [name] and Path(name).read_bytes().startswith(NAMES[name])
    assert (where.location if prefect_ds._HAS_LOCATIONS else where) == path


# fmt: off
ARGUMENTS = [
    ("data.csv", {"engine": "python"}, {}), ("data.csv", {"engine": "c"}, {}),
    ("data.csv", {"engine": "pyarrow"}, {}), ("data.csv", {"skipfooter": 0}, {}),
    ("data.csv", {"sep": None, "engine": "python"}, {}), ("data.csv", {"sep": None}, {}),
    ("data.csv", {"sep": "[;]"}, {"sep": ";"}), ("data.csv", {"delimiter": "[;]"}, {"sep": ";"}),
    ("data.csv", {"sep": r"\s+"}, {"sep": "\t"}), ("data.csv", {"sep": "§"}, {"sep": "§"}),
    ("data.csv", {"index_col": 0}, {"index": True}), ("data.tsv", {"sep": ";"}, {"sep": ";"}),
    ("data.csv", {"quotechar": "§"}, {"quotechar": "§"}), ("data.h5", {}, {"key": "mine"}),
    ("data.h5", {"key": "mine"}, {"key": "mine", "format": "table"}),
    ("data.jsonl", {"orient": "records"}, {"orient": "records"}),
]
# fmt: on


@pytest.mark.parametrize("name, read, write", ARGUMENTS, ids=str)
@pytest.mark.filterwarnings("ignore:Falling back")
def test_keyword_arguments_of_the_user_win(name, read, write):
    if read.get("engine") == "pyarrow" and pandas.__version__ < "1.4":
        pytest.skip("pandas has no such engine yet")
    if name.endswith("h5"):
        pytest.importorskip("tables")
    kwargs = {"read_kwargs": read, "write_kwargs": write}
    write_file(FRAME, name, **kwargs)
    assert_frame_equal(read_file(name, **kwargs), FRAME)
    assert "key" not in write or len(pandas.read_hdf(name, "mine")) == 3


_LEVELS = pandas.MultiIndex.from_product([["x", "y"], ["min", "max"]])

_COLUMNS = pandas.DataFrame([[1, 2, 3, 4]] * 2, columns=_LEVELS)

#: Frames that pandas writes, but with other arguments, or not to each file type.
SHAPES = {
    "levels of columns": _COLUMNS,
    "named levels": _COLUMNS.rename_axis(columns=["a", "b"]),
    "aggregated": FRAME.groupby("three").agg({"one": ["min", "max"], "two": ["mean"]}),
    "pivoted": FRAME.pivot(index="one", columns="three", values="two"),
    "levels of the index": pandas.DataFrame({"x": range(4)}, index=_LEVELS),
    "levels of both": pandas.DataFrame([[1, 2, 3, 4]] * 4, index=_LEVELS, columns=_LEVELS),
    "no rows": FRAME[:0],
    "no rows, levels": _COLUMNS[:0],
    "no columns": pandas.DataFrame(index=[0, 1]),
    "nothing": pandas.DataFrame(),
    "labels of rows": FRAME.set_index("three"),
    "categories of intervals": pandas.DataFrame({"x": pandas.cut([1, 2, 3], 2)}),
    "mixed": FRAME.assign(one=[1, "x", 2.5]),
}


# What a file does not keep -------------------------------------------------------------------


class Kind(pandas.DataFrame):
    """A frame of another type."""


_DAY = pandas.Timestamp("2020-01-01")

#: The cell that is repeated, and one in the middle.
# fmt: off
_ODD_CELLS = {
    "tiny": (1.5, 1.234e-20), "digits of a float": (1.5, 0.12345678901234568),
    "missing float": (1.5, float("nan")), "fraction": (1.0, 1.5), "large": (1, 2**60 + 1),
    "beyond 64 bits": (1, 2**70), "time": (_DAY, pandas.Timestamp("2020-01-01 10:20:30")),
    "nanoseconds": (_DAY, pandas.Timestamp("2020-01-01 10:20:30.123456789")),
    "early": (_DAY, pandas.Timestamp("1850-01-01")), "no time": (_DAY, pandas.NaT),
    "no boolean": (True, None), "number among text": ("a", 1),
    "date among text": ("a", datetime.date(2020, 2, 3)), "list among text": ("a", ["a", "b"]),
    "digits": ("01", "02"), "digits among text": ("a", "01"), "text among digits": ("01", "a"),
    "word": ("a", "NA"), "blanks": ("a", "two  spaces "), "return": ("a", "a\rb"),
    "nothing among text": ("a", ""), "missing text": ("a", None), "formula": ("a", "=1+1"),
    "error": ("a", "#REF!"), "accent": ("a", "Z\xfcrich"), "thousands": ("a", "1,234"),
    "true": ("true", "false"), "lists": ([1], [2, 3]), "lists of one": ([1], [2]),
    "dicts": ({"x": 1}, {"y": 2}), "intervals": (pandas.Interval(0, 1), pandas.Interval(1, 2)),
}
# fmt: on


def odd_frames(file_type):
    if file_type in ("csv", "parquet"):
        rows = 52_000  # Of such a long frame, a part is looked at.
        days = pandas.date_range("2020", periods=rows, freq="min")
        yield "many days", pandas.DataFrame({"day": days, "n": range(rows)})
        yield "many digits", pandas.DataFrame({"code": ["01"] * rows, "n": range(rows)})
        # The reader of csv takes a long file in parts, of which each would have its own type.
        yield "many codes", pandas.DataFrame({"x": ["123456"] * (rows - 1) + ["x"], "n": 0.5})
    for name, (cell, other) in _ODD_CELLS.items():
        yield name, pandas.DataFrame({"x": [cell] * 20 + [other] + [cell] * 19})
    yield "infinite", pandas.DataFrame({"x": [1 / 3, float("inf"), 2 / 3]})
    for name, values in [("categories", ["x", "y"]), ("numbers as categories", [1, 2])]:
        yield name, pandas.DataFrame({"x": pandas.Categorical(values)})
        yield name + " in order", pandas.DataFrame({"x": pandas.Categorical(values, ordered=True)})
    yield "text", FRAME.assign(three=FRAME.three.astype("string" if hasattr(pandas, "NA") else str))
    yield "name of the index", FRAME.rename_axis(index="id")
    yield "name of the columns", FRAME.rename_axis(columns="field")
    yield "short floats", FRAME.astype({"two": "float32"})
    yield "numbers for labels", FRAME.rename(columns={"one": 1})
    yield "booleans for labels", pandas.DataFrame([[1, 2]], columns=[False, True])
    yield "categories for labels", with_labels(pandas.CategoricalIndex(list("abc")), axis=1)
    yield "one label twice", with_labels(["a", "a", "b"], axis=1)
    yield "rows taken away", FRAME[1:]
    yield "numbered twice", pandas.concat([FRAME] * 2)
    yield "dates for rows", with_labels(pandas.date_range("2020", periods=3), axis=0)
    yield "nan for a row", with_labels(["x", "nan", "y"], axis=0)
    yield "another class", Kind(FRAME)
    if hasattr(FRAME, "attrs"):
        frame = FRAME.copy()
        frame.attrs["unit"] = "kg"
        yield "attributes", frame
    yield from SHAPES.items()


def is_same(restored, frame):
    """Whether nothing has changed that a task can tell; None is as good as NaN."""
    try:
        nulls = restored.isna().any(axis=None) and frame.isna().any(axis=None)
        pair = [f.fillna(float("nan")) if nulls else f for f in (restored, frame)]
        assert_frame_equal(*pair)
    except AssertionError:
        return False

    def types(frame):
        cells = [cell for _, column in frame.items() for cell in column if column.dtype == object]
        kept = [c for c in cells if not pandas.api.types.is_scalar(c) or not pandas.isna(c)]
        others = [type(frame), getattr(frame, "attrs", {}), getattr(frame.index, "freq", None)]
        return [*map(type, kept), *map(type, frame.columns), *others]

    return types(restored) == types(frame) and restored.equals(frame)


def is_fine_alone(frame, path, file_type):
    """Whether pandas writes and reads it without other arguments."""
    reader, writer = prefect_ds._FILE_TYPES[file_type]
    try:
        writer(frame, path, **({"key": "data"} if file_type == "hdf" else {}))
        reader(path)
    except ImportError as missing:
        pytest.skip(f"pandas needs another package: {missing}")
    except Exception:
        return False
    return True


@pytest.mark.parametrize(
    "file_type",
    ["csv", "parquet", *(pytest.param(t, marks=slow) for t in sorted(OTHER_TYPES))],
)
@pytest.mark.filterwarnings("ignore")
def test_says_what_a_file_does_not_keep_and_writes_what_pandas_alone_does(file_type, log):
    silent, false_alarm, not_written = [], [], []
    for n, (odd, frame) in enumerate(odd_frames(file_type)):
        path = os.path.abspath(f"{n}.{EXTENSIONS.get(file_type, file_type)}")
        has_to_work = is_fine_alone(frame, path, file_type)
        Path(path).write_bytes(b"earlier")
        before = len(log(logging.WARNING))
        try:
            write_file(frame, path)
        except Exception as exc:
            assert Path(path).read_bytes() == b"earlier" and f"{path} was not written" in str(exc)
            assert re.search("Use (parquet or )?pickle", str(exc)), f"{odd}: {exc}"
            # Without columns, pandas alone reads something that was not written.
            is_unreadable = "could not read it back" in str(exc) and not len(frame.columns)
            not_written += [(odd, exc)] if has_to_work and not is_unreadable else []
            continue
        said = log(logging.WARNING)[before:]
        assert not said or (said.count("does not keep all of the frame") == 1 and path in said)
        # Columns that there are not have no types.
        if len(frame.columns) and bool(said) == is_same(read_file(path), frame):
            (false_alarm if said else silent).append((odd, said[-300:]))
    assert (silent, false_alarm, not_written) == ([], [], [])


def test_says_a_loss_once_for_each_path(log, empty_folder):
    indexed = FRAME.set_index("three")
    for n in range(3):
        storage = pickle.loads(pickle.dumps(PandasResult(str(empty_folder / "{n}.csv"))))
        storage.write(indexed, input_mapping={"n": n})
    write_file(indexed, str(empty_folder / "other.csv"))
    storage.write(pandas.DataFrame({"code": ["01"]}), input_mapping={"n": 3})
    said = log(logging.WARNING).splitlines()
    assert [re.search(r"(\w+)\.csv", line).group(1) for line in said] == ["0", "other", "3"]


@pytest.mark.parametrize(
    "name, frame, remedy, read, write",
    [
        ("x.csv", FRAME[1:], "index_col", {"index_col": 0}, {"index": True}),
        ("x.csv", FRAME.assign(three="01"), "dtype", {"dtype": {"three": str}}, {}),
        ("x.csv", FRAME.assign(one=_DAY), "parse_dates", {"parse_dates": ["one"]}, {}),
        ("x.csv", _COLUMNS, r"header.*\[0, 1\]", {"header": [0, 1]}, {}),
        ("x.xlsx", _COLUMNS, r"header.*\[0, 1\]", {"index_col": 0, "header": [0, 1]}, {}),
        ("x.json", FRAME.assign(three="01"), "dtype", {"dtype": {"three": str}}, {}),
        ("x.parquet", FRAME.assign(three=[[1, 2]] * 3), "pickle", None, None),
        ("x.h5", with_labels(["x", "nan", "y"], axis=0), "pickle", None, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_remedy_is_one_for_this_file_type_and_loss(name, frame, remedy, read, write, log):
    path = os.path.abspath(name)
    try:
        write_file(frame, path)
    except ImportError as missing:
        pytest.skip(f"pandas needs another package: {missing}")
    said = log(logging.WARNING)
    if is_same(read_file(path), frame):
        pytest.skip("This pandas keeps it.")
    _, _, told = said.partition("does not keep all of the frame")
    assert len(said.splitlines()) == 1 and re.search(remedy, told)
    assert "parquet" not in name or "parquet" not in told
    if read:
        kwargs = {"read_kwargs": read, "write_kwargs": write}
        other = path.replace("x.", "kept.")
        write_file(frame, other, **kwargs)
        assert_frame_equal(read_file(other, **kwargs), frame)
        assert log(logging.WARNING) == said


# How a file appears: whole or not at all -----------------------------------------------------


@takes_posix
def test_a_write_that_fails_leaves_the_earlier_file_and_a_link_stays_one():
    import resource

    os.mkdir("there")
    os.symlink(os.path.join("there", "data.pkl"), "link.pkl")
    write_file(FRAME, "link.pkl")
    with pytest.raises(Exception, match="pickle"):
        write_file(pandas.DataFrame({"bad": [lambda: None]}), "link.pkl")
    with pytest.raises(ValueError, match="could not read it back"):
        write_file(FRAME * 2, "link.pkl", write_kwargs={"compression": "gzip"})
    os.chmod("link.pkl", 0o600)
    write_file(FRAME, "link.pkl")
    assert os.stat("link.pkl").st_mode & 0o777 == 0o600
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):  # as if the disk were full
            write_file(many_rows(0), "link.pkl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files() == ["link.pkl", "there"] and files("there") == ["data.pkl"]
    assert os.path.islink("link.pkl") and read_file("link.pkl").equals(FRAME)


@slow
@takes_posix
def test_a_killed_writer_leaves_a_whole_file_or_none():
    # Forking is safe only where there are no threads.
    in_another_process(f"kill_writers({SEED})")
    # What they left behind goes when the folder is next written to.
    assert any(each.startswith(".") for each in files())
    write_file(FRAME, "other.csv")
    assert files() == ["data.pkl", "other.csv"], f"seed {SEED}"


def kill_writers(seed):
    dice, kills = random.Random(seed), int(os.environ.get("PREFECT_DS_KILLS", 12))
    logging.disable(logging.CRITICAL)
    while kills > 0 or not any(each.startswith(".") for each in files()):
        writer = os.fork()
        while writer == 0:
            write_file(pandas.DataFrame({"x": range(20000), "y": "text"}), "data.pkl")
        wait_until(lambda: os.path.exists("data.pkl"))
        time.sleep(dice.random() * 0.05)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        assert len(pandas.read_pickle("data.pkl")) == 20000, f"seed {seed}"
        kills -= 1
        assert kills > -200, f"nothing is left behind; seed {seed}"


@pytest.fixture(params=["memory://folder", "simplecache::memory://folder", "s3://bucket"])
def remote(request, monkeypatch):
    """A folder behind a URL, arguments for it, and the file system as others see it."""
    fsspec = pytest.importorskip("fsspec", "0.8.5" if "::" in request.param else None)
    if "s3" not in request.param:
        filesystem = fsspec.filesystem("memory")
        yield request.param, {}, filesystem
        filesystem.store.clear()
        getattr(filesystem, "pseudo_dirs", []).clear()
        return
    s3fs = pytest.importorskip("s3fs", reason="takes s3fs, which speaks S3")
    server = pytest.importorskip("moto.server", reason="takes moto[server], which serves S3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    served = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    served.start()
    address = "http://{}:{}".format(*served.get_host_and_port())
    options = {"client_kwargs": {"endpoint_url": address}}
    other = s3fs.S3FileSystem(**options, skip_instance_cache=True, use_listings_cache=False)
    other.mkdir("bucket")
    options = {"storage_options": options}
    yield request.param, {"read_kwargs": options, "write_kwargs": options}, other
    served.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_remote_files_have_literal_names_and_are_asked_for_each_time(remote, log):
    folder, kwargs, filesystem = remote
    place = "bucket" if "s3" in folder else "folder"
    ids = ["[ab]", "a*", "a?", "ab", "a"]
    with Flow("remote") as flow:
        calls = Calls()
        made = calls.make(**stored(folder + "/{id}.csv", **kwargs)).map(ids)
    # Another process deletes and damages them.
    for change, expected in [("", ids), ("", []), ("delete", ["[ab]", "a*"]), ("damage", ["a?"])]:
        for id in expected if change else []:
            getattr(filesystem, "rm_file", filesystem.rm)(f"{place}/{id}.csv")
            if change == "damage":
                filesystem.touch(f"{place}/{id}.csv")
        calls.clear()
        state = run(flow)
        assert [frame.id[0] for frame in state.result[made].result] == ids and calls == expected
        if "s3" in folder:  # What a file system remembers of the folder counts for nothing.
            type(filesystem)(**kwargs["read_kwargs"]["storage_options"]).ls(place)
    found = filesystem.find(place if "s3" in folder else "/folder")
    (aside,) = (path for path in found if ".unreadable-" in path)
    assert "a?.csv.unreadable-" in aside and len(found) == 6
    assert "a?.csv is there, but cannot be read" in log(logging.WARNING)
    if prefect_ds._HAS_LOCATIONS:
        storage = PandasResult(folder + "/{id}.csv", **kwargs)
        assert storage.write(FRAME, id=3).location == folder + "/3.csv"
        assert [storage.exists(storage.path, id=n) for n in (3, 4)] == [True, False]


def test_a_folder_is_no_file():
    os.mkdir("there.csv")
    flow, made, _, calls = flow_of("there.csv")
    assert "there.csv is a folder, but" in str(failed(run(flow), made)) and calls == []
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=r"x\.parquet was not written.* one file"):
        write_file(FRAME, "x.parquet", write_kwargs={"partition_cols": ["three"]})
    assert files() == ["there.csv"] and files("there.csv") == []


def test_an_upload_that_fails_leaves_the_earlier_file(monkeypatch):
    filesystem = pytest.importorskip("fsspec").filesystem("memory")
    path = "memory://uploads/data.csv"
    flow, made, _, _ = flow_of(path)
    write_file(FRAME, path)
    put = "put_file" if hasattr(filesystem, "put_file") else "put"
    no_connection = Mock(side_effect=OSError("no connection"))
    monkeypatch.setattr(type(filesystem), put, no_connection)
    assert "no connection" in str(failed(run(flow, context={"recompute": "make"}), made))
    assert_frame_equal(read_file(path), FRAME)


# The storage of a task, as a Result of Prefect's ---------------------------------------------


def test_is_written_and_read_by_hand():
    frame_of = (lambda read: read.value) if prefect_ds._HAS_LOCATIONS else (lambda read: read)
    plain, template = PandasResultHandler("x.csv"), PandasResultHandler("{id:02}.csv")
    plain.write(FRAME)
    template.write(FRAME.assign(id=3), input_mapping={"id": 3})
    assert files() == ["03.csv", "x.csv"]
    assert_frame_equal(frame_of(plain.read()), FRAME)
    assert_frame_equal(frame_of(plain.read("03.csv")), FRAME.assign(id=3))
    assert_frame_equal(frame_of(template.read(input_mapping={"id": 3})), FRAME.assign(id=3))
    with pytest.raises(ValueError, match="'id'"):
        template.read()


def runs_on_prefect(result, target, argument, values):
    """Of two runs on Prefect's own runners: types of states, frames, where they are."""
    told = []
    for _ in range(2):
        with Flow("plain") as flow:
            make = Calls().make(result=result, **({"target": target} if target else {}))
            made = make.map(values) if values else make(argument)
        state = FlowRunner(flow).run(return_tasks=[made], context={"checkpointing": True})
        for end in getattr(state.result[made], "map_states", [state.result[made]]):
            assert end.is_successful(), repr(end.result)
            place = os.path.basename(end._result.location)
            told.append((type(end).__name__, end.result.id[0], place))
    return told


@from_0_11
@pytest.mark.parametrize(
    "location, target, argument, values",
    [
        (None, "{task_name}.bin", 3, None),
        (None, "{map_index}.bin", None, [3, 4]),
        ("{task_name}.bin", None, 3, None),
        # Prefect 0.11 fills targets from its context only.
        pytest.param(None, "{id}.bin", 3, None, marks=from_0_12),
        pytest.param(None, lambda id, **fields: f"{id}.bin", 3, None, marks=from_0_12),
        pytest.param(lambda id, **fields: f"{id}.bin", None, 3, None, marks=from_0_12),
        pytest.param("{today}{id}.bin", None, None, None, marks=from_0_12),
    ],
    ids=["context", "map", "location", "arguments", "function", "located by a function", "none"],
)
def test_targets_and_locations_are_filled_and_loaded_as_with_prefects(
    location, target, argument, values
):
    local = LocalResult(dir=os.path.abspath("local"), location=location)
    ours = PandasResult(location=location, file_type="pickle")
    local, ours = (runs_on_prefect(result, target, argument, values) for result in (local, ours))
    assert ours == local
    assert {kind for kind, _, _ in ours} == ({"Success", "Cached"} if target else {"Success"})


@from_0_11
@by_handler_or_prefect
def test_a_target_is_filled_from_defaults_loaded_and_recomputed(options):
    calls = []

    @task(result=PandasResult(), target="{task_name}_{id}_{size}.pkl")
    def make(id, size="large"):
        calls.append(id)
        return FRAME

    with Flow("defaults") as flow:
        plain, children = make(1), make.map([2, 3])
    for expected in ("Success", "Cached"):
        state = run(flow, **options)
        states = [state.result[plain], *state.result[children].map_states]
        assert [type(state).__name__ for state in states] == [expected] * 3
        assert_frame_equal(state.result[plain].result, FRAME)
        assert sorted(calls) == [1, 2, 3]
    assert files() == ["make_1_large.pkl", "make_2_large.pkl", "make_3_large.pkl"]
    assert len(pandas.read_pickle("make_1_large.pkl")) == 3
    # What was found at its target is recomputed though its state is given.
    context = {"recompute": "make", **options.get("context", {})}
    given = {plain: state.result[plain]}
    final = run(flow, task_states=given, **{**options, "context": context})
    assert type(final.result[plain]) is Success and sorted(calls) == [1, 1, 2, 2, 3, 3]
    Path("make_1_large.pkl").write_bytes(b"")
    for _ in range(2):
        assert_frame_equal(run(flow, **options).result[plain].result, FRAME)
        assert len(calls) == 7 and len(files()) == 4


@from_0_11
def test_a_target_of_prefects_is_recomputed_and_ours_leads_nowhere_else():
    with Flow("target") as flow:
        calls = Calls()
        calls.make(result=LocalResult(dir=os.path.abspath("in")), target="out.pkl")(1)
        outside = calls.make("outside", result=PandasResult(), target="in/{who}.csv")(2)
    for recompute, expected in [("", 1), ("", 1), ("make", 2), ("", 2)]:
        context = {"checkpointing": True, "who": "../secret", "recompute": recompute}
        state = run(flow, context=context, task_runner_state_handlers=[])
        assert calls == [1] * expected and files("in") == ["out.pkl"]
        assert "leads out of the folder" in str(failed(state, outside))


# The storage of a task, which is read when it is needed --------------------------------------


@pytest.mark.parametrize("run_by", [run, run_by_prefects])
@on_each_executor
def test_a_second_run_runs_nothing_and_opens_only_what_is_asked_for(executor, run_by, log):
    def make(name, path):
        options = {**stored(path), **({"task_run_name": "{map_index}"} if HAS_RUN_NAMES else {})}
        return task(lambda x: note(name) or FRAME.assign(id=ids_in(x)), name=name, **options)

    with Flow("stored") as flow:
        first = make("first", "first.pkl")(1)
        mapped = make("load", "load_{map_index}.pkl").map([1, 2])
        reduced = make("total", "total.pkl")(make("clean", "clean_{map_index}.pkl").map(mapped))
        make("last", "last_{x}.pkl").map([1, 2], upstream_tasks=[unmapped(reduced)])
        if run_by is run:  # In a second round, what is in files goes to workers and comes back.
            retry = {"max_retries": 1, "retry_delay": timedelta(0)}
            task(lambda: 1 // (prefect.context.task_run_count - 1), name="retried", **retry)()
    options = {"executor": executor(), "context": {"checkpointing": run_by is run}}
    assert run_by(flow, **options).is_successful()
    names = [name for name in files() if name != "noted"]
    contents = [Path(name).read_bytes() for name in names]
    is_later = run_by is run and PURGES_ON_DASK
    for name in names:
        if is_later:
            Path(name).write_text("It is not opened.")
    before = len(files_read(log))
    state = run_by(flow, **options)
    assert state.is_successful() and len(noted()) == len(names) == 8
    assert files_read(log)[before:] == [] or not is_later
    said = log(logging.INFO)
    for name, content in zip(names, contents):
        Path(name).write_bytes(content)
        assert said.count(f": Wrote {os.path.abspath(name)}") == 1
        # Prefect 0.12.0 computes on Dask, each time that it waits, all that it had before.
        found = said.count(f": Found {os.path.abspath(name)}")
        assert found == 1 or (found and prefect.__version__ == "0.12.0")
    first_read, mapped_read = ["first.pkl"], ["load_0.pkl", "load_1.pkl"]
    for asked, expected, read in [(first, 3, first_read), (mapped, 9, mapped_read)]:
        before = len(files_read(log))
        if PURGES_ON_DASK or run_by is not run:
            assert ids_in(state.result[asked].result) == expected
        assert files_read(log)[before:] == (read if is_later else [])
    # A state travels as a place.
    assert not is_later or b"BlockManager" not in pickle.dumps(all_states(state))
    # It says whose result it is that a user reads.
    assert f"Task 'load[1]': Loaded {os.path.abspath('load_1.pkl')}" in log(logging.INFO)
    assert "Task ''" not in said


@from_0_12
def test_what_is_there_after_the_run(counted_tables):
    indexed = pandas.DataFrame({"x": [1]}, index=["a"])
    with Flow("after") as flow:
        plain = task(table, name="plain")()
        first = task(table, name="first", **stored("first.pkl"))(plain)
        task(table, name="last", **stored("last.pkl"))(first)
        lossy = task(lambda: indexed, name="lossy", **stored("lossy.csv"))()
        tagged = task(table, name="tagged", tags=["prefect-ds:keep"], **stored("tagged.pkl"))()
    state = run(flow)
    assert state.result[plain]._result is PurgedResult and state.result[plain].result is None
    assert tables_alive() == 1, "only what has the tag is in memory"
    assert len(state.result[first].result) == len(state.result[tagged].result) == 1
    # What does not come back from its file exactly stays as it was.
    assert state.result[lossy].result is indexed


@from_0_12
def test_a_state_that_is_given_is_read_by_who_needs_it():
    with Flow("given") as flow:
        made = Calls().make(**stored("{id}.csv")).map([1, 2])
        sizes = task(lambda frame: len(frame), name="size").map(made)
    given = {made: run(flow).result[made]}
    os.remove("2.csv")
    one, two = run(flow, task_states=given).result[sizes].map_states
    assert one.result == 3 and "2.csv is gone" in two.message


def many_rows(i):
    return pandas.DataFrame({"x": range(100_000)})


DAMAGES = {
    "empty": lambda content: b"",
    # So that it looks as it was, and only reading all of it can tell.
    "garbage": lambda content: content[:4] + b"?" * (len(content) - 8) + content[-4:],
    "no frame": lambda content: pickle.dumps([FRAME]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("how", ["later", "threads", "found", "tag"])
def test_a_damaged_file_is_kept_and_computed_again(how, damage, log):
    tags = ["prefect-ds:keep"] if how == "tag" else []
    flow, _, last, calls = flow_of("data.pkl", tags=tags)

    def result_of_run():
        executor = EXECUTORS["threads" if how == "threads" else "local"]()
        state = (run_by_prefects if how == "found" else run)(flow, executor=executor)
        return state.result[last]

    assert result_of_run().result == 3
    content = DAMAGES[damage](Path("data.pkl").read_bytes())
    Path("data.pkl").write_bytes(content)
    if PURGES_ON_DASK and how not in ("found", "tag") and damage != "empty":
        # It turns out when it is read: the reader fails, and the next run computes the file.
        end = result_of_run()
        assert end.is_failed() and calls == [1] and files()[0] in str(end.message)
        assert os.path.abspath("data.pkl") in str(end.message) and len(files()) == 1
        assert result_of_run().result == 3
    else:
        assert result_of_run().result == 3
        assert "data.pkl is there, but cannot be read" in log(logging.WARNING)
    _, aside = files()
    assert calls == [1, 1] and re.match(r"data\.pkl\.unreadable-20\d+", aside)
    assert Path(aside).read_bytes() == content
    assert result_of_run().result == 3 and calls == [1, 1]


@pytest.mark.parametrize("run_by", [run, run_by_prefects])
def test_an_error_that_is_not_of_the_file_leaves_it_where_it_is(run_by, monkeypatch):
    flow, made, last, calls = flow_of("data.csv")
    run_by(flow)
    content = Path("data.csv").read_bytes()
    told_by_type = (OSError(5, "Input/output error"), MemoryError("no room"), ImportError("engine"))
    told_by_text = (ValueError("C error: out of memory"), RuntimeError("lzma module not available"))
    for error in told_by_type + told_by_text:

        def fail(*args, error=error, **kwargs):
            raise error

        with monkeypatch.context() as patched:
            patched.setitem(prefect_ds._FILE_TYPES, "csv", (fail, fail))
            state = run_by(flow)
            assert not state.result[last].is_successful()
            told = f"{state.result[made].message} {state.result[last].message}"
            assert str(error.args[-1]) in told and "Task '" in told
            assert files() == ["data.csv"] and Path("data.csv").read_bytes() == content
            state = run(flow, context={"recompute": "make"})
            assert str(error) in str(failed(state, made))
            assert "data.csv" in state.result[made].message
            assert Path("data.csv").read_bytes() == content
    assert run_by(flow).result[last].result == 3 and calls == [1] * 6


def test_arguments_that_do_not_fit_are_at_fault_and_not_the_file():
    write_file(FRAME, "data.csv")
    content = Path("data.csv").read_bytes()
    with Flow("typo") as flow:
        calls = Calls()
        made = calls.make(**stored("data.csv", read_kwargs={"parse_dates": ["oen"]}))(1)
        last = task(lambda frame: len(frame), name="last")(made)
    state = run(flow)
    assert "oen" in f"{state.result[made].message} {state.result[last].message}"
    assert files() == ["data.csv"] and Path("data.csv").read_bytes() == content and calls == []


@on_each_executor
def test_says_what_is_out_of_date_and_computes_it_if_it_is_told_to(executor, log):
    with Flow("out of date") as flow:
        first = Calls().make(name="first", **stored("first_{id}.pkl")).map([1, 2])
        between = task(lambda x: x, name="between").map(first)
        second = task(lambda x: x, name="second", **stored("{map_index}.pkl")).map(between)
        last = task(lambda x: x[0], name="last", **stored("last.pkl"))(second)
    for times in (2, 1):
        for _ in range(times):
            assert run(flow, executor=executor()).is_successful()
        for name in files():
            os.utime(name, (10**9,) * 2)
    assert "is older" not in log(logging.WARNING)
    for name in ("first_1.pkl", "first_2.pkl"):
        os.utime(name)
    assert run(flow, executor=executor()).is_successful()
    said = [line for line in log(logging.WARNING).splitlines() if "is older than" in line]
    folder = re.escape(os.path.abspath("") + os.sep)
    pattern = rf"Task 'second\[\d\]': {folder}\d\.pkl is older than {folder}first_\d\.pkl, .*out-of"
    assert re.match(pattern, said[0]) and sum("'second[" in line for line in said) == 1
    for written in (["0.pkl", "1.pkl", "last.pkl"], []):
        before = log(logging.INFO).count(": Wrote ")
        state = run(flow, executor=executor(), context={"recompute": "out-of-date"})
        lines = [line for line in log(logging.INFO).splitlines() if ": Wrote " in line][before:]
        assert sorted(os.path.basename(line) for line in lines) == written
        assert ids_in(state.result[last].result) == 3


# Which file belongs to which task run --------------------------------------------------------


def at(calls, name="make", path="out.csv"):
    return storing(calls, name, **stored(path))


def mapping(path, *values):
    return lambda calls: at(calls, path=path).map(*map(list, values))


def twice(*xs):
    return lambda calls: list(map(at(calls), xs))


def one_function_with_other_arguments_of_pandas(calls):
    make = storing(calls).run
    for kwargs in ({}, {"read_kwargs": {"comment": "#"}}):
        task(make, name="make", **stored("out.csv", **kwargs))(1)


def two_tasks_with_one_function(calls):
    make = storing(calls).run
    for n in (1, 2):
        task(lambda n=n: make(n), name="make", **stored("out.csv"))()


def a_linked_file(calls):
    os.symlink("out.csv", "link.csv")
    at(calls, "b", "link.csv")(1, upstream_tasks=[at(calls, "a")(1)])


@on_local_and_threads
@pytest.mark.parametrize(
    "build",
    [
        mapping("{x:0<2}.csv", ["1", "10"]),
        mapping("{x:%Y-%m}.csv", [datetime.date(2020, 2, 3), datetime.date(2020, 2, 4)]),
        mapping("{x[region]}.csv", [{"region": 1, "id": 1}, {"region": 1, "id": 2}]),
        mapping("{x}.csv", [1, "1"]),
        mapping("in/{x}.csv", ["a/b", "a//b"]),
        mapping("{x}.csv", [1, 1], [2, 3]),
        mapping("{x.n}.csv", [types.SimpleNamespace(n=1), types.SimpleNamespace(n=1)]),
        twice(1, 2),
        twice(0.1, numpy.float32(0.1)),
        twice({"x": [0.1]}, {"x": [numpy.float32(0.1)]}),
        twice(FRAME, FRAME * 2),
        lambda calls: twice(*[Calls().make()(n) for n in (1, 2)])(calls),
        lambda calls: [at(calls, "a")(1), at(calls, "b")(1)],
        lambda calls: [at(calls, "a")(1), at(calls, "b", os.path.abspath("out.csv"))(1)],
        lambda calls: at(calls, "b")(at(calls, "a")(1)),
        pytest.param(a_linked_file, marks=takes_posix),
        two_tasks_with_one_function,
        one_function_with_other_arguments_of_pandas,
        pytest.param(
            lambda calls: storing(calls, result=PandasResult(), target="c{x:.0f}.csv").map(
                [1, 1.1]
            ),
            marks=from_0_11,
        ),
    ],
)
def test_a_file_belongs_to_one_task_run(build, executor, log):
    calls = []
    with Flow("clash") as flow:
        build(calls)
    for n in (1, 2):
        state = run(flow, executor=EXECUTORS[executor]())
        failures = [state for state in all_states(state) if state.is_failed()]
        assert state.is_failed() and len(failures) == 1
        message = str(failures[0].result)
        assert "belongs to the task run" in message and message.count(".csv") == 1
        assert len(set(re.findall(r"ask run ('.+?' \(.+?\))[. ]", message))) == 2
        # Who came second neither ran nor wrote; and the next run finds no file of the other one.
        assert [isinstance(s.result, object) for s in all_states(state)]  # and all can be read
        left = [path for path in Path().rglob("*.csv*") if path.is_file()]
        assert all(".unreadable-" in path.name for path in left) and len(left) == len(calls) == n
        assert all(path.name in log(logging.WARNING) for path in left)
        told = {pandas.read_csv(str(path)).run[0] for path in left}
        assert told == {" ".join(map(str, call)) for call in calls}


def all_states(flow_state):
    tops = flow_state.result.values()
    return [state for top in tops for state in getattr(top, "map_states", [top])]


@on_local_and_threads
def test_the_same_task_with_equal_arguments_may_share_a_file(executor):
    with Flow("shared") as flow:
        calls = Calls()
        make = calls.make(**stored("{id}.csv"))
        frame = storing(calls, "frame")(0)
        nested = functools.reduce(lambda inner, _: {"it's": inner}, range(14), [3])
        clean = storing(calls, "clean", **stored("clean.csv"))
        for _ in range(2):
            make(1)
            make.map([Path("2"), Path(".") / "2"])
            make([nested, datetime.date(2020, 2, 3), None])
            clean(frame)
    for _ in range(2):
        assert run(flow, executor=EXECUTORS[executor]()).is_successful()
    # Two that run at once may both run.
    told = {str(call[:2] if isinstance(call, tuple) else call) for call in calls}
    assert len({call for call in told if "frame" not in call}) == len(files()) == 4


def test_a_file_belongs_to_one_task_run_as_long_as_its_flow_runs():
    calls = []
    with Flow("rounds") as flow:
        make = storing(calls, **stored("out.csv"))
        first, second = make(1), make(flaky(lambda _: 2)())
    state = run(flow)
    assert state.result[first].is_successful() and len(calls) == 1
    assert re.search("belongs to the task run '.*make'", str(failed(state, second)))


def test_flow_runs_do_not_take_files_from_each_other():
    inner, *_, calls = flow_of("other.csv", value=Parameter("id", default=0))

    def run_inner(id, **context):
        context["recompute"] = "make"
        assert run(inner, parameters={"id": id}, context=context).is_successful()

    def run_several():
        for id in (1, 2):
            run_inner(id)
            run_inner(id)
            run_inner(id, scheduled_start_time=pendulum.datetime(2020, 2, 3))

    run_several()
    outer = Flow("outer", tasks=[task(run_several, name="several")])
    assert run(outer).is_successful() and calls == [1, 1, 1, 2, 2, 2] * 2


@purges_on_dask
def test_a_file_of_two_task_runs_in_processes_is_set_aside_in_the_end(processes, empty_folder):
    def make(name):
        # Each runs in a process of its own, and both have looked for the file before it is there.
        def made():
            (empty_folder / f"noted-{name}").touch()
            wait_until(lambda: all((empty_folder / f"noted-{n}").exists() for n in "ab"))
            return FRAME

        return task(made, name=name, **stored(str(empty_folder / "out.csv")))()

    with Flow("two") as flow:
        make("a"), make("b")
    state = run(flow, executor=InOnePool(processes))
    assert state.is_failed()
    assert "out.csv belongs to the task run" in state.message and "'b'" in state.message
    (aside,) = (name for name in files() if name.startswith("out"))
    assert aside.startswith("out.csv.unreadable-") and aside in state.message


# A task whose file is there is not run -------------------------------------------------------


def test_storage_of_the_flow_leaves_alone_what_prefect_puts_in_between():
    @task
    def join(frames, named, first, chosen):
        assert chosen is not None and len(named["b"]) == 3
        return pandas.concat(frames).assign(first=first)

    with Flow("between", **stored("{task_name}.csv")) as flow:
        calls = Calls()
        a, b = calls.make("a")(1), calls.make("b")(2)
        result = join([a, b], {"b": b}, a["one"], control_flow.merge(a, b))
    for n in range(3):
        state = run(flow, context={"checkpointing": n < 2})
        assert state.is_successful() and len(state.result[result].result) == 6
        assert sorted(calls) == [1, 2] and files() == ["a.csv", "b.csv", "join.csv"]


@pytest.mark.skipif(
    "result_handler" not in inspect.signature(Task.__init__).parameters,
    reason="From Prefect 0.14 on there is only result=.",
)
def test_result_handler_is_taken_as_long_as_prefect_takes_it():
    with Flow("keyword") as flow:
        calls = Calls()
        result = calls.make(result_handler=PandasResultHandler("data_{id}.csv")).map([1, 2])
    for checkpointing in (True, True, False):
        state = run(flow, context={"checkpointing": checkpointing})
        assert ids_in(state.result[result].result) == 9 and calls == [1, 2]


# fmt: off
ENDS = [
    (signals.FAIL("no"), {}, "Failed"), (signals.SKIP("no"), {}, "Skipped"),
    (signals.PAUSE("no"), {}, "Paused"), (signals.SUCCESS("no"), {}, "Success"),
    (ValueError("no"), {}, "Failed"), (None, {}, "Failed"), ([FRAME], {}, "Failed"),
    (ValueError("no"), {"max_retries": 1, "retry_delay": timedelta(1)}, "Retrying"),
    (FRAME["one"], {}, "Failed"), (FRAME, {"timeout": 1}, "TimedOut"),
    (FRAME, {"state_handlers": [lambda _, old, new: new if new.is_running() else state.Failed()]},
     "Failed"),
]
# fmt: on


@pytest.mark.parametrize("value, kwargs, kind", ENDS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("context", [{}, {"checkpointing": True}], ids=["off", "on"])
def test_only_a_frame_of_a_task_that_succeeded_is_written(value, kwargs, kind, context):
    def end():
        time.sleep(3 if "timeout" in kwargs else 0)
        if isinstance(value, BaseException):  # a new one: a signal keeps the state that it made
            raise type(value)("no", **({"result": FRAME} if kind == "Success" else {}))
        return value

    make = task(end, name="end", **kwargs, **stored("data.csv"))
    state = DSFlowRunner(Flow("ends", tasks=[make])).run(
        return_tasks=[make], task_runner_state_handlers=[checkpoint_handler], context=context
    )
    assert type(state.result[make]).__name__ == kind
    assert files() == (["data.csv"] if kind == "Success" else [])
    if isinstance(state.result[make].result, TypeError):
        assert "returned " + type(value).__name__ in str(state.result[make].result)
        with pytest.raises(TypeError, match="returned "), raise_on_exception():
            run(Flow("raise", tasks=[make]))


@by_handler_or_prefect
def test_a_loop_is_written_in_its_last_round(options):
    rounds = []

    @task(max_retries=1, retry_delay=timedelta(0), **stored("data.csv"))
    def loop():
        rounds.append(files())
        if len(rounds) <= 2:
            raise signals.LOOP(result=FRAME.assign(id=len(rounds)))
        if len(rounds) == 3:
            raise ValueError("not yet")
        return prefect.context["task_loop_result"].assign(last=True)

    state = run(Flow("loop", tasks=[loop]), **options)
    assert_frame_equal(state.result[loop].result, FRAME.assign(id=2, last=True))
    assert rounds == [[]] * 4 and len(pandas.read_csv("data.csv")) == 3


def test_a_loop_that_prefects_own_task_runner_stores_goes_on_to_its_end():
    @task(**stored("data.csv"))
    def loop():
        number = prefect.context.get("task_loop_count", 1)
        if number < 3:
            raise signals.LOOP(result=FRAME.assign(id=number))
        return prefect.context["task_loop_result"].assign(last=True)

    options = {"task_runner_cls": None, "context": {"checkpointing": True}}
    state = run_by_prefects(Flow("loop", tasks=[loop]), **options)
    assert_frame_equal(state.result[loop].result, FRAME.assign(id=2, last=True))


@by_handler_or_prefect
def test_a_task_that_cannot_write_fails_and_is_retried(options, log):
    attempts, heard = iter(range(4)), []
    make = task(
        lambda: [next(attempts) < 3 or os.remove("a"), FRAME][1],
        name="make",
        max_retries=1,
        retry_delay=timedelta(0),
        state_handlers=[lambda task, old, new: heard.append(type(new).__name__)],
        **stored("a/b.csv"),
    )
    Path("a").touch()
    flow = Flow("deaf", tasks=[make])
    state = run(flow, **options)
    assert isinstance(failed(state, make), OSError) and "Task 'make'" in log(logging.ERROR)
    assert heard[-1] == "Failed" and files() == ["a"]
    assert run(flow, **options).is_successful() and files("a") == ["b.csv"]


def test_a_handler_of_a_task_says_where_it_belongs():
    flow, made, *_ = flow_of("data.csv", state_handlers=[checkpoint_handler])
    error = failed(run(flow), made)
    assert isinstance(error, TypeError)
    assert "task_runner_state_handlers=[checkpoint_handler]" in str(error)


@pytest.mark.skipif("checkpoint" in prefect.config.tasks.defaults, reason="It is the default.")
def test_a_task_may_opt_out():
    flow, _, last, calls = flow_of("data.csv", checkpoint=False)
    Path("data.csv").write_text("mine")
    for n in (1, 2):
        assert run(flow).result[last].result == 3 and len(calls) == n
    assert Path("data.csv").read_text() == "mine" and files() == ["data.csv"]


@on_local_and_threads
def test_a_task_with_a_purged_input_fails_before_it_runs_and_writes(executor, log):
    with Flow("purged") as flow:
        number, calls = task(lambda: 1, name="number")(), Calls()
        made = calls.make(**stored("data.csv"))(number)
    purged = Success(result=None)
    purged._result = PurgedResult
    state = run(flow, executor=EXECUTORS[executor](), task_states={number: purged})
    message = state.result[made].message
    assert state.result[made].is_failed() and calls == [] and files() == []
    assert "Task 'make'" in message and "'number'" in message and "which was purged" in message
    assert message in log(logging.ERROR)


# Which tasks run though their file is there --------------------------------------------------


def chain_of_files(calls):
    with Flow("chain") as flow:
        first = storing(calls, "first", **stored("first.csv"))(1)
        length = task(lambda frame: len(frame), name="between")(first)
        storing(calls, "mapped", **stored("mapped_{x}.csv")).map([1, 2], unmapped(length))
        for name in ("other", "first+", "a, b", "[x]"):
            storing(calls, name, **stored("{task_name}.csv"))(1)
    return flow


@pytest.mark.parametrize(
    "recompute, computed",
    [
        ("first", {"first"}),
        ("first+", {"first+"}),
        ("f*st+", {"first", "mapped"}),
        ("between+", {"mapped"}),
        ("*", {"first", "mapped", "other", "first+", "a, b", "[x]"}),
        ("other, mapped, [x]", {"mapped", "other", "[x]"}),
        (["o*er"], {"other"}),
        (("a, b", "[x]"), {"a, b", "[x]"}),
        (["first++"], {"first+"}),
        ("", set()),
        (" , ", set()),
    ],
    ids=str,
)
@on_local_and_threads
def test_recomputes_for_one_run(recompute, computed, executor):
    calls = []
    flow = chain_of_files(calls)
    run(flow)
    for expected, context in [(computed, {"recompute": recompute}), (set(), {})]:
        del calls[:]
        assert run(flow, context=context, executor=EXECUTORS[executor]()).is_successful()
        assert {name for name, *_ in calls} == expected
        assert len(calls) == len(expected) + ("mapped" in expected)


def test_the_flow_runner_of_prefect_does_not_know_what_to_recompute():
    calls = []
    state = run_by_prefects(chain_of_files(calls), context={"recompute": "first"})
    (message,) = [s.message for t, s in state.result.items() if t.name == "first"]
    assert state.is_failed() and "DSFlowRunner" in message and not calls


def test_what_was_cached_before_is_forgotten_when_it_is_recomputed():
    numbers, seen = [], []

    @task(name="raw", cache_for=timedelta(hours=1))
    def raw():
        numbers.append(1)
        return len(numbers)

    with Flow("forget") as flow:
        number = raw()
        task(lambda number: seen.append(number) or FRAME, **stored("made.pkl"))(number)
        looked = flaky(lambda x: x)(number)  # In the second round `raw` is not computed again.
    results = []
    for recompute in ("", "raw+", "", "raw", "", ""):
        state = run(flow, context={"recompute": recompute})
        results.append(state.result[looked].result)
    assert results == [1, 2, 2, 3, 3, 3] and seen == [1, 2]
    # Of the state of an earlier run, too.
    run(flow, context={"recompute": "raw"}, task_states={number: state.result[number]})
    assert len(numbers) == 4


@on_local_and_threads
def test_a_pattern_that_is_inherited_need_not_match(executor):
    inner, *_ = flow_of("inside.csv", name="inside")
    with Flow("outer") as outer:  # With a timeout, Prefect runs it in a thread of its own.
        result = task(lambda: run(inner).is_successful(), name="outside", timeout=60)()
    state = run(outer, context={"recompute": "outside"}, executor=EXECUTORS[executor]())
    assert state.result[result].result is True


def test_recomputing_what_is_no_task_is_refused():
    for recompute, said in [("frist+", "'frist+' matches no task"), ([3], "'3' matches no task")]:
        calls = []
        state = run(chain_of_files(calls), context={"recompute": recompute})
        assert state.is_failed() and calls == [] and said in str(state.message)


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
@on_each_executor
def test_an_executor_is_enough(executor, log):
    with Flow("enough") as flow:
        frames = write_and_note.map([1, 2])
        result = how_many(frames)
    for _ in range(2):
        final = run_on(executor(), flow)
        assert final.result[result].result == 2 and sorted(noted()) == ["1", "2"]
    assert_frame_equal(final.result[frames].map_states[1].result, FRAME)
    assert not log(logging.WARNING)


@from_0_12
def test_the_executor_knows_its_flow_as_it_is_and_no_other(counted):
    flow = Flow("grows")
    executor = DSExecutor(flow)
    for _ in range(2):
        with flow:
            count(step(load(0)))
        assert flow.run(executor=executor).is_successful() and peak == [2] and not alive
    copied = flow.copy()
    assert copied.run(executor=executor).is_successful()
    copied.add_task(task(lambda: 1, name="another"))
    final = copied.run(executor=executor)
    assert "without the task 'another'" in final.message
    assert "flow.executor = DSExecutor(flow)" in final.message
    assert copied.run(executor=DSExecutor(copied)).is_successful()


@from_0_12
def test_a_task_runner_of_ones_own_inherits_from_ours():
    own, ours = type("OwnTaskRunner", (TaskRunner,), {}), type("OursAsWell", (DSTaskRunner,), {})
    with Flow("own") as flow:
        write_and_note.map([1, 2])
    final = FlowRunner(flow, task_runner_cls=own).run(executor=DSExecutor(flow))
    assert final.is_failed() and "inherit from prefect_ds.DSTaskRunner" in final.message
    final = FlowRunner(flow, task_runner_cls=ours).run(executor=DSExecutor(flow))
    assert final.is_successful() and files() == ["1.csv", "2.csv", "noted"]


@from_0_12
def test_runs_within_runs_and_at_once_share_the_executor():
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
    assert flow.run(depth=2, executor=executor).is_successful() and depths == [2, 1, 0]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        finals = pool.map(lambda _: flow.run(depth=1, executor=executor), range(12))
        assert all(final.is_successful() for final in finals)


@from_0_12
def test_what_the_executor_does_not_take():
    flow = chain(1)
    for arguments in [(), (LocalExecutor(),), (flow, LocalDaskExecutor), (flow, flow)]:
        with pytest.raises(TypeError, match=r"takes a flow and an executor|argument"):
            DSExecutor(*arguments)
    with pytest.raises(TypeError, match=r"not an instance as in DSExecutor\(flow\)"):
        DSExecutor.start().__enter__()  # as on a flow that has the class as its executor


# Under Prefect Server and Cloud --------------------------------------------------------------

SUCCESS = {"success": True}

#: What a backend always answers.
ANSWERS = {
    "hello": "hello",
    "register_agent": {"id": "agent"},
    "task_run": [],  # Nothing is cached.
    "tenant": [{"id": "tenant"}],
    "update_flow_run_heartbeat": SUCCESS,
    "update_task_run_heartbeat": SUCCESS,
    "write_run_logs": SUCCESS,
}


class Backend:
    """A small Prefect Server: it answers what Prefect's client asks of it, over HTTP."""

    def __init__(self):
        self.flows, self.flow_runs, self.task_runs = {}, {}, {}
        self._lock = threading.Lock()
        backend = self

        class Handler(SimpleHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])).decode())
                query, variables = body["query"], json.loads(body["variables"] or "null") or {}
                name = re.search(r"{\s*(\w+)", query).group(1)
                with backend._lock:
                    answer = ANSWERS.get(name)
                    if name not in ANSWERS:
                        answer = getattr(backend, name)(query, variables.get("input", {}))
                content = json.dumps({"data": {name: answer}}).encode()
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

    def register(self, flow):
        """As `flow.register`, but for the project; return the id of the flow."""
        known = flow.serialize(build=True)
        flow_id = str(uuid.uuid4())
        self.flows[flow_id] = {
            **{key: known.get(key) for key in ("name", "environment", "run_config", "storage")},
            "version": 1,
            "id": flow_id,
            "core_version": prefect.__version__,
            "settings": {"heartbeat_enabled": False},
            "project": {"id": "project", "name": "project"},
            "tasks": {str(uuid.uuid4()): task["slug"] for task in known["tasks"]},
        }
        return flow_id

    def environment(self):
        """That of an agent; labels and the like do not matter."""
        return for_processes(
            PREFECT__BACKEND="server",
            PREFECT__SERVER__HOST="http://127.0.0.1",
            PREFECT__SERVER__PORT=self.port,
            PREFECT__HOME_DIR=os.path.abspath("prefect"),
            PREFECT__CLOUD__SEND_FLOW_RUN_LOGS="false",
            PREFECT__LOGGING__LOG_TO_CLOUD="false",
            PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
        )

    def create(self, flow_id, **context):
        """As `client.create_flow_run(flow_id=..., context=...)`; return the id of the flow run."""
        flow_run_id, now = str(uuid.uuid4()), pendulum.now("utc")
        self.flow_runs[flow_run_id] = {
            "id": flow_run_id,
            "name": "run",
            "flow_id": flow_id,
            "version": 0,
            "parameters": {},
            "context": context,
            "scheduled_start_time": now.isoformat(),
            "run_config": None,
            "history": [],
            "serialized_state": state.Scheduled(start_time=now).serialize(),
        }
        for task_id in self.flows[flow_id]["tasks"]:
            self._task_run(flow_run_id, task_id, -1)
        return flow_run_id

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

    # What the client asks: each method has the name of the field.

    def get_runs_in_queue(self, query, given):
        return {"flow_run_ids": [i for i, run in self.flow_runs.items() if self._is_ready(run)]}

    def flow_run(self, query, given):
        return [
            {
                **run,
                "state": run["serialized_state"]["type"],
                "flow": self.flows[run["flow_id"]],
                "task_runs": self._due(run),
            }
            for i, run in self.flow_runs.items()
            if i in query and ("_in" not in query or self._is_ready(run))
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
        return self._task_run(values["flow_run_id"], values["task_id"], int(values["map_index"]))

    def get_task_run_info(self, query, given):
        return self.task_runs[max((i for i in self.task_runs if i in query), key=len)]

    def set_flow_run_states(self, query, given):
        return self._set_all(self.flow_runs, "flow_run_id", given["states"])

    def set_task_run_states(self, query, given):
        return self._set_all(self.task_runs, "task_run_id", given["states"])

    get_or_create_task_run = get_or_create_task_run_info  # below 0.13
    task_run_by_pk = get_task_run_info

    def _task_run(self, flow_run_id, task_id, map_index):
        found = self.task_runs.get(f"{flow_run_id} {task_id} {map_index}".replace(" ", "-"))
        if found is None:
            slug = self.flows[self.flow_runs[flow_run_id]["flow_id"]]["tasks"][task_id]
            found = {
                "id": f"{flow_run_id}-{task_id}-{map_index}",
                "flow_run_id": flow_run_id,
                "map_index": map_index,
                "task": {"id": task_id, "slug": slug},
                "task_id": task_id,
                "version": 0,
                "serialized_state": Pending().serialize(),
                "history": [],
            }
            self.task_runs[found["id"]] = found
        return found

    def _set_all(self, runs, key, states):
        for new in states:
            run, new_state = runs[new[key]], new["state"]
            run["serialized_state"] = new_state
            run["version"] += 1
            run["history"].append((new_state["type"], new_state["message"]))
        return {"states": [{"id": s[key], "status": "SUCCESS", "message": None} for s in states]}

    def _due(self, flow_run):
        now = pendulum.now("utc").subtract(seconds=3)
        runs = [r for r in self.task_runs.values() if r["flow_run_id"] == flow_run["id"]]
        starts = [(r, r["serialized_state"].get("start_time")) for r in runs]
        return [run for run, start in starts if start and pendulum.parse(start) <= now]

    def _is_ready(self, flow_run):
        kind = flow_run["serialized_state"]["type"]
        return kind == "Scheduled" or (kind == "Running" and bool(self._due(flow_run)))


@pytest.fixture
def backend(empty_folder):
    """A backend."""
    try:
        Flow("any").serialize()
    except AttributeError as exc:
        pytest.skip(f"With this marshmallow, Prefect runs under no backend: {exc}")
    found = Backend()
    thread = threading.Thread(target=found.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()


@contextmanager
def agent(backend):
    """Something that has a flow run executed by a real agent; it returns the state then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = "from prefect.cli import cli; cli()"
    options = ["agent", "local", "start", "--show-flow-logs", "--agent-address", address]
    with open("agent.log", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", command, *options],
            env=backend.environment(), stdout=output, stderr=output,
        )  # fmt: skip

    def execute(flow_run_id, timeout=60):
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
        left = psutil.Process(process.pid).children(recursive=True)
        for each in [*left, process]:
            each.kill()
        process.wait()
        print(Path("agent.log").read_text())


def for_an_agent(flow):
    """Let a flow have what it needs to be registered, and the executor."""
    if HAS_EXECUTORS:
        flow.executor = DSExecutor(flow)
        flow.run_config = LocalRun()  # On 0.13 only a flow with this uses its executor.
    elif "executor" in inspect.signature(LocalEnvironment.__init__).parameters:
        flow.environment = LocalEnvironment(executor=DSExecutor(flow))
    else:
        pytest.skip("On Prefect 0.12.0 an environment takes no executor.")
    flow.storage = Local(directory=os.path.abspath("flows"))
    flow.result = flow.storage.result
    return flow


def run_here(backend, flow, **context):
    """Run a flow by Prefect's `CloudFlowRunner` in this process; return the id of the run."""
    flow_run_id = backend.create(backend.register(flow), **context)
    resume_here(backend, flow, flow_run_id)
    return flow_run_id


def resume_here(backend, flow, flow_run_id):
    """Begin the flow run, or go on with it when what waits has waited long enough."""
    backend.let_retry_now(flow_run_id)
    api = f"http://127.0.0.1:{backend.port}"
    config = {"backend": "server", "cloud.api": api, "cloud.graphql": api}
    config.update({"cloud.send_flow_run_logs": False, "logging.log_to_cloud": False})
    with set_temporary_config(config), prefect.context(flow_run_id=flow_run_id):
        executor = None if HAS_EXECUTORS else flow.environment.executor
        CloudFlowRunner(flow=flow).run(executor=executor)


IN_20_MINUTES = {"max_retries": 1, "retry_delay": timedelta(minutes=20)}


def stages():
    """What is computed depends on a file, and so does whether it fails."""

    @task(**stored("load_{i}.csv"))
    def load(i):
        note(f"load{i}")
        return pandas.DataFrame({"x": [int(Path("x").read_text()) + i]})

    @task(**IN_20_MINUTES, **stored("clean_{i}.csv"))
    def clean(frame, i):
        note(f"clean{i}")
        if os.path.exists("fails") and i % 2:
            raise ValueError("Not yet.")
        return frame * 2

    @task
    def total(frames):
        note(sum(int(frame["x"].sum()) for frame in frames))

    with Flow("stages") as flow:
        ids = [0, 1, 2, 3]
        total(clean.map(load.map(ids), ids))
    return flow


@slow
@has_executors
def test_runs_loads_recomputes_and_retries_under_an_agent(backend):
    Path("x").write_text("1")
    all_of_them = [f"{name}{i}" for name in ("clean", "load") for i in range(4)]
    flow_id = backend.register(for_an_agent(stages()))
    with agent(backend) as execute:
        first = backend.create(flow_id)
        assert execute(first).is_successful() and sorted(noted()) == ["20", *all_of_them]
        for name in ("load", "clean"):
            history = backend.history(first, name)
            assert [kind for kind, _ in history.pop(-1)] == ["Mapped"] and len(history) == 4
            for reported in history.values():
                assert [kind for kind, _ in reported] == ["Running", "Success"]

        before, second = len(noted()), backend.create(flow_id)
        assert execute(second).is_successful() and sorted(noted()[before:]) == ["20"]
        for i in range(4):
            (reported,) = backend.history(second, "clean")[i]
            assert reported == ("Success", f"Found {os.path.abspath(f'clean_{i}.csv')}.")

        Path("x").write_text("2")
        Path("fails").write_text("")
        before, third = len(noted()), backend.create(flow_id, recompute="load+")
        assert execute(third).is_running() and sorted(noted()[before:]) == all_of_them
        assert backend.history(third, "clean")[1][-1][0] == "Retrying"

        os.remove("fails")
        before = len(noted())
        backend.let_retry_now(third)
        assert execute(third).is_successful() and sorted(noted()[before:]) == [
            "28",
            "clean1",
            "clean3",
        ]


@from_0_12
@pytest.mark.parametrize("build", [lambda: chain(9), lambda: mapped(20)], ids=["chain", "map"])
def test_frames_alive_under_a_backend(build, backend, counted):
    flow_run_id = run_here(backend, for_an_agent(build()))
    assert backend.state(flow_run_id).is_successful()
    assert peak == [2] and not alive


def fail_at_first(frame=None):
    """Notes how many frames are in memory."""
    if frame is not None:
        tables.append(weakref.ref(frame))
    note(tables_alive())
    if prefect.context["task_run_count"] == 1:
        raise ValueError("Not yet.")


@from_0_12
def test_what_a_retry_in_another_process_reads_is_loaded_and_dropped(
    backend, counted_tables, noting_loads
):
    read = task(fail_at_first, **IN_20_MINUTES)
    make = Calls().make(**stored("{id}.pkl"))
    with Flow("resumed") as flow:
        for i in range(3):
            read(make(i))
        read(upstream_tasks=[make(3)])
    flow_run_id = run_here(backend, for_an_agent(flow))
    assert backend.state(flow_run_id).is_running() and not noting_loads
    resume_here(backend, flow, flow_run_id)
    assert backend.state(flow_run_id).is_successful()
    assert sorted(noted()) == ["0"] * 2 + ["1"] * 6
    assert sorted(map(os.path.basename, noting_loads)) == ["0.pkl", "1.pkl", "2.pkl"]


@from_0_12
@pytest.mark.parametrize("value", [5, None])
@pytest.mark.parametrize("storage", [{}, stored("out.csv")], ids=["nothing", "file"])
def test_a_retry_in_another_process_without_its_input(value, storage, backend, log, caplog):
    """Nothing wrong gets into a file: what is not at hand may be a None that was returned."""

    @task(name="retried", **IN_20_MINUTES, **storage)
    def retry(x):
        note(x)
        if prefect.context["task_run_count"] == 1:
            raise ValueError("Not yet.")
        return FRAME

    with Flow("gone") as flow:
        retry(task(lambda: value, name="source", checkpoint=False)())
    flow_run_id = run_here(backend, for_an_agent(flow))
    assert backend.state(flow_run_id).is_running()
    resume_here(backend, flow, flow_run_id)
    final = backend.state(flow_run_id)
    if storage:
        (history,) = backend.history(flow_run_id, "retried").values()
        assert final.is_failed() and noted() == [str(value)] and "out.csv" not in files()
        assert history[-1][0] == "Failed" and "'source', which is not at hand" in history[-1][1]
        assert history[-1][1] in log(logging.ERROR)
    else:
        assert final.is_successful() and noted() == [str(value), "None"]
    assert not [r.name for r in caplog.records if "._" in r.name], "private names in the log"


@from_0_12
@pytest.mark.parametrize("retries", [0, 1])
@pytest.mark.parametrize(
    "path, message", [("{i}.csv", "stores a pandas DataFrame"), ("{y}.csv", "KeyError: 'y'")]
)
def test_a_checkpoint_that_fails_is_reported_once(path, message, retries, backend):
    heard = []
    handlers = [lambda task, old, new: heard.append(type(new).__name__)]
    delay = timedelta(0) if retries else None
    options = dict(stored(path), max_retries=retries, retry_delay=delay, state_handlers=handlers)
    with Flow("fails") as flow:
        task(lambda i: 3, name="make", **options)(1)
    flow_run_id = run_here(backend, for_an_agent(flow))
    assert backend.state(flow_run_id).is_failed()
    (history,) = backend.history(flow_run_id, "make").values()
    is_filled = message.startswith("stores")  # Else the task is found not to run, before it does.
    once = ["Running", "Success", "Failed"] if is_filled else ["Running", "Failed"]
    assert heard == once + ["Retrying", *once] * (retries and is_filled)
    reported = {"Retrying", "Failed", *["Running"] * is_filled}
    assert [kind for kind, _ in history] == [kind for kind in heard if kind in reported]
    assert all(message in text for kind, text in history if kind == "Failed")


@from_0_12
@pytest.mark.parametrize(
    "options, kind",
    [
        (stored("{id}.csv"), "Success"),
        ({"target": "{id}.csv", "result": PandasResultHandler("{id}.csv")}, "Cached"),
    ],
)
def test_what_is_found_under_a_backend_is_reported_as_loaded(options, kind, backend, log):
    with Flow("found") as flow:
        Calls().make(**options)(1)
    for _ in range(2):
        flow_run_id = run_here(backend, for_an_agent(flow))
        assert backend.state(flow_run_id).is_successful()
    (history,) = backend.history(flow_run_id, "make").values()
    assert history == [(kind, f"Found {os.path.abspath('1.csv')}.")]
    assert log(logging.INFO).count(f"Wrote {os.path.abspath('1.csv')}") == 1


# Results that nobody needs any more ----------------------------------------------------------


def zipped():
    n = numbers(10)
    one, other = load.map(n), load.map(n)
    total(count.map(one))
    total(count.map(both.map(one, other)))


def reduced():
    load(how_many(load.map(numbers(5))))


def mapped_over_a_list():
    total(count.map(task(lambda: [new_part() for _ in range(5)], name="parts")()))


def beside_a_map():
    frame = load(0)
    load(total(count.map(both.map(load.map(numbers(4)), unmapped(frame)))))


def flattened():
    two = task(lambda i: [new_part(), new_part()], name="two")
    total(count.map(prefect.flatten(two.map(numbers(2)))))


def skipped():
    @task
    def skip(part):
        raise signals.SKIP("no")

    skip.map(load.map(numbers(5)))


def as_wide_as_told():
    parts = [load.map(list(range(10))) for _ in range(3)]
    for part in parts:
        total(count.map(step.map(part)))
        total(pass_on.map(numbers(total(numbers(3)))))


kept = []
watched = task(lambda i: new_part(), state_handlers=[lambda _, *states: kept.extend(states)])

#: Flows, how many frames are alive in them at a time, and how many afterwards.
IN_MEMORY = [
    (lambda: chain(9), 2, 0),
    (lambda: mapped(20), 2, 0),
    (zipped, 3, 0),
    (reduced, 5, 1),
    (mapped_over_a_list, 5, 0),
    (beside_a_map, 3, 1),
    (skipped, 1, 0),
    (as_wide_as_told, 2, 0),
    (lambda: total(count.map(watched.map(numbers(5)))), 1, 0),
    *([(flattened, 4, 0)] if hasattr(prefect, "flatten") else []),
]


def flow_with(build):
    with Flow("memory") as flow:
        built = build()
    return built if isinstance(built, Flow) else flow


@pytest.mark.parametrize("build, most, last", IN_MEMORY)
def test_frames_alive(build, most, last, counted):
    final = run(flow_with(build))
    assert final.is_successful()
    assert (peak, len(alive)) == ([most], last)


@purges_on_dask
@pytest.mark.parametrize("executor", ["synchronous", "threads", "dask"])
@pytest.mark.parametrize("build", [lambda: chain(9), lambda: mapped(30), as_wide_as_told])
def test_frames_alive_on_two_workers(build, executor, counted):
    assert run(flow_with(build), executor=EXECUTORS[executor]()).is_successful()
    assert peak[0] <= (2 if executor == "synchronous" else 2 * 2 + 2)
    wait_until(lambda: not alive, 10)  # On a cluster, what nobody needs is gone some time later.


def parts_alive():
    return len(alive)


@slow
@purges_on_dask
def test_frames_in_processes_never_come_to_the_process_that_runs_the_flow(counted):
    with Flow("processes") as flow:
        here = task(lambda part: parts_alive(), name="here_alive").map(
            step.map(load.map(numbers(20)))
        )
    executor = LocalDaskExecutor(scheduler="processes", num_workers=2)
    children = run(flow, executor=executor).result[here].map_states
    assert [child.result for child in children] == [1] * 20, "on the workers"
    assert not peak, "in the process that runs the flow"


@on_each_executor
def test_purged_results(executor):
    double = task(lambda frame: frame * 2, name="double")
    with Flow("purge") as flow:
        first = Calls().make()(1)
        second = double(first)
        kept = double.copy(tags=["prefect-ds:keep"])(second)
        last = double(kept)
    final = DSFlowRunner(flow).run(return_tasks=flow.tasks, executor=executor())
    assert_frame_equal(final.result[last].result, FRAME.assign(id=1) * 8)
    assert_frame_equal(final.result[kept].result, FRAME.assign(id=1) * 4)
    if PURGES_ON_DASK or executor is LocalExecutor:
        for purged in (first, second):
            assert final.result[purged].is_successful() and final.result[purged].result is None
            assert final.result[purged]._result is PurgedResult


def test_inputs_of_a_retry_are_all_that_is_kept(counted):
    @task(max_retries=1, retry_delay=timedelta(0))
    def flaky(part, i):
        if i == 1 and prefect.context["task_run_count"] == 1:
            raise ValueError("Not yet.")
        return new_part(part)

    with Flow("retry") as flow:
        n = numbers(3)
        loaded = load.map(n)
        result = total(count.map(flaky.map(loaded, n)))
    first = DSFlowRunner(flow).run(return_tasks=flow.tasks)
    purged = [child._result is PurgedResult for child in first.result[loaded].map_states]
    assert first.is_running() and purged == [True, False, True] and len(alive) == 1
    second = DSFlowRunner(flow).run(return_tasks=flow.tasks, task_states=first.result)
    assert second.is_successful() and second.result[result].result == 3
    del first  # Below 0.12 its states hold what their tasks have read.
    assert not alive


class OfAnotherKind(prefect_ds.Executor):
    def submit(self, fn, *args, extra_context=None, **kwargs):
        return fn(*args, **kwargs)

    def map(self, fn, *args):
        return list(map(fn, *args))

    def wait(self, futures):
        return futures


def with_its_own(name, cls):
    return type(
        f"With{name}", (cls,), {name: lambda self, *a, **k: getattr(cls, name)(self, *a, **k)}
    )


@pytest.mark.parametrize(
    "executor, reason",
    [
        (OfAnotherKind, "OfAnotherKind is not known to prefect_ds"),
        (with_its_own("submit", LocalDaskExecutor), "Withsubmit has a submit of its own"),
        (with_its_own("map", LocalExecutor), "Withmap has a map of its own"),
    ],
)
def test_executors_that_would_be_passed_over_run_as_without_it(executor, reason, log):
    flow = mapped(3)
    final = run(flow, executor=executor())
    assert final.result[flow.total].result == 3
    assert all(s.result is not None for s in final.result.values())
    assert log(logging.WARNING).count(reason) == 1


# What errors hold ----------------------------------------------------------------------------


def fail_over(*anything):
    raise ValueError(len(anything))


def fail_in_a_call(part):
    hidden = [{"part": part}]
    fail_over(hidden)


def fail_with_a_cause(part):
    try:
        fail_over(part)
    except ValueError:
        raise RuntimeError("with a cause and a context") from KeyError("cause")


def fail_in_an_inner_function(part):
    return [fail(0) for fail in [lambda number: fail_over(part, number)]]


FAILING = [fail_in_a_call, fail_with_a_cause]
if sys.version_info < (3, 11):  # From then on, a frame that is cleared keeps its function.
    FAILING += [fail_in_an_inner_function]


@pytest.mark.parametrize("fail", FAILING)
@pytest.mark.parametrize("how", ["alone", "mapped", "reducing"])
@pytest.mark.parametrize("executor", ["local", pytest.param("threads", marks=purges_on_dask)])
def test_an_error_holds_no_data(fail, how, executor, counted):
    failing = task(fail, name="fail")
    with Flow("errors") as flow:
        part = load(0) if how == "alone" else load.map(numbers(10))
        failure = failing.map(part) if how == "mapped" else failing(part)
    found = run(flow, executor=EXECUTORS[executor]()).result[failure]
    assert all(s.is_failed() for s in _children(found) or [found])
    assert how == "reducing" or peak[0] <= (1 if executor == "local" else 3)
    assert not alive


# Progress ------------------------------------------------------------------------------------


def map_of_four():
    with Flow("progress") as flow:
        make = task(lambda id: FRAME if id != 2 else fail_over(id), name="make")
        make.copy(**stored("{id}.csv")).map([0, 1, 2, 3])
    return flow


@on_each_that_purges
def test_says_how_far_a_long_map_is(executor, log, impatient):
    FRAME.to_csv("1.csv")
    run(map_of_four(), executor=EXECUTORS[executor]())
    lines = [line for line in log(logging.INFO).splitlines() if line.startswith("Mapped task runs")]
    assert len(lines) > 1
    assert lines[-1] == "Mapped task runs: 4 of 4 done, 1 found, 1 failed"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stderr, shows", [(Terminal, True), (io.StringIO, False)])
def test_shows_a_bar_on_a_terminal(stderr, shows, impatient, monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", stderr())
    run(map_of_four())
    assert ("mapped task runs: 100%" in sys.stderr.getvalue()) is shows


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


def contents_of_a_run(flow):
    """What a run leaves in a folder in which nothing has happened before."""
    os.mkdir("fresh")
    os.chdir("fresh")
    try:
        assert run(flow).is_successful()
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


@slow
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
        victim, done = start + dice.randrange(1, 7), 0
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
    from distributed import Client
    from distributed.utils import json_load_robust

    worker = ("worker", "--nthreads", "1", "--no-nanny", "--local-directory", "dask-worker-space")
    common = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", "noted-cluster.json"]
    processes = []
    try:
        for name, *options in [("scheduler", "--port", "0"), worker, worker]:
            command = [sys.executable, "-m", f"distributed.cli.dask_{name}", *common, *options]
            with open(f"noted-{name}.log", "ab") as log:
                kwargs = {"env": for_processes(**environment), "stdout": log, "stderr": log}
                processes.append(subprocess.Popen(command, **kwargs))
        while not os.path.exists("noted-cluster.json"):
            assert processes[0].poll() is None, Path("noted-scheduler.log").read_text()
            time.sleep(0.01)
        # The file may be there before it is written to the end.
        address = json_load_robust("noted-cluster.json")["address"]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2)
        yield address
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


@slow
@takes_posix
@pytest.mark.parametrize("allowed_failures", [0, 3])
def test_a_flow_whose_worker_was_killed_goes_on_where_it_was(allowed_failures, impatient):
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    victim = dice.choice(["one", "two"]) + f"_{dice.randrange(10)}.csv"

    def die_once(name):
        if name == victim and not os.path.exists("noted-death"):
            note(os.getpid(), "noted-death")
            os.kill(os.getpid(), signal.SIGKILL)

    whole = contents_of_a_run(two_stages())
    flow = two_stages(fault=die_once)
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


@slow
@takes_posix
@purges_on_dask
def test_what_is_lost_with_a_worker_and_fails_when_it_runs_again_fails_the_flow_run():
    @task
    def make():
        note(os.getpid())
        assert len(noted()) == 1, "not again"
        return numpy.ones(10_000)

    with Flow("lost") as flow:
        made = make()
        killed = task(lambda: subprocess.call(["kill", "-9", noted()[0]]))(upstream_tasks=[made])
        how_many(made, upstream_tasks=[killed])
    with cluster_of_processes() as address:
        state = run(flow, executor=DaskExecutor(address=address))
    assert state.is_failed() and "'make' was lost with a worker" in str(state.result)


#: What is alive of the class below in this process.
_tables = weakref.WeakValueDictionary()


class Table(pandas.DataFrame):
    """A frame that notes in which process it arrives, and how many are alive where it is made."""

    def __init__(self, name, file=None):
        super().__init__({"name": [name], "x": 1})
        _tables[id(self)] = self
        note(f"{name} {os.getpid()} {len(_tables)}", file or "noted")

    def __reduce__(self):
        return Table, (self["name"][0], "noted-arrivals")


@slow
@takes_posix
def test_workers_started_by_hand_share_the_work_and_the_files():
    width = 16
    look_up = task(lambda: Table("look_up"), name="look_up")
    load = task(lambda i: Table("load"), name="load", **stored("data/load_{i:02}.pkl"))
    join = task(
        lambda frame, other, i: Table("join"), name="join", **stored("data/join_{i:02}.pkl")
    )
    with Flow("distributed") as flow:
        ids = list(range(width))
        other = look_up()
        result = how_many(join.map(load.map(ids), unmapped(other), ids))
        end = task(lambda other: Table("last"), name="last")(other)

    computed = []
    with cluster_of_processes() as address:
        for _ in range(2):
            before = len(noted())
            states = run(flow, executor=DaskExecutor(address=address)).result
            assert states[result].result == width
            assert list(states[end].result["name"]) == ["last"]
            computed.append([line.split() for line in noted()[before:]])
    processes = {process for _, process, _ in computed[0]}
    assert len(processes) == 2 and str(os.getpid()) not in processes
    assert files("data") == [f"{n}_{i:02}.pkl" for n in ("join", "load") for i in range(width)]
    first, second = (Counter(name for name, *_ in each) for each in computed)
    assert first == {"look_up": 1, "load": width, "join": width, "last": 1}
    assert second == {"look_up": 1, "last": 1}
    if PURGES_ON_DASK:  # Results stay on the workers, which let go of what was purged.
        arrivals = [line.split() for line in noted("noted-arrivals")]
        here = [name for name, process, _ in arrivals if process == str(os.getpid())]
        assert here == ["last", "last"]
        assert max(int(alive_there) for *_, alive_there in computed[0]) <= 8


def run_at_once(start):
    """Whether many runs of one flow, in one folder, all come to what one comes to."""
    logging.getLogger("prefect").handlers = [handler] = [logging.Handler(logging.WARNING)]
    # Of files that others write meanwhile, some are newer than what was made from them.
    handler.addFilter(lambda record: "is older than" not in record.getMessage())
    warned = []
    handler.emit = warned.append
    flow = two_stages(width=2)
    whole = contents_of_a_run(flow)

    def once(wait):
        wait()
        total = run(flow).result[flow.total].result
        return total.to_csv(index=False).encode() == whole["total.csv"] and not warned

    assert all(start(once)) and contents() == whole


def in_many_threads(once, runs=100 if IS_SLOW_ONE else 20):
    everyone = threading.Barrier(runs)
    with concurrent.futures.ThreadPoolExecutor(runs) as pool:
        return list(pool.map(once, [everyone.wait] * runs))


def in_many_processes(once, runs=100):
    waiting, go = os.pipe()

    def wait():
        os.close(go)
        os.read(waiting, 1)  # until all are there

    processes = [fork(lambda: once(wait)) for _ in range(runs)]
    os.close(go)
    return [os.waitpid(process, 0)[1] == 0 for process in processes]


@takes_posix
@pytest.mark.parametrize("how", ["threads", pytest.param("processes", marks=slow)])
def test_many_runs_at_once(how):
    in_another_process(f"run_at_once(in_many_{how})")


# Any flow runs as on Prefect's FlowRunner ----------------------------------------------------
# A plan is drawn, in plain data; a flow is built of it, and run on Prefect's runner and on ours.
# They must agree on states, results that count, transitions, and which tasks are run how often.
# Then the flow is run once more, where the files are: on Prefect's runner, which reads each file
# when it is found, and on ours, which has to come to the same, and to read none in vain.
# PREFECT_DS_EXAMPLES says how many plans; executors that are slower get fewer.

#: The files that were read in this process.
_loaded = []


@pytest.fixture
def noting_loads(monkeypatch):
    def read(path, **kwargs):
        _loaded.append(path)
        return pandas.read_pickle(path, **kwargs)

    _loaded.clear()
    pair = read, prefect_ds._FILE_TYPES["pickle"][1]
    monkeypatch.setitem(prefect_ds._FILE_TYPES, "pickle", pair)
    logging.disable(logging.CRITICAL)
    yield _loaded
    logging.disable(logging.NOTSET)


_EXAMPLES = int(os.environ.get("PREFECT_DS_EXAMPLES", 48 if IS_SLOW_ONE else 16))

#: `parameter` is passed if it is not None, and is required if "missing"; `given` are states by
#: the number of their task; `references`: every how manieth task is a reference task, None for
#: Prefect's choice.
_Plan = namedtuple("_Plan", "steps parameter entry given raise_on_exception references")

#: A step adds one task or a few. Child i of a map plays `scripts[i % len(scripts)]`.
_Step = namedtuple("_Step", "kind reads scripts options")

#: What a task reads, or waits for: the task that was added `back` tasks before, None: a constant.
_Read = namedtuple("_Read", "back part how")

#: What a task does when it is run first, second, ...; from then on it does the last.
_SCRIPTS = """
    number; list of 2; list of 3; list of 1; list of 0; list of 4; nested; None; True; False;
    raise; raise, number; raise, raise, list of 2; FAIL; FAIL, number; SKIP; SUCCESS;
    LOOP, LOOP, number; LOOP, raise, number; LOOP, SKIP; RETRY, number; RETRY, RETRY, raise
"""
_SCRIPTS = [tuple(script.split(", ")) for script in " ".join(_SCRIPTS.split()).split("; ")]

_TRIGGERS = [triggers.all_failed, triggers.all_finished, triggers.any_failed]
_TRIGGERS += [triggers.any_successful, triggers.not_all_skipped, triggers.some_failed(at_least=1)]
_TRIGGERS += [triggers.some_successful(at_least=1)]  # One state of many counts as one, in a set.


def _look_at_results(upstream_states):
    """A trigger of one's own: it may read what no argument does."""
    states = getattr(upstream_states, "values", lambda: upstream_states)()
    seen = {_said(s.result) for s in states if not (s.is_mapped() or s.is_failed())}
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
    return Success(result=task.made("forgiven", 7)) if new_state.is_failed() else new_state


_KNOWN = Success("known", result=[11, 12])


def _know(task, old_state, new_state):
    return _KNOWN if new_state.is_running() else new_state


def _protest(task, old_state, new_state):
    if new_state.is_successful():
        raise ValueError("protest")
    return new_state


_OPTIONS = [{"max_retries": number, "retry_delay": timedelta(0)} for number in (1, 2)]
_OPTIONS += [{"state_handlers": [handler]} for handler in (_forgive, _know, _protest)]
_OPTIONS += [{"skip_on_upstream_skip": False}, {"cache_for": timedelta(days=1)}]
_OPTIONS += [{"tags": ["prefect-ds:keep"]}]

#: Where the frames that a task makes are stored: nowhere, or in files.
_FRAMES = [{"frames": "in memory"}, *[{"frames": "result"}] * 3]
if "target" in inspect.signature(Task.__init__).parameters:
    _FRAMES += [{"frames": "target"}]

_GIVEN = {
    "Success": lambda: Success(result=[1, 2]),
    "Skipped": lambda: state.Skipped(result=3),
    "Failed": lambda: state.Failed(result=ValueError("given")),
    "Pending": Pending,
    "Mapped": lambda: Mapped(map_states=[Success(result=4), Pending()]),
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
    options = all_options + [{"trigger": trigger} for trigger in all_triggers]
    options = st.sampled_from(options + _FRAMES * (len(options) // 3))
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


def _said(value):
    """Its `repr` in one line."""
    return " ".join(repr(value).split())


def _note_call(*key):
    """Note that a task, or a child, is run; return how often it was before."""
    calls = _file_of_notes("calls")
    before = noted(calls).count(_said(key))
    note(_said(key), calls)
    return before


#: The frames that tasks have made in this process.
_made = []


class _Frame(pandas.DataFrame):
    """A frame over whose columns a task can be mapped: Prefect goes on until an IndexError."""

    def __getitem__(self, key):
        try:
            return super().__getitem__(key)
        except KeyError as exc:
            raise IndexError(key) from exc


class _Play(Task):
    def __init__(self, scripts, frames=None, **kwargs):
        super().__init__(**kwargs)
        self.scripts, self.frames = scripts, frames

    def made(self, value, number):
        """What a task returns: a value, or a frame of as many rows and columns."""
        if not self.frames:
            return value
        size = len(value) if isinstance(value, list) else 1
        frame = _Frame([[number + i for i in range(size)]] * size)
        _made.append(weakref.ref(frame))
        return frame

    def run(self, x=None, y=None):
        index = prefect.context.get("map_index")
        script = self.scripts[(index or 0) % len(self.scripts)]
        does = script[min(_note_call(self.name, index), len(script) - 1)]
        number = zlib.crc32(_said((self.name, index, x, y)).encode())
        if does == "raise":
            raise ValueError(number)
        if does in ("LOOP", "SUCCESS"):
            raise getattr(signals, does)(str(number), result=self.made(number, number))
        if hasattr(signals, does):
            raise getattr(signals, does)(str(number))
        if does.startswith("list of"):
            return self.made([number + i for i in range(int(does[-1]))], number)
        values = {"number": number, "nested": [[number], [], [1, 2]], "None": None}
        return self.made(values.get(does, does == "True"), number)


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
    options = dict({"state_handlers": [_note]}, **step.options)
    path = os.path.join(prefect.context.folder_of_files, "{task_full_name}.pkl")
    if options.get("frames") == "result":
        options.update(stored(path))
    elif options.get("frames") == "target":
        options.update(target=path, result=PandasResult())
        if options.get("trigger") is _look_at_results:  # What is found needs no input any more.
            del options["trigger"]
    return _Play(step.scripts, name=name, **options)


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


def _outcomes(plan, flow_runner_cls, executor, folder, handlers=(checkpoint_handler,)):
    """What the rounds of a run of the plan come to, as far as two runs must agree."""
    notes = tempfile.mkdtemp()
    try:
        with prefect.context(caches={}, folder_of_notes=notes, folder_of_files=folder):
            return list(_rounds(plan, flow_runner_cls, executor(), [*handlers, _note]))
    finally:  # Where a flow runner has failed, what it had begun may still be writing.
        shutil.rmtree(notes, ignore_errors=True)


def _rounds(plan, flow_runner_cls, executor, handlers):
    flow, tasks = _build(plan)
    mapped = {edge.downstream_task for edge in flow.edges if edge.mapped}
    given = {
        tasks[i]: _GIVEN[name]()
        for i, name in plan.given.items()
        if i < len(tasks) and (name != "Mapped" or tasks[i] in mapped)
    }
    owned = [s for given_state in given.values() for s in _children(given_state) or [given_state]]
    run = {
        "executor": executor,
        "parameters": {"p": plan.parameter} if plan.parameter not in (None, "missing") else {},
        "task_runner_state_handlers": handlers,
        "context": {"raise_on_exception": True} if plan.raise_on_exception else {},
        "task_states": given,
    }
    rounds = 3 if plan.entry == "FlowRunner" else 1
    if plan.entry == "flow.run":
        options = [option for step in plan.steps for option in step.options]
        rounds += "cache_for" in options and "frames" not in options
    for _ in range(rounds):
        _made.clear(), _loaded.clear()
        try:
            if plan.entry == "flow.run":
                final = flow.run(runner_cls=flow_runner_cls, **run)
            else:
                run["return_tasks"] = tasks[::2] if plan.entry == "return_tasks" else flow.tasks
                final = flow_runner_cls(flow).run(**run)
        except Exception:
            yield "raised"
            return
        if not isinstance(final.result, dict):
            yield type(final)
            return
        if issubclass(flow_runner_cls, (DSFlowRunner, OnDSExecutor)) and PURGES_ON_DASK:
            assert not _read_in_vain(flow, isinstance(executor, DaskExecutor))
        is_whole = final.is_finished() or plan.entry != "return_tasks"
        if flow_runner_cls is DSFlowRunner and isinstance(executor, LocalExecutor) and is_whole:
            assert not _held_in_vain(flow, final)
        yield _outcome(flow, final, owned)
        run["task_states"] = {}
        if plan.entry == "FlowRunner":
            if final.is_finished():
                return
            run["task_states"] = {t: _resumed(s) for t, s in final.result.items()}


def _resumed(task_state):
    if task_state.is_mapped():
        task_state.map_states = [_resumed(child) for child in task_state.map_states]
    return state.Resume() if isinstance(task_state, state.Paused) else task_state


def _is_read(edge):
    """Whether a task may look at what comes through an edge; Prefect's own triggers do not."""
    trigger = edge.downstream_task.trigger
    return edge.key or edge.mapped or getattr(trigger, "__module__", "") != "prefect.triggers"


def _outcome(flow, final, owned):
    read = {edge.upstream_task for edge in flow.edges if _is_read(edge)}
    kept = (flow.tasks - read) | flow.reference_tasks()
    states = {task: [found, *_children(found)] for task, found in final.result.items()}
    return {
        "final state": type(final),
        "states": {task.name: [type(s).__name__ for s in found] for task, found in states.items()},
        "given": [_said(s.result) for s in [*owned, _KNOWN]],
        "calls": Counter(noted(_file_of_notes("calls"))),
        "transitions": Counter(noted(_file_of_notes("transitions"))),
        "results": {t.name: [_result(s, t in kept) for s in found] for t, found in states.items()},
        "dropped by a child, held by the map": [
            task.name
            for task, (found, *children) in states.items()
            if children
            for child, item in zip(children, (children and found.result) or [])
            if child._result is PurgedResult and item is not None
        ],
    }


def _held_in_vain(flow, final):
    """The frames that are alive, though no result has them that counts."""
    counts = flow.reference_tasks() | {
        task
        for task in flow.tasks
        if task.tags or task.cache_for or not any(map(_is_read, flow.edges_from(task)))
    }
    states = [s for t, s in final.result.items() if t in counts or not final.is_finished()]
    results = [s.result for s in _with_children(states)]
    for each in _with_children(final.result.values()):  # Below 0.12, they hold what they read.
        if not each.is_finished() or each.is_cached():
            results += [result.value for result in (each.cached_inputs or {}).values()]
    if any(ref() is not None for ref in _made):
        gc.collect()  # What an error or a signal is in a cycle with is another matter.
    has_failed = any(s.is_failed() for s in _with_children(final.result.values()))
    has_failed = has_failed or any(_forgive in task.state_handlers for task in flow.tasks)
    held = [ref() for ref in _made if ref() is not None and not has_failed]
    return [_said(frame) for frame in held if not any(_is_in(frame, r) for r in results)]


def _is_in(frame, value):
    return value is frame or (isinstance(value, list) and any(_is_in(frame, v) for v in value))


def _read_in_vain(flow, is_cluster):
    """The files that were read though no task that ran has asked for them, or more than once."""
    calls, transitions = (
        [eval(line) for line in noted(_file_of_notes(name)) if re.match(r"\('(?!cleanup)", line)]
        for name in ("calls", "transitions")
    )
    # Of our tasks the handlers hear that they run before their file is found.
    plays = {task.name for task in flow.tasks if isinstance(task, _Play)}
    has_run = calls + [t[:2] for t in transitions if t[-1] == "Running" and t[0] not in plays]

    def is_asked_for(name, index):
        (source,) = [task for task in flow.tasks if task.name == name]
        return bool(source.tags) or any(
            edge.downstream_task.cache_for
            or getattr(edge, "flattened", False)
            or (edge.mapped and index is None)
            or getattr(edge.downstream_task.trigger, "__module__", "") != "prefect.triggers"
            or (edge.downstream_task.name, index if edge.mapped else ANY) in has_run
            for edge in flow.edges_from(source)
            if _is_read(edge)
        )

    runs_again = any(t[-1] in ("Retrying", "Paused") for t in transitions)
    flattens = any(getattr(edge, "flattened", False) for edge in flow.edges)
    # On a cluster each that asks reads for itself.
    most, vain = 99 if runs_again or flattens or is_cluster else 1, []
    for path, times in Counter(_loaded).items():
        name, _, index = os.path.basename(path)[: -len(".pkl")].partition("[")
        if not is_asked_for(name, int(index[:-1]) if index else None) or times > most:
            vain.append((path, times))
    return vain


def _children(task_state):
    return list(task_state.map_states) if task_state.is_mapped() else []


def _with_children(states):
    return [s for task_state in states for s in [task_state, *_children(task_state)]]


def _result(task_state, is_kept):
    if not is_kept and (task_state.is_mapped() or task_state._result is PurgedResult):
        return ANY
    return _said(task_state.result)


class OnDSTaskRunner(FlowRunner):
    """Prefect's, with checkpoints: each file that is there is read when it is found."""

    def __init__(self, flow, **kwargs):
        super().__init__(flow, **{**kwargs, "task_runner_cls": DSTaskRunner})


class OnDSExecutor(FlowRunner):
    """Prefect's, on a `DSExecutor`."""

    def get_flow_run_state(self, state, executor, **kwargs):
        executor = DSExecutor(self.flow.copy(), executor)  # whose order of tasks is another one
        return super().get_flow_run_state(state, executor=executor, **kwargs)


class OwnExecutor(LocalExecutor):
    """A user's own, which is to be used."""

    def submit(self, fn, *args, **kwargs):
        self.has_submitted = True
        return super().submit(fn, *args, **kwargs)

    def wait(self, futures):
        assert self.has_submitted
        return super().wait(futures)


class AsInProcesses(LocalDaskExecutor):
    """Prefect's own, in one process, but a map is not changed in place where it is flattened."""

    def __init__(self):
        super().__init__(scheduler="synchronous")

    def wait(self, futures):
        answers = super().wait(futures)
        if isinstance(answers, dict):
            return {key: copy.copy(answer) for key, answer in answers.items()}
        return copy.copy(answers)


class InThreadsToTheEnd(LocalDaskExecutor):
    """Prefect's own, but no KeyboardInterrupt in a thread that may hold the lock of a handler."""

    def _interrupt_pool(self):
        self._pool.shutdown(wait=True)


@pytest.mark.parametrize("pausing", [False, True])
@pytest.mark.parametrize(
    "name, share",
    [
        ("local", 1),
        ("own", 3),
        ("synchronous", 2),
        pytest.param("DSExecutor", 2, marks=from_0_12),
        pytest.param("threads", 3, marks=purges_on_dask),
        pytest.param("processes", 4, marks=[purges_on_dask, slow]),
        pytest.param("cluster", 5, marks=[purges_on_dask, slow]),
    ],
)
def test_runs_any_flow_as_prefect_does(name, share, pausing, request, tmp_path, noting_loads):
    pool = request.getfixturevalue("processes") if name == "processes" else None
    executor = {
        "local": LocalExecutor,
        "own": OwnExecutor,
        "synchronous": lambda: LocalDaskExecutor(scheduler="synchronous"),
        "DSExecutor": LocalExecutor,
        "threads": lambda: InThreadsToTheEnd(scheduler="threads"),
        "processes": lambda: InOnePool(pool),
        "cluster": EXECUTORS["dask"],
    }[name]
    runner = OnDSExecutor if name == "DSExecutor" else DSFlowRunner

    # Dask computes what is asked for. In threads, children would share Prefect's Mapped states;
    # Prefect 0.12.0 computes on it, each time that it waits, all that it has computed before.
    is_dask = name in ("synchronous", "threads", "processes") and PURGES_ON_DASK
    is_comparable = hasattr(LocalDaskExecutor(), "callback")
    prefects = AsInProcesses if is_dask and is_comparable else LocalExecutor

    @settings(
        max_examples=max(1, _EXAMPLES // share // 2), deadline=None, print_blob=True,
        derandomize="PREFECT_DS_EXAMPLES" not in os.environ,
        # To explain a failure, hypothesis would hold what it has seen.
        phases=[phase for phase in Phase if phase.name != "explain"],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    # What one process puts into Prefect's cache, another one does not see.
    @given(plan=_plans(pausing, caching=name != "processes"))
    def compare(plan):
        if is_dask and plan.entry == "return_tasks":  # Dask leaves out what nobody asks for.
            plan = plan._replace(entry="FlowRunner")
        folder = tempfile.mkdtemp(dir=str(tmp_path))
        theirs, ours, again = (os.path.join(folder, each) for each in ("theirs", "ours", "again"))
        expected = _outcomes(plan, FlowRunner, prefects, theirs, handlers=())
        assert _outcomes(plan, runner, executor, ours) == expected
        # Where the flow runner itself has failed, another process may still be writing.
        is_over = isinstance(expected[-1], dict) or name not in ("processes", "cluster")
        if os.path.exists(ours) and is_over:
            shutil.copytree(ours, again)
            expected = _outcomes(plan, OnDSTaskRunner, prefects, again)
            assert _outcomes(plan, runner, executor, ours) == expected
            # Where the flow runner itself has failed, it is all one what was done before.
            assert files(again) == files(ours) or not isinstance(expected[-1], dict)

    compare()


# The marker ----------------------------------------------------------------------------------


def test_there_is_one_purged_result():
    for same in (
        copy.deepcopy(PurgedResult),
        pickle.loads(pickle.dumps(PurgedResult)),
        cloudpickle.loads(cloudpickle.dumps(PurgedResult)),
        copy.copy(PurgedResult),
        copy.deepcopy(Success(result=PurgedResult))._result,
    ):
        assert same is PurgedResult
    assert "Purged" in repr(PurgedResult) and PurgedResult.value is None


# The README ----------------------------------------------------------------------------------

README = Path(__file__).with_name("README.md")
SNIPPETS = []
if README.exists():
    found = re.compile("```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
    SNIPPETS = found.findall(README.read_text("utf-8"))


@pytest.mark.skipif(not SNIPPETS, reason="takes the README beside this file")
@pytest.mark.parametrize("code, printed", SNIPPETS, ids=list(map(str, range(len(SNIPPETS)))))
def test_a_snippet_of_the_readme_runs_alone_and_prints_what_it_says(code, printed):
    for line, replaced in {
        "result=PandasResultHandler": f"{STORAGE}=PandasResultHandler",
        **({} if HAS_EXECUTORS else BELOW_0_13_10),
    }.items():
        code = code.replace(line, replaced)
    with redirect_stdout(io.StringIO()) as output:
        exec(code, {"__name__": "__main__"})
    said = [line for line in output.getvalue().splitlines() if "| " not in line]
    assert said == printed.splitlines()


#: As the README says.
BELOW_0_13_10 = {
    "flow.executor = DSExecutor(flow)": "",
    "flow.run()": "flow.run(runner_cls=DSFlowRunner, "
    "task_runner_state_handlers=[checkpoint_handler])",
    "import DSExecutor, ": "import DSFlowRunner, checkpoint_handler, ",
}
