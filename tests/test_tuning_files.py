"""Tuned files by name, form and place: what `find_kernel_configs` looks for, believes and says."""

import json
import logging
import os
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moegate.bench.ahead_of_time import imagine_workload
from moegate.bench.workloads import MODELS, Workload
from moegate.conformance import configs as suite
from moegate.impl import once
from moegate.impl.config import QuantScheme
from moegate.impl.platform import Platform
from moegate.impl.tuning import lookup, schema
from moegate.impl.tuning.kernel_config import KernelConfig, default_kernel_config, use_kernel_configs
from moegate.impl.tuning.lookup import FOLDER_VARIABLE, find_kernel_configs
from moegate.impl.tuning.names import ConfigKey, normalise_device_name
from moegate.impl.tuning.schema import TunedConfigError
from moegate.impl.tuning.writer import dump, read_tuned_file, write_tuned_file

H200 = replace(Platform.parse("cuda:9.0"), name="NVIDIA H200")
QWEN3 = {
    "top_k": 8,
    "num_experts": 128,
    "hidden_size": 2048,
    "intermediate_size": 704,
    "dtype": torch.bfloat16,
    "platform": H200,
}
PUBLIC = "E=128,N=704,device_name=NVIDIA_H200.json"
NATIVE = "E=128,N=704,H=2048,top_k=8,device_name=NVIDIA_H200.json"
TILE = suite.small_tile()
CONFIG = KernelConfig(16, 32, 16, 1, 4, 1)


@pytest.fixture
def folder(tmp_path, tmp_path_factory, monkeypatch):
    """The user's folder; no file ships."""
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path_factory.mktemp("shipped"))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    lookup.forget()
    once.forget()
    yield tmp_path
    lookup.forget()
    once.forget()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="moegate.impl.tuning")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def put(folder, name, entries):
    (folder / name).write_text(json.dumps(entries))
    return folder / name


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform_name", "spelled"),
    [
        ("NVIDIA H200", "NVIDIA_H200"),
        ("NVIDIA H200 NVL", "NVIDIA_H200"),
        ("NVIDIA H200 141GB HBM3e", "NVIDIA_H200"),
        ("NVIDIA GH200 480GB", "NVIDIA_GH200_480GB"),
        ("NVIDIA H20-3e", "NVIDIA_H20-3e"),
        ("Intel(R) Arc(TM) Pro B60 Graphics", "Intel(R)_Arc(TM)_Pro_B60_Graphics"),
        ("AMD Instinct MI300X/MI300A", "AMD_Instinct_MI300X_MI300A"),
        ("../../etc/passwd", ".._.._etc_passwd"),
        ("a,dtype=fp8_w8a8", "a_dtype_fp8_w8a8"),
        ("", ""),
    ],
)
def test_device_names_are_spelled_as_public_files_spell_them(platform_name, spelled):
    assert normalise_device_name(platform_name) == spelled


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ({}, PUBLIC),
        ({"dtype": torch.float16}, PUBLIC),
        ({"dtype": torch.float32}, "E=128,N=704,device_name=NVIDIA_H200,dtype=float32.json"),
        ({"scheme": QuantScheme.FP8_W8A8}, "E=128,N=704,device_name=NVIDIA_H200,dtype=fp8_w8a8.json"),
        (
            {"scheme": QuantScheme.FP8_W8A8, "block_shape": (128, 128)},
            "E=128,N=704,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json",
        ),
        (
            {"scheme": QuantScheme.INT4_W4A16, "block_shape": (0, 64)},
            "E=128,N=704,device_name=NVIDIA_H200,dtype=int4_w4a16.json",
        ),
        ({"num_local_experts": 32}, "E=32,N=704,device_name=NVIDIA_H200.json"),
    ],
)
def test_the_public_name_of_a_layer(folder, layer, name):
    found = find_kernel_configs(num_tokens=16, **QWEN3 | layer)
    assert name in found.reasons[0]
    put(folder, name, {"16": TILE})
    lookup.forget()
    assert find_kernel_configs(num_tokens=16, **QWEN3 | layer).source == str(folder / name)


def test_the_native_name_holds_what_the_public_one_lacks():
    key = ConfigKey.of_layer(
        num_local_experts=128,
        intermediate_size=704,
        hidden_size=2048,
        top_k=8,
        dtype=torch.bfloat16,
        scheme=QuantScheme.INT4_W4A16,
        block_shape=(0, 64),
        platform=H200,
    )
    assert key is not None
    assert key.file_name == "E=128,N=704,H=2048,top_k=8,device_name=NVIDIA_H200,dtype=int4_w4a16,group=64.json"
    assert key.public.file_name == "E=128,N=704,device_name=NVIDIA_H200,dtype=int4_w4a16.json"


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ("", ""),
        (",dtype=float32", " --dtype fp32"),
        (",dtype=fp8_w8a8,block_shape=[128,128]", " --dtype fp8-block"),
    ],
)
def test_the_command_names_formats_as_the_command_line_does(fields, option):
    key = ConfigKey.parse(f"E=8,N=64,H=32,top_k=2,device_name=NVIDIA_H200{fields}.json")
    assert key.tune_command() == f"moegate tune --shape E=8,N=64,H=32,top_k=2{option}"


@pytest.mark.parametrize(
    "layer",
    [
        {"scheme": QuantScheme.FP8_W8A8},
        {"scheme": QuantScheme.FP8_W8A8, "block_shape": (64, 128)},
        {"scheme": QuantScheme.INT4_W4A16, "block_shape": (0, 64)},
    ],
)
def test_no_command_is_given_for_a_format_whose_tiles_are_not_searched(folder, layer):
    (reason,) = find_kernel_configs(num_tokens=16, **QWEN3 | layer).reasons
    assert "no tuned file" in reason
    assert "moegate tune" not in reason


KEYS = st.builds(
    lambda device, native, shape, **rest: ConfigKey(
        **rest,
        device_name=normalise_device_name(device) or "x",
        hidden_size=native[0] if native else None,
        top_k=native[1] if native else None,
        group=native[2] if native and shape is None else None,
        block_shape=shape,
    ),
    num_experts=st.integers(1, 4096),
    intermediate_size=st.integers(1, 1 << 20),
    device=st.text(max_size=300) | st.sampled_from(sorted(suite.DEVICES)),
    dtype=st.sampled_from((None, "float32", *(s.value for s in QuantScheme if s is not QuantScheme.NONE))),
    native=st.none() | st.tuples(st.integers(1, 1 << 16), st.integers(1, 64), st.none() | st.integers(1, 1024)),
    shape=st.none() | st.tuples(st.integers(1, 512), st.integers(1, 512)),
)


@settings(deadline=None, database=None)
@given(KEYS)
def test_every_key_comes_back_from_its_file_name(key):
    assert ConfigKey.parse(key.file_name) == key
    assert len(key.file_name.encode()) < 256
    assert os.path.basename(key.file_name) == key.file_name


@pytest.mark.parametrize(
    "name",
    [
        "E=128,N=704.json",
        "E=128,N=704,device_name=NVIDIA_H200_NVL.json",  # written so, it is never looked up
        "E=0128,N=704,device_name=NVIDIA_H200.json",
        "E=128,N=704,device_name=NVIDIA H200.json",
        "E=128,N=704,device_name=NVIDIA_H200,block_shape=[128, 128].json",
        "E=128,N=704,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[0,128].json",
        "E=0,N=704,device_name=NVIDIA_H200.json",
        "E=128,N=704,H=2048,device_name=NVIDIA_H200.json",
        "E=128,N=704,device_name=NVIDIA_H200.json.bak",
    ],
)
def test_a_name_that_is_never_looked_up_is_an_error(name):
    with pytest.raises(ValueError, match=r"expected|never looked up"):
        ConfigKey.parse(name)


# --- places and precedence ----------------------------------------------------------------------------------------


def test_the_users_folder_wins_over_the_shipped_one_and_native_over_public(folder, tmp_path_factory, monkeypatch):
    shipped = tmp_path_factory.mktemp("shipped")
    monkeypatch.setattr(lookup, "SHIPPED", shipped)
    key = ConfigKey.parse(NATIVE)
    order = []
    for place in (folder, shipped):
        order.append(write_tuned_file(place, key, {16: (CONFIG, CONFIG)}))
        order.append(put(place, PUBLIC, {"16": TILE}))
    while order:
        lookup.forget()
        assert find_kernel_configs(num_tokens=16, **QWEN3).source == str(order[0])
        order.pop(0).unlink()


def test_without_the_variable_the_shipped_files_are_read(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path)
    put(tmp_path, PUBLIC, {"16": TILE})
    lookup.forget()
    assert find_kernel_configs(num_tokens=16, **QWEN3).source == str(tmp_path / PUBLIC)
    lookup.forget()


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_variable_that_names_no_folder_is_an_error(tmp_path, monkeypatch, kind):
    place = tmp_path / "place"
    if kind == "a file":
        place.write_text("{}")
    monkeypatch.setenv(FOLDER_VARIABLE, str(place))
    lookup.forget()
    with pytest.raises(ValueError, match=rf"{FOLDER_VARIABLE}: expected a folder, got .*place"):
        find_kernel_configs(num_tokens=16, **QWEN3)


def test_a_rank_without_experts_and_a_device_without_a_name_take_the_default(folder):
    put(folder, PUBLIC, {"16": TILE})
    for layer in ({"num_local_experts": 0}, {"platform": Platform.parse("cuda:9.0")}):
        found = find_kernel_configs(num_tokens=16, **QWEN3 | layer)
        assert found.source == "default"
        assert "no tuned file is looked for" in found.reasons[0]


def test_a_file_is_read_once(folder, monkeypatch):
    put(folder, PUBLIC, {"16": TILE, "64": TILE})
    reads = []
    original = schema.read_bytes
    monkeypatch.setattr(lookup, "read_bytes", lambda path: reads.append(path) or original(path))
    for tokens in (1, 16, 17, 64, 100):
        find_kernel_configs(num_tokens=tokens, **QWEN3)
    assert [path.name for path in reads] == [NATIVE, PUBLIC]


def test_tiles_set_by_hand_win_over_files(folder):
    put(folder, PUBLIC, {"16": TILE})
    with use_kernel_configs(KernelConfig(32, 64, 64)):
        assert find_kernel_configs(num_tokens=16, **QWEN3).source == "override"
    assert find_kernel_configs(num_tokens=16, **QWEN3).source == str(folder / PUBLIC)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_an_error(folder):
    put(folder, PUBLIC, {"16": TILE}).chmod(0)
    with pytest.raises(TunedConfigError, match="Permission denied"):
        find_kernel_configs(num_tokens=16, **QWEN3)


# --- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "wanted", "key"),
    [
        ((16, 64), 1, 16),
        ((16, 64), 40, 16),  # a tie: the smaller
        ((16, 64), 41, 64),
        ((16, 64), 128, 64),  # twice the largest, still
        ((16, 64), 129, None),
        ((1,), 2, 1),
        ((1,), 3, None),
        ((1, 2, 4, 8), 2048, None),
        ((1024, 4096), 2, 1024),
    ],
)
def test_the_nearest_key_is_taken_and_none_beyond_twice_the_largest(folder, tokens, wanted, key):
    put(folder, PUBLIC, {str(number): suite.small_tile(index) for index, number in enumerate(tokens)})
    found = find_kernel_configs(num_tokens=wanted, **QWEN3)
    assert found.key == key
    assert (found.source == "default") == (key is None)
    if key is None:
        assert f"ends at {tokens[-1]} tokens" in found.reasons[-1]


# --- what is said -------------------------------------------------------------------------------------------------


def test_a_missing_file_is_warned_about_once_with_name_place_and_command(folder, said):
    for tokens in (1, 2, 3):
        find_kernel_configs(num_tokens=tokens, **QWEN3)
    ((level, text),) = said()
    assert level == "WARNING"
    for part in (NATIVE, PUBLIC, str(folder), str(lookup.SHIPPED), "moegate tune --shape E=128,N=704,H=2048,top_k=8"):
        assert part in text


def test_under_the_interpreter_a_missing_file_is_no_matter(folder, said):
    cpu = replace(Platform.parse("cpu"), name="cpu", interpreted=True)
    found = find_kernel_configs(num_tokens=4, **QWEN3 | {"platform": cpu})
    assert found.source == "default"
    assert said() == []


def test_steps_that_are_too_long_are_warned_about_once_for_the_file(folder, said):
    layer = QWEN3 | {"scheme": QuantScheme.FP8_W8A8, "block_shape": (128, 128)}
    name = "E=128,N=704,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    put(folder, name, {"1": TILE | {"BLOCK_SIZE_K": 256}, "8": TILE, "64": TILE | {"BLOCK_SIZE_K": 512}})
    for tokens in (1, 8, 64):
        find_kernel_configs(num_tokens=tokens, **layer)
    ((level, text),) = said()
    assert level == "WARNING"
    assert name in text
    assert "key 1: BLOCK_SIZE_K 256 runs as 128" in text
    assert "key 64: BLOCK_SIZE_K 512 runs as 128" in text
    assert "key 8" not in text


def test_what_the_device_cannot_run_is_warned_about_and_the_default_taken(folder, said):
    t4 = replace(Platform.parse("cuda:8.9"), name="NVIDIA L4")
    put(
        folder,
        "E=128,N=704,device_name=NVIDIA_L4.json",
        {"1": TILE, "64": TILE | {"BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 128, "num_stages": 4}},
    )
    layer = QWEN3 | {"platform": t4}
    assert find_kernel_configs(num_tokens=1, **layer).key == 1
    found = find_kernel_configs(num_tokens=64, **layer)
    assert (found.source, found.key) == ("default", None)
    assert re.search(r"key 64: it needs \d+ bytes of shared memory, the device has 101376", found.reasons[-1])
    assert [level for level, _ in said()] == ["WARNING"]


def test_ignored_keys_are_told(folder, said):
    put(folder, PUBLIC, {"triton_version": "3.1.0", "16": TILE | {"SPLIT_K": 1, "kpack": 2}})
    found = find_kernel_configs(num_tokens=16, **QWEN3)
    assert "ignored triton_version, 16/SPLIT_K, 16/kpack" in found.reasons[0]
    assert [level for level, _ in said()] == ["INFO"]


def test_rocm_files_without_pipelining_are_taken(folder):
    mi300 = replace(Platform.parse("rocm:gfx942"), name="AMD Instinct MI300X")
    tile = TILE | {"num_stages": 0, "waves_per_eu": 0, "matrix_instr_nonkdim": 16, "kpack": 2}
    put(folder, "E=128,N=704,device_name=AMD_Instinct_MI300X.json", {"16": tile})
    found = find_kernel_configs(num_tokens=16, **QWEN3 | {"platform": mi300})
    assert (found.key, found.w13.num_stages) == (16, 1)


def test_values_that_the_kernel_does_not_take_are_refused_and_no_error(folder):
    put(folder, PUBLIC, {"16": TILE | {"BLOCK_SIZE_M": 8}, "64": TILE | {"num_warps": 32}})
    assert "block_size_m" in find_kernel_configs(num_tokens=16, **QWEN3).reasons[-1]
    assert "num_warps" in find_kernel_configs(num_tokens=64, **QWEN3).reasons[-1]


# --- the native form ----------------------------------------------------------------------------------------------


def native(**changes):
    return {"format": "moegate", "version": 1, "tokens": {"16": {"w13": TILE, "w2": TILE}}} | changes


def test_each_gemm_has_its_own_tile_in_the_native_form(folder):
    w2 = TILE | {"BLOCK_SIZE_N": 128, "SWAP_AB": True}
    put(folder, NATIVE, native(tokens={"16": {"w13": TILE, "w2": w2}}, about={"seconds": 1e-5}, triton_version="3.6"))
    found = find_kernel_configs(num_tokens=16, **QWEN3)
    assert (found.w13.block_size_n, found.w2.block_size_n) == (32, 128)
    assert (found.w13.swap_ab, found.w2.swap_ab) == (False, True)


@pytest.mark.parametrize(
    ("document", "key"),
    [
        (native(version=2), "version"),
        (native(version="1"), "version"),
        (native(version=True), "version"),
        (native(format="other"), "format"),
        (native(tokens={}), ""),
        (native(tokens=[]), "tokens"),
        (native(measured=1), "measured"),
        (native(tokens={"16": {"w13": TILE}}), "16"),
        (native(tokens={"16": {"w13": TILE, "w2": TILE, "w3": TILE}}), "16"),
        (native(tokens={"16": {"w13": TILE, "w2": TILE | {"BLOCK_SIZE_M": 32}}}), "16/w2/BLOCK_SIZE_M"),
        (native(tokens={"16": {"w13": TILE | {"SWAP_AB": 1}, "w2": TILE}}), "16/w13/SWAP_AB"),
        (native(tokens={"x": {"w13": TILE, "w2": TILE}}), "x"),
    ],
)
def test_a_broken_native_file_is_an_error_with_its_key(folder, document, key):
    file = put(folder, NATIVE, document)
    with pytest.raises(TunedConfigError) as caught:
        find_kernel_configs(num_tokens=16, **QWEN3)
    assert caught.value.file == file
    assert caught.value.key == key
    assert str(file) in str(caught.value)


def test_swapped_operands_are_no_key_of_the_public_form(folder):
    put(folder, PUBLIC, {"16": TILE | {"SWAP_AB": True}})
    with pytest.raises(TunedConfigError, match="16/SWAP_AB"):
        find_kernel_configs(num_tokens=16, **QWEN3)


def test_a_broken_file_stays_an_error_on_every_call(folder):
    put(folder, PUBLIC, {"16": TILE | {"num_warps": -4}})
    for _ in range(2):
        with pytest.raises(TunedConfigError, match="16/num_warps: expected at least 1, got -4"):
            find_kernel_configs(num_tokens=16, **QWEN3)


# --- layers whose kernels no file speaks of ---------------------------------------------------------------------------

PREFILL = Workload(MODELS["qwen3-30b-a3b"], 2048)


def imagined_path(workload):
    return imagine_workload(workload, replace(H200, num_sms=132, shared_memory=232_448)).path


def test_the_suite_judges_the_tiles_of_files_on_layers_that_run_without_them_too(folder):
    facet = pytest.importorskip("moegate.conformance.subjects.moegate_configs").MoegateConfigs()
    file = put(folder, "E=128,N=768,device_name=NVIDIA_H200.json", {"2048": TILE})
    assert imagined_path(PREFILL).last("config")["source"] == "sorted rows"
    with facet.using(folder):
        assert imagined_path(PREFILL).last("config")["source"] == str(file)


def test_where_a_folder_is_named_it_is_said_that_some_layers_take_no_tile_of_it(folder, caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            imagined_path(replace(PREFILL, num_tokens=64))
            imagined_path(PREFILL)
    said = [message for message in caplog.messages if "sorted rows" in message]
    assert len(said) == 1
    assert said[0].startswith(
        f"{FOLDER_VARIABLE} is set, and some layers run on sorted rows, whose tiles no file gives"
    )


# --- defaults -----------------------------------------------------------------------------------------------------

SIZES = ((64, 96), (200, 72), (2048, 704), (2880, 2880), (4096, 14336), (7168, 256), (2048, 704), (33, 17))


@pytest.mark.parametrize("device", sorted(suite.DEVICES))
@pytest.mark.parametrize("weights", suite.WEIGHTS, ids=str)
def test_every_accepted_layer_has_a_default_that_fits(folder, device, weights):
    dtype, scheme, block_shape = weights
    facet = pytest.importorskip("moegate.conformance.subjects.moegate_configs").MoegateConfigs()
    tokens = (*range(1, 18), 31, 64, 65, 100, 512, 4096, 16384)
    for hidden, intermediate in SIZES:
        for num_tokens in tokens:
            question = suite.ConfigSpec(device, num_tokens, 64, intermediate, hidden, 4, dtype, scheme, block_shape)
            found = facet.find(question, folder)
            assert suite._misfit(question, found) == ""


def test_a_scale_block_that_no_step_divides_is_an_error_by_name(folder):
    layer = QWEN3 | {"scheme": QuantScheme.FP8_W8A8, "block_shape": (128, 100)}
    with pytest.raises(ValueError, match="block_shape: expected a K that 16 divides"):
        find_kernel_configs(num_tokens=16, **layer)


def test_the_default_is_the_one_of_the_tile_rule(folder):
    found = find_kernel_configs(num_tokens=512, num_local_experts=32, **QWEN3)
    rest = {"num_tokens": 512, "top_k": 8, "num_experts": 128, "dtype": torch.bfloat16, "platform": H200}
    assert found.w13 == default_kernel_config(n=1536, k=2048, **rest)
    assert found.w2 == default_kernel_config(n=2048, k=704, **rest)


# --- the writer ---------------------------------------------------------------------------------------------------


def test_a_public_file_is_written_as_other_engines_read_it(tmp_path):
    file = write_tuned_file(tmp_path, ConfigKey.parse(PUBLIC), {16: (CONFIG, CONFIG)}, triton_version="3.6.0")
    assert file.name == PUBLIC
    assert json.loads(file.read_text()) == {"triton_version": "3.6.0", "16": TILE}


def test_the_public_form_refuses_what_it_cannot_hold():
    key = ConfigKey.parse(PUBLIC)
    for pair in ((CONFIG, replace(CONFIG, num_warps=8)), (replace(CONFIG, swap_ab=True),) * 2):
        with pytest.raises(ValueError, match="public form"):
            dump(key, {16: pair})
    with pytest.raises(ValueError, match="at least one"):
        dump(key, {})


def test_a_written_file_can_be_read_again_to_go_on(tmp_path):
    key = ConfigKey.parse(NATIVE)
    assert read_tuned_file(tmp_path / NATIVE) is None
    file = write_tuned_file(tmp_path, key, {64: (CONFIG, CONFIG), 16: (CONFIG, CONFIG)}, about={"model": "qwen3"})
    again = read_tuned_file(file)
    assert again is not None
    assert list(again.entries) == [16, 64]
    assert json.loads(file.read_text())["about"] == {"model": "qwen3"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    key = ConfigKey.parse(NATIVE)
    file = write_tuned_file(tmp_path, key, {16: (CONFIG, CONFIG)})
    before = file.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_tuned_file(tmp_path, key, {64: (CONFIG, CONFIG)})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [NATIVE]


def test_the_writer_refuses_what_the_lookup_would_not_believe(tmp_path):
    with pytest.raises(TunedConfigError, match="BLOCK_SIZE_M"):
        write_tuned_file(tmp_path, ConfigKey.parse(NATIVE), {16: (CONFIG, replace(CONFIG, block_size_m=32))})
    assert list(tmp_path.iterdir()) == []


def test_shipped_files_are_under_names_that_are_looked_up_and_in_a_package_that_ships():
    assert (lookup.SHIPPED / "__init__.py").is_file()
    files = sorted(lookup.SHIPPED.glob("*.json"))
    assert len(files) >= 3
    for file in files:
        ConfigKey.parse(file.name)
