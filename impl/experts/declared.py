"""Backends that are declared, so that the oracle knows them, while their kernels ship elsewhere."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config import ActivationFormat, MoEConfig
from ..platform import Platform
from .base import StandardExperts
from .readiness import Readiness, absent


def first_refusal(*checks: tuple[bool, str]) -> str | None:
    """The words of the first check that fails, None where all hold."""
    return next((words for holds, words in checks if not holds), None)


def common_checks(config: MoEConfig) -> tuple[tuple[bool, str], ...]:
    """What none of these backends can do: LoRA, the batched format, routing weights on the input."""
    return (
        (not config.is_lora_enabled, "applies no LoRA"),
        (
            config.activation_format is ActivationFormat.STANDARD,
            f"takes the standard activation format, got {config.activation_format}",
        ),
        (not config.apply_router_weight_on_input, "multiplies routing weights into the output alone"),
    )


class DeclaredExperts(StandardExperts):
    """A backend that the oracle knows and this project ships no kernel of.

    Attributes:
        ships: where its kernels live, for the user.
    """

    ships: ClassVar[str]

    @classmethod
    def readiness(cls, config: MoEConfig, platform: Platform) -> Readiness:
        """Absent: only declared."""
        del config, platform
        return absent(f"declared alone: moegate ships no {cls.backend} kernel ({cls.ships} has them)")

    def apply(self, *args: Any, **kwargs: Any) -> None:
        """Refused.

        Raises:
            NotImplementedError: always; `readiness` says why.
        """
        raise NotImplementedError(f"{self.backend}: moegate ships no kernel of it; {self.ships} has them")
