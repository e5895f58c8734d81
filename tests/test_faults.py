"""The catalogue of faults, and what plants them: edits that do not fit are errors, every end of a child is seen."""

import json
import os
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from moegate.conformance.catalogue import PROPERTIES
from moegate.conformance.faults import fault as fault_module
from moegate.conformance.faults import hunt as hunt_module
from moegate.conformance.faults.client import outcomes_of
from moegate.conformance.faults.document import as_markdown
from moegate.conformance.faults.fault import CatalogueError, Edit, Fault, load_catalogue
from moegate.conformance.faults.job import Job, Orders, Outcome
from moegate.conformance.faults.mutants import candidates, sample
from moegate.conformance.faults.record import Journal, read_matrix, read_witnesses, write_matrix
from moegate.conformance.faults.survivors import read_survivors, summary, without_equivalents
from moegate.conformance.properties.align import BEYOND
from moegate.conformance.spec import AlignSpec
from moegate.main import app

CATALOGUE = load_catalogue()
HEAD = 'area = "mine"\ntests = ["test_align.py"]\nexpect = ["ALIGN-06"]\n'
WITH_EXPERT_0 = "tl.full((BLOCK_BLOCKS,), 0, tl.int32), mask=unused)"
UNUSED = "tl.full((BLOCK_BLOCKS,), -1, tl.int32), mask=unused)"


def catalogue(folder, *faults, head=HEAD):
    """A file of these faults, each (id, file, old, new)."""
    rows = [
        "\n".join(["[[fault]]", *(f"{key} = {json.dumps(value)}" for key, value in fault.items())]) for fault in faults
    ]
    path = folder / "mine.toml"
    path.write_text("\n".join([head, *rows]))
    return path


def edit(id="mine", file="kernels/align.py", old=UNUSED, new=WITH_EXPERT_0, **more):
    return {"id": id, "file": file, "old": old, "new": new} | more


def moegate(*arguments):
    done = CliRunner().invoke(app, ["faults", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


# --- the catalogue that comes with the suite ----------------------------------------------------------------------


def test_every_edit_of_the_catalogue_fits_the_source():
    for fault in CATALOGUE:
        assert fault.sources()


def test_what_is_expected_to_kill_is_a_property_or_a_named_end():
    for fault in CATALOGUE:
        for expected in fault.expect:
            assert expected in PROPERTIES or expected.startswith(("error:", "signal:")) or expected == "hang", fault.id


def test_every_area_of_the_public_faults_has_faults_and_so_have_null_kernels():
    threads = tomllib.loads((Path(fault_module.__file__).parent / "public.toml").read_text())["thread"]
    areas = {fault.area for fault in CATALOGUE if not fault.equivalent}
    assert {thread["area"] for thread in threads} | {"null"} <= areas
    assert sum(not fault.equivalent for fault in CATALOGUE) >= 120


def test_every_public_thread_has_a_fault_that_is_hunted_or_a_reason():
    threads = tomllib.loads((Path(fault_module.__file__).parent / "public.toml").read_text())["thread"]
    assert len({thread["id"] for thread in threads}) == len(threads) == 144
    named = {thread for fault in CATALOGUE if not fault.equivalent for thread in fault.threads}
    for thread in threads:
        assert (thread["id"] in named) != bool(thread.get("reason")), thread["id"]
    assert {name for fault in CATALOGUE for name in fault.threads} <= {thread["id"] for thread in threads}


def test_every_fault_that_a_cpu_shows_has_a_witness_of_today():
    witnesses = read_witnesses()
    for fault in CATALOGUE:
        if not fault.equivalent and "cuda" not in fault.needs:
            assert fault.id in witnesses, f"{fault.id}: moegate faults -k {fault.id} --update-witnesses"
            assert witnesses[fault.id].digest == fault.digest(), fault.id
            assert set(witnesses[fault.id].by) & set(fault.expect), fault.id
    assert set(witnesses) <= {fault.id for fault in CATALOGUE}


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (edit(old="    for"), "mine: expected its `old` once in kernels/align.py, found it"),
        (edit(old="no such text"), "mine: expected its `old` once in kernels/align.py, found it 0 times: no such text"),
        (edit(new=UNUSED + "\n"), "expected a `new` of as many lines as its `old` (0), got 1"),
        (edit(new=UNUSED), "mine: its `new` is its `old`"),
        (edit(new="tl.full("), "kernels/align.py:"),
        (edit(file="kernels/nothing.py"), "mine: expected a file of moegate.impl, got 'kernels/nothing.py'"),
        (edit(package="no.such.package"), "package: expected a package that can be imported, got 'no.such.package'"),
    ],
)
def test_an_edit_that_does_not_fit_is_an_error_that_names_its_fault(tmp_path, bad, said):
    code, text = moegate("--catalogue", catalogue(tmp_path, bad))
    assert code == 4
    assert said in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("area = [", "expected TOML"),
        (HEAD, "expected at least one [[fault]]"),
        (HEAD + "colour = 1\n[[fault]]", "got ['colour']"),
        (HEAD + '[[fault]]\nfile = "x"', "expected an id for every fault, got None"),
        (HEAD + '[[fault]]\nid = "a"\nfile = "x"\nold = 1\nnew = "y"', "a: expected a string for old, got 1"),
        (HEAD + '[[fault]]\nid = "a"\nfile = "x"\nold = "x"\nnew = "y"\nneeds = ["tpu"]', "got ['tpu']"),
        ('area = "a"\n[[fault]]\nid = "a"\nfile = "x"\nold = "x"\nnew = "y"', "expected `tests` and `expect`"),
        (HEAD + 2 * '[[fault]]\nid = "a"\nfile = "x"\nold = "x"\nnew = "y"\n', "a: this id is taken"),
    ],
)
def test_a_file_that_is_no_catalogue_is_an_error_that_says_where(tmp_path, text, said):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(CatalogueError) as raised:
        load_catalogue([path])
    assert said in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--area", "weather"), "--area: expected some of"),
        (("--select", "no such fault"), "--select: expected part of a fault's id"),
        (("--device", "tpu"), "--device: expected cpu or cuda"),
        (("--scale", "0"), "--scale: expected a number above 0"),
        (("--matrix", "--witness"), "--matrix: expected no --witness"),
        (("--catalogue", "nowhere.toml"), "expected a file, got 'nowhere.toml'"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, said):
    code, text = moegate(*arguments)
    assert code == 4
    assert said in text


# --- the server ---------------------------------------------------------------------------------------------------

ENDS = {
    "killed": ("kernels/align.py", UNUSED, WITH_EXPERT_0, {"expect": ("ALIGN-06",)}),
    "killed by another": ("kernels/align.py", UNUSED, WITH_EXPERT_0, {"expect": ("ALIGN-01",)}),
    "survives": ("kernels/align.py", UNUSED, UNUSED + "  # no change", {"expect": ("ALIGN-06",)}),
    "raises": (
        "align.py",
        "    with current_device(topk_ids):\n        return align_kernels",
        "    with current_device(topk_ids[:0][0]):\n        return align_kernels",
        {"expect": ("error:IndexError",)},
    ),
    "dies": (
        "align.py",
        "    with current_device(topk_ids):\n        return align_kernels",
        "    with current_device(__import__('os').kill(__import__('os').getpid(), 11)):\n        return align_kernels",
        {"expect": ("signal:SIGSEGV",)},
    ),
    "hangs": (
        "align.py",
        "    with current_device(topk_ids):\n        return align_kernels",
        "    with current_device(__import__('time').sleep(600)):\n        return align_kernels",
        {"expect": ("hang",)},
    ),
    "is slow": ("kernels/align.py", UNUSED, UNUSED + "  # no change", {"expect": ("ALIGN-06",)}),
    "cannot be loaded": (
        "align.py",
        "from . import path\n",
        "from . import nothing_of_this_name\n",
        {"expect": ("*",)},
    ),
}


LIMITS = {"hangs": {"silence_s": 5.0}, "is slow": {"limit_s": 0.0}}


@pytest.fixture(scope="module")
def ends():
    """What came of one fault of each kind, by its kind."""
    jobs = [
        Job(Fault(id, "align", (Edit(file, old, new),), tests=("test_align.py",), variants=("triton",), **more),
            Orders(scale=0.05, **LIMITS.get(id, {})))
        for id, (file, old, new, more) in ENDS.items()
    ]  # fmt: skip
    return {outcome.id: outcome for outcome in outcomes_of(jobs, 2)}


def test_every_end_of_a_hunt_is_told_apart(ends):
    assert set(ends) == set(ENDS)
    told = {id: (e.killed, e.expected, bool(e.broken)) for id, e in ends.items()}
    assert told == {
        "killed": (True, True, False),
        "killed by another": (True, False, False),
        "survives": (False, False, False),
        "raises": (True, True, False),
        "dies": (True, True, False),
        "hangs": (True, True, False),
        "cannot be loaded": (False, False, True),
        "is slow": (False, False, False),
    }
    assert ends["hangs"].by == ["hang"]
    assert ends["is slow"].detail == "ended after 0 s, before all its cases had run"
    assert ends["raises"].by == ["error:IndexError"]
    assert ends["dies"].by == ["signal:SIGSEGV"]
    assert "nothing_of_this_name" in ends["cannot be loaded"].broken


def test_a_kill_has_the_case_that_shows_it_again(ends):
    first = ends["killed"]
    job = Job(
        Fault("killed", "align", (Edit(*ENDS["killed"][:3]),), ("ALIGN-06",), ("test_align.py",), ("triton",)),
        Orders(witness=first.witness, search=False),
    )
    (again,) = outcomes_of([job], 1)
    assert again.expected
    assert again.from_witness
    assert again.witness == first.witness
    assert ends["dies"].witness is not None  # known to the parent, though the child could not tell
    assert "AlignSpec(" in ends["dies"].witness.spec


UNHEARD, ZEROS = "replay-that-nobody-hears", "replay-takes-zeros-for-any-memory"


@pytest.fixture(scope="module")
def subjects():
    """What came of faults of several subjects, hunted by one server."""
    fault = Fault("mine", "align", (Edit(*ENDS["killed"][:3]),), ("ALIGN-06",), ("test_align.py",), ("triton",))
    named = {each.id: each for each in CATALOGUE}
    searched = (fault, replace(fault, id="nobody's", subject="no.such.module:Subject"), named[UNHEARD])
    jobs = [Job(each, Orders(scale=0.05)) for each in searched]
    jobs.append(Job(named[ZEROS], Orders(witness=read_witnesses()[ZEROS].witness, search=False)))
    return {each.id: each for each in outcomes_of(jobs, 2)}


def test_faults_of_several_subjects_are_hunted_together_and_one_that_does_not_load_fails_alone(subjects):
    assert subjects["mine"].by == ["ALIGN-06"]
    assert "no.such.module" in subjects["nobody's"].broken
    assert subjects[UNHEARD].expected


def test_memory_that_a_recorded_call_had_as_zeros_is_full_where_it_is_replayed(subjects):
    assert subjects[ZEROS].from_witness
    assert subjects[ZEROS].by == ["HYGIENE-04"]


def test_of_many_cases_that_kill_the_quickest_becomes_the_witness(monkeypatch):
    now = 0.0
    monkeypatch.setattr(hunt_module, "time", SimpleNamespace(monotonic=lambda: now))
    fault = Fault("slow", "align", (), ("ALIGN-06",), ("test_align.py",))
    hunter = hunt_module._Hunter(fault, Orders(quickest=3), lambda *case: None)
    # What a case takes, and whether it kills.
    cases = [(5.0, False), (3.0, True), (1.0, False), (2.0, True), (4.0, True)]
    specs = [AlignSpec(M=1, E=1, top_k=1, seed=seed) for seed in range(len(cases))]
    with hunter.exploring():
        for spec, (took, kills) in zip(specs, cases, strict=True):
            hunter.begins(spec)
            now += took
            hunter.judged([BEYOND.verdict(not kills)], spec)
    hunter.ends()
    assert hunter.outcome.expected
    assert hunter.outcome.cases == 2, "those behind the first kill were not needed to kill"
    assert hunter.outcome.witness is not None
    assert hunter.outcome.witness.spec == repr(specs[3])
    with pytest.raises(hunt_module._Killed):
        hunter.judged([BEYOND.verdict(True)], specs[0])


def test_features_that_a_fault_needs_narrow_its_search():
    fault = Fault("f", "a", (), ("X",), ("t",), needs=("cuda", "dtype=float16|float32", "scheme=none"))

    class Spec:
        dtype, scheme = "float16", "none"

    assert fault.may_show(Spec())
    Spec.dtype = "bfloat16"
    assert not fault.may_show(Spec())


# --- the command --------------------------------------------------------------------------------------------------

PACKAGE = {
    "mymoe/__init__.py": "",
    "mymoe/layer.py": "def scale(output):\n    return output * 1.0\n",
    "mymoe/subject.py": """
from moegate.conformance.subjects.eager import EagerSubject

from .layer import scale


class Mine(EagerSubject):
    name = "mine"

    def experts(self, case, variant):
        return scale(super().experts(case, variant))
""",
}


def test_a_catalogue_of_a_user_s_own_is_hunted_in_a_user_s_own_package(tmp_path, monkeypatch):
    for name, text in PACKAGE.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path))
    head = 'area = "scale"\ntests = ["test_experts.py"]\nexpect = ["NUM-01"]\npackage = "mymoe"\n'
    head += 'subject = "mymoe.subject:Mine"\n'
    path = catalogue(
        tmp_path,
        {"id": "six-times", "file": "layer.py", "old": "output * 1.0", "new": "output * 6.0"},
        {"id": "the-same", "file": "layer.py", "old": "output * 1.0", "new": "output / 1.0"},
        head=head,
    )
    journal, report = tmp_path / "journal", tmp_path / "report.json"
    arguments = ("--catalogue", path, "--scale", "0.02", "--resume", journal, "--json", report)
    code, text = moegate(*arguments, "--select", "six")
    assert code == 0, text
    assert "1 of 1 killed" in text
    # What stands in the journal is not hunted again, and a survivor is a finding.
    monkeypatch.setattr("moegate.faults.outcomes_of", lambda jobs, *rest, **more: _survive(jobs))
    code, text = moegate(*arguments)
    assert code == 1
    assert "the-same: SURVIVES" in text
    rows = json.loads(report.read_text())
    assert rows["schema"] == 1
    assert rows["score"] == 0.5
    first = {row["id"]: row for row in rows["faults"]}["six-times"]
    assert first["killed"]
    assert "NUM-01" in first["by"]
    assert first["cases"] >= 1


def _survive(jobs):
    assert [job.fault.id for job in jobs] == ["the-same"]
    return [Outcome("the-same", "scale", cases=7)]


def test_a_hunt_that_is_interrupted_says_what_it_had_and_keeps_it(tmp_path, monkeypatch):
    edits = [{"id": f"fault-{n}", "file": "layer.py", "old": "1.0", "new": f"{n}.0"} for n in range(2, 7)]
    (tmp_path / "mymoe").mkdir()
    (tmp_path / "mymoe" / "__init__.py").write_text("")
    (tmp_path / "mymoe" / "layer.py").write_text(PACKAGE["mymoe/layer.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    path = catalogue(tmp_path, *edits, head='area = "a"\ntests = ["t"]\nexpect = ["NUM-01"]\npackage = "mymoe"\n')
    asked = []

    def interrupted(jobs, *rest):
        asked[:] = [job.fault.id for job in jobs]
        yield Outcome(asked[0], "a", True, ["NUM-01"], True, 3, kills={"NUM-01": [2, 3]})
        raise KeyboardInterrupt

    monkeypatch.setattr("moegate.faults.outcomes_of", interrupted)
    matrix = tmp_path / "matrix.json"
    monkeypatch.setattr("moegate.faults.write_matrix", partial(write_matrix, path=matrix))
    monkeypatch.setattr("moegate.faults.read_matrix", partial(read_matrix, path=matrix))
    command = ("--catalogue", path, "--matrix", "--update-witnesses")
    code, text = moegate(*command, "--resume", tmp_path / "journal")
    assert code == 2, text
    assert "interrupted after 1 of 5 faults; the same command goes on from there" in text
    assert asked != sorted(asked), "a matrix that is cut off is a sample"
    first, faults = asked[0], load_catalogue([path])
    assert read_matrix(faults, matrix) == {first: {"NUM-01": [2, 3]}}
    # Without the journal: what the matrix lacks comes first, and what it has stays.
    assert moegate(*command)[0] == 2
    assert asked[-1] == first
    assert read_matrix(faults, matrix) == {id: {"NUM-01": [2, 3]} for id in (first, asked[0])}


def test_a_matrix_forgets_a_fault_that_has_changed_and_one_that_is_gone(tmp_path):
    kept, changed, gone = (Fault(id, "a", (Edit("x.py", "1", "2"),), ("X",), ("t",)) for id in ("kept", "changed", "g"))
    outcomes = {id: Outcome(id, "a", kills={"X": [1, 2], "Y": [0, 2]}) for id in ("kept", "changed", "g")}
    path = tmp_path / "matrix.json"
    write_matrix([kept, changed, gone], outcomes, path)
    now = [kept, replace(changed, expect=("Z",))]
    assert read_matrix(now, path) == {"kept": {"X": [1, 2]}}
    write_matrix(now, {}, path)
    assert read_matrix([kept, changed, gone], path) == {"kept": {"X": [1, 2]}}


def test_a_file_that_is_no_matrix_is_refused(tmp_path):
    path = tmp_path / "matrix.json"
    path.write_text('{"a-fault": {"NUM-01": [1, 2]}}')
    with pytest.raises(CatalogueError, match="expected a matrix of schema 1"):
        read_matrix([], path)


def test_a_journal_forgets_a_fault_that_has_changed(tmp_path):
    fault = Fault("f", "a", (Edit("x.py", "1", "2"),), ("X",), ("t",))
    journal = Journal(tmp_path / "journal", "search cpu")
    journal.add(fault, Outcome("f", "a", killed=True, by=["X"], expected=True, cases=3))
    assert journal.read([fault])["f"].cases == 3
    assert Journal(tmp_path / "journal", "matrix cpu").read([fault]) == {}
    assert journal.read([Fault("f", "a", (Edit("x.py", "1", "3"),), ("X",), ("t",))]) == {}


# --- mutants ------------------------------------------------------------------------------------------------------


def test_a_sample_of_mutants_is_the_same_for_the_same_seed_and_fits_the_source():
    # Of one package of the implementation, which is enough to draw from.
    first, again, other = (sample(60, seed, "moegate.impl.tuning") for seed in (1, 1, 2))
    assert first == again
    assert {mutant.id for mutant in first} != {mutant.id for mutant in other}
    for mutant in first:
        assert mutant.sources()


def test_a_smaller_sample_of_mutants_is_part_of_a_larger_one():
    smaller, larger = (sample(count, 3, "moegate.impl.tuning") for count in (20, 50))
    assert {mutant.id for mutant in smaller} < {mutant.id for mutant in larger}


def test_mutants_are_many_of_every_kind_and_have_names_of_their_own():
    every = candidates()
    assert len({mutant.id for mutant in every}) == len(every) > 3000
    kinds = {mutant.note.split(":")[0] for mutant in every}
    assert {"comparison", "constant", "mask", "operand", "operator", "statement deleted"} <= kinds


def report_of(mutants, *killed):
    rows = [{"id": m.id, "killed": m.id in killed, "by": ["NUM-01"] if m.id in killed else []} for m in mutants]
    return {"faults": rows, "not_hunted": []}


def test_verdicts_on_survivors_stay_with_their_edit_and_new_ones_are_open(tmp_path):
    mutants, path = sample(4, 1, "moegate.impl.tuning"), tmp_path / "mutants.json"
    first = summary(report_of(mutants, mutants[0].id), mutants, 4, 1, path)
    assert (first["mutants"], first["killed"], first["by_error"]) == (4, 1, 0)
    assert [row["id"] for row in first["survivors"]] == [mutant.id for mutant in mutants[1:]]
    assert {row["verdict"] for row in first["survivors"]} == {"open"}
    first["survivors"][0] |= {"verdict": "equivalent", "why": "a reason"}
    path.write_text(json.dumps(first))
    # Known equivalents are named and not hunted, wherever their lines are now.
    moved = [replace(mutant, id=f"moved {mutant.id}") for mutant in mutants]
    assert [mutant.equivalent for mutant in without_equivalents(moved, path)] == ["", "a reason", "", ""]
    again = report_of([moved[0], *moved[2:]], moved[2].id) | {"not_hunted": [{"id": moved[1].id}]}
    second = summary(again, moved, 4, 1, path)
    assert [row["verdict"] for row in second["survivors"]] == ["open", "equivalent", "open"]
    # Outside of a smaller sample a verdict stays as long as the source has what it is of.
    fewer = sample(2, 1, "moegate.impl.tuning")
    smaller = summary(report_of(fewer), fewer, 2, 1, path, every=mutants)
    kept = {row["mark"] for name in ("survivors", "others") for row in smaller[name]}
    assert kept >= {row["mark"] for row in first["survivors"]}
    with pytest.raises(ValueError, match="report: expected the 4 mutants of count 4 and seed 1, got others"):
        summary(report_of(mutants[1:]), mutants, 4, 1, path)
    first["survivors"][0]["verdict"] = "harmless"
    path.write_text(json.dumps(first))
    with pytest.raises(ValueError, match=r"expected a verdict of .*, got 'harmless'"):
        read_survivors(path)


def test_every_survivor_that_is_checked_in_has_a_verdict_and_a_reason():
    for row in read_survivors().values():
        assert row["why"], row["id"]


# --- the document -------------------------------------------------------------------------------------------------


def test_the_document_says_what_is_checked_in():
    text = (Path(__file__).parent.parent / "docs" / "faults.md").read_text()
    assert as_markdown() in text
