"""What is shipped, under which names, and which room may know which."""

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("reference", "impl", "conformance", "bench")
SUITE = ("conformance", "-q", "-p", "no:cacheprovider", "--moegate-device", "cpu", "--moegate-subject", "torch")
SOME = ("--moegate-scale", "0.01", "-k", "routing or few_pairs and float32")
# A few cases of the suite, then every file of ours that was loaded under two names. pytest gives the rooms' own
# __init__.py a second one, which is why they are empty.
LOADED = """
import collections, os, sys, pytest
root, *arguments = sys.argv[1:]
ours = tuple(os.path.join(root, room) + os.sep for room in ("reference", "impl", "conformance", "bench", "cli"))
code = pytest.main(arguments)
names = collections.defaultdict(set)
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None) or ""
    if file.startswith(ours) and os.path.getsize(file):
        names[os.path.relpath(file, root)].add(name)
print("loaded", len(names), {file: sorted(two) for file, two in names.items() if len(two) > 1})
sys.exit(code)
"""


def git_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def modules(*rooms, tests=False):
    """(path, source, tree) of the modules of some rooms."""
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*.py")):
            if tests or not path.name.startswith(("test_", "conftest")):
                yield path.relative_to(ROOT).as_posix(), path.read_text(), ast.parse(path.read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel's files, what import-linter says of its unpacked form, and what a run of the suite loads."""
    tree, unpacked = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("unpacked")
    for name in git_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())

    def run(*command, cwd, **environment):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=inherited | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def wheel():
        build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
        done = run("-c", build, cwd=tree)
        assert done.returncode == 0, done.stderr
        with zipfile.ZipFile(next((tree / "dist").glob("*.whl"))) as archive:
            archive.extractall(unpacked)
            shipped = archive.namelist()
        lint = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
        return shipped, run("-c", lint, cwd=tree, PYTHONPATH=str(unpacked))

    with ThreadPoolExecutor(2) as pool:
        loaded = pool.submit(run, "-c", LOADED, str(ROOT), *SUITE, *SOME, cwd=ROOT)
        shipped, lint = wheel()
    return SimpleNamespace(shipped=shipped, lint=lint, loaded=loaded.result())


def test_the_wheel_holds_gits_files_of_the_rooms_and_no_other(built):
    kept = (".py", ".json", ".toml", ".j2", ".css", ".js")
    expected = {f"moegate/{name}" for name in git_files() if name.split("/")[0] in ROOMS and name.endswith(kept)}
    expected |= {f"moegate/{name.removeprefix('cli/')}" for name in git_files() if name.startswith("cli/")}
    shipped = {name for name in built.shipped if ".dist-info/" not in name}
    assert shipped - expected == set()
    assert expected - shipped == set()
    assert not any("tests/" in name for name in shipped)


def test_arrows_between_rooms_run_one_way(built):
    assert built.lint.returncode == 0, built.lint.stdout + built.lint.stderr
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert f"Contracts: {len(contracts)} kept, 0 broken." in built.lint.stdout


def test_no_library_module_is_loaded_under_two_names(built):
    assert built.loaded.returncode == 0, built.loaded.stdout
    report = built.loaded.stdout.splitlines()[-1].split(maxsplit=2)
    assert int(report[1]) > 15
    assert ast.literal_eval(report[2]) == {}


@pytest.mark.parametrize("room", ROOMS)
def test_a_rooms_init_is_empty(room):
    assert (ROOT / room / "__init__.py").read_bytes() == b""


def test_no_folder_of_the_checkout_is_called_moegate():
    assert not (ROOT / "moegate").exists()


def test_library_modules_use_no_bare_assert():
    bare = [
        f"{path}:{node.lineno}"
        for path, _, tree in modules(*ROOMS, "cli")
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert bare == []


def test_only_the_platform_knows_of_the_interpreter():
    """Messages may name the variable; nothing else in the implementation reads it."""
    readers = [
        path
        for path, source, tree in modules("impl")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == "TRITON_INTERPRET"
    ]
    assert readers == ["impl/platform.py"]


def test_library_modules_import_their_siblings_relatively():
    absolute = [
        f"{path}:{node.lineno}"
        for path, _, tree in modules(*ROOMS)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "moegate"
    ]
    assert absolute == []


def public_definitions(tree):
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


def test_everything_public_in_reference_and_implementation_has_a_docstring():
    silent = [
        f"{path}: {node.name}"
        for path, _, tree in modules("reference", "impl")
        for node in public_definitions(tree)
        if ast.get_docstring(node) is None
    ]
    assert silent == []
