"""Measure prefect_ds beside Prefect's own FlowRunner and beside what is physically possible.

    tox -e bench

or, in any environment: `python bench_prefect_ds.py`. One table is printed, all of it measured in
one run on one machine, nothing logged by Prefect. Whatever concerns memory is measured in a
process of its own. It ends with 1 if a bound is missed.

`--rows alive` measures only the rows whose function has that in its name, `--quick` makes them
smaller, and `--figure memory.svg` draws the memory of one flow over time (it takes matplotlib).
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
import weakref
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
from prefect_ds.task_runner import DSTaskRunner

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

RUNNERS = {"ours": DSFlowRunner, "own": partial(FlowRunner, task_runner_cls=DSTaskRunner)}

logging.getLogger("prefect").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def executor_named(name, threads):
    if name == "LocalExecutor":
        yield LocalExecutor()
    elif name == "LocalDaskExecutor":
        yield LocalDaskExecutor(scheduler="threads", num_workers=threads)
    else:
        from distributed import Client

        kwargs = {"n_workers": 1, "threads_per_worker": threads, "dashboard_address": None}
        with Client(processes=False, **kwargs) as client:
            yield DaskExecutor(address=client.scheduler.address)


def run(flow, runner, executor="LocalExecutor", threads=2, clock=time.perf_counter, **kwargs):
    """Run the flow; return its seconds."""
    with executor_named(executor, threads) as the_executor:
        start = clock()
        state = flow.run(runner_cls=RUNNERS[runner], executor=the_executor, **kwargs)
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
def scalar(frame):
    return float(frame.iat[0, 0])


@task
def total(values):
    return sum(values)


@task
def noop(value):
    return value


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


def frames_loop(count, rows=1):
    """What `frames_map` computes, as a plain loop."""

    def through_all_stages():
        frame = source.run(rows)
        for _ in range(3):
            frame = step.run(frame)
        return scalar.run(frame)

    return sum(through_all_stages() for _ in range(count))


def noop_map(count):
    with Flow("map of nothing") as flow:
        noop.map(list(range(count)))
    return flow


def noop_chain(count):
    with Flow("chain of nothing") as flow:
        value = noop(0)
        for _ in range(count - 1):
            value = noop(value)
    return flow


def noop_loop(count, clock=time.perf_counter):
    """Call what those flows call, as a plain loop; return its seconds."""
    start = clock()
    for number in range(count):
        noop.run(number)
    return clock() - start


# Measurements: each is called in a process of its own -----------------------------------------


def fresh(measure, *args, path=(), env=None):
    """What `measure(*args)` returns in a new process, or None if it fails or takes an hour."""
    # Imported under its name, not run as a script: then tasks are pickled by reference, and the
    # workers of an in-process cluster count the same frames.
    code = "import json, bench_prefect_ds as b; print(json.dumps(b.{}(*{!r})))"
    here = os.path.dirname(os.path.abspath(__file__))
    paths = [*path, here, *sys.path[1:]]
    command = [sys.executable, "-W", "ignore", "-c", code.format(measure.__name__, args)]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), **(env or {}))
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                command, env=env, cwd=folder, timeout=3600,
                capture_output=True, text=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{measure.__name__}{args}: not in an hour", file=sys.stderr)
            return None
    if done.returncode:
        print(f"{measure.__name__}{args}: {done.stderr[-1000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def alive(make_flow, count, runner, executor="LocalExecutor", threads=2):
    gc.disable()
    run(globals()[make_flow](count), runner, executor, threads)
    return Frames.peak


def alive_in_loop(count):
    gc.disable()
    frames_loop(count)
    return Frames.peak


def memory(how, count, megabytes):
    """Pairs of seconds and resident MB above start, of a map or (`how="loop"`) of a loop."""
    rows = int(megabytes * 1e6 / 80)
    flow = frames_map(count, rows)
    if how == "loop":
        work = partial(frames_loop, count, rows)
    else:
        work = partial(run, flow, how)
        run(frames_map(1), how)  # modules that are loaded late belong to the start
    return sampled(work)


def sampled(work):
    """Pairs of seconds and resident MB above start, while `work` runs."""
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    samples, has_ended = [], threading.Event()

    def sample():
        while not has_ended.wait(0.003):
            resident = process.memory_info().rss - before
            samples.append((time.perf_counter() - start, resident / 1e6))

    thread = threading.Thread(target=sample)
    thread.start()
    work()
    has_ended.set()
    thread.join()
    return samples


def overhead(executor, count, repeats=3):
    """Milliseconds per child of a map: ours, Prefect's own and a loop's, in turns, the best."""
    flow = noop_map(count)
    for runner in RUNNERS:
        run(noop_map(10), runner, executor)
    works = [partial(run, flow, runner, executor) for runner in RUNNERS]
    works.append(partial(noop_loop, count))
    rounds = [[work() for work in works] for _ in range(repeats)]
    return [min(taken) / count * 1000 for taken in zip(*rounds)]


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
        dict(EXACT, keep_default_na=False, na_values=[""]),
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
    def counts(make_flow, count, executor, bound, threads=2):
        args = (count, "ours", executor, threads)
        what = f"{make_flow[7:]} of {count}, {executor}"
        if executor != "LocalExecutor":
            what += f", {threads} threads"
        return Row(
            "frames alive, " + what, "",
            ours=fresh(alive, make_flow, *args),
            own=fresh(alive, make_flow, count, "own", executor, threads),
            limit=fresh(alive_in_loop, count) if executor == "LocalExecutor" else None,
            bound=bound,
            original=fresh(alive, make_flow, *args, path=[sizes.original])
            if sizes.original and count < 100
            else None,
        )  # fmt: skip

    yield counts("frames_chain", 9, "LocalExecutor", 2)
    for count in (20, sizes.wide):
        yield counts("frames_map", count, "LocalExecutor", 2)
        for name in DASK_NAMES:
            yield counts("frames_map", count, name, 2 * 2 + 2)


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
    env = {"PREFECT__FLOWS__CHECKPOINTING": "true"}
    taken = {
        how: fresh(checkpointed, how, count, megabytes, env=env)
        if how != "own" or PandasSerializer
        else None
        for how in ("loop", "ours", "own")
    }
    for index, name in enumerate(("cold", "warm")):
        what = "{} run, 2 x {} parquet files of {:g} MB (Prefect's: LocalResult, target)"
        ours, own, loop = (seconds and seconds[index] for seconds in map(taken.get, (
            "ours", "own", "loop"
        )))  # fmt: skip
        yield Row(what.format(name, count, megabytes), "s", ours, own, loop)


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
    rows_memory,
    rows_overhead,
    rows_growth,
    rows_chain,
    rows_wide,
    rows_checkpointed,
    rows_store,
]


# The table ------------------------------------------------------------------------------------


def verdict(row):
    """What the bound says, and what came of it."""
    if row.bound is None:
        return "", ""
    if row.ours is None:
        return str(row.bound), "missed"
    if row.bound == "runs":
        return "runs", "ok"
    if row.over is None:
        return f"{row.bound}", "ok" if row.ours <= row.bound else "missed"
    ratio = row.ratio or row.ours / getattr(row, row.over)
    bound = "{} x {}".format(row.bound, {"own": "Prefect's", "self": "narrow"}.get(
        row.over, row.over
    ))  # fmt: skip
    return bound, "{} ({:.3g} x)".format("ok" if ratio <= row.bound else "missed", ratio)


def print_row(cells):
    widths = [86, 9, 9, 11, 16, 16, 9]
    print("| " + " | ".join(cell.ljust(w) for cell, w in zip(cells, widths)) + " |", flush=True)


def print_table(sizes, selected):
    titles = ["what", "ours", "Prefect's", "limit", "bound", ""]
    titles += ["0.1.1"] if sizes.original else []
    print_row(titles)
    print_row(["---"] * len(titles))
    missed = 0
    for make_rows in ROWS:
        for row in make_rows(sizes) if selected in make_rows.__name__ else ():
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
    """Resident memory over time of one flow, three ways."""
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
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for how, label, color, style in lines:
        samples = fresh(memory, how, sizes.frames, sizes.megabytes)
        seconds, resident = numpy.array(samples).T
        label += f": {resident.max() / 1000:.2f} GB in {seconds[-1]:.1f} s"
        axes.plot(seconds, resident / 1000, color=color, linestyle=style, label=label)
    axes.set_title(
        f"A map of {sizes.frames} DataFrames of {sizes.megabytes} MB through four stages"
    )
    axes.set_xlabel("seconds", color=grey)
    axes.set_ylabel("resident memory above start, GB", color=grey)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(grey)
    axes.legend(loc="upper left", frameon=False)
    figure.tight_layout()
    figure.savefig(path, transparent=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", metavar="SUBSTRING", help="measure only these")
    parser.add_argument("--quick", action="store_true", help="with fewer and smaller frames")
    parser.add_argument("--original", metavar="FOLDER", help="where prefect-ds 0.1.1 is, on 0.9")
    parser.add_argument("--figure", metavar="FILE.svg", help="draw memory over time, no table")
    options = parser.parse_args()
    sizes = argparse.Namespace(
        wide=1000, frames=40, megabytes=50, stored=500, chain=3000, original=None
    )
    if options.quick:
        # Below 0.14 a task run takes a hundred times as long.
        wide = 300 if RELEASE >= (0, 14) else 100
        vars(sizes).update(wide=wide, frames=20, stored=100, chain=1000)
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
