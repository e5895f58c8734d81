"""Subjects by name and from files: what is wrong with one is said before anything runs."""

import importlib.util

import pytest

from moegate.conformance import loading
from moegate.conformance.loading import SHIPPED, NotInstalledError, load_subject, needed

HEAD = """
from moegate.conformance.numerics import Numerics
from moegate.conformance.subject import Capabilities, Subject

class Mine(Subject):
    name = "mine"
"""
EXPERTS = "    def experts(self, case, variant):\n        return case.hidden_states.clone()\n"
BAD = {
    "no import": ("import nowhere_to_be_found\n" + HEAD + EXPERTS, r"does not import: ModuleNotFoundError.*\(line 1\)"),
    "no Python": ("class Mine(:\n", r"does not import: SyntaxError: .*\(line 1\)"),
    "exits": ("raise SystemExit('usage')\n", "does not import: SystemExit: usage"),
    "no such class": (HEAD.replace("class Mine", "class Yours") + EXPERTS, "Mine of .*mine.py.* nothing of that name"),
    "no Subject": ("class Mine:\n    pass\n", "to be a class derived from .*Subject, got <class"),
    "wants arguments": (
        HEAD + "    def __init__(self, path):\n        pass\n" + EXPERTS,
        r"Mine\(\) does not come to be",
    ),
    "no name": (HEAD.replace('name = "mine"', 'name = ""') + EXPERTS, "expected a name"),
    "no call": (HEAD, "lacks a call: .*experts"),
    "misspelled call": (HEAD + EXPERTS.replace("experts", "expert"), "expert is no call .* did you mean experts"),
    "no variant": (HEAD + EXPERTS.replace(", variant", ""), r"expected experts\(self, case, variant\)"),
    "promised call": (
        HEAD + EXPERTS + "    def facets(self, variant):\n        return ('experts', 'route')\n",
        "variant default names the call route, which is not defined",
    ),
    "unknown scheme": (
        HEAD + "    capabilities = Capabilities(schemes=('fp4',))\n" + EXPERTS,
        r"capabilities.schemes: expected a tuple of some of none, .*, got \('fp4',\)",
    ),
    "a text for a tuple": (
        HEAD + "    capabilities = Capabilities(dtypes='bfloat16')\n" + EXPERTS,
        "capabilities.dtypes: expected a tuple of some of bfloat16, .*, got 'bfloat16'",
    ),
    "no multiple": (
        HEAD + "    capabilities = Capabilities(hidden_multiple=0)\n" + EXPERTS,
        "capabilities.hidden_multiple: expected at least 1, got 0",
    ),
    "no Numerics": (HEAD + "    numerics = {'gate': 'storage'}\n" + EXPERTS, r"expected numerics to be a Numerics\("),
}


@pytest.mark.parametrize("what", BAD)
def test_each_thing_that_is_wrong_with_a_file_has_its_own_words(what, tmp_path):
    text, message = BAD[what]
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_subject(f"{tmp_path}/mine.py:Mine")


def test_a_file_may_be_called_like_a_package_and_import_what_lies_beside_it(tmp_path):
    (tmp_path / "beside_mine.py").write_text("NAME = 'beside'\n")
    head = "import torch\nfrom beside_mine import NAME\n" + HEAD.replace('"mine"', "NAME")
    (tmp_path / "torch.py").write_text(head + EXPERTS)
    assert load_subject(f"{tmp_path}/torch.py:Mine").name == "beside"


def test_a_variant_can_be_asked_for_by_name():
    assert load_subject("moegate:cpu").variants == ("cpu",)
    assert len(load_subject("moegate").variants) > 1, "another instance keeps its own"
    with pytest.raises(ValueError, match=r"expected a variant of \['cpu', 'triton'\], got 'tpu'"):
        load_subject("moegate:tpu")


def test_an_unknown_name_is_refused_with_the_one_that_was_meant():
    with pytest.raises(ValueError, match="got 'transformer'; did you mean transformers"):
        load_subject("transformer")


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_not_installed_says_how_to_install_it_and_what_is_loads(name):
    module, _ = needed(name)
    if module and importlib.util.find_spec(module) is None:
        with pytest.raises(NotInstalledError, match=f"{module} is not installed here: pip install"):
            load_subject(name)
    else:
        assert load_subject(name).name == name


@pytest.mark.parametrize("name", ["transformers", "vllm", "sglang", "flashinfer", "moegate:flashinfer_cutlass"])
def test_an_adapter_says_with_what_it_was_last_run_and_imports_its_engine_only_when_called(name, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda module: object())
    assert any(word in load_subject(name).last_run for word in ("untested", "20"))
