"""`regtool cohort`: every pair of a list, each in a process of its own, into one folder; resumed, divided, gathered."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from regtool.cohorts import bids
from regtool.cohorts.cluster import ClusterPool
from regtool.cohorts.folder import LOGS, PAGE, RESULTS, PairFolder, read_identity, write_identity
from regtool.cohorts.pools import LocalPool, Pool, shares
from regtool.cohorts.table import row_of, write_results
from regtool.cohorts.tasks import Answer, Task
from regtool.config.schema import Parameters, Run
from regtool.config.toml import merged
from regtool.errors import OutputError, ParameterError, UsageError
from regtool.io.files import check_folder, sha256, write_text
from regtool.io.pairs import Pair, Pairs, read_list
from regtool.methods.resolve import resolve
from regtool.report.cohort import cohort_html
from regtool.report.schema import IDENTITY, CohortIdentity, CohortOutputs, CohortReport, FailedCase
from regtool.runtime import Graceful, pick_device, uninterrupted

WORST = (0, 4, 3, 2, 5, 1)  # exit codes of pairs, the worst last
TICK = 0.25  # seconds between looks at what is running
ELSEWHERE = ("train", "augment", "synthesis", "supervision")  # sections that do not decide a registration
FREE = ("run.threads", "run.max_memory_gb", "run.device")  # where and how fast, not what
RESERVED = (IDENTITY, RESULTS, PAGE)
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line says. source: a list of pairs or images, or a folder; template: the fixed image of every pair of such a list of images.

    bids_dir, ending: instead of `source`, the images of a BIDS dataset whose name ends so; bids: name outputs as derivatives. jobs: pairs at a time;
    shard: (i, n), the i-th of n parts, from 1; retry: times that a failed pair is tried again; timeout: seconds a pair; scheduler: of a Dask cluster.
    """

    source: Path | None
    output: Path
    parameter_file: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    template: Path | None = None
    bids_dir: Path | None = None
    ending: str = "T1w"
    bids: bool = False
    jobs: int = 1
    resume: bool = False
    overwrite: bool = False
    shard: tuple[int, int] = (1, 1)
    retry: int = 0
    timeout: float | None = None
    fail_fast: bool = False
    scheduler: str | None = None
    fix_header: bool = False
    command: str = ""


@dataclass(frozen=True, kw_only=True)
class CohortEvent:
    """Where a cohort stands. finished: the row of a pair that has just ended; skipped: finished before; running: seconds by id."""

    total: int
    done: int
    failed: int
    skipped: int
    running: Mapping[str, float]
    pairs_per_minute: float
    seconds_left: float | None
    finished: Row | None = None


def cohort(request: Request, watch: Callable[[CohortEvent], None] | None = None, graceful: Graceful = uninterrupted) -> CohortReport:
    """Registers every pair that is not finished, writes results.csv and cohort.html, and returns the summary; `exit_code` is that of the worst pair.

    Pairs fail alone. Raises, before the first pair, InputError for a wrong list (missing files all at once), UsageError for the folder of another
    cohort, ParameterError; later OutputError where the disk is full, RegtoolError where the scheduler is lost. What is finished stays in any case.
    """
    pairs = _pairs(request)
    resolved = resolve(request.parameter_file, request.overrides, None)
    run = resolved.parameters.run
    pick_device(run.device)
    folders = [_folder(request, pair) for pair in pairs]
    identity = _identity(request, folders, resolved.parameters, resolved.model)
    mine = range(request.shard[0] - 1, len(pairs), request.shard[1])
    _open(request, identity, [folders[k] for k in mine])
    if request.bids:
        bids.describe(request.output, request.bids_dir)
    finished = {k for k in mine if request.resume and folders[k].finished() is not None}
    overrides = merged(request.overrides, _absolute(run))
    file = None if request.parameter_file is None else str(request.parameter_file.absolute())
    tasks = []
    for k in mine:
        if k not in finished:
            inputs = {role: str(path) for role, path in folders[k].inputs.items()}
            names = bids.target_names(pairs[k]) if request.bids else {}
            task = Task(
                id=pairs[k].id,
                folder=str(folders[k].folder),
                cohort=str(request.output.absolute()),
                inputs=inputs,
                parameter_file=file,
                overrides=overrides,
                fix_header=request.fix_header,
                command=request.command,
                names=names,
            )
            tasks.append(task)
    with graceful() as asked:
        started = time.monotonic()
        full: Answer | None = None
        try:
            if tasks:
                full = _work(request, tasks, run, len(finished), lambda: asked.stop is not None, watch)
        finally:
            with contextlib.suppress(OutputError) if full is not None else contextlib.nullcontext():
                rows = _gather(request, folders)
    if full is not None:
        raise OutputError(f"{full.error}; stopped after the pair {full.id}", tip=f"{full.tip or 'free some space'}, then go on with --resume")
    return _summary(request, rows, mine, len(finished), time.monotonic() - started)


def _absolute(run: Run) -> dict[str, Any]:
    """Paths among the parameters, for whoever works in another folder."""
    initial = None if run.initial_transform is None else str(Path(run.initial_transform).absolute())
    return {"run": {key: path for key, path in (("model", run.model), ("initial_transform", initial)) if path}}


def _work(
    request: Request, tasks: Sequence[Task], run: Run, skipped: int, stopped: Callable[[], bool], watch: Callable[[CohortEvent], None] | None
) -> Answer | None:
    """Until all tasks are done, `stopped`, the first failure with fail_fast, or a full disk, whose answer is returned."""
    pool: Pool
    if request.scheduler is not None:
        threads = run.threads or 1
        own = [replace(task, overrides=merged(task.overrides, {"run": {"threads": threads}})) for task in tasks]
        pool = ClusterPool(request.scheduler, own, request.retry, request.timeout, threads)
    else:
        pool = LocalPool(tasks, shares(min(request.jobs, len(tasks)), run), request.retry, request.timeout)
    started = time.monotonic()
    by_id = {task.id: task for task in tasks}
    done = failed = 0
    try:
        while done < len(tasks) and not stopped():
            answer = pool.next(TICK)
            if answer is not None:
                done += 1
                failed += answer.status == "failed"
            if watch is not None:
                speed = done / (time.monotonic() - started) * 60
                left = (len(tasks) - done) / speed * 60 if done else None
                finished = None if answer is None else _finished_row(by_id[answer.id], answer)
                watch(
                    CohortEvent(
                        total=len(tasks) + skipped,
                        done=done,
                        failed=failed,
                        skipped=skipped,
                        running=pool.running(),
                        pairs_per_minute=speed,
                        seconds_left=left,
                        finished=finished,
                    )
                )
            if answer is not None and answer.stop:
                return answer
            if answer is not None and answer.status == "failed" and request.fail_fast:
                break
    finally:
        pool.close()
    return None


def _finished_row(task: Task, answer: Answer) -> Row:
    return {**row_of(task.pair), "status": answer.status, "seconds": answer.seconds, **({"error": answer.error} if answer.error else {})}


def _pairs(request: Request) -> Pairs:
    """UsageError for ids that results of the cohort itself are called, and for derivatives that would overwrite each other."""
    if request.bids_dir is not None:
        if request.template is None or request.source is not None:
            raise UsageError("--bids-dir goes with --template, and without a list", tip="regtool cohort --bids-dir DIR --template FILE -o OUT")
        if request.output.absolute() == request.bids_dir.absolute():
            raise UsageError("the derivatives would be written among the raw data", tip=f"-o {request.bids_dir / 'derivatives' / 'regtool'}")
        pairs = bids.find_subjects(request.bids_dir, request.template, request.ending)
    elif request.source is None:
        raise UsageError("the list of pairs is missing", tip="regtool cohort PAIRS.csv -o DIR, or --bids-dir DIR --template FILE")
    else:
        pairs = read_list(request.source, request.template, isolated=True)
    if request.shard[1] > len(pairs):
        raise UsageError(f"--shard {request.shard[0]}/{request.shard[1]}: there are only {len(pairs)} pairs", tip="use fewer parts")
    taken: dict[str, str] = {}
    for pair in pairs:
        if pair.id in RESERVED:
            raise UsageError(f"a pair is called {pair.id!r}, as a file of the cohort is", tip="give it another id")
        if request.bids and taken.setdefault(name := bids.target_names(pair)["warped"], pair.id) != pair.id:
            raise UsageError(f"the pairs {taken[name]} and {pair.id} would both become {name}", tip="leave --bids out, or rename the images")
    return pairs


def _folder(request: Request, pair: Pair) -> PairFolder:
    """Of labels and landmarks those that both images have."""
    fixed, moving = pair.fixed.files, pair.moving.files
    inputs = {"fixed": pair.fixed.image, "moving": pair.moving.image}
    for name in ("labels", "landmarks"):
        if name in fixed and name in moving:
            inputs |= {f"fixed_{name}": fixed[name], f"moving_{name}": moving[name]}
    inputs |= {f"{side}_mask": files["mask"] for side, files in (("fixed", fixed), ("moving", moving)) if "mask" in files}
    parent = request.output / LOGS if request.bids else request.output
    return PairFolder(pair.id, (parent / pair.id).absolute(), {role: path.absolute() for role, path in inputs.items()})


def _identity(request: Request, folders: Sequence[PairFolder], parameters: Parameters, model: Path | None) -> CohortIdentity:
    """What makes a cohort that cohort: its pairs, and all that decides their results."""
    tables = parameters.model_dump(mode="json", exclude={*ELSEWHERE})
    method = tables.pop("method")
    tables.pop("format")
    flat = {f"{section}.{key}": value for section, table in tables.items() for key, value in table.items() if f"{section}.{key}" not in FREE}
    initial = parameters.run.initial_transform
    files = {"model": model, "initial transform": None if initial is None else Path(initial)}
    return CohortIdentity(
        pairs={pair.id: {role: str(path) for role, path in pair.inputs.items()} for pair in folders},
        parameters={"method": method, **flat, "fix_header": request.fix_header, "bids": request.bids},
        files={name: None if path is None or not path.exists() else sha256(path) for name, path in files.items()},
    )


def _open(request: Request, identity: CohortIdentity, mine: Sequence[PairFolder]) -> None:
    """Makes the folder this cohort's. UsageError for another cohort's, or for one that is there already without being asked to go on."""
    output = request.output
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file, -o needs a folder", tip="name another output with -o")
    check_folder(output)
    known = None if request.overwrite else read_identity(output)
    if known is not None:
        _same(output, known, identity)
    there = [pair for pair in mine if pair.folder.exists() and any(pair.folder.iterdir())]
    if there and known is None and not request.overwrite:
        raise UsageError(f"{there[0].folder} exists already, and not from this cohort", tip="--overwrite replaces it; -o names another place")
    if there and not request.resume and not request.overwrite:
        raise UsageError(f"{output} holds this cohort already, or a part of it", tip="--resume goes on, --overwrite starts anew")
    if request.overwrite:
        for pair in there:
            pair.clear()
    if known is None or known.pairs != identity.pairs:
        write_identity(output, identity)


def _same(output: Path, known: CohortIdentity, identity: CohortIdentity) -> None:
    """UsageError, or ParameterError, saying in what two cohorts differ. Pairs may have been added."""
    tip = "name another output with -o, or start anew with --overwrite"
    before, after = {**known.parameters, **known.files}, {**identity.parameters, **identity.files}
    changes = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    other = [f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in changes]
    if other:
        raise ParameterError(f"{output} is a cohort with other parameters: {'; '.join(other[:5])}{'; ...' if len(other) > 5 else ''}", tip=tip)
    then, now = known.pairs, identity.pairs
    changed = [name for name in then if name in now and now[name] != then[name]]
    if changed:
        role = next(r for r in sorted({*then[changed[0]], *now[changed[0]]}) if then[changed[0]].get(r) != now[changed[0]].get(r))
        was, is_ = then[changed[0]].get(role), now[changed[0]].get(role)
        raise UsageError(f"{output} is another cohort: {len(changed)} pairs have other files; {changed[0]}: {role} was {was}, is {is_}", tip=tip)
    gone = [name for name in then if name not in now]
    if gone:
        raise UsageError(f"{output} is another cohort: it has {len(gone)} pairs that the list lacks, such as {gone[0]!r}", tip=tip)


def _gather(request: Request, folders: Sequence[PairFolder]) -> list[Row]:
    """Writes the table and the page of the whole cohort, again where other shards have come further meanwhile: so the last writer knows all."""
    written: list[Row] | None = None
    while True:
        rows: list[Row] = [row_of(pair) for pair in folders]
        if rows == written:
            return rows
        write_results(request.output / RESULTS, rows)
        place = f"{LOGS}/" if request.bids else ""
        links = {pair.id: f"{place}{pair.id}/qc.html" for pair in folders if (pair.folder / "qc.html").exists()}
        title = request.output.resolve().name
        write_text(request.output / PAGE, cohort_html(title, rows, links, request.command))
        written = rows


def _summary(request: Request, rows: Sequence[Row], mine: range, skipped: int, seconds: float) -> CohortReport:
    own = [rows[k] for k in mine]
    counts = {status: sum(row["status"] == status for row in own) for status in ("ok", "qc_failed", "failed", "not_run")}
    done = len(own) - counts["not_run"] - skipped
    bad = [row for row in own if row["status"] in ("failed", "qc_failed")]
    return CohortReport(
        status=next((status for status in ("not_run", "failed", "qc_failed") if counts[status]), "ok"),
        folder=str(request.output.resolve()),
        pairs=len(own),
        **counts,
        skipped=skipped,
        seconds=round(seconds, 3),
        pairs_per_minute=round(done / seconds * 60, 2) if done else None,
        exit_code=max((int(row.get("exit_code", 0)) for row in own), key=WORST.index, default=0),
        not_good=tuple(FailedCase(**{key: row[key] for key in ("id", "error", "exit_code") if key in row}) for row in bad),
        outputs=CohortOutputs(results=RESULTS, page=PAGE),
    )
