"""Faults planted in the lookup of tuned files, most of them seen in public engines, each caught by a named property."""

import logging
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from moegate.conformance import configs as suite
from moegate.conformance.judge import PROPERTIES
from moegate.conformance.subjects.moegate_configs import MoegateConfigs
from moegate.impl.config import QuantScheme
from moegate.impl.tuning import kernel_config, lookup, names, schema, writer
from moegate.impl.tuning.kernel_config import KernelConfig
from moegate.impl.tuning.names import ConfigKey

_OF_LAYER = ConfigKey.of_layer
_FILE_NAME = vars(ConfigKey)["file_name"].fget
_PARSE, _READ, _TILE, _TOKENS = schema.parse, schema.read_bytes, schema._tile, schema._tokens


class _Caught(Exception):
    pass


def violated(expected):
    """The properties that the suite finds violated; it stops at the first of the expected ones."""
    found = set()
    facet = MoegateConfigs()

    def take(verdicts):
        for verdict in verdicts:
            if not verdict.holds:
                found.add(verdict.property.id)
        if found & expected:
            raise _Caught

    # No shrinking: that it is seen is enough. No health checks: a fault may make any of them complain, and the
    # strategy's own health is checked where the suite runs it without one.
    @seed(1)
    @settings(
        max_examples=120,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(suite.config_specs())
    def lookups(question):
        with TemporaryDirectory() as folder:
            try:
                take(suite.judge_lookup(facet, question, Path(folder)))
            except (AttributeError, TypeError, KeyError) as error:  # a fault may leave the suite without an answer
                raise AssertionError from error

    try:
        for what in (*suite.BROKEN_FILES, *suite.BROKEN_PLACES) if "CONFIG-06" in expected else ():
            with TemporaryDirectory() as folder:
                take(suite.judge_broken(facet, what, suite.ConfigSpec(), Path(folder)))
        for device in suite.DEVICES if expected & {"CONFIG-07", "CONFIG-08"} else ():
            for _, scheme, block_shape in suite.WEIGHTS:
                with TemporaryDirectory() as folder:
                    take(suite.judge_validation(facet, device, scheme, block_shape, Path(folder)))
        for device in suite.DEVICES:
            with TemporaryDirectory() as folder:
                take(suite.judge_lookup(facet, suite.ConfigSpec(device), Path(folder)))
        lookups()
    except _Caught:
        pass
    except BaseExceptionGroup as group:
        if not group.subgroup(_Caught):
            raise
    return found


def _key(change):
    """The key that is looked for is changed, the one that is written is not."""

    def plant(patch):
        patch.setattr(lookup.Layer, "key", property(lambda layer: change(layer, _key_of(layer))))

    return plant


def _key_of(layer, **changes):
    arguments = {
        "num_local_experts": layer.num_local_experts,
        "intermediate_size": layer.intermediate_size,
        "hidden_size": layer.hidden_size,
        "top_k": layer.top_k,
        "dtype": layer.dtype,
        "scheme": layer.scheme,
        "block_shape": layer.block_shape,
        "platform": layer.platform,
    }
    return _OF_LAYER(**arguments | changes)


def _device_names(spell):
    def plant(patch):
        patch.setattr(names, "normalise_device_name", spell)

    return plant


def _nearest(choose):
    return lambda patch: patch.setattr(lookup, "nearest", choose)


def _never_beyond(patch):
    original = lookup._find

    def find(num_tokens, layer, folder):
        table = lookup._table(layer, folder)
        return original(min(num_tokens, 2 * table.tokens[-1]) if table.tokens else num_tokens, layer, folder)

    patch.setattr(lookup, "_find", find)


def _one_default(patch):
    patch.setattr(lookup, "default_kernel_config", lambda **kwargs: KernelConfig(64, 128, 128, 1, 8, 4))


def _errors_pass_for_no_file(patch):
    def parse(path, content):
        try:
            return _PARSE(path, content)
        except schema.TunedConfigError:
            tile = schema.Tile(16, 64, 64, 1, 4, 3)
            return schema.TunedFile(path, {16: (tile, tile)}, False)

    patch.setattr(lookup, "parse", parse)


def _only_regular_files_are_seen(patch):
    patch.setattr(lookup, "read_bytes", lambda path: _READ(path) if path.is_file() else None)


def _any_number(patch):
    def tile(path, key, value, ignored, *, may_swap):
        try:
            return _TILE(path, key, value, ignored, may_swap=may_swap)
        except schema.TunedConfigError as error:
            if "at least" in str(error) or "power of two" in str(error):
                return schema.Tile(16, 64, 64, 1, 4, 3)
            raise

    patch.setattr(schema, "_tile", tile)


def _silent_clamp(patch):
    def validated(file, layer):
        table = original(file, layer)
        entries = {m: (pair, () if pair else reasons) for m, (pair, reasons) in (table.entries or {}).items()}
        return replace(table, entries=entries)

    original = lookup._validated
    patch.setattr(lookup, "_validated", validated)


def _writer_forgets_w2(patch):
    original = writer.dump
    patch.setattr(
        "moegate.impl.tuning.writer.dump",
        lambda key, configs, **rest: original(key, {m: (w13, w13) for m, (w13, _) in configs.items()}, **rest),
    )


def _spaces_in_block_shape(patch):
    original = _FILE_NAME
    patch.setattr(ConfigKey, "file_name", property(lambda key: original(key).replace("128,128]", "128, 128]")))


FAULTS = {
    "any key serves, the smallest": (_nearest(lambda tokens, wanted: tokens[0]), {"CONFIG-02"}),
    "the larger key wins a tie": (
        _nearest(lambda tokens, wanted: min(tokens, key=lambda key: (abs(key - wanted), -key))),
        {"CONFIG-02"},
    ),
    "the key is rounded up": (
        _nearest(lambda tokens, wanted: next((key for key in tokens if key >= wanted), tokens[-1])),
        {"CONFIG-02"},
    ),
    "a file with decode keys alone serves prefill": (_never_beyond, {"CONFIG-03"}),
    "the H200 family has many names": (
        _device_names(lambda name: name.replace(" ", "_").replace("/", "_")),
        {"CONFIG-01", "CONFIG-12"},
    ),
    "every name with an H200 in it is the H200": (
        _device_names(lambda name: "NVIDIA_H200" if "H200" in name else name.replace(" ", "_")),
        {"CONFIG-05", "CONFIG-01"},
    ),
    "float16 has files of its own": (
        _key(lambda layer, key: replace(key, dtype="float16") if layer.dtype is torch.float16 else key),
        {"CONFIG-05", "CONFIG-01", "CONFIG-12"},
    ),
    "float32 takes bfloat16's files": (
        _key(lambda layer, key: replace(key, dtype=None) if key.dtype == "float32" else key),
        {"CONFIG-05", "CONFIG-11"},
    ),
    "the block shape is left out of the key": (
        _key(lambda layer, key: replace(key, block_shape=None)),
        {"CONFIG-05", "CONFIG-11"},
    ),
    "the block shape is spelled with a space": (_spaces_in_block_shape, {"CONFIG-05", "CONFIG-01"}),
    "a weight-only group passes for a block shape": (
        _key(lambda layer, key: replace(key, group=None, block_shape=(1, key.group)) if key.group is not None else key),
        {"CONFIG-05", "CONFIG-01"},
    ),
    "the writer knows a field that the lookup does not pass": (
        _key(lambda layer, key: _key_of(layer, top_k=1)),
        {"CONFIG-04"},
    ),
    "a scheme has another name in the lookup": (
        _key(lambda layer, key: replace(key, dtype="w8a8_fp8") if layer.scheme is QuantScheme.FP8_W8A8 else key),
        {"CONFIG-05", "CONFIG-01"},
    ),
    "N is the packed size for int4": (
        _key(
            lambda layer, key: (
                replace(key, intermediate_size=key.intermediate_size // 2)
                if layer.scheme is QuantScheme.INT4_W4A16
                else key
            )
        ),
        {"CONFIG-05", "CONFIG-01"},
    ),
    "the writer keeps one tile for both GEMMs": (_writer_forgets_w2, {"CONFIG-04"}),
    "one default for every device": (_one_default, {"CONFIG-05"}),
    "a broken file passes for another": (_errors_pass_for_no_file, {"CONFIG-06"}),
    "a link that leads nowhere passes for no file": (_only_regular_files_are_seen, {"CONFIG-06"}),
    "values are not looked at": (_any_number, {"CONFIG-06"}),
    "padded keys are numbers too": (
        lambda patch: patch.setattr(
            schema, "_tokens", lambda path, key: int(key) if key.isdigit() else _TOKENS(path, key)
        ),
        {"CONFIG-06"},
    ),
    "long steps run as they stand": (
        lambda patch: patch.setattr(lookup, "fit_block_k", lambda tile, block_shape: tile),
        {"CONFIG-07"},
    ),
    "long steps are cut without a word": (_silent_clamp, {"CONFIG-07"}),
    "weight-only groups are spanned": (
        lambda patch: patch.setattr(
            lookup,
            "fit_block_k",
            lambda tile, block_shape: kernel_config.fit_block_k(
                tile, None if (block_shape or (1,))[0] == 0 else block_shape
            ),
        ),
        {"CONFIG-07"},
    ),
    "shared memory is not counted": (
        lambda patch: patch.setattr(lookup, "obstacle", lambda *arguments: None),
        {"CONFIG-08"},
    ),
    "the default rule forgets the device's memory": (
        lambda patch: (
            patch.setattr(kernel_config, "_tiles", lambda dtype, platform, scheme: kernel_config._HOPPER),
            patch.setattr(kernel_config, "_fit", lambda config, dtype, platform: config),
            kernel_config._default.cache_clear(),
        ),
        {"CONFIG-05"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_a_named_property(fault, monkeypatch):
    logging.disable(logging.CRITICAL)
    try:
        plant, expected = FAULTS[fault]
        plant(monkeypatch)
        found = violated(expected)
        assert found & expected, f"caught by {sorted(found)} alone"
    finally:
        logging.disable(logging.NOTSET)
        kernel_config._default.cache_clear()
        lookup.forget()


def test_nothing_is_found_without_a_fault():
    assert violated(set(PROPERTIES)) == set()
