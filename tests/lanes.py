"""Which cases of a matrix every change is tested on (`make test`); the others are for `make test-all`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def short(cases: Iterable[Any], rule: Callable[..., bool]) -> list[Any]:
    """The cases, with the mark `slow` on those that `rule` does not keep in the short lane.

    rule: takes the values of one case, each as an argument. It keeps at least one of each kind.
    """
    found = [case if isinstance(case, tuple) else (case,) for case in cases]
    kept = [bool(rule(*case)) for case in found]
    assert any(kept), "the short lane holds none of these cases"
    return [pytest.param(*c, marks=() if k else pytest.mark.slow) for c, k in zip(found, kept, strict=True)]
