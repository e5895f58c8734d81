"""The gate's two sides: revisions of a real repository, what is refused, and what needs no clock."""

import difflib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moegate.bench.gate.guards import Described, accept, compare
from moegate.bench.gate.inject import with_spin
from moegate.bench.gate.measuring import Measuring, Plan
from moegate.bench.gate.record import Change
from moegate.bench.gate.sides import BadSidesError, Repository, SideError, choose_sides, trees_as_sides
from moegate.bench.gate.store import Store
from moegate.bench.selection import LORA, LORA_MODEL
from moegate.bench.workloads import MODELS, Workload
from moegate.impl.kernels import combine

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = (ROOT / "docs/examples/my_moe.py").read_text()


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(folder, text, message):
    (folder / "mine.py").write_text(text)
    git(folder, "add", "mine.py")
    git(folder, "commit", "-qm", message)


@pytest.fixture
def repository(tmp_path):
    """A project with a layer of its own, and two commits."""
    folder = tmp_path / "a project"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    commit(folder, EXAMPLE, "first")
    git(folder, "tag", "v1")
    slow = EXAMPLE.replace("    return out.to(", "    __import__('time').sleep(0.004)\n    return out.to(")
    commit(folder, slow, "second")
    return folder


def test_each_side_has_its_own_file(repository):
    sides = choose_sides(repository, "v1", subject="mine.py:MyMoE")
    files = [Path(side.subject.rpartition(":")[0]) for side in (sides.base, sides.head)]
    assert ["sleep" in file.read_text() for file in files] == [False, True]
    assert sides.base.record.commit == git(repository, "rev-parse", "v1")
    assert not sides.head.record.dirty
    # Nobody who looks at the repository sees the checkout, and the second run takes it as it is.
    assert git(repository, "status", "--porcelain") == ""
    kept = files[0].stat().st_mtime_ns
    again = choose_sides(repository, "v1", subject="mine.py:MyMoE")
    assert Path(again.base.subject.rpartition(":")[0]).stat().st_mtime_ns == kept
    assert again.key() == sides.key()
    assert choose_sides(repository, "v1", "main", subject="mine.py:MyMoE").head.tree != repository


def test_a_kept_checkout_that_somebody_changed_is_made_anew(repository):
    file = Path(choose_sides(repository, "v1", subject="mine.py:MyMoE").base.subject.rpartition(":")[0])
    file.write_text("spoiled")
    choose_sides(repository, "v1", subject="mine.py:MyMoE")
    assert "class MyMoE" in file.read_text()


def test_a_dirty_tree_is_measured_only_on_request_and_named(repository):
    (repository / "mine.py").write_text("class MyMoE: ...\n")
    (repository / "new file.py").touch()
    with pytest.raises(BadSidesError, match=r"clean working tree, got changes in mine.py, new file.py; commit them"):
        choose_sides(repository, "v1", subject="mine.py:MyMoE")
    sides = choose_sides(repository, "HEAD", subject="mine.py:MyMoE", allow_dirty=True)
    assert sides.head.record.dirty
    key = sides.key()
    (repository / "mine.py").write_text("class MyMoE:  # another\n    ...\n")
    assert choose_sides(repository, "HEAD", subject="mine.py:MyMoE", allow_dirty=True).key() != key


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ("no-such", {}, "revision: expected a commit of .*, got 'no-such'"),
        ("--help", {}, "revision: expected a commit"),
        ("main", {}, "base: expected another commit than the head's, got 'main'"),
        ("v1", {"subject": "mine:MyMoE"}, "subject: expected moegate or FILE.py:CLASS, got 'mine:MyMoE'"),
        ("v1", {"subject": "../x.py:MyMoE"}, "subject: expected a file within"),
    ],
)
def test_what_makes_no_comparison_is_refused(repository, base, options, message):
    with pytest.raises(BadSidesError, match=message):
        choose_sides(repository, base, **{"subject": "mine.py:MyMoE", **options})


def test_a_folder_without_a_repository_is_refused(tmp_path):
    with pytest.raises(BadSidesError, match=r"git rev-parse: .*not a git repository"):
        Repository(tmp_path)
    with pytest.raises(BadSidesError, match="base-tree: expected a folder"):
        trees_as_sides(tmp_path / "none", tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"subject": "mine.py:MyMoE", "prepare": "echo no compiler >&2; exit 7"},
            r"(?s)the base does not build: .* ended with code 7.*no compiler",
        ),
        ({"subject": "other.py:MyMoE"}, "the base has no other.py"),
        ({}, "the base has no impl/, so it is no checkout of moegate; name your own layer with --subject"),
    ],
)
def test_a_side_that_cannot_be_measured_is_said_so(repository, options, message):
    with pytest.raises(SideError, match=message):
        choose_sides(repository, "v1", **options)


def test_each_side_is_prepared_in_its_own_folder(repository):
    (repository / ".git" / "info" / "exclude").write_text("built\n")
    sides = choose_sides(repository, "v1", subject="mine.py:MyMoE", prepare="git rev-parse HEAD > built")
    built = [(side.tree / "built").read_text().strip() for side in (sides.base, sides.head)]
    assert built == [sides.base.record.commit, sides.head.record.commit]


def test_the_example_of_the_docs_is_gated(repository, tmp_path):
    """A real run on the CPU, in a foreign repository: 4 ms more in each call of the head."""
    command = [sys.executable, "-m", "moegate", "gate", "--base", "v1", "--subject", "mine.py:MyMoE", "--device", "cpu"]
    command += ["--models", "mixtral-8x7b/64", "--tokens", "1", "--pairs", "2", "--again", "2", "--rounds", "2"]
    report = tmp_path / "gate.md"
    done = subprocess.run(
        [*command, "--markdown", str(report)], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "❌ SLOWER" in report.read_text()


# Regressions that change no number, three of them of public engines: the naive blocks lost, the second stream asked for
# after external experts, FlashInfer the default on Hopper; and a kernel of adapters launched once more. Each as an edit
# of one line.
LOST = {
    "naive blocks": (
        "impl/align.py",
        "return not has_expert_map and num_tokens * top_k * 4 <= global_num_experts and not grouped",
        "return False",
    ),
    "order": (
        "impl/shared_experts.py",
        "    (OrderTest.MULTI_STREAM, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED, _multi_stream),\n"
        "    (OrderTest.EXTERNAL, SharedExpertsOrder.EXTERNAL, _external),\n",
        "    (OrderTest.EXTERNAL, SharedExpertsOrder.EXTERNAL, _external),\n"
        "    (OrderTest.MULTI_STREAM, SharedExpertsOrder.MULTI_STREAM_OVERLAPPED, _multi_stream),\n",
    ),
    "hopper": ("impl/oracle/rules.py", "lambda config, platform: platform.is_hopper", "lambda config, platform: False"),
    "shrinking once": (
        "impl/experts/stages.py",
        "return self._shrink(hidden, self._table.w2, make_lists=False)",
        "return [self._shrink(hidden, self._table.w2, make_lists=False) for _ in range(2)][0]",
    ),
}


def test_lost_fast_paths_are_flagged_without_a_clock(tmp_path):
    head = tmp_path / "head"
    for room in ("impl", "bench", "conformance", "reference", "cli"):
        shutil.copytree(ROOT / room, head / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in LOST.values():
        text = (head / name).read_text()
        assert text.count(old) == 1, name
        (head / name).write_text(text.replace(old, new))
    sides = trees_as_sides(ROOT, head, tmp_path / "cache")
    store = Store(tmp_path / "state")
    workloads = [Workload(MODELS[LORA_MODEL], 1, lora=lora) for lora in (None, LORA)]
    said = Measuring(sides, "cpu", Plan(), store).describe(workloads, compiled=0)
    changes = compare(Described(**said["base"]), Described(**said["head"]))
    failing = {(change.what, str(change.base), str(change.head)) for change in changes if change.fails}
    assert ("assignment", "naive", "aligned") in failing
    assert any(what == "launches" and "align" in head for what, _, head in failing)
    assert ("decision", "multi_stream_overlapped", "external") in failing
    hopper = [each for each in changes if "on cuda:9.0" in each.where and "flashinfer" in str(each.head)]
    assert hopper
    assert {each.base for each in hopper} == {"triton"}
    shrinks = {
        f"+{LORA}-" in change.where: (change.base.get("lora_shrink_kernel"), change.head.get("lora_shrink_kernel"))
        for change in changes
        if change.what == "launches" and change.fails
    }
    assert shrinks == {False: (None, None), True: (2, 3)}
    # Each kind of change is one that a run may be told to take, and only that.
    taken = accept(changes, ["decision:backend on cuda:9.0*"])
    assert {each for each in taken if each.accepted} == {
        Change(each.what, each.where, each.base, each.head, each.fails, accepted=True)
        for each in changes
        if each.what == "decision" and each.where.startswith("backend on cuda:9.0")
    }


def test_a_spin_is_put_into_the_kernel_that_is_there():
    """What the self-test injects: the kernel's own source, with a timed wait in its last program."""
    source = Path(combine.__file__).read_text()
    spun = with_spin(source, "combine_kernel")
    added = [line for line in difflib.ndiff(source.splitlines(), spun.splitlines()) if line.startswith(("+ ", "- "))]
    gone = [line for line in added if line.startswith("- ")]
    # Nothing of the kernel is changed but that its new argument is not specialised on.
    assert gone in ([], ["- @triton.jit("], [line for line in gone if "do_not_specialize=[" in line])
    assert "+     _spin(spin_cycles)" in added
    assert "+     spin_cycles," in added
    with pytest.raises(ValueError, match="kernel: expected a function other in the source"):
        with_spin(source, "other")
