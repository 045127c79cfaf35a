"""Measure prefect_ds beside Prefect's own FlowRunner, and beside what is physically possible.

`tox -e bench`, or with Prefect 0.9 to 1.4 `python bench_prefect_ds.py`, prints the table of the
README: what was measured with `DSFlowRunner`, with Prefect's `FlowRunner`, and without Prefect (the
limit: a plain loop, or bare Dask); and the bound, which is a number, or so many times one of the
others. It ends with 1 if a bound is missed.

- `--rows REGEX` prints the rows whose name matches.
- `--quick` makes everything smaller, and leaves out what takes long.
- `--figure memory.svg` draws, instead, the memory of one flow over time. It takes matplotlib.

Memory is measured in a process of its own each time. Times are taken in turns, in one process; the
median is shown, and a bound holds for the median of the ratios within each turn.
"""

import argparse
import contextlib
import gc
import glob
import logging
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import threading
import time
import tracemalloc
import warnings
import weakref
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle

import distributed
import numpy
import pandas
import prefect
import psutil
from prefect import Flow, task

import prefect_ds

try:
    from prefect.executors import DaskExecutor, LocalDaskExecutor, LocalExecutor
except ImportError:  # below 0.14
    from prefect.engine.executors import DaskExecutor, LocalDaskExecutor, LocalExecutor

RELEASE = tuple(map(int, prefect.__version__.split(".")[:2]))
RUNNERS = {"prefect_ds": prefect_ds.DSFlowRunner, "Prefect": prefect.engine.FlowRunner}
WAYS = [*RUNNERS, "limit"]
PROCESSES = "2 worker processes"

warnings.simplefilter("ignore")
logging.disable()


# How it is measured ---------------------------------------------------------------------------

#: A new process is a copy of this one, in which everything is imported, and nothing has run.
FORK = multiprocessing.get_context("fork")


def fresh(measure, *args, patience=1800):
    """What `measure(*args)` returns in a new process; None if it fails or takes too long."""
    receiver, sender = FORK.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        process = FORK.Process(target=lambda: os.chdir(folder) or sender.send(measure(*args)))
        process.start()
        sender.close()
        try:
            return receiver.recv() if receiver.poll(patience) else None
        except EOFError:  # it has failed, and has said why
            return None
        finally:
            # Not all workers notice by themselves that it has ended.
            for member in [*children(process.pid), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.join()


def children(pid=None):
    return psutil.Process(pid).children(recursive=True)


def in_turns(works, turns, unit=1, clock=time.perf_counter):
    """For each of the works a list of the times that it takes, each turn in another order."""
    taken = {way: [] for way in works}
    for turn in range(turns):
        for index in range(len(works)):
            way = list(works)[(turn + index) % len(works)]
            gc.collect()
            start = clock()
            works[way]()
            taken[way].append((clock() - start) / unit)
    return taken


def memory_during(work, processes=None):
    """Pairs of seconds and resident MB above start while `work` runs, of all these processes."""
    processes = processes or [psutil.Process()]
    samples, has_ended = [], threading.Event()

    def sample():
        resident = sum(process.memory_info().rss for process in processes) / 1e6
        samples.append((time.perf_counter(), resident))

    def keep_sampling():
        while not has_ended.wait(0.003):
            sample()

    gc.collect()
    sample()
    threading.Thread(target=keep_sampling, daemon=True).start()
    work()
    has_ended.set()
    sample()
    (start, before), *_ = samples
    return [(seconds - start, resident - before) for seconds, resident in sorted(samples)]


def peak(samples):
    return max(resident for _, resident in samples)


@contextlib.contextmanager
def executor_named(name, threads=2):
    """One of Prefect's executors, by the name that it has in the table."""
    # Workers in threads of this process start at once, and share the counter of frames.
    here = {"processes": False, "dashboard_address": None, "memory_limit": 0}
    if name == "LocalExecutor":
        yield LocalExecutor()
    elif name in ("LocalDaskExecutor", "process pool"):
        scheduler = "threads" if name == "LocalDaskExecutor" else "processes"
        yield LocalDaskExecutor(scheduler=scheduler, num_workers=threads)
    elif name == "adaptive":
        yield DaskExecutor(
            cluster_class="distributed.LocalCluster",
            cluster_kwargs=dict(here, n_workers=1, threads_per_worker=threads),
            # Dask takes a task that it does not know for one of half a second.
            adapt_kwargs={"minimum": 1, "maximum": 8, "target_duration": "500ms"},
        )
    else:
        count = 2 if name == PROCESSES else 1
        here.update(n_workers=count, threads_per_worker=threads // count)
        here.update(processes=count == 2, resources={"GPU": 1} if name == "one GPU" else None)
        with distributed.LocalCluster(**here) as cluster:
            with distributed.Client(cluster, set_as_default=False) as client:
                client.run(exec, f"import {__name__}")  # which takes long, and is not measured
            yield DaskExecutor(address=cluster.scheduler_address)


def run(flow, way, executor=None, **kwargs):
    """Run the flow, by `DSFlowRunner` or by Prefect's own."""
    state = flow.run(runner_cls=RUNNERS[way], executor=executor or LocalExecutor(), **kwargs)
    assert state.is_successful(), state.message


def run_stored(flow, way):
    """Run a flow whose frames are stored: by us, or by Prefect's own checkpointing."""
    ours = {"task_runner_state_handlers": [prefect_ds.checkpoint_handler]}
    run(flow, way, **(ours if way == "prefect_ds" else {"context": {"checkpointing": True}}))


# The flows ------------------------------------------------------------------------------------

ALIVE, COUNTS = [], []


def counted(frame):
    """Count the frames that are alive, by weak references."""
    ALIVE.append(None)
    COUNTS.append(len(ALIVE))
    weakref.finalize(frame, ALIVE.pop)
    return frame


@task
def source(megabytes):
    values = numpy.ones((int(megabytes * 1e6 / 80), 10))
    return counted(pandas.DataFrame(values, columns=list("abcdefghij")))


@task
def step(frame):
    return counted(frame + 1)


size = task(lambda frame: len(frame), name="size")
total = task(lambda sizes: sum(sizes), name="total")
same = task(lambda value: value, name="same")


@task
def nap(seconds):
    time.sleep(seconds)
    return [1, 2, 3]


def chain(count, megabytes=0.001):
    with Flow("chain of frames") as flow:
        frame = source(megabytes)
        for _ in range(count - 1):
            frame = step(frame)
    return flow


def frames(count, megabytes=0.001):
    with Flow("map of frames through four stages, and on to a reduce") as flow:
        made = source.map([megabytes] * count)
        total(size.map(step.map(step.map(step.map(made)))))
    return flow


def through_all_stages(megabytes):
    return size.run(step.run(step.run(step.run(source.run(megabytes)))))


def frames_loop(count, megabytes=0.001, calculate=map):
    """What `frames` computes, as a plain loop, or by what else applies a function."""
    return sum(calculate(through_all_stages, [megabytes] * count))


def load(megabytes):
    """A frame as people store them: of numbers, times, and texts, some of which come often."""
    numbers = numpy.random.default_rng(1).integers(1, 10**6, int(megabytes * 1e6 / 104))
    frame = pandas.DataFrame({"order": numpy.arange(len(numbers)), "amount": numbers / 100})
    frame["time"] = pandas.Timestamp("2020-02-03") + pandas.to_timedelta(numbers, "s")
    frame["customer"] = ["customer " + str(number) for number in numbers]
    frame["region"] = numpy.array(["north", "south", "west"], object)[numbers % 3]
    return frame


def change(frame):
    return frame.assign(amount=frame["amount"] + 1)


def stored(way, name):
    """The keyword arguments of a task whose frames go into files."""
    path = os.path.abspath(name + ".parquet")
    if way == "Prefect":
        from prefect.engine.results import LocalResult
        from prefect.engine.serializers import PandasSerializer

        result = LocalResult(dir=os.getcwd(), serializer=PandasSerializer("parquet"))
        return {"name": name, "result": result, "target": path}
    result = "result" if RELEASE >= (0, 11) else "result_handler"
    return {"name": name, result: prefect_ds.PandasResultHandler(path)}


def stored_frames(way, count, megabytes, stages=("load", "clean", "fit", "save")):
    """A map of frames through these stages; one that is None is not stored."""
    with Flow("stored frames") as flow:
        made = [megabytes] * count
        for number, stage in enumerate(stages):
            kwargs = stored(way, stage + "/{map_index}") if stage else {}
            made = task(change if number else load, **kwargs).map(made)
    return flow


def nothing(count, stages=1):
    with Flow("map of nothing") as flow:
        values = list(range(count))
        for _ in range(stages):
            values = same.map(values)
    return flow


def submitted(executor, function, values, stages=1):
    """Such a map without Prefect, by Dask alone."""
    with distributed.Client(executor.address, set_as_default=False) as client:
        for _ in range(stages):
            values = [client.submit(function, value, pure=False) for value in values]
        client.gather(values)


def naps(kind, unit, count=16):
    """A flow of tasks that sleep, or do nothing; `unit` is how long a second is, in seconds."""
    flows = []  # kept, as Prefect's order of what depends on nothing follows from addresses
    while True:
        with Flow(kind) as flow:
            if kind == "map":
                nap.map([unit] * count)
            elif kind == "resources":
                nap.map([2 * unit] * 6, task_args={"tags": ["dask-resource:GPU=1"]})
                nap.map([unit] * 30)
            elif kind == "lists":
                for _ in range(12):
                    same.map(nap(unit))
            elif kind == "layers":  # each waits for the whole one before
                layer = []
                for _ in range(count):
                    layer = [same(number, upstream_tasks=layer) for number in range(6)]
            elif kind == "slow root":
                root = nap(6 * unit)
                for _ in range(100):
                    same(root)
                others = [nap(3 * unit) for _ in range(6)]
        flows.append(flow)
        if kind != "slow root":
            return flow
        roots = [each for each in flow.sorted_tasks() if each in {root, *others}]
        if root in roots[:4]:
            return flow


# What is measured, each in a new process ------------------------------------------------------
# One way at a time, which is the last argument; what takes all of them returns a list for each.


def frames_alive(executor, flows, way):
    """The largest number of frames that are alive at a time, for each of the flows."""
    gc.disable()  # what waits for the collector counts as alive
    largest = []
    for make_flow, count in flows:
        with executor_named(executor) as the_executor:
            run(make_flow(count), way, the_executor)
        largest.append(max(COUNTS))
        gc.collect()
        COUNTS.clear()
    return tuple(largest)


def memory(executor, count, megabytes, way):
    """Resident memory over time of a map of frames: of this process, or of the two workers."""
    if way == "limit" and executor == "LocalExecutor":
        return memory_during(partial(frames_loop, count, megabytes))
    if way == "limit":
        with ProcessPoolExecutor(2) as pool:
            frames_loop(2, calculate=pool.map)
            work = partial(frames_loop, count, megabytes, pool.map)
            return memory_during(work, children())
    with executor_named(executor) as the_executor:
        run(frames(2), way, the_executor)  # modules that are loaded late belong to the start
        return memory_during(partial(run, frames(count, megabytes), way, the_executor), children())


def per_task_run(executor, count, stages, turns):
    """Milliseconds per empty task run; the limit on a cluster is bare Dask."""

    def works(count):
        flow = nothing(count, stages)
        works = {way: partial(run, flow, way, the_executor) for way in RUNNERS}
        if executor == PROCESSES:
            works["limit"] = partial(submitted, the_executor, same.run, range(count), stages)
        return works

    clock = time.process_time if executor == "LocalExecutor" else time.perf_counter
    with executor_named(executor) as the_executor:
        in_turns(works(10), 1)
        return in_turns(works(count), turns, count * stages / 1000, clock)


def process_pool(count, megabytes, turns):
    """Seconds of a map of frames in two processes; the limit is a loop in such a pool."""

    def loop():
        with ProcessPoolExecutor(2) as pool:
            frames_loop(count, megabytes, pool.map)

    with executor_named("process pool") as executor:
        ours, own = (partial(run, frames(count, megabytes), way, executor) for way in RUNNERS)
        taken = in_turns({"prefect_ds": ours, "limit": loop}, turns)
        return {**taken, **in_turns({"Prefect": own}, 1)}


def sleeping(kind, unit, executor, threads, limit, *args):
    """Seconds of a flow of tasks that sleep, or do nothing."""
    flow = naps(kind, unit, *args)  # one for both, as Prefect orders its tasks by chance
    taken = {"limit": [limit * unit]} if limit else {}
    for way in RUNNERS:
        with executor_named(executor, threads) as the_executor:
            taken.update(in_turns({way: partial(run, flow, way, the_executor)}, 1))
    return taken


def cluster_memory(few, many, way):
    """kB per child of a map of naps, at the peak: scheduler and client are in this process."""
    few, many = (few // 4, many // 4) if way == "Prefect" else (few, many)  # which is slow
    peaks = {}
    with executor_named(PROCESSES, 4) as executor:
        for count in (few, few, many):  # modules that are loaded late come with the first one
            work = partial(run, naps("map", 0.005, count), way, executor)
            if way == "limit":
                work = partial(submitted, executor, nap.run, [0.005] * count)
            start = psutil.Process().memory_info().rss / 1e6
            peaks[count] = start + peak(memory_during(work))
    return (peaks[many] - peaks[few]) * 1e3 / (many - few)


def waiting_memory(count, way):
    """kB per task run of a map through 4 stages, at the peak, above that of a map of 10."""
    count = count // 8 if way == "Prefect" else count  # which is slow, above all when traced
    peaks = {}
    for width in (10, 10, count):  # modules that are loaded late come with the first one
        flow = nothing(width, 4)
        tracemalloc.start()
        run(flow, way)
        peaks[width] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return (peaks[count] - peaks[10]) / 1e3 / (4 * (count - 10))


def files_opened(way):
    """How many of the 49 files that it has stored a flow opens in its second run."""

    def note(path):
        if str(path).endswith(".parquet"):
            opened.add(os.path.abspath(path))

    def read(path, *args, **kwargs):
        note(path)  # pandas below 1.2 lets pyarrow open it, of which Python knows nothing
        return read_table(path, *args, **kwargs)

    from pyarrow import parquet

    read_table, parquet.read_table = parquet.read_table, read
    sys.addaudithook(lambda event, args: note(args[0]) if event == "open" else None)
    opened = set()
    with stored_frames(way, 12, 0.001) as flow:
        (written,) = flow.get_tasks("save/{map_index}")
        task(pandas.concat, **stored(way, "summary"))(written)
    run_stored(flow, way)
    assert len(glob.glob("**/*.parquet", recursive=True)) == 49
    opened.clear()
    run_stored(flow, way)
    return len(opened)


def first_run(way, count=40, megabytes=20):
    """Peak memory of a first run whose last map is stored; the limit is a loop over pandas."""

    def loop(count, megabytes):
        for _ in range(count):
            change(change(load(megabytes))).to_parquet("frame.parquet")

    def work(*sizes):
        if way == "limit":
            return partial(loop, *sizes)
        return partial(run_stored, stored_frames(way, *sizes, [None, None, "save"]), way)

    work(1, 0.001)()  # for what is imported late
    return peak(memory_during(work(count, megabytes)))


def second_run(way, count=40, megabytes=20):
    """Peak memory of a run that finds all files, of four stages."""
    flow = stored_frames(way, count // 4, megabytes)
    fresh(run_stored, flow, way)  # elsewhere: here it would leave something in memory
    assert len(glob.glob("*/*.parquet")) == count
    for _ in range(2):
        run_stored(stored_frames(way, 1, 0.001, ["warm"]), way)
    return peak(memory_during(partial(run_stored, flow, way)))


# The table ------------------------------------------------------------------------------------

#: A bound is a number, or so many times what the way `over` takes. `ways` are measured one by one.
#: Instead of a function that measures it, a row may have a text that says why there is none.
Row = namedtuple("Row", "name unit measure bound ways over", defaults=(None, None))


def table(n):
    """All rows; `n` holds the sizes. Maps of frames go through 4 stages, and on to a reduce."""
    own, local, flows = [*RUNNERS], "LocalExecutor", [(chain, 9), (frames, 20), (frames, n.wide)]
    storing = own if RELEASE >= (0, 13) else own[:1]  # Prefect alone stores no frames

    def on_dask(measure, *args):
        return partial(measure, *args) if RELEASE >= (0, 12) else "not below Prefect 0.12"

    name = f"frames alive, chain of 9; map of 20; of {n.wide:,}"
    yield Row(name, "", partial(frames_alive, local, flows), 2, own)
    for executor in ("LocalDaskExecutor", "DaskExecutor"):
        measure = on_dask(frames_alive, executor, flows)
        yield Row(f"the same, 2 threads of `{executor}`", "", measure, 6, own)
    name = f"map of 40 frames of {n.large} MB, peak memory"
    yield Row(name, "MB", lambda way: peak(memory(local, 40, n.large, way)), 1.25, WAYS, "limit")
    name = f"memory per waiting call, map of {n.waiting:,} x 4"
    yield Row(name, "kB", partial(waiting_memory, n.waiting), 2, own)

    name = f"time per empty task run, map of {n.wide:,}"
    bound = 0.05 if RELEASE >= (0, 14) else 0.6 if RELEASE >= (0, 12) else 1
    measure = partial(per_task_run, local, n.wide, 1, n.turns)
    yield Row(name, "ms", measure, bound, over="Prefect")
    name = f"the same, map of {n.cluster} x 4, 2 processes (limit: `client.submit`)"
    bound = 1.5 if RELEASE >= (0, 14) else numpy.inf
    measure = on_dask(per_task_run, PROCESSES, n.cluster, 4, n.turns)
    yield Row(name, "ms", measure, bound, over="limit")
    measure = on_dask(process_pool, 24, 20, 4 * n.turns)
    yield Row("map of 24 frames of 20 MB, pool of 2", "s", measure, bound, over="limit")
    name = f"scheduler and client memory per child, maps of {n.few:,} and {n.many:,}"
    measure = "not by `--quick`" if n.is_quick else on_dask(cluster_memory, n.few, n.many)
    yield Row(name, "kB", measure, 5, WAYS)
    one, two, three, six = (f"{number * n.unit:g} s" for number in (1, 2, 3, 6))
    for name, *args in (
        ("16 naps of 1 s, adaptive cluster of 1 to 8", "map", 1, "adaptive", 1, 2),
        (f"6 naps of {two} for one GPU, 30 of {one}", "resources", n.unit, "one GPU", 4, 12),
        (f"12 naps of {one}, each mapped over", "lists", n.unit, PROCESSES, 4, 3),
        (f"6 naps of {three}, 100 tasks after one of {six}", "slow root", n.unit, PROCESSES, 4, 6),
        ("10 layers of 6 tasks, 12 threads", "layers", 1, "LocalDaskExecutor", 12, None, 10),
    ):
        yield Row(name, "s", on_dask(sleeping, *args), 1.1, over="Prefect")
    yield Row("files opened by a second run, 49 stored", "", on_dask(files_opened), 0, storing)
    yield Row("its peak memory, 40 frames of 20 MB", "MB", on_dask(second_run), 25, storing)
    name = "the same, first run, last map stored"
    yield Row(name, "MB", on_dask(first_run), 100, [*storing, "limit"])


def is_kept(row):
    """Measure a row, and print it; return whether its bound is kept."""
    if isinstance(row.measure, str):
        print_row(row.name, "", "", "", row.measure)
        return True
    if row.ways:
        each = {way: fresh(row.measure, way) for way in row.ways}
        taken = {way: [value] for way, value in each.items() if value is not None}
    else:
        taken = fresh(row.measure) or {}
    values = taken.get("prefect_ds", [])
    if row.over:
        others = cycle(taken.get(row.over, []))  # measured as often, or once
        values = [ours / other for ours, other in zip(values, others)]
    reached = numpy.max(numpy.median(values, axis=0)) if values else numpy.nan
    bound = f"{row.bound} {'x ' + row.over if row.over else row.unit}".strip()
    bound = "none here" if row.bound == numpy.inf else bound
    if not reached <= row.bound:
        bound = f"{reached:.3g} misses {bound}"
    print_row(row.name, *(shown(taken.get(way), row.unit) for way in WAYS), bound)
    return reached <= row.bound


def shown(values, unit):
    """The median of the values, or of what the tuples among them have in each place."""
    medians = numpy.atleast_1d(numpy.median(values, axis=0)) if values else []
    numbers = "; ".join(f"{float(f'{median:.3g}'):,g}" for median in medians)
    return numbers and f"{numbers} {unit}".strip()


def print_row(*cells):
    print(*(f"| {cell}" if cell else "|" for cell in cells), "|", flush=True)


def draw(path, count, megabytes):
    """Draw memory over time of one flow, three ways, in one process and on a cluster."""
    from matplotlib import pyplot

    # These can be read on white and on black.
    colors = {"Prefect": "#d9822b", "limit": "#8a8a8a", "prefect_ds": "#3b8eea"}
    greys = ["text.color", "xtick.color", "ytick.color", "axes.edgecolor", "axes.labelcolor"]
    pyplot.rcParams.update({**dict.fromkeys(greys, "#808080"), "svg.fonttype": "none"})
    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, both = pyplot.subplots(1, 2, figsize=(10, 5), sharey=True)
    titles = {"LocalExecutor": "LocalExecutor", PROCESSES: "DaskExecutor, 2 processes"}
    for axes, (executor, title) in zip(both, titles.items()):
        for way, color in colors.items():
            seconds, resident = zip(*fresh(memory, executor, count, megabytes, way))
            label = {"Prefect": "Prefect's FlowRunner", "limit": "plain loop"}.get(way, way)
            label += f": {max(resident) / 1000:.2f} GB in {seconds[-1]:.1f} s"
            gigabytes, width = [each / 1000 for each in resident], 3 if way == "limit" else 1.5
            axes.plot(seconds, gigabytes, color=color, label=label, linewidth=width)
        axes.set(title=title, xlabel="seconds", xlim=(0, None))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    both[0].set(ylabel="resident memory above start, GB", ylim=(0, None))
    figure.suptitle(f"A map of {count} DataFrames of {megabytes} MB through four stages")
    figure.tight_layout()
    figure.savefig(path, transparent=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", metavar="REGEX", help="only those that match")
    parser.add_argument("--quick", action="store_true", help="smaller, in some minutes")
    parser.add_argument("--figure", metavar="FILE.svg", help="draw memory over time, no table")
    options = parser.parse_args()
    n = argparse.Namespace(wide=1000, waiting=3000, large=50, cluster=150, few=2000, many=20000)
    vars(n).update(unit=1, turns=4, is_quick=options.quick)
    if n.is_quick:
        vars(n).update(wide=200, waiting=1000, large=20, cluster=50, unit=0.25, turns=3)
        if RELEASE < (0, 14):  # where a task run takes tens of milliseconds
            vars(n).update(wide=50, waiting=200, turns=2)
    if options.figure:
        return draw(options.figure, 40, n.large)
    modules = [prefect_ds, prefect, pandas, distributed]
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{versions}\n")
    print_row("", *WAYS, "bound")
    print("|---" * 5 + "|")
    kept = [is_kept(row) for row in table(n) if re.search(options.rows, row.name)]
    print("\nNo bound is missed." if all(kept) else f"\n{kept.count(False)} missed")
    return int(not all(kept))


if __name__ == "__main__":
    import bench_prefect_ds  # under its name, by which workers find its tasks

    sys.exit(bench_prefect_ds.main())
