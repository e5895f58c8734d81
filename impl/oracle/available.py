"""Which kernels there are: on this machine, or on an imagined one that has them all."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..checks import expect_instance, expect_one_of
from ..config import MoEConfig
from ..experts.readiness import READY, Readiness, absent
from ..platform import Platform
from .backends import EXPERTS, experts_class
from .backends import UnquantizedMoeBackend as Backend


def installed_kernels(config: MoEConfig, platform: Platform) -> dict[Backend, Readiness]:
    """What this process has for `config`, on its own device.

    Nothing is imported or compiled to find out, but the modules of this project.

    Args:
        config: the layer.
        platform: this machine's device, as `Platform.detect` gives it.

    Raises:
        TypeError: another type of argument, by name.
    """
    expect_instance("config", config, MoEConfig)
    expect_instance("platform", platform, Platform)
    return {backend: experts_class(backend).readiness(config, platform) for backend in EXPERTS}


def every_kernel(without: Collection[Backend] = ()) -> Mapping[Backend, Readiness]:
    """A machine that has every kernel, but those left out: what a platform that is not this one is judged by.

    Raises:
        TypeError, ValueError: names left out that no backend has.
    """
    for name in expect_instance("without", without, Collection):
        expect_one_of("without", name, Backend)
    left_out = absent("left out by the question")
    return {backend: left_out if backend in without else READY for backend in EXPERTS}
