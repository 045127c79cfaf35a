"""Measure prefect_ds beside Prefect's own FlowRunner and beside what is physically possible.

    tox -e bench

or, in any environment: `python bench_prefect_ds.py`. One table is printed, all of it measured in
one run on one machine, nothing logged by Prefect. Whatever concerns memory is measured in a
process of its own. It ends with 1 if a bound is missed.

`--rows alive` measures only the rows whose function (`rows_alive`, ...) has that in its name,
`--quick` makes them smaller, and `--figure memory.svg` draws the memory of one flow over time (it
takes matplotlib).
"""

import argparse
import collections
import contextlib
import gc
import glob
import inspect
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import weakref
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import dask
import numpy
import pandas
import prefect
import psutil
from prefect import Flow, task
from prefect.engine import FlowRunner, flow_runner
from prefect.engine.result import Result

# These import lines work with the original prefect-ds 0.1.1, too, which is measured on 0.9.
from prefect_ds.checkpoint_handler import checkpoint_handler
from prefect_ds.flow_runner import DSFlowRunner
from prefect_ds.pandas_result_handler import PandasResultHandler

# What the installed Prefect offers ------------------------------------------------------------

try:
    from prefect.executors import DaskExecutor, LocalDaskExecutor, LocalExecutor
except ImportError:  # below 0.14
    from prefect.engine.executors import DaskExecutor, LocalDaskExecutor, LocalExecutor

try:
    from prefect.engine.results import LocalResult
    from prefect.engine.serializers import PandasSerializer
except ImportError:  # below 0.13
    PandasSerializer = None

RELEASE = tuple(map(int, prefect.__version__.split(".")[:2]))
STORAGE = "result" if "location" in inspect.signature(Result.__init__).parameters else (
    "result_handler"
)  # fmt: skip
DASK_NAMES = ["LocalDaskExecutor", "DaskExecutor"] if hasattr(flow_runner, "run_task") else []
#: time per task run over Prefect's own: what slows it down differs between releases
OVERHEAD_BOUND = 0.05 if RELEASE >= (0, 14) else 0.6 if RELEASE >= (0, 12) else 1.0

RUNNERS = {"ours": DSFlowRunner, "own": FlowRunner}
WAYS = [*RUNNERS, "loop"]

#: Whether Prefect's own `target` is there to compare with, and what it takes.
TARGETS = PandasSerializer is not None
CHECKPOINTING = {"PREFECT__FLOWS__CHECKPOINTING": "true"}

logging.getLogger("prefect").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def executor_named(name, threads=2):
    """Prefect's executor, with a cluster of its own if it needs one."""
    if name == "LocalExecutor":
        yield LocalExecutor()
    elif name.startswith("LocalDaskExecutor"):
        scheduler = "processes" if "processes" in name else "threads"
        yield LocalDaskExecutor(scheduler=scheduler, num_workers=threads)
    elif name == "DaskExecutor, adaptive":
        yield DaskExecutor(
            cluster_class="distributed.LocalCluster",
            cluster_kwargs=cluster_kwargs(1),
            # Dask takes a task that it does not know for one of half a second.
            adapt_kwargs={"minimum": 1, "maximum": 8, "target_duration": "500ms"},
        )
    else:
        from distributed import Client

        with cluster_named(name, threads) as cluster:
            with Client(cluster, set_as_default=False) as client:
                client.run(same, None)  # what workers import when they start is not measured
            yield DaskExecutor(address=cluster.scheduler_address)


def cluster_kwargs(threads):
    """Of a cluster in this process: its workers start at once, and share our counters."""
    kwargs = {"n_workers": 1, "threads_per_worker": threads, "processes": False}
    return dict(kwargs, dashboard_address=None)


def cluster_named(name, threads):
    from distributed import LocalCluster, Scheduler, SpecCluster, Worker

    if name == "DaskExecutor, one GPU":
        options = [{"nthreads": threads // 2, "resources": gpus} for gpus in ({}, {"GPU": 1})]
        workers = {n: {"cls": Worker, "options": kwargs} for n, kwargs in enumerate(options)}
        options = {"dashboard_address": None, "protocol": "inproc://"}
        return SpecCluster(workers, {"cls": Scheduler, "options": options})
    kwargs = cluster_kwargs(threads)
    if name == "DaskExecutor, 2 processes":
        kwargs.update(n_workers=2, threads_per_worker=threads // 2, processes=True)
    return LocalCluster(**kwargs)


def run(flow, runner, executor=None, clock=time.perf_counter, **kwargs):
    """Run the flow; return its seconds."""
    start = clock()
    state = flow.run(runner_cls=RUNNERS[runner], executor=executor or LocalExecutor(), **kwargs)
    seconds = clock() - start
    assert state.is_successful(), state.message
    return seconds


# The flows ------------------------------------------------------------------------------------


class Frames:
    """Counts the frames that are alive, by weak references."""

    alive = peak = 0
    lock = threading.RLock()

    @classmethod
    def count(cls, frame):
        with cls.lock:
            cls.alive += 1
            cls.peak = max(cls.peak, cls.alive)
        weakref.finalize(frame, cls.drop)
        return frame

    @classmethod
    def drop(cls):
        with cls.lock:
            cls.alive -= 1


@task
def source(rows):
    return Frames.count(pandas.DataFrame(numpy.ones((rows, 10))))


@task
def step(frame):
    return Frames.count(frame + 1)


@task
def join(left, right):
    return Frames.count(left + right)


@task
def scalar(frame):
    return float(frame.iat[0, 0])


@task
def total(values):
    return sum(values)


@task
def noop(value):
    return value


class Naps:
    """What was done in this process, as pairs: the worker, and when it began.

    A class, as the functions of tasks are pickled with copies of their globals.
    """

    taken = []  # noqa: RUF012

    @classmethod
    def take(cls, seconds):
        from distributed import get_worker

        cls.taken.append((get_worker().address, time.perf_counter()))
        time.sleep(seconds)


@task
def nap(seconds, after=None):
    Naps.take(seconds)
    return [1, 2, 3]


def frames_chain(count, rows=1):
    with Flow("chain of frames") as flow:
        frame = source(rows)
        for _ in range(count - 1):
            frame = step(frame)
    return flow


def frames_map(count, rows=1):
    with Flow("map of frames through four stages and a reduce") as flow:
        frames = source.map([rows] * count)
        for _ in range(3):
            frames = step.map(frames)
        total(scalar.map(frames))
    return flow


def frames_zip(count, rows=1):
    with Flow("two maps of frames that meet") as flow:
        left, right = source.map([rows] * count), source.map([rows] * count)
        total(scalar.map(join.map(step.map(left), step.map(right))))
    return flow


def frames_diamond(count, rows=1):
    with Flow("a map of frames that parts and meets again") as flow:
        frames = source.map([rows] * count)
        total(scalar.map(join.map(step.map(frames), step.map(frames))))
    return flow


def frames_loop(count, rows=1, calculate=map):
    """What `frames_map` computes, as a plain loop, or what else applies a function as `map`."""
    return sum(calculate(through_all_stages, [rows] * count))


def through_all_stages(rows):
    frame = source.run(rows)
    for _ in range(3):
        frame = step.run(frame)
    return scalar.run(frame)


def noop_map(count, stages=1):
    with Flow("map of nothing") as flow:
        values = list(range(count))
        for _ in range(stages):
            values = noop.map(values)
    return flow


def noop_chain(count):
    with Flow("chain of nothing") as flow:
        value = noop(0)
        for _ in range(count - 1):
            value = noop(value)
    return flow


def noop_layers(count, width=6):
    with Flow("layers of nothing, each waits for the whole one before") as flow:
        layer = []
        for _ in range(count):
            layer = [noop(number, upstream_tasks=layer) for number in range(width)]
    return flow


def noop_loop(count, clock=time.perf_counter):
    """Call what those flows call, as a plain loop; return its seconds."""
    start = clock()
    for number in range(count):
        noop.run(number)
    return clock() - start


def noop_submitted(executor, count, stages):
    """Submit the graph of `noop_map` to the executor's cluster, without Prefect."""
    from distributed import Client

    start = time.perf_counter()
    with Client(executor.address, set_as_default=False) as client:
        values = list(range(count))
        for _ in range(stages):
            values = [client.submit(same, value, pure=False) for value in values]
        client.gather(values)
        return time.perf_counter() - start


def same(value):
    return value


# `unit` is how long a second is, in seconds.


def naps_map(unit):
    with Flow("16 mapped tasks of 1 s") as flow:
        nap.map([unit] * 16)
    return flow


def naps_two_stages(unit):
    with Flow("80 x 2 mapped tasks of 50 ms") as flow:
        nap.map([0.05] * 80, nap.map([0.05] * 80))
    return flow


def naps_tagged(unit):
    with Flow("6 x 2 s tasks with GPU=1 beside 30 x 1 s tasks") as flow:
        nap.map([2 * unit] * 6, task_args={"tags": ["dask-resource:GPU=1"]})
        nap.map([unit] * 30)
    return flow


def naps_lists(unit):
    with Flow("12 times (list 1 s, then a map)") as flow:
        for _ in range(12):
            noop.map(nap(unit))
    return flow


def naps_root(unit):
    """Prefect orders what depends on nothing by chance; the root shall be among the first."""
    flows = []  # kept, as the order follows from where the tasks are in memory
    while True:
        with Flow("root of 6 s with 100 tasks waiting, 6 tasks of 3 s") as flow:
            root = nap(6 * unit)
            for _ in range(100):
                noop(root)
            others = [nap(3 * unit) for _ in range(6)]
        flows.append(flow)
        order = [each for each in flow.sorted_tasks() if each in {root, *others}]
        if root in order[:4]:
            return flow


# Measurements: each is called in a process of its own -----------------------------------------


def fresh(measure, *args, path=(), env=None, patience=3600):
    """What `measure(*args)` returns in a new process, or None if it fails or takes too long."""
    # Imported under its name, not run as a script: then tasks are pickled by reference, and the
    # workers of an in-process cluster count the same frames.
    code = "import json, bench_prefect_ds as b; print(json.dumps(b.{}(*{!r})))"
    here = os.path.dirname(os.path.abspath(__file__))
    paths = [*path, here, *sys.path[1:]]
    command = [sys.executable, "-W", "ignore", "-c", code.format(measure.__name__, args)]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), **(env or {}))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "universal_newlines": True}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(command, env=env, cwd=folder, **pipes)
        try:
            output, errors = process.communicate(timeout=patience)
            trouble = errors[-1000:] if process.returncode else ""
        except subprocess.TimeoutExpired:
            trouble = f"not in {patience} s"
        finally:
            end(process)
    if trouble:
        print(f"{measure.__name__}{args}: {trouble}", file=sys.stderr)
        return None
    return json.loads(output.splitlines()[-1])


def end(process):
    """End a process, if it runs, and what it has started: not all workers notice by themselves."""
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        for member in [process, *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.communicate()


def alive(make_flow, count, runner, executor="LocalExecutor", threads=2):
    gc.disable()
    with executor_named(executor, threads) as the_executor:
        run(globals()[make_flow](count), runner, the_executor)
    return Frames.peak


def alive_in_loop(count):
    gc.disable()
    frames_loop(count)
    return Frames.peak


def memory(how, count, megabytes, executor="LocalExecutor"):
    """Pairs of seconds and resident MB above start, of a map or (`how="loop"`) of a loop."""
    rows = int(megabytes * 1e6 / 80)
    if how == "loop" and executor == "LocalExecutor":
        return sampled(partial(frames_loop, count, rows))
    if how == "loop":
        with ProcessPoolExecutor(2) as pool:
            frames_loop(2, 1, pool.map)
            return sampled(partial(frames_loop, count, rows, pool.map))
    with executor_named(executor) as the_executor:
        run(frames_map(2), how, the_executor)  # modules that are loaded late belong to the start
        return sampled(partial(run, frames_map(count, rows), how, the_executor))


def sampled(work, with_children=True):
    """Pairs of seconds and resident MB above start while `work` runs, of children, too."""
    processes = [psutil.Process()]
    if with_children:
        processes += psutil.Process().children(recursive=True)

    def resident_now():
        return sum(process.memory_info().rss for process in processes)

    before, start = resident_now(), time.perf_counter()
    samples, has_ended = [], threading.Event()

    def sample():
        while not has_ended.wait(0.003):
            samples.append((time.perf_counter() - start, (resident_now() - before) / 1e6))

    thread = threading.Thread(target=sample)
    thread.start()
    work()
    has_ended.set()
    thread.join()
    return samples


def overhead(executor, count, stages=1, repeats=3):
    """Milliseconds per child of a map: ours, Prefect's own and the limit's, in turns, the best.

    The limit is a loop, for processes of a cluster the same graph without Prefect.
    """
    with executor_named(executor) as the_executor:

        def works(count):
            for runner in RUNNERS:
                yield partial(run, noop_map(count, stages), runner, the_executor)
            if "processes" in executor:
                yield partial(noop_submitted, the_executor, count, stages)
            else:
                yield partial(noop_loop, count * stages)

        for work in works(10):
            work()
        measured = list(works(count))
        rounds = [[work() for work in measured] for _ in range(repeats)]
    return [min(taken) / (count * stages) * 1000 for taken in zip(*rounds)]


def processes(how, count, megabytes):
    """Seconds of a map in 2 processes, by `LocalDaskExecutor`, or of a loop there."""
    rows = int(megabytes * 1e6 / 80)
    if how != "loop":
        with executor_named("LocalDaskExecutor, processes") as executor:
            return run(frames_map(count, rows), how, executor)
    start = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        frames_loop(count, rows, pool.map)
    return time.perf_counter() - start


def naps(make_flow, unit, executor, threads, is_warm=False):
    """Of ours, then of Prefect's own: seconds of one flow, and how many workers took part.

    Workers that are warm have run a small flow before.
    """
    flow = globals()[make_flow](unit)  # one for both, as Prefect orders its tasks by chance
    outcome = []
    for runner in RUNNERS:
        with executor_named(executor, threads) as the_executor:
            if is_warm:
                run(noop_map(8, 2), runner, the_executor)
            seconds = run(flow, runner, the_executor)
        outcome.append((seconds, len({worker for worker, _ in Naps.taken})))
        Naps.taken.clear()
    return outcome


def joining(runner, unit):
    """Seconds until a worker runs something that joins while tasks of 6 s run."""
    with Flow("tasks of 6 s") as flow:
        nap.map([6 * unit] * 3)
    with cluster_named("DaskExecutor", 1) as cluster:

        def join_later():
            while not Naps.taken:
                time.sleep(0.01)
            time.sleep(unit)
            cluster.scale(2)
            while len(cluster.scheduler.workers) < 2:
                time.sleep(0.01)
            joined.append(time.perf_counter())

        joined = []
        thread = threading.Thread(target=join_later)
        thread.start()
        run(flow, runner, DaskExecutor(address=cluster.scheduler_address))
        thread.join()
    first = Naps.taken[0][0]
    return min(start for worker, start in Naps.taken if worker != first) - joined[0]


def layers(runner, count):
    """Seconds of layers of 6 tasks, each of which waits for the whole layer before."""
    with executor_named("LocalDaskExecutor", 12) as executor:
        return run(noop_layers(count), runner, executor)


def pending(runner, count):
    """Bytes per task run of a map through 4 stages: its peak above that of a map of 10."""
    peaks = {}
    for width in (10, 10, count):  # modules that are loaded late come with the first one
        flow = noop_map(width, 4)
        gc.collect()
        tracemalloc.start()
        run(flow, runner)
        peaks[width] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return (peaks[count] - peaks[10]) / (4 * (count - 10))


def wide(how, count, clock=time.perf_counter):
    """Seconds of a map, or of a loop."""
    return noop_loop(count, clock) if how == "loop" else run(noop_map(count), how, clock=clock)


def growth(how, counts, repeats):
    """Milliseconds of processor time per child, for each count of children.

    All is done in one thread, and its processor time does not depend on what else is running.
    """
    measure = partial(wide, how, clock=time.process_time)
    measure(100)
    rounds = [[measure(count) for count in counts] for _ in range(repeats)]
    return [min(taken) / count * 1000 for count, taken in zip(counts, zip(*rounds))]


def chain(count):
    """Seconds of Prefect's sort of the tasks, of each runner, and of a loop."""
    flow = noop_chain(count)
    start = time.perf_counter()
    flow.sorted_tasks()  # which the flow remembers
    sort = time.perf_counter() - start
    return [sort, run(flow, "ours"), run(flow, "own"), noop_loop(count)]


def checkpointed(how, count, megabytes):
    """Seconds of a map through two stages, files in parquet: cold, then warm."""
    rows = int(megabytes * 1e6 / 80)
    paths = "one/{map_index}.parquet", "two/{map_index}.parquet"
    if how == "loop":
        return [_checkpointed_loop(paths, count, rows) for _ in range(2)]
    if how == "ours":
        stored = [{STORAGE: PandasResultHandler(path)} for path in paths]
        kwargs = {"task_runner_state_handlers": [checkpoint_handler]}
    else:
        result = LocalResult(dir=os.getcwd(), serializer=PandasSerializer("parquet"))
        stored = [{"result": result, "target": path} for path in paths]
        kwargs = {}
    with Flow("checkpointed") as flow:
        made = task(make_named, **stored[0]).map([rows] * count)
        total(scalar.map(task(step_named, **stored[1]).map(made)))
    return [run(flow, how, **kwargs) for _ in range(2)]


def stored_stages(how, count, rows, stages=("load", "clean", "fit", "write")):
    """A map through stages that all are stored, and the rest of what `flow.run` needs for it."""

    def stored(path):
        if how == "own":
            result = LocalResult(dir=os.getcwd(), serializer=PandasSerializer("parquet"))
            return {"result": result, "target": path}
        return {STORAGE: PandasResultHandler(path)}

    with Flow("stored stages") as flow:
        frames = [rows] * count
        for stage in stages:
            function = make_named if stage == stages[0] else step_named
            path = stage + "/{map_index}.parquet"
            frames = task(function, name=stage, **stored(path)).map(frames)
    return flow, {} if how == "own" else {"task_runner_state_handlers": [checkpoint_handler]}


def second_run(how, count, megabytes):
    """Seconds, and resident MB above start, of a run whose files are all there."""
    rows = int(megabytes * 1e6 / 80)
    flow, kwargs = stored_stages(how, count, rows)
    if how != "loop":
        run(stored_stages(how, 1, 10, ["warm"])[0], how, **kwargs)
    run(flow, "ours" if how == "loop" else how, **kwargs)
    gc.collect()
    paths = glob.glob("*/[0-9]*.parquet")
    assert len(paths) >= 4 * count

    def work():
        if how == "loop":
            for path in paths:
                pandas.read_parquet(path)
        else:
            run(flow, how, **kwargs)

    samples = sampled(work)
    return samples[-1][0], max(resident for _, resident in samples)


def first_run_memory(how, count, megabytes):
    """Resident MB above start of a first run that ends by a map that is stored."""
    rows = int(megabytes * 1e6 / 80)
    if how == "loop":

        def work():
            for index in range(count):
                frame = step_named(step_named(make_named(rows)))
                frame.to_parquet(f"{index}.parquet")
                del frame

        make_named(10).to_parquet("warm.parquet")
    else:
        with Flow("load, clean, write") as flow:
            path = "write/{map_index}.parquet"
            cleaned = task(step_named).map(task(make_named).map([rows] * count))
            if how == "own":
                result = LocalResult(dir=os.getcwd(), serializer=PandasSerializer("parquet"))
                storage = {"result": result, "target": path}
            else:
                storage = {STORAGE: PandasResultHandler(path)}
            task(step_named, name="write", **storage).map(cleaned)
        kwargs = {} if how == "own" else {"task_runner_state_handlers": [checkpoint_handler]}
        run(stored_stages(how, 1, 10, ["warm"])[0], how, **kwargs)
        work = partial(run, flow, how, **kwargs)
    return max(resident for _, resident in sampled(work))


def client_memory(how, count, megabytes):
    """Resident MB above start of the client, while two processes run a map that is stored."""
    rows = int(megabytes * 1e6 / 80)
    flow, kwargs = stored_stages(how, count, rows, ["load", "write"])
    with executor_named("DaskExecutor, 2 processes") as executor:
        run(stored_stages(how, 1, 10, ["warm"])[0], how, executor, **kwargs)
        work = partial(run, flow, how, executor, **kwargs)
        return max(r for _, r in sampled(work, with_children=False))


def files_read(how, deleted, looks):
    """How many files the second run of the flow of `example.py` reads, which has stored 49."""
    read = []
    original = pandas.read_parquet
    pandas.read_parquet = lambda *args, **kwargs: read.append(args) or original(*args, **kwargs)
    if how == "ours":
        import prefect_ds

        _, writer = prefect_ds._FILE_TYPES["parquet"]
        prefect_ds._FILE_TYPES["parquet"] = (pandas.read_parquet, writer)
    flow, kwargs = stored_stages(how, 12, 10)
    with flow:
        (fitted,) = flow.get_tasks("write")
        if how == "own":
            result = LocalResult(dir=os.getcwd(), serializer=PandasSerializer("parquet"))
            storage = {"result": result, "target": "summary.parquet"}
        else:
            storage = {STORAGE: PandasResultHandler("summary.parquet")}
        summary = task(summarize, **storage)(fitted)
    run(flow, how, **kwargs)
    for path in deleted:
        os.remove(path)
    read.clear()
    state = flow.run(runner_cls=RUNNERS[how], executor=LocalExecutor(), **kwargs)
    if looks:
        assert len(state.result[summary].result) == 120
    return len(read)


def summarize(models):
    return pandas.concat(models, ignore_index=True)


def _checkpointed_loop(paths, count, rows):
    start = time.perf_counter()
    for index in range(count):
        frame = _load_or_compute(paths[0].format(map_index=index), make_named, rows)
        frame = _load_or_compute(paths[1].format(map_index=index), step_named, frame)
        scalar.run(frame)
    return time.perf_counter() - start


def _load_or_compute(path, function, argument):
    if os.path.exists(path):
        return pandas.read_parquet(path)
    frame = function(argument)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    frame.to_parquet(path)
    return frame


def make_named(rows):
    columns = list("abcdefghij")  # parquet wants names
    return pandas.DataFrame(numpy.random.rand(rows, 10), columns=columns)


def step_named(frame):
    return frame + 1


#: From pandas 3 on the default reads a float as it was, and this argument is deprecated.
EXACT = {} if pandas.__version__ >= "3" else {"float_precision": "round_trip"}

#: Keyword arguments of the writer and of the reader, the same for pandas alone.
STORE_KWARGS = {
    "parquet": ({}, {}),
    "csv": (
        {"index": False},
        dict(EXACT, keep_default_na=False, na_values=[""], low_memory=False),
    ),
}


def store(file_type, megabytes, repeats):
    """Seconds to write and to read a frame: by us, by pandas alone, by pandas and fsync."""
    frame = make_named(int(megabytes * 1e6 / 80))
    write_kwargs, read_kwargs = STORE_KWARGS[file_type]
    path = os.path.abspath("frame." + file_type)
    ours = PandasResultHandler(path, read_kwargs=read_kwargs, write_kwargs=write_kwargs)
    to_file = partial(getattr(frame, "to_" + file_type), path, **write_kwargs)
    from_file = partial(getattr(pandas, "read_" + file_type), path, **read_kwargs)

    def to_disk():
        to_file()
        with open(path, "rb+") as opened:
            os.fsync(opened.fileno())

    actions = {
        "write": [partial(ours.write, frame), to_file, to_disk],
        "read": [partial(ours.read, path), from_file],
    }
    taken = {name: [[] for _ in works] for name, works in actions.items()}
    for works in actions.values():
        for work in works:
            work()  # the first time takes longer: for imports, and for memory from the system
    for number in range(repeats):
        for name, works in actions.items():
            # In another order each time: what runs first may find things in another state.
            for index in sorted(range(len(works)), key=lambda i: (i + number) % len(works)):
                if name == "write" and os.path.exists(path):
                    os.remove(path)
                os.sync()
                start = time.perf_counter()
                works[index]()
                taken[name][index].append(time.perf_counter() - start)
    return taken


def store_memory(how, file_type, megabytes):
    """The peak in MB above start, frame included, of writing a frame."""
    frame = make_named(int(megabytes * 1e6 / 80))
    write_kwargs, _ = STORE_KWARGS[file_type]
    path = os.path.abspath("frame." + file_type)
    writers = {
        "ours": PandasResultHandler(path, write_kwargs=write_kwargs).write,
        "alone": lambda frame: getattr(frame, "to_" + file_type)(path, **write_kwargs),
    }
    writers[how](frame.head())  # modules that are loaded late belong to the start
    return megabytes + max(resident for _, resident in sampled(partial(writers[how], frame)))


# Rows of the table ----------------------------------------------------------------------------

#: `over` is what a bound is a multiple of: None for a plain number, else "own" or "limit".
#: `ratio` is given where it is not the quotient of the two.
Row = collections.namedtuple("Row", "what unit ours own limit bound over ratio original")
Row.__new__.__defaults__ = (None,) * 7


def rows_alive(sizes):
    yield row_alive(sizes, "frames_chain", 9, "LocalExecutor", 2)
    for count in (20, sizes.wide):
        yield row_alive(sizes, "frames_map", count, "LocalExecutor", 2)
        for name in DASK_NAMES:
            yield row_alive(sizes, "frames_map", count, name, 2 * 2 + 2)


def rows_alive_meeting(sizes):
    for make_flow in sizes.meeting:
        for name in DASK_NAMES:
            # Two maps meet, for each of which every worker may have one more.
            yield row_alive(sizes, make_flow, 20, name, 2 * 2 + 2 + 2 * 2)


def row_alive(sizes, make_flow, count, executor, bound):
    what = f"frames alive, {make_flow[7:]} of {count}, {executor}"
    taken = {runner: fresh(alive, make_flow, count, runner, executor) for runner in RUNNERS}
    is_local = executor == "LocalExecutor"
    return Row(
        what if is_local else what + ", 2 threads", "", taken["ours"], taken["own"],
        limit=fresh(alive_in_loop, count) if is_local else None,
        bound=bound,
        original=fresh(alive, make_flow, count, "ours", executor, path=[sizes.original])
        if sizes.original and count < 100
        else None,
    )  # fmt: skip


def rows_memory(sizes):
    what = "peak memory, map of {} frames of {} MB"
    room = psutil.virtual_memory().available / 1e6
    count = sizes.frames
    own_count = count if room > 1.4 * 4 * count * sizes.megabytes else 10
    peak = {}
    for how, number in (("loop", count), ("ours", count), ("own", own_count)):
        samples = fresh(memory, how, number, sizes.megabytes)
        peak[how] = max(resident for _, resident in samples) if samples else None
    if own_count != count:
        what += f" (Prefect's own: {own_count} frames)"
    yield Row(
        what.format(count, sizes.megabytes), "MB",
        peak["ours"], peak["own"], peak["loop"], 1.25, "limit",
    )  # fmt: skip


def rows_overhead(sizes):
    for name in ["LocalExecutor", *DASK_NAMES]:
        taken = fresh(overhead, name, sizes.wide) or [None] * 3
        bound = OVERHEAD_BOUND if name == "LocalExecutor" else 1.0
        yield Row("time per task run, " + name, "ms", *taken, bound, "own")


def rows_cluster(sizes):
    count, stages, executor = sizes.cluster, 4, "DaskExecutor, 2 processes"
    taken = fresh(overhead, executor, count, stages, sizes.repeats, patience=300)
    what = f"time per task run, map of {count} x {stages}, {executor} (limit: client.submit)"
    yield Row(what, "ms", *(taken or [None] * 3), 1.25, "limit")


def rows_processes(sizes):
    count, megabytes, executor = sizes.frames * 3 // 5, 20, "LocalDaskExecutor, 2 processes"
    taken = dict.fromkeys(WAYS)
    # Ours and the limit take less than a second, in which anything else shows: the best of 3.
    for how in [*WAYS, "ours", "loop", "ours", "loop"]:
        seconds = fresh(processes, how, count, megabytes, patience=300)
        taken[how] = min(filter(None, [taken[how], seconds]), default=None)
    taken = taken.values()
    what = f"{count} frames of {megabytes} MB through 5 stages, {executor}"
    yield Row(what, "s", *taken, 1.5, "limit")


def rows_adaptive(sizes):
    # Not in fractions of a second: the cluster looks once a second whether to grow.
    yield row_naps("16 mapped tasks of 1 s", 1, "DaskExecutor, adaptive", 1, "naps_map", 2)


def rows_joining(sizes):
    unit = sizes.unit
    taken = [fresh(joining, runner, unit, patience=120) for runner in RUNNERS]
    what = f"while tasks of {6 * unit:g} s run, a worker joins: first used after"
    yield Row(what, "s", *taken, bound=1)


def rows_resources(sizes):
    unit = sizes.unit
    what = f"6 tasks of {2 * unit:g} s that take the one GPU beside 30 of {unit:g} s"
    yield row_naps(what, unit, "DaskExecutor, one GPU", 4, "naps_tagged", 12 * unit)


def rows_lists(sizes):
    unit = sizes.unit
    what = f"12 times (list {unit:g} s, then a map)"
    yield row_naps(what, unit, "DaskExecutor, 2 processes", 4, "naps_lists", 3 * unit)


def rows_root(sizes):
    unit = sizes.unit
    what = f"root of {6 * unit:g} s, 100 tasks waiting, 6 others of {3 * unit:g} s"
    yield row_naps(what, unit, "DaskExecutor, 2 processes", 4, "naps_root", 6 * unit)


def rows_spread(sizes):
    what, ideal = "80 x 2 mapped tasks of 50 ms after a small flow", 160 * 0.05 / 4
    executor = "DaskExecutor, 2 processes"
    yield row_naps(what, None, executor, 4, "naps_two_stages", ideal, 1.3, "limit", is_warm=True)


def row_naps(what, unit, executor, threads, make_flow, limit, bound=1.1, over="own", is_warm=False):
    taken = fresh(naps, make_flow, unit, executor, threads, is_warm, patience=120)
    (ours, workers), (own, own_workers) = taken or [(None, "?")] * 2
    what = f"{what}, {executor}"
    if "adaptive" in executor:
        what += f" 1 to 8 (used: {workers}, Prefect's {own_workers})"
    else:
        what += f", {threads} threads"
    return Row(what, "s", ours, own, limit, bound, over)


def rows_layers(sizes):
    taken = {}
    for count in sizes.layers:
        taken[count], own = (
            fresh(layers, runner, count, patience=sizes.patience) for runner in RUNNERS
        )
        what = f"{count} layers of 6 plain tasks, each after the whole layer before, 12 threads"
        yield Row(what, "s", taken[count], own, None, 1.0, "own")
    few, many = sizes.layers[0], sizes.layers[-1]
    per_edge = {n: seconds and seconds / (n - 1) / 36 * 1000 for n, seconds in taken.items()}
    ratio = per_edge[many] / per_edge[few] if per_edge[many] and per_edge[few] else None
    what = f"time per edge of {many} layers (over that of {few})"
    yield Row(what, "ms", per_edge[many], None, None, 1.5, "self", ratio)


def rows_pending(sizes):
    # What is slow takes three times as long when it is traced: Prefect's own, and all below 0.14.
    count = 3 * sizes.wide if RELEASE >= (0, 14) else sizes.wide // 2
    own_count = min(count, 2 * sizes.wide // 5) // (1 if RELEASE >= (0, 14) else 4)
    taken = (
        fresh(pending, "ours", count, patience=300),
        fresh(pending, "own", own_count, patience=300),
    )
    what = f"peak memory per task run, map of {count:,} x 4 (Prefect's own: {own_count:,})"
    yield Row(what, "B", *taken, None, 1.0, "own")


def rows_growth(sizes):
    counts = [sizes.wide, 3 * sizes.wide, 10 * sizes.wide]
    repeats = {"ours": 3, "own": 1, "loop": 3}
    taken = [fresh(growth, how, counts, repeats[how]) or [None] * 3 for how in repeats]
    narrow = taken[0][0]
    for count, ours, own, loop in zip(counts, *taken):
        bound = 1.2 if count == counts[-1] else None  # 1, and what timing is uncertain by
        ratio = ours / narrow if bound and ours else None
        what = f"processor time per child, map of {count:,}"
        what += f" (over that of {counts[0]:,})" if bound else ""
        yield Row(what, "ms", ours, own, loop, bound, "self" if bound else None, ratio)


def rows_chain(sizes):
    sort, *taken = fresh(chain, sizes.chain) or [float("nan"), None, None, None]
    what = "chain of {:,} tasks (before it, Prefect's sort of the flow: {:.3g} s)"
    yield Row(what.format(sizes.chain, sort), "s", *taken, bound="runs")


def rows_wide(sizes):
    taken = [fresh(wide, how, 50 * sizes.wide) for how in ("ours", "own", "loop")]
    yield Row(f"map of {50 * sizes.wide:,} children", "s", *taken, bound="runs")


def rows_checkpointed(sizes):
    count, megabytes = sizes.frames, sizes.megabytes / 10
    taken = {
        how: fresh(checkpointed, how, count, megabytes, env=CHECKPOINTING)
        if how != "own" or TARGETS
        else None
        for how in ("loop", "ours", "own")
    }
    for index, name in enumerate(("cold", "warm")):
        what = "{} run, 2 x {} parquet files of {:g} MB (Prefect's: LocalResult, target)"
        ours, own, loop = (seconds and seconds[index] for seconds in map(taken.get, (
            "ours", "own", "loop"
        )))  # fmt: skip
        yield Row(what.format(name, count, megabytes), "s", ours, own, loop)


def rows_second_run(sizes):
    for what, deleted, looks, bound in (
        ("", [], False, 0),
        (", the summary is looked at", [], True, 1),
        (", one fit and the summary deleted", ["write/3.parquet", "summary.parquet"], False, 12),
    ):
        taken = [
            fresh(files_read, how, deleted, looks, env=CHECKPOINTING) if how == "ours" or TARGETS
            else None
            for how in RUNNERS
        ]  # fmt: skip
        yield Row("files read in the second run, 49 stored" + what, "", *taken, None, bound)
    count, megabytes = sizes.parts, sizes.megabytes / 10
    taken = {
        how: fresh(second_run, how, count, megabytes, env=CHECKPOINTING) or [None] * 2
        for how in (WAYS if TARGETS else ["ours", "loop"])
    }
    what = f"second run, {4 * count} parquet files of {megabytes:g} MB"
    seconds, peaks = ([taken.get(how, [None] * 2)[n] for how in WAYS] for n in range(2))
    bound = 0.2 if RELEASE >= (0, 14) else None
    yield Row(f"{what} (limit: to read them)", "s", *seconds, bound, "limit")
    yield Row(f"peak memory, {what}", "MB", *peaks, 50)


def rows_first_run(sizes):
    count, megabytes = sizes.frames, sizes.megabytes
    taken = [
        fresh(first_run_memory, how, count, megabytes, env=CHECKPOINTING)
        if how != "own" or TARGETS else None
        for how in WAYS
    ]  # fmt: skip
    what = f"{count} frames of {megabytes} MB"
    yield Row(f"peak memory, first run, {what}, the last map stored", "MB", *taken, 1.25, "limit")
    if DASK_NAMES:
        taken = [
            fresh(client_memory, how, 20, megabytes, env=CHECKPOINTING)
            if how != "own" or TARGETS else None
            for how in RUNNERS
        ]  # fmt: skip
        what = f"20 frames of {megabytes} MB, 2 processes"
        # One frame would be more.
        yield Row(f"peak memory of the client, {what}, stored", "MB", *taken, None, megabytes)


def rows_store(sizes):
    for file_type, megabytes, repeats in (
        # A multiple of 6 makes each of two or three ways the first one equally often.
        ("parquet", sizes.stored, 12),
        # That takes minutes, so that the order says nothing.
        ("csv", sizes.stored, 2),
    ):
        taken = fresh(store, file_type, megabytes, repeats)
        for name, seconds in (taken or {}).items():
            ours, alone = seconds[:2]
            ratio = statistics.median(a / b for a, b in zip(ours, alone))
            what = f"{name} {file_type}, {megabytes} MB"
            if name == "write":
                what += f" (limit, and fsync: {statistics.median(seconds[2]):.3g} s)"
            yield Row(
                what, "s", statistics.median(ours), None, statistics.median(alone),
                1.05, "limit", ratio,
            )  # fmt: skip
        ours, alone = (fresh(store_memory, how, file_type, megabytes) for how in ("ours", "alone"))
        what = f"memory, with the frame, write {file_type}, {megabytes} MB"
        yield Row(what, "MB", ours, None, alone, 1.05, "limit")


ROWS = [
    rows_alive,
    rows_alive_meeting,
    rows_memory,
    rows_pending,
    rows_overhead,
    rows_layers,
    rows_growth,
    rows_chain,
    rows_wide,
    rows_checkpointed,
    rows_second_run,
    rows_first_run,
    rows_store,
]
if DASK_NAMES:
    ROWS += [
        rows_cluster,
        rows_processes,
        rows_adaptive,
        rows_joining,
        rows_resources,
        rows_lists,
        rows_root,
        rows_spread,
    ]


# The table ------------------------------------------------------------------------------------


def verdict(row):
    """What the bound says, and what came of it."""
    if row.bound is None:
        return "", ""
    names = {"own": "Prefect's", "self": "narrow", "limit": "limit"}
    bound = f"{row.bound} x {names[row.over]}" if row.over else str(row.bound)
    if row.ours is None:
        return bound, "missed"
    if row.bound == "runs":
        return bound, "ok"
    if row.over is None:
        return bound, "ok" if row.ours <= row.bound else "missed"
    reference = getattr(row, row.over, None)
    ratio = row.ratio or (reference and row.ours / reference)
    if ratio is None:
        return bound, f"missed: no {names[row.over]}"
    return bound, "{} ({:.3g} x)".format("ok" if ratio <= row.bound else "missed", ratio)


def print_row(cells):
    widths = [90, 9, 9, 11, 16, 16, 9]
    print("| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths)) + " |", flush=True)


def print_table(sizes, selected):
    titles = ["what", "ours", "Prefect's", "limit", "bound", ""]
    titles += ["0.1.1"] if sizes.original else []
    print_row(titles)
    print_row(["---"] * len(titles))
    missed = 0
    for make_rows in ROWS:
        if not any(name in make_rows.__name__ for name in selected):
            continue
        for row in make_rows(sizes):
            bound, outcome = verdict(row)
            values = [row.ours, row.own, row.limit]
            cells = [row.what] + [in_unit(v, row.unit) for v in values] + [bound, outcome]
            print_row(cells + ([in_unit(row.original, row.unit)] if sizes.original else []))
            missed += outcome.startswith("missed")
    return missed


def in_unit(value, unit):
    if value is None:
        return "-"
    digits = "{:.0f}" if value >= 100 else "{:.3g}"
    return " ".join([digits.format(value), unit]).strip()


def print_machine():
    memory_gb = psutil.virtual_memory().total / 2**30
    print(f"{platform.platform()}, {os.cpu_count()} cores, {memory_gb:.0f} GB")
    modules = [prefect, pandas, numpy, dask]
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in modules)
    print(f"Python {platform.python_version()}, {versions}\n")


def install_original(folder):
    """A folder with prefect-ds 0.1.1, or None: it can only run on Prefect 0.9."""
    if RELEASE != (0, 9):
        return None
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--target", folder, "prefect-ds==0.1.1"]
    is_there = subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    return folder if is_there or glob.glob(os.path.join(folder, "prefect_ds*")) else None


# The figure -----------------------------------------------------------------------------------


def draw(path, sizes):
    """Resident memory over time of one flow, three ways, in one process and on a cluster."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Colours and greys that can be read on white and on black: the background is the page's.
    lines = [
        ("own", "Prefect's FlowRunner", "#d9822b", "-"),
        ("ours", "prefect_ds", "#3b8eea", "-"),
        ("loop", "plain Python loop", "#8a8a8a", "--"),
    ]
    grey = "#808080"
    pyplot.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif"})
    pyplot.rcParams.update({name + ".color": grey for name in ("text", "xtick", "ytick")})
    figure, both = pyplot.subplots(1, 2, figsize=(10, 5), sharey=True)
    for axes, executor in zip(both, ("LocalExecutor", "DaskExecutor, 2 processes")):
        for how, label, color, style in lines:
            samples = fresh(memory, how, sizes.frames, sizes.megabytes, executor)
            seconds, resident = numpy.array(samples).T
            label += f": {resident.max() / 1000:.2f} GB in {seconds[-1]:.1f} s"
            axes.plot(seconds, resident / 1000, color=color, linestyle=style, label=label)
        axes.set_title(executor, fontsize="medium")
        axes.set_xlabel("seconds", color=grey)
        axes.set_xlim(left=0)
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(grey)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    both[0].set_ylim(bottom=0)  # and of the other one
    both[0].set_ylabel("resident memory above start, all processes, GB", color=grey)
    figure.suptitle(
        f"A map of {sizes.frames} DataFrames of {sizes.megabytes} MB through four stages"
    )
    figure.tight_layout()
    figure.savefig(path, transparent=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=[""], metavar="SUBSTRING", help="only these")
    parser.add_argument("--quick", action="store_true", help="with fewer and smaller frames")
    parser.add_argument("--original", metavar="FOLDER", help="where prefect-ds 0.1.1 is, on 0.9")
    parser.add_argument("--figure", metavar="FILE.svg", help="draw memory over time, no table")
    options = parser.parse_args()
    sizes = argparse.Namespace(
        wide=1000, frames=40, parts=200, megabytes=50, stored=500, chain=3000, original=None,
        cluster=150, repeats=2, unit=1, layers=(8, 9, 10, 11, 20), patience=30,
        meeting=("frames_zip", "frames_diamond"),
    )  # fmt: skip
    if options.quick:
        # Below 0.14 a task run takes a hundred times as long.
        wide = 300 if RELEASE >= (0, 14) else 100
        vars(sizes).update(wide=wide, frames=20, parts=40, stored=100, chain=1000)
        vars(sizes).update(cluster=50, repeats=1, unit=0.25, layers=(8, 16), patience=20)
        sizes.meeting = sizes.meeting[:1]
    if options.figure:
        return draw(options.figure, sizes)
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        sizes.original = options.original or install_original(folder)
        missed = print_table(sizes, options.rows)
    print("\n{}".format(f"{missed} missed" if missed else "All bounds are kept."))
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
