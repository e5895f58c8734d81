"""What is timed: a real model's layer, a number of tokens, a routing, a dtype and a cache state, under one identity.

Two timings may be compared only where all of these agree, so all of them are part of a workload's id, the routing by
a hash of the ids that it really gives. Routings come from an integer hash, not from a library's random generator:
the same on every machine and for every version of torch.

Only the routed experts are timed: no gate GEMM, no top-k, no shared expert.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache

import numpy as np
import torch

from ..impl.quantization import WeightScale
from .formats import FORMATS, Format, find_format

TOKEN_COUNTS = tuple(2**power for power in range(15))
"""M from 1 to 16,384."""


@dataclass(frozen=True)
class Model:
    """The routed experts of one layer of a model, as one rank holds them.

    Attributes:
        name: the id's first part.
        num_experts: E, over all ranks.
        top_k: experts of one token.
        hidden_size: H.
        intermediate_size: I of one rank.
        source: where these numbers come from.
        activation: the model's own, under moegate's name (`moegate.impl.config.Activation`).
        num_local_experts: experts of this rank; None: all. Rank 0 holds the ids from 0 on.
        has_bias: whether the experts' GEMMs add a bias.
        interleaved: gate and up rows of w13 alternate, as in the published checkpoint.
        native_scheme: how the published checkpoint stores the experts, where that is not what is timed here.
    """

    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    source: str
    activation: str = "silu"
    num_local_experts: int | None = None
    has_bias: bool = False
    interleaved: bool = False
    native_scheme: str = "bf16"

    def __post_init__(self) -> None:
        sizes = {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_local_experts": self.local_experts,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k: expected at most num_experts {self.num_experts}, got {self.top_k}")
        if self.local_experts > self.num_experts:
            raise ValueError(
                f"num_local_experts: expected at most num_experts {self.num_experts}, got {self.num_local_experts}"
            )

    @property
    def local_experts(self) -> int:
        """E_local: how many experts' weights this rank holds."""
        return self.num_experts if self.num_local_experts is None else self.num_local_experts

    @property
    def is_gated(self) -> bool:
        """Whether w13 holds gate and up rows (2I) or I rows only."""
        return not self.activation.endswith("_no_mul")

    @property
    def w13_rows(self) -> int:
        """Rows of one expert's w13: 2I where gated, else I."""
        return (2 if self.is_gated else 1) * self.intermediate_size

    def expert_map(self) -> torch.Tensor | None:
        """`[E]` int32 on the CPU, global to local id and -1 elsewhere; None where this rank holds every expert."""
        if self.local_experts == self.num_experts:
            return None
        mapping = torch.full((self.num_experts,), -1, dtype=torch.int32)
        mapping[: self.local_experts] = torch.arange(self.local_experts, dtype=torch.int32)
        return mapping

    def scaled_down(self, divisor: int) -> Model:
        """The same experts and top_k with H and I divided, for machines without a GPU; named `<name>/<divisor>`.

        Raises:
            ValueError: a divisor that does not divide both.
        """
        if divisor < 1 or self.hidden_size % divisor or self.intermediate_size % divisor:
            raise ValueError(
                f"divisor: expected a common divisor of H {self.hidden_size} and I {self.intermediate_size}, "
                f"got {divisor}"
            )
        return replace(
            self,
            name=f"{self.name}/{divisor}",
            hidden_size=self.hidden_size // divisor,
            intermediate_size=self.intermediate_size // divisor,
        )


MODELS = {
    model.name: model
    for model in (
        Model("qwen3-30b-a3b", 128, 8, 2048, 768, "Hugging Face Qwen/Qwen3-30B-A3B config.json"),
        Model("mixtral-8x7b", 8, 2, 4096, 14336, "Hugging Face mistralai/Mixtral-8x7B-v0.1 config.json"),
        Model("qwen3.5-35b-a3b", 256, 8, 2048, 512, "Hugging Face Qwen/Qwen3.5-35B-A3B config.json"),
        Model(
            "deepseek-v3-tp8",
            256,
            8,
            7168,
            256,
            "Hugging Face deepseek-ai/DeepSeek-V3 config.json (moe_intermediate_size 2048 over 8 ranks)",
            native_scheme="fp8, blocks of 128 x 128",
        ),
        Model(
            "minimax-m2.5-ep4",
            256,
            8,
            3072,
            1536,
            "Hugging Face MiniMaxAI/MiniMax-M2.5 config.json (256 experts over 4 ranks)",
            num_local_experts=64,
            native_scheme="fp8, blocks of 128 x 128",
        ),
        Model(
            "gpt-oss-120b",
            128,
            4,
            2880,
            2880,
            "Hugging Face openai/gpt-oss-120b config.json",
            activation="swigluoai",
            has_bias=True,
            interleaved=True,
            native_scheme="mxfp4",
        ),
        # Not a model: gpt-oss-120b's sizes (H and I are no multiples of 128) with SiLU and without biases, which
        # public MoE benchmarks time under this name.
        Model("gpt-oss-like", 128, 4, 2880, 2880, "the sizes of openai/gpt-oss-120b, SiLU and no biases instead"),
        Model(
            "nemotron-3-nano",
            128,
            6,
            2688,
            1856,
            "Hugging Face nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 config.json",
            activation="relu2_no_mul",
        ),
    )
}

SMALL_MODELS = {
    model.name: model
    for model in (
        MODELS["qwen3-30b-a3b"].scaled_down(16),
        MODELS["mixtral-8x7b"].scaled_down(64),
        MODELS["qwen3.5-35b-a3b"].scaled_down(16),
        MODELS["deepseek-v3-tp8"].scaled_down(32),
        MODELS["minimax-m2.5-ep4"].scaled_down(32),
        MODELS["gpt-oss-like"].scaled_down(16),
        MODELS["gpt-oss-120b"].scaled_down(16),
        MODELS["nemotron-3-nano"].scaled_down(16),
    )
}
"""The same routing problems with H and I divided, for the CPU backend."""


def find_model(name: str) -> Model:
    """The model, or its scaled-down form, of this name.

    Raises:
        ValueError: a name that is neither, with those that are.
    """
    models = {**MODELS, **SMALL_MODELS}
    if name not in models:
        raise ValueError(f"model: expected one of {', '.join(models)}, got {name!r}")
    return models[name]


class Distribution(StrEnum):
    """How tokens choose experts. Every token's top_k experts are distinct in each."""

    UNIFORM = "uniform"
    """Every set of top_k experts is as likely as any other, for each token alone."""
    ZIPF = "zipf"
    """Experts are drawn without replacement, the r-th most popular one with a weight of r ** -exponent."""
    ALL_TO_ONE = "all-to-one"
    """Every token chooses the same top_k experts, on this rank."""


@dataclass(frozen=True)
class Routing:
    """A routing distribution and its seed.

    Attributes:
        distribution: how tokens choose.
        exponent: of `ZIPF`; 0 elsewhere.
        seed: another seed is another workload.
    """

    distribution: Distribution = Distribution.UNIFORM
    exponent: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "distribution", Distribution(self.distribution))
        if (self.distribution is Distribution.ZIPF) != (self.exponent > 0):
            raise ValueError(
                f"exponent: expected more than 0 for zipf and 0 elsewhere, got {self.exponent} for {self.distribution}"
            )
        if self.seed < 0:
            raise ValueError(f"seed: expected at least 0, got {self.seed}")

    def __str__(self) -> str:
        exponent = f"{self.exponent:g}" if self.exponent else ""
        return f"{self.distribution}{exponent}-s{self.seed}"

    @staticmethod
    def parse(text: str) -> Routing:
        """A routing from `uniform`, `zipf1.2`, `all-to-one`, each with `-sSEED` if wanted.

        Raises:
            ValueError: anything else.
        """
        match = re.fullmatch(r"(uniform|zipf|all-to-one)(\d+(?:\.\d+)?)?(?:-s(\d+))?", text)
        if match is None:
            raise ValueError(f"routing: expected uniform, zipf<exponent> or all-to-one, got {text!r}")
        return Routing(Distribution(match[1]), float(match[2] or 0), int(match[3] or 0))


@dataclass(frozen=True)
class LoraOptions:
    """LoRA adapters of one rank on every expert; token t of a call has the next adapter after token t - 1.

    Attributes:
        rank: of each adapter.
        adapters: how many.

    Raises:
        ValueError: a rank or a number out of its range.
    """

    rank: int
    adapters: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 256:
            raise ValueError(f"lora: expected a rank in [1, 256], got {self.rank}")
        if not 1 <= self.adapters <= 64:
            raise ValueError(f"adapters: expected a number in [1, 64], got {self.adapters}")

    def __str__(self) -> str:
        return f"lora{self.rank}x{self.adapters}"


@dataclass(frozen=True)
class Workload:
    """One measurement's whole identity.

    Attributes:
        model: the layer.
        num_tokens: M.
        routing: who chooses what.
        dtype: how activations and weights are stored, a key of `FORMATS`.
        cache_state: "cold" (each call's weights come from device memory) or "warm" (whatever the cache holds).
        lora: the tokens' adapters; None without.
    """

    model: Model
    num_tokens: int
    routing: Routing = Routing()
    dtype: str = "bf16"
    cache_state: str = "cold"
    lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens: expected at least 1, got {self.num_tokens}")
        find_format(self.dtype)
        if self.cache_state not in ("cold", "warm"):
            raise ValueError(f"cache_state: expected cold or warm, got {self.cache_state!r}")

    @property
    def format(self) -> Format:
        """How activations and weights are stored."""
        return FORMATS[self.dtype]

    @property
    def stored(self) -> str:
        """How the layer is stored, for tables: its dtype, and the adapters beside it."""
        return self.dtype if self.lora is None else f"{self.dtype}+{self.lora}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The activations' dtype as torch names it."""
        return self.format.activations

    @property
    def unsupported(self) -> str | None:
        """Why there is no such layer, in words; None where moegate can run it."""
        if self.model.interleaved and self.format.weight_scale is WeightScale.BLOCK:
            return f"{self.dtype} needs all gate rows before the up rows, and those of {self.model.name} alternate"
        if self.lora is not None and self.format.is_quantized:
            # Their deltas are judged by conformance.
            return f"adapters are timed on plain weights, and {self.dtype} are none"
        return self.format.unfit(self.model.hidden_size, self.model.intermediate_size)

    @property
    def id(self) -> str:
        """Every part of the identity in one string: two workloads are the same exactly where their ids are."""
        model = self.model
        local = "" if model.local_experts == model.num_experts else f"of{model.num_experts}"
        shape = f"E{model.local_experts}{local}k{model.top_k}H{model.hidden_size}I{model.intermediate_size}"
        rows = "-interleaved" if model.interleaved else ""
        bias = "-bias" if model.has_bias else ""
        return (
            f"{model.name}-{shape}-{model.activation}{rows}{bias}-{self.stored}-M{self.num_tokens}"
            f"-{self.routing}-{_routing_digest(model, self.num_tokens, self.routing)}-{self.cache_state}"
        )

    def topk_ids(self, rotation: int = 0) -> np.ndarray:
        """`[M, top_k]` int32 global ids, distinct within a row; the same for the same workload everywhere.

        Args:
            rotation: which of the routings that are timed in turn; 0 is the one whose hash the id bears.
        """
        return _topk_ids(self.model, self.num_tokens, self.routing, rotation)

    def topk_weights(self, rotation: int = 0) -> np.ndarray:
        """`[M, top_k]` float32 routing weights of at least 0.5 / (1.5 top_k), each row summing to one."""
        model = self.model
        bits = _hash(self.routing.seed, 3 + 8 * rotation, self.num_tokens, model.top_k)
        raw = 0.5 + (bits >> np.uint64(40)).astype(np.float64) / 2**24
        return (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)

    def lora_ids(self, rotation: int = 0) -> np.ndarray | None:
        """`[M]` int32, each token's adapter, another one in each rotation; None without adapters."""
        if self.lora is None:
            return None
        return ((np.arange(self.num_tokens) + rotation) % self.lora.adapters).astype(np.int32)

    def rows_by_local_expert(self, rotation: int = 0) -> np.ndarray:
        """`[E_local]` int64: how many routed pairs each expert of this rank gets."""
        counts = np.bincount(self.topk_ids(rotation).ravel(), minlength=self.model.num_experts)
        return counts[: self.model.local_experts]


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), a bijection of 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(seed: int, stream: int, rows: int, columns: int) -> np.ndarray:
    """`[rows, columns]` uint64; a value depends on seed, stream, row and column alone, not on the sizes."""
    golden = 0x9E3779B97F4A7C15
    key = np.array([((seed + 1) * golden + stream * 0xD1B54A32D192ED03) % 2**64], dtype=np.uint64)
    row_keys = _mix(_mix(key) + np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(golden))
    return _mix(row_keys[:, None] + np.arange(1, columns + 1, dtype=np.uint64)[None, :] * np.uint64(golden))


def _permutation(seed: int, stream: int, size: int) -> np.ndarray:
    return np.argsort(_hash(seed, stream, 1, size)[0], kind="stable")


def _topk_ids(model: Model, num_tokens: int, routing: Routing, rotation: int) -> np.ndarray:
    stream = 8 * rotation
    match routing.distribution:
        case Distribution.UNIFORM:
            scores = _hash(routing.seed, stream, num_tokens, model.num_experts)
            ids = np.argsort(scores, axis=1, kind="stable")[:, : model.top_k]
        case Distribution.ZIPF:
            ids = _zipf_ids(model, num_tokens, routing, stream)
        case Distribution.ALL_TO_ONE:
            # On this rank, where the load is: a rank without pairs would have nothing to do.
            order = _permutation(routing.seed, stream + 1, model.local_experts)
            if len(order) < model.top_k:
                order = np.concatenate([order, np.arange(model.local_experts, model.num_experts)])
            ids = np.broadcast_to(order[: model.top_k], (num_tokens, model.top_k))
    return np.ascontiguousarray(ids, dtype=np.int32)


def _zipf_ids(model: Model, num_tokens: int, routing: Routing, stream: int) -> np.ndarray:
    # Integer weights and integer comparisons: a floating-point logarithm may differ in its last bit between machines.
    weights = [max(1, round(2**24 * rank**-routing.exponent)) for rank in range(1, model.num_experts + 1)]
    ends = np.cumsum(np.array(weights, dtype=np.uint64))
    # One popularity order for all rotations: a model's hot experts stay hot.
    by_popularity = _permutation(routing.seed, 2, model.num_experts)
    ids = np.full((num_tokens, model.top_k), -1, dtype=np.int64)
    chosen = np.zeros((num_tokens, model.num_experts), dtype=bool)
    filled = np.zeros(num_tokens, dtype=np.int64)
    rows = np.arange(num_tokens)
    attempt = 0
    while rows.size:
        # Drawing again whenever an expert was drawn before is drawing without replacement.
        bits = _hash(routing.seed, stream + 4 + 8 * 2**20 * attempt, num_tokens, 1)[rows, 0]
        point = ((bits >> np.uint64(32)) * ends[-1]) >> np.uint64(32)
        expert = by_popularity[np.searchsorted(ends, point, side="right")]
        fresh = ~chosen[rows, expert]
        hit, expert = rows[fresh], expert[fresh]
        chosen[hit, expert] = True
        ids[hit, filled[hit]] = expert
        filled[hit] += 1
        rows = rows[filled[rows] < model.top_k]
        attempt += 1
    return ids


@lru_cache(maxsize=4096)
def _routing_digest(model: Model, num_tokens: int, routing: Routing) -> str:
    ids = _topk_ids(model, num_tokens, routing, rotation=0)
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()[:8]
