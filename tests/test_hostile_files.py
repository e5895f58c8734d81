"""Files and names that mean harm: refused with the file's name, or escaped wherever they are shown."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.table import Table
from safetensors.torch import save, save_file

from moegate.conformance.console import PlainConsole, printable
from moegate.conformance.loading import load_subject
from moegate.conformance.properties.bad_input import time_limit
from moegate.conformance.spec import parse_spec
from moegate.conformance.subjects.moegate_public import E, H, I
from moegate.conformance.subjects.moegate_public_files import (
    ADAPTER,
    ADAPTER_PREFIX,
    KEY,
    QWEN3,
    TILE,
    adapter_entries,
    state_dict,
    write_adapter,
)
from moegate.impl.checkpoint import load_layer
from moegate.impl.json_file import MAX_BYTES
from moegate.impl.lora.peft import CONFIG, WEIGHTS, load_peft
from moegate.impl.tuning.names import normalise_device_name
from moegate.impl.tuning.writer import dump, read_tuned_file

ROOT = Path(__file__).resolve().parents[1]
ESCAPE = "\x1b[2J\x1b[31m"
HOSTILE_NAMES = (
    f"{ESCAPE}red",
    "<script>alert(1)</script>",
    "[red]markup[/red]",
    "[/]",
    "../../etc/passwd",
    "a\nverdict: holds",
    "a\r\x08\x08b",
    "\u202egnirts",
    ":warning:",
    "|--|`\"'&<>",
    "x" * 200,
)

Reader = Callable[[Path], Any]


def _tuned(file: Path) -> Any:
    return read_tuned_file(file)


def _adapter(file: Path) -> Any:
    sizes = {"layer": 0, "num_experts": E, "hidden_size": H, "intermediate_size": I}
    return load_peft(file.parent, **sizes)


def _checkpoint(file: Path) -> Any:
    return load_layer(file, QWEN3, prefix="", prepare=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path)


def refusal(read: Reader, file: Path) -> str:
    """What a reader says of a file that it refuses: one printable line with the file's name."""
    before = file.read_bytes() if file.is_file() else None
    with time_limit(), pytest.raises((ValueError, TypeError)) as caught:
        read(file)
    said = str(caught.value)
    assert before is None or file.read_bytes() == before
    assert said.isprintable(), said
    assert len(said) < 2000
    return said


# --- JSON --------------------------------------------------------------------------------------------------------

GOOD = {
    "tuned file": (_tuned, "tuned.json", dump(KEY, {16: (TILE, TILE)})),
    "adapter": (_adapter, CONFIG, json.dumps(ADAPTER)),
}


def _bad_json(good: str) -> Iterator[tuple[str, bytes]]:
    content = good.encode()
    for part in range(0, len(content), max(1, len(content) // 12)):
        yield f"cut at {part}", content[:part]
    first = good.index('"') + 1
    key = good[first : good.index('"', first)]
    yield "a key twice", (good[: first - 1] + f'"{key}": 1, ' + good[first - 1 :]).encode()
    yield "more behind it", content + b"{}"
    yield "a byte order mark", b"\xef\xbb\xbf" + content
    yield "UTF-16", good.encode("utf-16")
    yield "UTF-32", good.encode("utf-32")
    yield "Latin-1", content.replace(b"}", b', "\xe9": 1}', 1)
    yield "NUL bytes", b"\0" * 100
    yield "a NUL inside", content[:5] + b"\0" + content[5:]
    yield "too many bytes", content + b" " * MAX_BYTES
    yield "nested lists", b"[" * 200_000
    yield "nested objects", b'{"a":' * 200_000 + b"1" + b"}" * 200_000
    yield "nested in a value", content.rstrip()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    yield "no object but a list", b"[]"
    yield "no object but a number", b"3"
    yield "no object but null", b"null"
    yield "a number of thousands of digits", content.rstrip()[:-1] + b', "x": ' + b"9" * 5000 + b"}"
    for word in ("NaN", "Infinity", "-Infinity"):
        yield word, content.rstrip()[:-1] + f', "x": {word}}}'.encode()
    yield "single quotes", good.replace('"', "'").encode()
    yield "a comma too many", content.rstrip()[:-1] + b",}"
    yield "a comment", b"// " + content
    yield "Python", b"__import__('os').abort()"


JSON_CASES = [
    pytest.param(read, name, content, id=f"{kind}-{what}".replace(" ", "_"))
    for kind, (read, name, good) in GOOD.items()
    for what, content in _bad_json(good)
]


@pytest.mark.parametrize(("read", "name", "content"), JSON_CASES)
def test_json_that_is_none_is_refused(read: Reader, name: str, content: bytes, folder: Path) -> None:
    file = folder / name
    file.write_bytes(content)
    assert name in refusal(read, file)


@pytest.mark.parametrize(("read", "name", "content"), [(read, name, good) for read, name, good in GOOD.values()])
def test_what_the_broken_files_are_made_of_is_read(read: Reader, name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    assert read(folder / name) is not None


def _folder_there(file: Path) -> None:
    file.mkdir()


def _pipe_there(file: Path) -> None:
    os.mkfifo(file)


def _loop_there(file: Path) -> None:
    file.symlink_to(file)


def _dangling(file: Path) -> None:
    file.symlink_to(file.with_name("gone"))


def _endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


PLACES = {
    "a folder": _folder_there,
    "a pipe": _pipe_there,
    "a link to itself": _loop_there,
    "a link to nothing": _dangling,
    "a device without end": _endless,
}


@pytest.mark.parametrize("kind", [*GOOD, "weights", "checkpoint"])
@pytest.mark.parametrize("what", PLACES)
def test_what_is_no_plain_file_is_refused_and_never_waited_for(kind: str, what: str, folder: Path) -> None:
    others = {"weights": (_adapter, WEIGHTS), "checkpoint": (_checkpoint, "model.safetensors")}
    read, name = GOOD[kind][:2] if kind in GOOD else others[kind]
    file = folder / name
    file.unlink(missing_ok=True)
    PLACES[what](file)
    said = refusal(read, file)
    assert name in said


def _adapter_config(**changes: Any) -> str:
    return json.dumps(ADAPTER | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "\x1b[2J"}, "peft_type"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": [8]}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"bias": {"a": 1}}, "bias"),
        ({"alpha_pattern": ["a"]}, "alpha_pattern"),
        ({"alpha_pattern": {"a": "8"}}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 8}}, "alpha_pattern"),
        ({"alpha_pattern": {"(a+)+$": 8}}, "alpha_pattern"),
        ({"alpha_pattern": {"(a|a)*b": 8}}, "alpha_pattern"),
        ({"alpha_pattern": {".*.*.*.*x": 8}}, "alpha_pattern"),
        ({"alpha_pattern": {r"(a)\1": 8}}, "alpha_pattern"),
        ({"alpha_pattern": {"(?=a)": 8}}, "alpha_pattern"),
        ({"alpha_pattern": {"a" * 500: 8}}, "alpha_pattern"),
        ({"alpha_pattern": {"a{99999999999}": 8}}, "alpha_pattern"),
    ],
    ids=str,
)
def test_an_adapters_configuration_is_checked_by_key(changes: dict, named: str, folder: Path) -> None:
    (folder / CONFIG).write_text(_adapter_config(**changes))
    assert named in refusal(_adapter, folder / CONFIG)


@pytest.mark.parametrize("key", ["\\ud800", "\\u001b[2J", "\\n\\nverdict: holds", "<b>", "a" * 5000], ids=ascii)
def test_a_hostile_key_is_shown_escaped(key: str, tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    file.write_text(f'{{"{key}": 1}}')
    refusal(_tuned, file)


# --- safetensors -------------------------------------------------------------------------------------------------


def _with_header(header: Any, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(**changes: Any) -> dict:
    return {"gate.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | changes}


LYING: dict[str, bytes] = {
    "empty": b"",
    "shorter than a length": b"\x08\0\0",
    "a header longer than the file": _with_header(_entry(), length=1 << 20),
    "a header of 2^63 bytes": _with_header(_entry(), length=1 << 63),
    "a header of no bytes": _with_header(b""),
    "a header that is no JSON": _with_header(b"{" * 64),
    "a header that is nested": _with_header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a header that is no object": _with_header([1]),
    "a header in another encoding": _with_header('{"\xe9": 1}'.encode("latin-1")),
    "offsets behind the end": _with_header(_entry(data_offsets=[0, 1 << 40], shape=[1 << 38])),
    "offsets that run backwards": _with_header(_entry(data_offsets=[64, 0])),
    "negative offsets": _with_header(_entry(data_offsets=[-64, 0])),
    "offsets that do not fit the shape": _with_header(_entry(shape=[5, 5])),
    "a negative dimension": _with_header(_entry(shape=[-4, -4])),
    "sizes that overflow": _with_header(_entry(shape=[1 << 32, 1 << 32, 4, 4])),
    "a dimension that is no number": _with_header(_entry(shape=["4", 4])),
    "an unknown dtype": _with_header(_entry(dtype="PICKLE")),
    "entries that overlap": _with_header(_entry() | {"b": {"dtype": "F32", "shape": [4], "data_offsets": [32, 48]}}),
    "a hole between entries": _with_header(_entry(data_offsets=[64, 128]), b"\0" * 128),
    "data behind the entries": _with_header(_entry(), b"\0" * 4096),
    "data cut off": _with_header(_entry(), b"\0" * 32),
    "a pickle": b"\x80\x04\x95" + b"\0" * 100,
    "a zip file": b"PK\x03\x04" + b"\0" * 100,
}


@pytest.mark.parametrize("what", LYING)
@pytest.mark.parametrize("read", [_checkpoint, _adapter], ids=["checkpoint", "adapter"])
def test_a_safetensors_file_that_lies_is_refused(read: Reader, what: str, folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(LYING[what])
    assert WEIGHTS in refusal(read, file) or "checkpoint" in refusal(read, file)


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bytes_are_refused_or_read_but_never_anything_else(seed: int, folder: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    content = bytearray(save(state_dict()))
    header = struct.unpack("<Q", content[:8])[0]
    for _ in range(3):
        content[int(torch.randint(8 + header, (1,), generator=generator))] ^= int(
            torch.randint(1, 256, (1,), generator=generator)
        )
    file = folder / "model.safetensors"
    file.write_bytes(bytes(content))
    with time_limit():
        try:
            _checkpoint(file)
        except (ValueError, TypeError) as error:
            assert printable(str(error)) == str(error)  # noqa: PT017


HOSTILE_ENTRIES = {
    "another layer's number": f"{ADAPTER_PREFIX.replace('0', '9' * 30)}0.gate_proj.lora_A.weight",
    "an expert above E": f"{ADAPTER_PREFIX}99.gate_proj.lora_A.weight",
    "an escape": f"{ADAPTER_PREFIX}{ESCAPE}.lora_A.weight",
    "a path": f"{ADAPTER_PREFIX}../../x.lora_A.weight",
    "a name without end": f"{ADAPTER_PREFIX}{'a' * 5000}.lora_A.weight",
    "a digit of another script": f"{ADAPTER_PREFIX}\u0663.gate_proj.lora_A.weight",
    "the same entry below another prefix": "x.layers.0.experts.0.gate_proj.lora_A.weight",
}


@pytest.mark.parametrize("what", HOSTILE_ENTRIES)
def test_a_hostile_name_of_an_entry_is_refused_or_none_of_this_layer(what: str, folder: Path) -> None:
    save_file(adapter_entries() | {HOSTILE_ENTRIES[what]: torch.ones(2, H)}, folder / WEIGHTS)
    if what == "another layer's number":
        assert _adapter(folder / WEIGHTS).gate
    else:
        refusal(_adapter, folder / WEIGHTS)


def pair(a: torch.Tensor, b: torch.Tensor, name: str = "0.gate_proj.") -> dict[str, torch.Tensor]:
    return {f"{ADAPTER_PREFIX}{name}lora_A.weight": a, f"{ADAPTER_PREFIX}{name}lora_B.weight": b}


FORMS = {
    "one dimension": pair(torch.ones(2), torch.ones(I, 2)),
    "another H": pair(torch.ones(2, H + 1), torch.ones(I, 2)),
    "another I": pair(torch.ones(2, H), torch.ones(I + 1, 2)),
    "integers": pair(torch.ones(2, H).int(), torch.ones(I, 2).int()),
    "a stack of one dimension": pair(torch.ones(8), torch.ones(I, 8), ""),
    "a projection under two names": pair(torch.ones(2, H), torch.ones(I, 2))
    | pair(torch.ones(2, H), torch.ones(I, 2), "0.w1."),
}


@pytest.mark.parametrize("entries", FORMS.values(), ids=FORMS)
def test_entries_of_other_forms_are_refused(entries: dict, folder: Path) -> None:
    save_file(entries, folder / WEIGHTS)
    refusal(_adapter, folder / WEIGHTS)


# --- names, wherever they are shown ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_name_in_the_terminal_is_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    console = PlainConsole(width=400)
    shown = io.StringIO()
    console.file = shown
    table = Table("name")
    table.add_row(name)
    console.print(table)
    console.print(f"skipped (1): {name}", style="red")
    text = shown.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert "\x08" not in text
    assert printable(name).split("\n")[0] in text


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_devices_name_is_one_part_of_a_path(name: str) -> None:
    spelled = normalise_device_name(name)
    assert os.path.basename(f"E=8,device_name={spelled}.json") == f"E=8,device_name={spelled}.json"
    assert spelled.isprintable()
    assert len(spelled) <= 100


SUBJECT = """
from moegate.conformance.subjects.eager import EagerSubject

class Hostile(EagerSubject):
    name = {name!r}

class Variants(EagerSubject):
    variants = ({name!r},)
"""


@pytest.mark.parametrize(
    "name", [name for name in HOSTILE_NAMES if not name.isprintable() or len(name) > 100], ids=ascii
)
@pytest.mark.parametrize("which", ["Hostile", "Variants"])
def test_a_subject_with_a_name_that_cannot_be_printed_is_refused(name: str, which: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SUBJECT.format(name=name))
    with pytest.raises(ValueError, match="subject: expected printable names") as caught:
        load_subject(f"{tmp_path}/mine.py:{which}")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name", ["", "nosuch", "a.py:B", "os:path", "os.path:join", ":", "a:", "a\0.py:B", ESCAPE, 3, None]
)
def test_what_is_no_subject_is_refused_by_name(name: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="subject: expected") as caught:
        load_subject(name)
    assert str(caught.value).isprintable()


LINES = (
    "",
    "AlignSpec",
    "AlignSpec(",
    "AlignSpec(1, 2, 3)",
    "AlignSpec(M=__import__('os').abort())",
    "AlignSpec(M=(lambda: 1)())",
    "AlignSpec(M='1', E=2, top_k=1)",
    "AlignSpec(M=1.0, E=2, top_k=1)",
    "AlignSpec(M=True, E=2, top_k=1)",
    "AlignSpec(**{'M': 1})",
    "AlignSpec(M=1, M=2)",
    "__import__('os').abort()",
    "(" * 500 + ")" * 500,
    "-" * 5000 + "1",
    "AlignSpec(M=" + "[" * 3000 + "]" * 3000 + ")",
    "AlignSpec(M=" + "9" * 5000 + ")",
    "a\0b",
    ESCAPE,
    "x" * 1_000_000,
)


@pytest.mark.parametrize("line", LINES, ids=lambda line: ascii(line)[:40])
def test_a_line_that_is_no_spec_is_refused_and_never_run(line: str) -> None:
    with time_limit(), pytest.raises(ValueError, match="spec: expected") as caught:
        parse_spec(line)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000


def test_junit_files_stay_xml_whatever_a_finding_says(tmp_path: Path) -> None:
    names = [name for name in HOSTILE_NAMES if len(name) < 100]
    (tmp_path / "test_it.py").write_text(
        f"import pytest\n@pytest.mark.parametrize('name', {names!r})\n"
        "def test_it(name, record_property):\n    record_property('subject', name)\n    assert False, name\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=out.xml"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=120)
    root = xml.etree.ElementTree.parse(tmp_path / "out.xml").getroot()
    assert len(list(root.iter("testcase"))) == len(names)
    assert not list(root.iter("script"))


# --- nothing that a file says is run -----------------------------------------------------------------------------

ROOMS = ("reference", "impl", "conformance", "bench", "cli")
# Pipes between processes that this project starts; no file, and nobody else's.
PICKLES = {
    "conformance/real_ranks.py",
    "conformance/faults/rehearsal.py",
    "conformance/faults/rewriting.py",
}
# Tensors that a subject's own process sends over a pipe: that process runs what the user named, here or there.
TENSORS_OF_A_CHILD = {"conformance/isolated.py"}
# Compile the functions of the installed Triton anew, with a repair in them, kernels that it rewrote, and edits of
# sources that the user named.
COMPILES = {
    "conformance/interpreter.py",
    "conformance/faults/fault.py",
    "conformance/faults/mutants.py",
    "conformance/faults/planting.py",
    "conformance/faults/rewriting.py",
}
# Runs the command that `moegate gate --prepare` was given.
SHELLS = {"bench/gate/sides.py"}
FORBIDDEN = {"eval", "exec", "compile", "__import__"}
UNSAFE = {("torch", "load"), ("pickle", "load"), ("marshal", "loads"), ("yaml", "load"), ("os", "system")}
UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml", "joblib"}


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            yield str(file.relative_to(ROOT)), ast.parse(file.read_text())


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell() -> None:
    found = []
    for file, tree in _sources():
        for node in ast.walk(tree):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN:
                found += [] if file in COMPILES else [f"{where} {node.func.id}"]
            if isinstance(node, ast.Attribute) and (ast.unparse(node.value), node.attr) in UNSAFE:
                found += [] if file in TENSORS_OF_A_CHILD | PICKLES else [f"{where} {ast.unparse(node)}"]
            words = {"allow_pickle", "trust_remote_code", *(() if file in SHELLS else ("shell",))}
            if isinstance(node, ast.keyword) and node.arg in words:
                found.append(f"{where} {node.arg}")
            if isinstance(node, (ast.Import, ast.ImportFrom)) and file not in PICKLES:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                found += [f"{where} import {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
    assert found == []


# What reads a file that somebody else may have written, and where it is attacked.
READERS = {
    "impl/json_file.py": "here",
    "impl/checkpoint.py": "here",
    "impl/lora/peft.py": "here",
    "bench/tune.py": "a tuned file, which `read_tuned_file` has just checked",
    "conformance/calibration.py": "a file of this package",
    "conformance/calibrate.py": "a file of this package",
    "conformance/false_alarms.py": "reports of `moegate check` that a developer hands it",
    "conformance/faults/client.py": "said by its own child",
    "conformance/faults/server.py": "said by its own parent",
    "conformance/faults/job.py": "said by its own parent",
    "conformance/faults/document.py": "files of this package",
    "conformance/faults/fault.py": "tests/test_faults.py",
    "conformance/faults/record.py": "a file of this package, and its own journal",
    "conformance/faults/survivors.py": "a file of this package, and a report that a developer hands it",
    "bench/gate/snapshot.py": "a file of this package",
    "bench/parallel.py": "written by its own process",
    "bench/gate/process.py": "said by its own child",
    "bench/gate/run.py": "said by its own child",
    "bench/gate/store.py": "its own state; what is broken is set aside",
    "bench/gate/trial.py": "a self-test's result, by its schema",
    "bench/history/run.py": "tests/test_history_store.py",
    "conformance/known.py": "tests/test_known.py",
    "conformance/sanitizer.py": "said by its own child",
    "cli/check.py": "written by its own child",
    "impl/parallel/agreement.py": "sent by the ranks of the group",
}


def test_everything_that_reads_json_or_tensors_from_files_is_known() -> None:
    readers = set()
    for file, tree in _sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if re.fullmatch(r"json\.loads?|safe_open|load_file|tomllib\.loads?|numpy\.load|np\.load", name):
                readers.add(file)
    assert readers == set(READERS)


def test_workflows_run_with_read_permissions_and_keep_no_credentials() -> None:
    for file in (ROOT / ".github" / "workflows").glob("*.y*ml"):
        text = file.read_text()
        assert "pull_request_target" not in text, file
        assert re.search(r"^permissions:\n  contents: read\n(?! )", text, re.MULTILINE), file
        assert len(re.findall(r"actions/checkout@", text)) == text.count("persist-credentials: false"), file
