"""`moegate explain`: which backend is chosen, and of every candidate why it was taken or passed over."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from moegate import exit_codes
from moegate.conformance.console import printable, wide_console
from moegate.json_output import expect_json_file, put_json

if TYPE_CHECKING:
    from moegate.impl.config import MoEConfig
    from moegate.impl.oracle.decision import Decision, Reason
    from moegate.impl.platform import Platform

SCHEMA = 1
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Names that `--without` takes for several backends at once.
PACKAGES = {"flashinfer": ("flashinfer_trtllm", "flashinfer_cutlass")}


def explain(
    platform: Annotated[
        str | None,
        typer.Option(help="cuda:9.0, rocm:gfx942, xpu, cpu, tpu or out_of_tree; this machine where left out."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bf16, fp16, fp32, fp8_w8a8, int8_w8a8, int8_w8a16 or int4_w4a16.")
    ] = "bf16",
    block_shape: Annotated[
        str | None, typer.Option(help="N,K of block-wise weight scales; 0,GROUP of groups along K.")
    ] = None,
    activation: Annotated[str, typer.Option(help="silu, gelu, gelu_tanh, swigluoai, ...")] = "silu",
    batched: Annotated[bool, typer.Option("--batched", help="Tokens arrive as [E_local, max_tokens, H].")] = False,
    lora: Annotated[bool, typer.Option("--lora", help="LoRA adapters may be applied to the experts.")] = False,
    bias: Annotated[bool, typer.Option("--bias", help="The experts' GEMMs add biases.")] = False,
    weight_on_input: Annotated[
        bool, typer.Option("--weight-on-input", help="Routing weights multiply the experts' input (top-k 1).")
    ] = False,
    dp: Annotated[int, typer.Option(help="Data-parallel ranks.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert-parallel ranks.")] = 1,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    experts: Annotated[int, typer.Option(help="E, the global number of experts.")] = 128,
    top_k: Annotated[int | None, typer.Option(help="Experts a token; 8 (1 with --weight-on-input).")] = None,
    hidden: Annotated[int, typer.Option(help="H, the hidden size.")] = 2048,
    intermediate: Annotated[int, typer.Option(help="The model's intermediate size of one expert.")] = 768,
    backend: Annotated[
        str | None, typer.Option(help="The backend to ask for; MOEGATE_BACKEND, else auto, where left out.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="A backend, or `flashinfer`, that is not there. May be repeated.")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Write the result as JSON; - is standard output.")
    ] = None,
) -> None:
    """Say which backend computes a layer's experts, and why each other candidate does not.

    For this machine only what is installed counts; a platform named by --platform that is not this machine has every
    kernel but those that --without names. Exit codes: 0 decided, 1 refused, 4 bad arguments.
    """
    from moegate.impl.oracle.decision import BackendRefusedError
    from moegate.impl.oracle.select import select_backend

    console = wide_console(stderr=json_file == "-")
    expect_json_file(console, "explain", json_file)
    decision, refusal = None, None
    reasons: tuple[Reason, ...] = ()
    try:
        device, is_here = _platform(platform)
        config = _config(
            dtype=dtype,
            block_shape=block_shape,
            activation=activation,
            batched=batched,
            lora=lora,
            bias=bias,
            weight_on_input=weight_on_input,
            ranks={"dp_size": dp, "ep_size": ep, "tp_size": tp},
            sizes={"num_experts": experts, "hidden_size": hidden, "intermediate_size": intermediate},
            top_k=top_k,
        )
        available = _available(config, device, is_here, without or [])
        decision = select_backend(config, device, available, backend, os.environ)
        reasons = decision.reasons
    except BackendRefusedError as error:
        refusal, reasons = error, error.reasons
    except (TypeError, ValueError) as error:
        console.print(f"moegate explain: {error}", markup=False, style="red")
        raise typer.Exit(exit_codes.BAD_ARGUMENTS) from None

    report = _report(device, is_here, config, decision, reasons, refusal)
    is_written = put_json(console, "explain", json_file, report)
    if json_file != "-":
        _print(console, report, reasons)
    if not is_written:
        raise typer.Exit(exit_codes.NOTHING_DONE)
    raise typer.Exit(exit_codes.FINDING if decision is None else exit_codes.HOLDS)


def _platform(text: str | None) -> tuple[Platform, bool]:
    """The platform asked about, and whether it is this machine's."""
    from moegate.impl.platform import Platform

    if text is None:
        return Platform.detect(), True
    asked = Platform.parse(text)
    try:
        here = Platform.detect()
    except (RuntimeError, ValueError):  # a device that moegate does not know is certainly not the one asked about
        return asked, False
    return (here, True) if str(here) == str(asked) else (asked, False)


def _config(
    *,
    dtype: str,
    block_shape: str | None,
    activation: str,
    batched: bool,
    lora: bool,
    bias: bool,
    weight_on_input: bool,
    ranks: dict[str, int],
    sizes: dict[str, int],
    top_k: int | None,
) -> MoEConfig:
    import torch

    from moegate.impl.config import ActivationFormat, MoEConfig, ParallelConfig, QuantScheme

    schemes = [scheme.value for scheme in QuantScheme if scheme is not QuantScheme.NONE]
    if dtype not in (*DTYPES, *schemes):
        raise ValueError(f"--dtype: expected one of {', '.join((*DTYPES, *schemes))}, got {dtype!r}")
    shape = None
    if block_shape is not None:
        match = re.fullmatch(r"([0-9]{1,9}),([0-9]{1,9})", block_shape)
        if match is None:
            raise ValueError(f"--block-shape: expected N,K such as 128,128 or 0,64, got {block_shape!a:.80}")
        shape = (int(match[1]), int(match[2]))
    return MoEConfig(
        **sizes,
        top_k=(1 if weight_on_input else min(8, sizes["num_experts"])) if top_k is None else top_k,
        dtype=getattr(torch, DTYPES.get(dtype, "bfloat16")),
        scheme=QuantScheme.NONE if dtype in DTYPES else QuantScheme(dtype),
        block_shape=shape,
        activation=activation,
        activation_format=ActivationFormat.BATCHED if batched else ActivationFormat.STANDARD,
        apply_router_weight_on_input=weight_on_input,
        is_lora_enabled=lora,
        has_bias=bias,
        parallel=ParallelConfig(**ranks),
    )


def _available(config: MoEConfig, device: Platform, is_here: bool, without: list[str]) -> Any:
    from moegate.impl.experts.readiness import absent
    from moegate.impl.oracle.available import every_kernel, installed_kernels
    from moegate.impl.oracle.backends import EXPERTS

    names = {backend.value: backend for backend in EXPERTS}
    left_out = []
    for name in without:
        if name not in names and name not in PACKAGES:
            raise ValueError(f"--without: expected one of {', '.join((*names, *PACKAGES))}, got {name!r}")
        left_out += [names[backend] for backend in PACKAGES.get(name, (name,))]
    if not is_here:
        return every_kernel(left_out)
    return installed_kernels(config, device) | dict.fromkeys(left_out, absent("left out by --without"))


def _report(
    device: Platform,
    is_here: bool,
    config: MoEConfig,
    decision: Decision | None,
    reasons: tuple[Reason, ...],
    refusal: Exception | None,
) -> dict[str, Any]:
    experts = None if decision is None or decision.experts is None else decision.experts
    kernel = None if experts is None else experts.readiness(config, device)
    return {
        "schema": SCHEMA,
        "platform": str(device),
        "this_machine": is_here,
        "backend": None if decision is None else decision.backend.value,
        "experts": None if experts is None else experts.__name__,
        "reasons": [reason.as_dict() for reason in reasons],
        "warnings": [] if decision is None else list(decision.warnings),
        "refusal": None if refusal is None else str(refusal),
        "kernel_here": None if kernel is None else {"state": kernel.state.value, "why": kernel.why},
    }


def _source(source: str) -> str:
    """`https://github.com/vllm-project/vllm/pull/44220` as `vllm #44220`."""
    match = re.fullmatch(r"https://github\.com/[^/]+/([^/]+)/(?:pull|issues)/(\d+)", source)
    return source if match is None else f"{match[1]} #{match[2]}"


def _print(console: Any, report: dict[str, Any], reasons: tuple[Reason, ...]) -> None:
    here = (
        "this machine: what is installed counts" if report["this_machine"] else "not this machine: every kernel counts"
    )
    console.print(f"{report['platform']} ({here})", markup=False)
    table = Table(box=None, pad_edge=False)
    for title in ("candidate", "", "why", "source"):
        table.add_column(title, overflow="fold", no_wrap=title == "candidate")
    for reason in reasons:
        state = Text("taken", style="green") if reason.taken else Text("passed over", style="yellow")
        why = reason.why + (f" [moved back by: {', '.join(reason.demotions)}]" if reason.demotions else "")
        table.add_row(Text(reason.candidate.value), state, Text(printable(why)), Text(_source(reason.source)))
    console.print(table)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", markup=False, style="yellow")
    if report["refusal"] is not None:
        console.print(f"refused: {report['refusal']}", markup=False, style="red")
        return
    experts = report["experts"] or "the platform's own experts"
    console.print(f"decision: {report['backend']} ({experts})", markup=False, style="bold")
    kernel = report["kernel_here"]
    if not report["this_machine"] and kernel is not None and kernel["state"] != "ready":
        console.print(f"here: {kernel['why']}", markup=False)
