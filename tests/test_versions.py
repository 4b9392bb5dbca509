"""What an integration says of a library that is missing or too old."""

import pytest

from flashprune.integrations import versions


def test_a_library_that_is_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda package: "5.19.1+local")
    versions.require("transformers", "5.19", extra="transformers")
    versions.require("transformers", "5.9", extra="transformers")


def test_one_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda package: "5.9.2")
    message = r"flashprune needs transformers>=5.19, found 5.9.2: pip install 'transformers>=5.19'"
    with pytest.raises(ImportError, match=message):
        versions.require("transformers", "5.19", extra="transformers")


def test_one_that_is_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"needs no-such-package for this: pip install 'flashprune\[extra\]'"):
        versions.require("no-such-package", "1.0", extra="extra")
