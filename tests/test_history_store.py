"""The history's files: whole, never changed, written by many; what is damaged or foreign is named."""

import copy
import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from history_runs import H200, benchmark_json, commit_id, moment, record, stored
from needed import need
from typer.testing import CliRunner

from moegate import exit_codes
from moegate.bench import record as current
from moegate.bench.history import run as stored_run
from moegate.bench.history.document import document
from moegate.bench.history.index import default_path
from moegate.bench.history.promotion import PromotionRefusedError, judge
from moegate.bench.history.queries import Filter, History
from moegate.bench.history.run import KEY, ForeignFileError
from moegate.bench.history.store import Store
from moegate.main import app


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "history")


def history_of(store):
    return History(store.folder)


def cli(*arguments):
    done = CliRunner().invoke(app, ["history", *(str(argument) for argument in arguments)])
    unforeseen = done.exception is not None and not isinstance(done.exception, SystemExit)
    assert not unforeseen, done.exception
    return done.exit_code, " ".join(done.output.split()), done.stdout


def test_the_current_schema_of_records_is_understood():
    assert current.SCHEMA in stored_run.RECORD_SCHEMAS


def test_a_stored_run_is_still_pytest_benchmarks_json(store, tmp_path):
    stored(store, record(40e-6), commit=1, time=1)
    stored(store, record(42e-6), commit=2, time=2)
    files = [str(path) for path in sorted(store.folder.rglob("runs/**/*.json"))]
    command = [sys.executable, "-m", "pytest_benchmark", "compare", "--columns=median", *files]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "40.0000" in done.stdout
    assert "42.0000" in done.stdout


def test_storing_a_run_again_changes_nothing(store):
    data = document(benchmark_json(record(40e-6)), exit_code=0, origin="test")
    first, second = store.add(data), store.add(copy.deepcopy(data))
    assert (first[2], second[2]) == (True, False)
    assert first[:2] == second[:2]
    with history_of(store) as history:
        assert [run.id for run in history.runs()] == [first[0]]


def _write_runs(folder, writer):
    for number in range(20):
        stored(Store(folder), record(40e-6 + number * 1e-7), commit=writer * 100 + number, time=number)
        stored(Store(folder), record(50e-6), commit=7, time=7)  # the same run from every writer


def test_several_writers_lose_nothing_and_leave_nothing_half_written(store):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_runs, args=(store.folder, writer)) for writer in (1, 2, 3)]
    for process in writers:
        process.start()
    while any(process.is_alive() for process in writers):
        if store.folder.is_dir():
            with history_of(store) as history:  # a reader meanwhile
                assert history.aside() == []
    for process in writers:
        process.join()
    with history_of(store) as history:
        assert len(history.runs()) == 61
        assert history.aside() == []
    assert not list(store.folder.rglob("*.part"))


def test_a_writer_that_is_killed_leaves_no_run(store, monkeypatch):
    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        stored(store, record(40e-6), promoted=False)
    assert [path for path in store.folder.rglob("*") if path.is_file()] == []


def test_damaged_and_foreign_files_are_named_and_the_rest_is_read(store):
    good = stored(store, record(40e-6), commit=1)
    cut = stored(store, record(41e-6), commit=2, promoted=False)
    edited = stored(store, record(42e-6), commit=3)
    files = {path.stem.rsplit("-", 1)[1]: path for path in store.folder.rglob("runs/**/*.json")}
    files[cut].write_bytes(files[cut].read_bytes()[:300])
    files[edited].write_text(files[edited].read_text().replace("4.2", "3.2"))
    (store.folder / "runs" / "notes.txt").write_text("remember")
    (store.folder / "promotions" / "0123456789ab.json").write_text("{}")
    code, said, _ = cli("list", "--store", store.folder)
    assert code == exit_codes.HOLDS
    assert good in said
    assert f"{files[cut].name}: its content is not what was stored" in said
    assert f"{files[edited].name}: its content is not what was stored" in said
    assert "runs/notes.txt: not a name that `moegate history` gives" in said
    assert "promotions/0123456789ab.json: expected moegate-promotion/1" in said
    assert f"it promotes run {edited}, which is not here" in said
    assert f"set aside: runs/2026-01/{files[cut].name}" in cli("list", "--store", store.folder)[1]  # and the next time

    code, said, _ = cli("rebuild", "--move-aside", "--store", store.folder)
    assert code == exit_codes.FINDING
    assert (store.folder / "aside" / "runs" / "notes.txt").read_text() == "remember"
    code, said, _ = cli("rebuild", "--store", store.folder)
    assert (code, "set aside" in said) == (exit_codes.HOLDS, False)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda data: data.update(benchmarks=[]), "no benchmark with a moegate record"),
        (lambda data: data.pop("machine_info"), "expected pytest-benchmark's JSON"),
        (lambda data: data["benchmarks"][0]["extra_info"].update(schema="moegate-bench/0"), "moegate-bench/0"),
        (lambda data: data["benchmarks"][0]["extra_info"].pop("machine"), "KeyError: 'machine'"),
        (lambda data: data["benchmarks"][0]["extra_info"]["timing"].update(samples=[0.0]), "more than 0 s"),
        (lambda data: data["benchmarks"][0]["extra_info"]["verdict"].update(holds=False), "expected one that holds"),
        (lambda data: data["benchmarks"][0]["stats"].update(median=1.0), "its median is 1.0 in stats"),
        (lambda data: data.update({KEY: {}}), "it comes from a history already"),
        (lambda data: data["machine_info"].update(load=float("nan")), "not JSON: Out of range float values"),
    ],
)
def test_what_is_no_run_is_refused_by_name(damage, named, tmp_path):
    data = benchmark_json(record(40e-6))
    damage(data)
    with pytest.raises(ForeignFileError, match=named.replace("(", ".")):
        Store(tmp_path / "history").add(document(data, exit_code=0, origin="test"))
    (tmp_path / "run.json").write_text(json.dumps(data))
    code, said, _ = cli("add", tmp_path / "run.json", "--store", tmp_path / "history")
    assert code == exit_codes.BAD_ARGUMENTS
    assert named in said


def test_the_index_is_made_anew_where_it_is_lost_or_broken(store):
    ids = {stored(store, record(40e-6), commit=number, time=number) for number in range(3)}

    def blot(path):
        """The head stays, so that SQLite opens it."""
        content = path.read_bytes()
        path.write_bytes(content[:4096] + b"?" * (len(content) - 4096))

    for damage in (Path.unlink, blot, lambda path: path.write_bytes(b"no database" * 500)):
        with history_of(store) as history:
            assert {run.id for run in history.runs()} == ids
        damage(default_path(store))
    with history_of(store) as history:
        assert {run.id for run in history.runs()} == ids
        assert "damaged" in history.index.rebuilt


def test_a_file_that_cannot_be_read_now_is_named_and_tried_again(store, monkeypatch):
    id = stored(store, record(40e-6), promoted=False)
    read = Path.read_bytes

    def fails(path):
        if path.suffix == ".json":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fails)
    with history_of(store) as history:
        assert "Input/output error" in history.aside()[0].reason
    monkeypatch.setattr(Path, "read_bytes", read)
    with history_of(store) as history:
        assert ([run.id for run in history.runs()], history.aside()) == ([id], [])


def test_a_file_that_goes_is_forgotten_and_one_that_comes_is_read(store):
    first, second = (stored(store, record(40e-6), commit=number, time=number) for number in (1, 2))
    with history_of(store) as history:
        assert history.index.refreshed == 4  # two runs, two promotions
    next(store.folder.rglob(f"runs/**/*{first}.json")).unlink()
    third = stored(store, record(40e-6), commit=3, time=3, promoted=False)
    with history_of(store) as history:
        assert history.index.refreshed == 1
        assert [run.id for run in history.runs()] == [third, second]
        assert len(history.series()[0].points) == 1


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository: two commits on main, one beside it on a branch."""
    for name in ("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "test@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    folder = tmp_path / "repository"

    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    folder.mkdir()
    git("init", "-q", "-b", "main")
    commits = {}
    for name in ("first", "second", "beside"):
        if name == "beside":
            git("checkout", "-q", "-b", "feature", commits["first"])
        git("commit", "-q", "--allow-empty", "-m", name)
        commits[name] = git("rev-parse", "HEAD")
    return folder, commits


def test_only_clean_commits_of_main_whose_run_passed_are_promoted(store, repository):
    folder, commits = repository
    good = stored(store, record(40e-6), commit=commits["second"], promoted=False)
    refused = {
        stored(store, record(40e-6), commit=commits["beside"], promoted=False): "is not on refs/heads/main",
        stored(store, record(40e-6), commit=commits["first"], exit_code=1): "the run failed (exit code 1)",
        stored(store, record(40e-6), commit=commits["first"], exit_code=None, promoted=False): "nobody said how",
        stored(store, record(40e-6), commit=commits["first"], dirty=True): "files differed from commit",
        stored(store, record(40e-6), commit=9, promoted=False): "is not in this clone",
        stored(store, record(40e-6), commit="unversioned", promoted=False): "commit is not known",
    }
    options = ("--store", store.folder, "--repo", folder)
    for id, reason in refused.items():
        code, said, _ = cli("promote", id, *options)
        assert (code, reason in said) == (exit_codes.FINDING, True), said
    assert cli("promote", good, *options)[0] == exit_codes.HOLDS
    assert "was promoted before" in cli("promote", good, *options)[1]
    with history_of(store) as history:
        assert [run.id for run in history.runs(promoted=True)] == [good]
        assert history.find("baseline").id == good
        assert len(history.runs()) == 1 + len(refused)  # all are stored
    with pytest.raises(PromotionRefusedError, match="main: expected a branch"):
        judge(folder, "trunk", commit=commits["first"], dirty=False, exit_code=0)


def test_a_remotes_main_is_asked_before_the_local_one(repository, tmp_path):
    folder, commits = repository
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(folder), str(clone), "-b", "main"], check=True, capture_output=True)
    subprocess.run(["git", "merge", "-q", "--ff-only", commits["second"]], cwd=clone, check=True)
    commit = ["git", "commit", "-q", "--allow-empty", "-m", "unpushed"]
    subprocess.run(commit, cwd=clone, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True)
    with pytest.raises(PromotionRefusedError, match="is not on refs/remotes/origin/main"):
        judge(clone, "main", commit=head.stdout.strip(), dirty=False, exit_code=0)
    assert (
        judge(clone, "main", commit=commits["second"], dirty=False, exit_code=0)["main"] == "refs/remotes/origin/main"
    )


def test_what_moegate_bench_wrote_is_stored_with_its_failures_and_commit(store, repository, tmp_path):
    folder, commits = repository
    run = {
        "schema": "moegate-bench-run/1",
        "records": [record(40e-6), record(44e-6, subject="theirs")],
        "failures": [{"workload": "w", "subject": "theirs", "reason": "RuntimeError: no"}],
        "skipped": [],
    }
    files = {}
    for name, failing in (("peer", "theirs"), ("ours", "moegate")):
        run["failures"][0]["subject"] = failing
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(run))
    code, _, out = cli("add", *files.values(), "--store", store.folder, "--repo", folder, "--json", "-")
    assert code == exit_codes.HOLDS
    peer, ours = (each["id"] for each in json.loads(out)["stored"])
    with history_of(store) as history:
        runs = {each.id: each for each in history.runs()}
        assert runs[peer].outcome == "passed"  # a peer's failure is none of ours
        assert runs[ours].outcome == "failed"
        assert runs[peer].commit == commits["beside"]
        assert (runs[peer].points, runs[peer].failures) == (2, 1)
        assert {series.key.subject for series in history.series(promoted=False)} == {"moegate", "theirs"}


def store_many(store, count):
    """As many runs on two GPU models, one in fifty promoted, written by copying two: 20 times as fast as `add`."""
    files = []
    for device in (H200, "NVIDIA H100"):
        records = [record(40e-6, num_tokens=tokens, device=device) for tokens in (1, 64)]
        _, path, _ = store.add(document(benchmark_json(*records, commit=0, time=0), exit_code=0, origin="test"))
        files.append(path.read_text())
        path.unlink()
    for number in range(count):
        content = files[number % 2].replace(commit_id(0), commit_id(number)).replace(moment(0), moment(number)).encode()
        id = hashlib.sha256(content).hexdigest()[:12]
        (path.parent / f"20260101T000000Z-{commit_id(number)[:8]}-{id}.json").write_bytes(content)
        if number % 50 == 0:
            store.promote(id, {"main": "refs/heads/main", "promoted_at": moment(number)})


@pytest.mark.parametrize(
    ("said", "exit_code", "outcome"),
    [
        (None, None, "unknown"),
        (None, 0, "passed"),
        (None, 1, "failed"),
        ({"failed": False, "why": []}, None, "passed"),
        ({"failed": False, "why": []}, 3, "failed"),
        ({"failed": True, "why": ["test_x: slower"]}, None, "failed"),
        ({"failed": True, "why": ["test_x: slower"]}, 0, "failed"),  # a shell that lost the exit code
    ],
)
def test_how_a_run_ended_is_what_it_says_itself_or_what_is_handed_in(store, said, exit_code, outcome):
    data = benchmark_json(record(40e-6)) | ({} if said is None else {"moegate": said})
    id, _, _ = store.add(document(data, exit_code=exit_code, origin="test"))
    with history_of(store) as history:
        run = history.find(id)
        assert (run.outcome, run.failures) == (outcome, len((said or {"why": []})["why"]))


def test_ten_thousand_runs_are_queried_in_two_seconds(store, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # waits for the disk are not what is timed
    store_many(store, 10_000)
    started = time.perf_counter()
    told = []
    with History(store.folder, watch=lambda done, total: told.append((done, total))) as history:
        assert len(history.runs()) == 10_000
        assert history.aside() == []
    assert (told[0], told[-1]) == ((0, 10_200), (10_199, 10_200))  # with the promotions
    print(f"\nindex of 10,000 runs made in {time.perf_counter() - started:.1f} s")
    need("ruptures")
    libraries = "typer, rich.table"
    queries = (
        (("list",), libraries),
        (("compare", commit_id(9_998)[:8], commit_id(4_000)[:8]), libraries),
        (("changes", "--device", "H200"), f"{libraries}, ruptures, scipy.stats"),
    )
    for arguments, imported in queries:
        command = [sys.executable, "-m", "moegate", "history", *arguments, "--store", str(store.folder), "--json", "-"]
        seconds, start = work_of(command), work_of([sys.executable, "-c", f"import {imported}"])
        print(f"moegate history {arguments[0]}: {seconds:.2f} s of work, {start:.2f} s to start Python and libraries")
        # SciPy alone may take a slow machine two seconds: then what is ours is bounded, and else the whole.
        assert seconds < max(2, start + 1)


def work_of(command):
    """Seconds of CPU that a process took: other tests share the cores, so its time on the clock says little."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == exit_codes.HOLDS, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_filter_selects_by_each_part(store):
    stored(store, record(40e-6), record(41e-6, num_tokens=64, routing="zipf1.2"), record(42e-6, routing="zipf1.2-s3"))
    with history_of(store) as history:
        for which, count in (
            (Filter(num_tokens=64), 1),
            (Filter(routing="zipf1.2"), 2),
            (Filter(routing="zipf1.2-s3"), 1),
            (Filter(device="h200"), 3),
            (Filter(device="H100"), 0),
            (Filter(model="qwen3-30b-a3b", dtype="bf16", subject="moegate"), 3),
        ):
            assert len(history.series(which)) == count, which
