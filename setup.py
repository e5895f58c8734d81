"""The one thing that pyproject.toml cannot say: the rooms at the top level install as `moegate.<room>`.

`cli/` is the package `moegate` itself, so that nothing called `impl` or `bench` lands in a user's site-packages.
"""

from setuptools import find_packages, setup

ROOMS = ("reference", "impl", "conformance", "bench")

setup(
    packages=[
        "moegate",
        *(f"moegate.{room}" for room in ROOMS),
        *(f"moegate.{room}.{package}" for room in ROOMS for package in find_packages(room)),
    ],
    package_dir={"moegate": "cli", **{f"moegate.{room}": room for room in ROOMS}},
    package_data={"": ["*.json", "*.toml", "*.j2", "*.css", "*.js", "catalogue/*.toml"]},
)
