"""The oracle as a process asks it: with this environment and this machine's kernels, and with the answer logged."""

from __future__ import annotations

import logging
import os

from ..config import MoEConfig
from ..once import log_once
from ..platform import Platform
from .available import installed_kernels
from .decision import Decision
from .select import select_backend

logger = logging.getLogger(__name__)


def choose_backend(config: MoEConfig, platform: Platform, request: str | None = None) -> Decision:
    """`select_backend` with this process's environment and kernels; decision and warnings are logged once.

    Args:
        config: the layer.
        platform: the device, as `Platform.of` gives it.
        request: a backend's name or `auto`; None leaves it to `MOEGATE_BACKEND`.

    Raises:
        TypeError, ValueError: as `select_backend`.
    """
    decision = select_backend(config, platform, installed_kernels(config, platform), request, os.environ)
    for warning in decision.warnings:
        log_once(logger, logging.WARNING, warning)
    log_once(logger, logging.INFO, f"experts backend on {platform}: {decision}")
    return decision
