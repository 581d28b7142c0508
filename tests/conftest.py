"""Fixtures of all tests."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import pytest  # noqa: E402

from tests import sglang_lane, slurm_cluster  # noqa: E402
from tests.zygote import Zygote  # noqa: E402


@pytest.fixture(scope="session")
def ranks() -> Iterator[Zygote]:
    """`ranks(world_size, fn, timeout=DEADLINE, **kwargs)`: results of a module-level function, by rank."""
    zygote = Zygote()
    yield zygote
    zygote.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("sglang") and not sglang_lane.PYTHON.exists():
            item.add_marker(pytest.mark.skip(reason=sglang_lane.MISSING))
        if item.get_closest_marker("slurm") and not slurm_cluster.available():
            item.add_marker(pytest.mark.skip(reason=slurm_cluster.MISSING))
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    from megatron_refine import platform

    if not platform.has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))
