"""Whether an installed library is one that an integration was checked with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version


def require(package: str, oldest: str, extra: str) -> None:
    """ImportError, saying what to install, unless `package` is there in version `oldest` or later."""
    try:
        found = version(package)
    except PackageNotFoundError as error:
        message = f"flashprune needs {package} for this: pip install 'flashprune[{extra}]'"
        raise ModuleNotFoundError(message, name=package) from error
    if _numbers(found) < _numbers(oldest):
        raise ImportError(f"flashprune needs {package}>={oldest}, found {found}: pip install '{package}>={oldest}'")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))
