"""Mutants: faults that a rule makes of a source, so that what is planted is not of our own choosing.

Every expression and statement of the implementation that a rule fits is a candidate; a sample of them is drawn by a
seed. A mutant is a fault like any other: an edit of whole lines that occurs once in its file and keeps their number.
"""

from __future__ import annotations

import ast
import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from .fault import Edit, Fault, folder_of
from .survivors import mark_of

PACKAGE = "moegate.impl"
MOEGATE, KERNEL_FORMS, SCALED_FORMS = "moegate", "moegate:kernel_forms", "moegate:scaled_forms"
# Below the package: what reads checkpoints and other engines' libraries is judged by tests of its own, not by the
# suite; the rest of what no property of the suite runs on a CPU stands here too, each with what judges it.
LEFT_OUT = (
    "checkpoint.py",  # tests/test_checkpoint.py
    "checkpoint_models.py",
    "mxfp4.py",
    "whole_file.py",  # tests/test_crashes.py
    "fused_shared.py",  # tests/test_layer.py
    "ops.py",  # torch.compile: tests/test_compile.py
    "once.py",  # logging
    "overlap.py",  # two streams: a GPU alone, by the catalogue's faults that need one
    "experts/flashinfer_cutlass.py",  # a library that is not here; its predicate is the oracle's
    "lora/peft.py",  # tests/test_lora_peft.py
    "parallel/agreement.py",
    "parallel/collectives.py",  # process groups: tests/test_parallel_processes.py
    "parallel/ranks.py",
    "oracle/available.py",  # what is installed on this machine
    "oracle/choose.py",
    "__init__.py",
)
# The pairs of features come first: no other cases differ from each other as much.
_EXPERTS = ("test_experts.py::every_pair", "test_experts.py::stay_within")
_BATCHED = ("test_batched.py::every_pair", "test_batched.py::each_token")
_BOTH_FORMATS = (_EXPERTS[0], _BATCHED[0], _EXPERTS[1], _BATCHED[1])
_ORACLE = ("questions.py::test_oracle",)
_PUBLIC = ("test_public.py",)
# The few cases in which a rank raises come first.
_RANKS = ("test_ep.py::simulated_rank_raises", "test_ep.py::simulated_ranks_make")
# Which of the suite's files run a module, the nearest first.
TESTS: dict[str, tuple[str, ...]] = {
    "kernels/topk_routing.py": ("test_route.py",),
    "routing.py": (*_PUBLIC, "test_route.py", "test_api.py::select_experts"),
    "kernels/align.py": ("test_align.py", *_EXPERTS),
    "align.py": ("test_api.py::moe_align", "test_align.py", *_EXPERTS),
    "kernels/quantize.py": ("test_quant.py", _BATCHED[0], *_BOTH_FORMATS),
    "quantize.py": (*_PUBLIC, "test_quant.py", "test_experts.py::every_pair", *_RANKS),
    "quantization.py": (*_PUBLIC, "test_api.py::quant", *_EXPERTS),
    "kernels/batched_gemm.py": (*_BATCHED, "test_lora.py::every_kind"),
    "kernels/slabs.py": _BATCHED,
    "experts/batched_triton.py": (*_BATCHED, *_ORACLE),
    "batched.py": ("test_api.py::batched_experts", *_BATCHED),
    "kernels/lora_": ("test_lora.py::every_kind", *_RANKS, "test_lora.py"),
    "lora/sharded.py": (*_PUBLIC, *_RANKS),
    "lora/": (*_PUBLIC, "test_lora.py::every_kind", *_RANKS, "test_lora.py"),
    "parallel/": (*_PUBLIC, *_RANKS),
    "kernels/travel.py": (*_RANKS,),
    "oracle/": (*_PUBLIC, *_ORACLE),
    "platform.py": (*_PUBLIC, "questions.py", "test_configs.py"),
    "shared_experts.py": (
        *_PUBLIC,
        "questions.py::test_order",
    ),
    "layer.py": (*_PUBLIC, "test_shared.py::beside", "test_graph.py::operands_changed", *_RANKS),
    "experts_module.py": (*_PUBLIC, "test_shared.py::beside", *_RANKS),
    "tuning/": (*_PUBLIC, "test_configs.py"),
    "json_file.py": (*_PUBLIC, "test_configs.py"),
    "checks.py": (*_PUBLIC, "test_api.py", *_EXPERTS),
    "weights.py": (*_PUBLIC, "test_api.py", *_EXPERTS),
    "fused_moe.py": (*_PUBLIC, "test_api.py::fused_experts", *_EXPERTS, *_RANKS, "test_lora.py::every_kind"),
    "experts/cpu.py": (*_EXPERTS, *_RANKS, "test_lora.py::every_kind", *_ORACLE),
    "experts/": (*_ORACLE, *_EXPERTS),
    "kernels/activation.py": (*_BOTH_FORMATS[:2], "test_lora.py::every_kind", *_BOTH_FORMATS[2:]),
    "config.py": (*_PUBLIC, *_ORACLE, *_EXPERTS),
    "kernels/tile.py": (_EXPERTS[0], "test_configs.py::no_tuned_file", *_BOTH_FORMATS[1:], "test_lora.py::every_kind"),
    "kernels/grouped_gemm.py": (*_EXPERTS, "test_lora.py::every_kind"),
    "": (*_BOTH_FORMATS, "test_lora.py::every_kind", "test_large.py"),
}
# Kernels that the subject `moegate` does not run are judged where they run.
_SUBJECTS = {
    "kernels/gated_gemm.py": KERNEL_FORMS,
    "kernels/sorted_gemm.py": KERNEL_FORMS,
    "kernels/stream_rows.py": KERNEL_FORMS,
    "kernels/descriptors.py": KERNEL_FORMS,
    "experts/triton_forms.py": KERNEL_FORMS,
    "experts/kernel_form.py": KERNEL_FORMS,
    "kernels/block_scaled_gemm.py": SCALED_FORMS,
}
_CPU_VARIANT = ("experts/cpu.py", "parallel/", "lora/eager.py", "quantize.py")
_BOTH_VARIANTS = ("routing.py", "parallel/slabs.py")  # in torch and in Triton; slabs are Triton's


class _Text:
    """A source, cut by the places that its syntax tree names: a line and a column in bytes."""

    def __init__(self, text: str) -> None:
        self.text, self.lines = text, text.splitlines(keepends=True)
        self._starts = list(accumulate((len(line) for line in self.lines), initial=0))

    def offset(self, line: int, column: int) -> int:
        """Characters before a place."""
        text = self.lines[line - 1]
        return self._starts[line - 1] + (column if text.isascii() else len(text.encode()[:column].decode()))

    def span(self, first: int, last: int) -> str:
        """Whole lines, both included."""
        return self.text[self._starts[first - 1] : self._starts[last]]

    def of(self, node: ast.AST) -> str:
        """What stands there for a node."""
        return self.text[self.offset(node.lineno, node.col_offset) : self.offset(node.end_lineno, node.end_col_offset)]


@dataclass(frozen=True)
class _Change:
    """One candidate: a span of a source and what would stand there."""

    file: str
    rule: str
    start: tuple[int, int]
    end: tuple[int, int]
    new: str


_COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
_OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "%", ast.Mod: "//",
    ast.BitAnd: "|", ast.BitOr: "&", ast.LShift: ">>", ast.RShift: "<<", ast.BitXor: "&",
}  # fmt: skip


class _Rules(ast.NodeVisitor):
    """Collects the candidates of one file; annotations, docstrings, messages and decorators are no code to mutate."""

    def __init__(self, file: str, text: _Text) -> None:
        self.file, self.text, self.found = file, text, []

    def _put(self, rule: str, node: ast.AST, new: str) -> None:
        start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
        self.found.append(_Change(self.file, rule, start, end, new))

    def _source(self, node: ast.AST) -> str:
        return self.text.of(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        # Defaults are part of the interface, which the suite passes.
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef):
                self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        self._put("statement deleted", node, "pass")

    def visit_Import(self, node: ast.Import) -> None:
        """Nothing."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Nothing."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Nothing."""

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        self._put("statement deleted", node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._put("statement deleted", node, "pass")
        operator = _OPERATORS.get(type(node.op))
        if operator is not None:
            self._put("operator", node, f"{self._source(node.target)} {operator}= {self._source(node.value)}")
        self.visit(node.value)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            other = _COMPARISONS[type(node.ops[0])]
            self._put("comparison", node, f"{self._source(node.left)} {other} {self._source(node.comparators[0])}")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        left, right = self._source(node.left), self._source(node.right)
        operator = _OPERATORS.get(type(node.op))
        is_text = any(isinstance(side, (ast.JoinedStr, ast.Constant)) and not _is_number(side) for side in
                      (node.left, node.right))  # fmt: skip
        if operator is not None and not is_text:
            self._put("operator", node, f"({left}) {operator} ({right})")
            if isinstance(node.op, (ast.BitAnd, ast.BitOr)):
                self._put("mask", node, f"({left})")
                self._put("mask", node, f"({right})")
            else:
                self._put("operand", node, f"({left})")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        word = "or" if isinstance(node.op, ast.And) else "and"
        self._put("boolean", node, f" {word} ".join(f"({self._source(value)})" for value in node.values))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._put("negation", node, f"({self._source(node.operand)})")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._put("branch", node, f"({self._source(node.orelse)})")
        self._put("branch", node, f"({self._source(node.body)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._put("constant", node, str(not node.value))
        elif isinstance(node.value, (int, float)):
            self._put("constant", node, str(node.value + 1))

    def visit_Subscript(self, node: ast.Subscript) -> None:
        # Kernels index to broadcast, and types are subscripted too: indices that are numbers alone.
        if isinstance(node.slice, (ast.Constant, ast.UnaryOp, ast.Slice)):
            self.visit(node.slice)
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if self._source(node.func) == "KernelConfig":
            return  # a tile changes speed and no number
        for argument in node.args:
            self.visit(argument)
        name = self._source(node.func)
        for keyword in node.keywords:
            if keyword.arg in ("num_warps", "num_stages"):
                continue
            if keyword.arg == "mask" and name in ("tl.load", "tl.store"):
                self._put("mask", keyword.value, f"({self._source(keyword.value)}) | True")
            self.visit(keyword.value)
        if name in ("tl.where", "torch.where") and len(node.args) == 3:
            self._put("operand", node, f"({self._source(node.args[1])})")
            self._put("operand", node, f"({self._source(node.args[2])})")
        if name in ("min", "max", "tl.minimum", "tl.maximum") and len(node.args) == 2:
            self._put("operand", node, f"({self._source(node.args[0])})")
            self._put("operand", node, f"({self._source(node.args[1])})")
        self.visit(node.func)

    def visit_If(self, node: ast.If) -> None:
        self._put("branch", node.test, "True")
        self._put("branch", node.test, "False")
        self.generic_visit(node)


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def candidates(package: str = PACKAGE) -> list[Fault]:
    """Every mutant that the rules make of a package, in the order of its files."""
    folder = folder_of(package)
    found = []
    for path in sorted(folder.rglob("*.py")):
        name = str(path.relative_to(folder))
        if name not in LEFT_OUT and path.name != "__init__.py":
            found.extend(_of_file(name, path, package))
    return found


def sample(count: int, seed: int, package: str = PACKAGE) -> list[Fault]:
    """So many of them, by a draw for each edit that nothing else has a part in; all of them where there are no more.

    A change of the source takes out of a sample what it edits, and puts in few others.
    """
    drawn = sorted(
        candidates(package), key=lambda mutant: hashlib.sha256(f"{seed} {mark_of(mutant)}".encode()).digest()
    )
    return sorted(drawn[:count], key=lambda mutant: mutant.id)


def _of_file(name: str, path: Path, package: str) -> Iterator[Fault]:
    text = _Text(path.read_text())
    tree = ast.parse(text.text)
    rules = _Rules(name, text)
    rules.visit(tree)
    # The statements of the module, from their decorators on: a change is Python where the one around it is.
    first = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) for node in tree.body]
    last = [node.end_lineno or node.lineno for node in tree.body]
    numbers: dict[tuple[int, str], int] = {}
    for change in rules.found:
        around = bisect_right(first, change.start[0]) - 1
        edit = _edit(change, text, first[around], last[around])
        if edit is None:
            continue
        key = (change.start[0], change.rule)
        numbers[key] = numbers.get(key, 0) + 1
        suffix = f".{numbers[key]}" if numbers[key] > 1 else ""
        id = f"{name}:{change.start[0]}:{change.rule.replace(' ', '-')}{suffix}"
        shown = " ".join(text.text[text.offset(*change.start) : text.offset(*change.end)].split())
        yield Fault(
            id=id,
            area=name.split("/", maxsplit=1)[0].removesuffix(".py"),
            edits=(edit,),
            expect=(),
            tests=_by_prefix(name),
            variants=_variants(name),
            package=package,
            subject=_SUBJECTS.get(name, MOEGATE),
            note=f"{change.rule}: {shown} becomes {' '.join(change.new.split())}",
        )


def _variants(name: str) -> tuple[str, ...]:
    if name.startswith(_BOTH_VARIANTS):
        return ("cpu", "triton")
    return ("cpu",) if name.startswith(_CPU_VARIANT) else ("triton",)


def _by_prefix(name: str) -> tuple[str, ...]:
    return next(tests for prefix, tests in TESTS.items() if name.startswith(prefix))


def _edit(change: _Change, text: _Text, first: int, last: int) -> Edit | None:
    """The smallest run of whole lines around the change that occurs once; None where the result is no Python.

    Args:
        change: what is changed.
        text: of the file.
        first: line on which the module's statement around it begins.
        last: line on which it ends.
    """
    start, end = text.offset(*change.start), text.offset(*change.end)
    old = text.text[start:end]
    new = change.new.replace("\n", " ")
    # What had several lines keeps them: the rest is left empty inside a bracket, or behind a statement.
    missing = old.count("\n") - new.count("\n")
    if missing and new == "pass":
        new = "pass" + "\n" * missing
    elif missing:
        new = f"({new}" + "\n" * missing + ")"
    if new == old:
        return None
    statement, before = text.span(first, last), text.offset(first, 0)
    try:
        compile(statement[: start - before] + new + statement[end - before :], change.file, "exec", dont_inherit=True)
    except SyntaxError:
        return None
    first, last = change.start[0], change.end[0]
    while text.text.count(window := text.span(first, last)) != 1:
        if first == 1 and last == len(text.lines):
            return None
        first, last = max(1, first - 1), min(len(text.lines), last + (first == 1))
    before = text.offset(first, 0)
    return Edit(change.file, window, window[: start - before] + new + window[end - before :])
