from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from moegate.conformance.cases import build_experts
from moegate.conformance.configs import (
    BROKEN_FILES,
    BROKEN_PLACES,
    DEVICES,
    FOUND,
    HARMLESS,
    WEIGHTS,
    ConfigSpec,
    config_specs,
    judge_broken,
    judge_lookup,
    judge_shipped,
    judge_validation,
    layer_tiles,
    put_public,
)
from moegate.conformance.properties.num import budget_of, judge_values, reference_of
from moegate.conformance.selection import SELECTION
from moegate.conformance.spec import ExpertsSpec
from moegate.conformance.strategies import POOLS, experts_specs

EXAMPLES = 40
# Of the suite's schemes, by the names in files: those that share no scale along K but a row's.
FILE_SCHEMES = {
    "none": "none",
    "fp8_channel_token": "fp8_w8a8",
    "int8_channel_token": "int8_w8a8",
    "int8_w8a16_channel": "int8_w8a16",
}
# Likewise those with scales of blocks, which files name beside the scheme.
FILE_BLOCKS = {"fp8_block": "fp8_w8a8"}


@pytest.fixture
def configs(moegate_session):
    subject = moegate_session.subject
    if "configs" not in subject.facets(subject.variants[0]):
        reason = f"{subject.name} does not define configs"
        moegate_session.ledger.skipped[reason] += 1
        pytest.skip(reason)
    return subject.configs()


@pytest.mark.moegate_facets("configs")
def test_files_are_found_by_name_and_nearest_key(moegate_session, configs):
    def judge(spec):
        with TemporaryDirectory() as folder:
            return judge_lookup(configs, spec, Path(folder))

    moegate_session.explore(config_specs(), judge, name="CONFIG", variant="configs", examples=260)


@pytest.mark.moegate_facets("configs")
@pytest.mark.parametrize("scheme", ["none", "fp8_w8a8"])
@pytest.mark.parametrize("what", [*BROKEN_FILES, *BROKEN_PLACES])
def test_a_broken_file_is_an_error_that_names_it(moegate_session, configs, what, scheme, tmp_path):
    spec = ConfigSpec(scheme=scheme)
    moegate_session.settle(judge_broken(configs, what, spec, tmp_path), spec, moegate_session.replay(spec))


@pytest.mark.moegate_facets("configs")
@pytest.mark.parametrize("device", DEVICES)
def test_values_are_checked_against_kernel_and_device(moegate_session, configs, device, tmp_path):
    for dtype, scheme, block_shape in WEIGHTS:
        # A width that no shipped file serves: what is found without the user's file is the default.
        spec = ConfigSpec(device=device, dtype=dtype, scheme=scheme, block_shape=block_shape, N=704)
        verdicts = judge_validation(configs, spec, tmp_path)
        moegate_session.settle(verdicts, spec, moegate_session.replay(spec))


@pytest.mark.moegate_facets("configs")
def test_every_shipped_file_is_reachable_and_valid(moegate_session, configs, tmp_path):
    spec = ConfigSpec()
    moegate_session.settle(judge_shipped(configs, tmp_path), spec, moegate_session.replay(spec))


def run_with(session, variant, configs, spec, folder, tiles):
    """FOUND and HARMLESS on one layer whose tuned file in `folder` gives `tiles`; nothing on a path without tiles."""
    subject = session.subject
    case = build_experts(spec, session.device)
    trace = reference_of(case)
    with configs.using(folder), subject.trace() as record:
        output = session.run_experts(case, variant)
    taken = [record.last(fact) for fact in ("config", "config_w2")]
    if taken[0] is None:
        return []
    wanted = [{name.lower(): size for name, size in tile.items() if name.isupper()} for tile in tiles]
    ran = all(
        fact["source"] != "default" and all(fact[name] == size for name, size in sizes.items())
        for fact, sizes in zip(taken, wanted, strict=True)
    )
    values = judge_values(case, output, trace, budget_of(case, trace, subject.numerics))
    wrong = [f"{verdict.property.id}: {verdict.detail}" for verdict in values if not verdict.holds]
    used = max((verdict.budget_used or 0.0 for verdict in values), default=None)
    return [
        FOUND.verdict(ran, f"expected the tiles {tiles}, ran {taken}"),
        HARMLESS.verdict(not wrong, f"{tiles}: {wrong}", budget_used=used),
    ]


def put_tiles(configs, device, spec, local_experts, tiles, folder):
    """A file in `folder` that gives a layer of the device these tiles."""
    sizes = {"M": spec.M, "E": local_experts, "N": spec.I, "H": spec.H, "top_k": spec.top_k}
    scheme = (FILE_SCHEMES | FILE_BLOCKS)[spec.scheme]
    blocks = {"block_shape": (spec.block_n, spec.block_k)} if spec.scheme in FILE_BLOCKS else {}
    question = ConfigSpec(device=device, dtype=spec.dtype, scheme=scheme, **blocks, **sizes)
    if tiles[0] == tiles[1] and "SWAP_AB" not in tiles[0]:
        put_public(folder, question, {spec.M: tiles[0]})
    else:
        configs.write(folder, question, {spec.M: tiles})


@pytest.mark.moegate_facets("experts", "configs", "trace")
@pytest.mark.moegate_executions(EXAMPLES, 1)
def test_no_tuned_file_changes_a_result_beyond_the_budget(moegate_session, moegate_variant, configs):
    session, variant, subject = moegate_session, moegate_variant, moegate_session.subject
    device = configs.device_name(session.device)
    # On a GPU each tile of each shape is a kernel to compile.
    shapes = POOLS[session.device].shapes[: 1 if session.device == "cuda" else None]

    def judge(spec):
        local_experts = build_experts(spec, session.device).w2.shape[0]
        number = spec.seed // 2 % (2 if session.device == "cuda" else 128)
        tiles = layer_tiles(number, own_w2=device in DEVICES and spec.seed % 2 == 0)
        with TemporaryDirectory() as name:
            put_tiles(configs, device, spec, local_experts, tiles, Path(name))
            return run_with(session, variant, configs, spec, Path(name), tiles)

    # Without blocks and groups, which clamp a step; on a GPU each tile of each scheme is a kernel to compile.
    known = tuple(FILE_SCHEMES)[: 1 if session.device == "cuda" else None]
    schemes = tuple(scheme for scheme in known if scheme in subject.capabilities.schemes)
    plain = replace(subject.capabilities, schemes=schemes, activations=("silu",), biases=("none",))
    drawn = experts_specs(session.device, plain, dtypes=subject.capabilities.dtypes[:1])
    session.explore(
        drawn.filter(lambda spec: spec.M > 0 and spec.expert_map != "owns_nothing").map(
            lambda spec: replace(spec, H=shapes[spec.seed % len(shapes)][0], I=shapes[spec.seed % len(shapes)][1])
        ),
        judge,
        name=f"CONFIG/{variant}",
        variant=variant,
        examples=EXAMPLES,
    )


def weights_of(question):
    """How a spec says what a file's name says of the weights; None for those of which the suite has no layers."""
    if question.scheme == "none":
        return {"scheme": "none"}
    scheme = next((name for name, named in FILE_BLOCKS.items() if named == question.scheme), None)
    if scheme is None or question.block_shape is None:
        return None
    return {"scheme": scheme, "block_n": question.block_shape[0], "block_k": question.block_shape[1]}


@pytest.mark.moegate_facets("experts", "configs", "trace")
def test_every_key_of_every_shipped_file_is_numerically_right(moegate_session, moegate_variant, configs, tmp_path):
    """On the file's own device the model's layer at each number of tokens; elsewhere its tiles on a small one."""
    session = moegate_session
    device = configs.device_name(session.device)
    empty = tmp_path / "empty"
    empty.mkdir()
    tried = set()  # of the small layer, which gives the same tiles one answer whatever key they have
    for number, file in enumerate(configs.shipped()):
        question = configs.question_of(file)
        weights = weights_of(question)
        if weights is None or weights["scheme"] not in session.subject.capabilities.schemes:
            session.ledger.skipped[f"{file.name}: no layers of {question.scheme} to run"] += 1
            continue
        is_here = question.device.split()[:2] == device.split()[:2]
        if session.device == "cuda" and not is_here:
            session.ledger.skipped[f"{file.name}: for another device"] += 1
            continue
        keys = question.tokens
        if session.device == "cuda" and SELECTION.profile == "gate":
            # Each is kernels to compile: the gate takes a ninth of a file, another of each, and nights take all.
            keys = keys[number % 9 :: 9]
        for tokens in keys:
            found = configs.find(replace(question, M=tokens), empty, with_shipped=True)
            tiles, folder = (found.w13, found.w2), empty
            if is_here:
                size = {"M": tokens, "H": question.H, "I": question.N, "E": question.E, "top_k": question.top_k}
                spec = ExpertsSpec(**size, **weights, dtype=question.dtype)
            elif (weights["scheme"], str(tiles)) in tried:
                continue
            else:
                tried.add((weights["scheme"], str(tiles)))
                size = {"M": 40, "H": 200, "I": 72, "E": 4, "top_k": 2}
                spec = ExpertsSpec(**size, **weights, dtype=question.dtype, seed=tokens % 256)
                folder = tmp_path / f"{file.stem}-{tokens}"
                folder.mkdir()
                put_tiles(configs, device, spec, spec.E, tiles, folder)
            session.ledger.executions[moegate_variant] += 1
            verdicts = run_with(session, moegate_variant, configs, spec, folder, tiles)
            session.settle(verdicts, spec, session.replay(spec))
