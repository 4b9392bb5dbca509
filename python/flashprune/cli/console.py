"""What every command prints, and how it fails: one line on stderr and exit code 2 for anything the user can mend."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

INTERRUPTED = 130  # the exit code after Ctrl-C
P = ParamSpec("P")
R = TypeVar("R")


class InputError(Exception):
    """A wrong argument or file: the message is all that the user sees."""


def stdout() -> Console:
    """A console on the current `sys.stdout`: plain text 80 columns wide where that is no terminal."""
    return Console(highlight=False, markup=False, emoji=False)


def table(title: str) -> Table:
    drawn = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", pad_edge=False)
    drawn.box = box.SIMPLE_HEAD
    return drawn


def progress() -> Progress:
    """A progress bar that leaves no trace, and is not drawn at all when stderr is no terminal."""
    bar = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=bar, transient=True, disable=not bar.is_terminal)


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn :class:`InputError` into one line on stderr and exit code 2, and warnings into one line each."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return command(*args, **kwargs)
            except InputError as error:
                fail(str(error))

    return wrapped


def fail(message: str) -> NoReturn:
    print(f"flashprune: error: {one_line(message)}", file=sys.stderr)
    raise typer.Exit(2)


def one_line(text: str) -> str:
    """Whitespace runs become one space; what a terminal would interpret (a hostile file name) is escaped."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"flashprune: note: {one_line(str(message))}", file=sys.stderr)
