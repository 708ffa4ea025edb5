"""The one exception family of the kit, and the numbers that it takes from others."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from glmpp.words import printable, shown

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
LONGEST = 2000  # characters of a line
# What torch's allocator, the dynamic linker and the C library say ("Cannot …" or "cannot …").
_NO_MEMORY = ("DefaultCPUAllocator", "failed to map segment", "annot allocate memory")


class GlmppError(Exception):
    """Something the reader can act on: the message says what is wrong, where (file, tensor, stage) and what to do.

    Args:
        said: one line, whatever is put into it: what is not printable is escaped, and the middle of a long one left out.
        details: lines that the kit adds, such as the end of a process's log; `str()` has them below, indented.
    """

    def __init__(self, said: object = "", details: Iterable[str] = ()):
        super().__init__(shown(str(said), LONGEST))
        self.details = [printable(line[:LONGEST])[:LONGEST] for line in details]

    def __str__(self) -> str:
        return "\n    ".join([self.args[0], *self.details])


class KitError(GlmppError):
    """A fault of glmpp's own code, and no verdict on anything: what it says, with its traceback, belongs in a report."""


def short(value: object) -> str:
    """A value for a message: its repr, cut to a line."""
    try:
        return _short.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"a {type(value).__name__} of thousands of digits"


def whole(what: str, value: object, least: int, most: int) -> int:
    """A whole number in a range, as an int. Raises GlmppError for what is none: a truth value, text, 1.5, another number."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if isinstance(value, bool) or number is None or not least <= number <= most:
        raise GlmppError(f"{what}={short(value)}: expected a whole number from {least:,} to {most:,}")
    return number


def positive(what: str, value: object, most: float) -> float:
    """A number above 0. Raises GlmppError for what is none, NaN and infinity included."""
    try:
        fits = not isinstance(value, (bool, str)) and 0 < value <= most and math.isfinite(value)
    except TypeError:
        fits = False
    if not fits:
        raise GlmppError(f"{what}={short(value)}: expected a number above 0, at most {most:,}")
    return value


def chain(error: BaseException, while_handling: bool = True) -> Iterator[BaseException]:
    """An exception, what it was raised from, what pydantic wraps in it, and what was being handled then: each once."""
    found: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        cause = todo.pop()
        if cause is None or any(cause is other for other in found):
            continue
        found.append(cause)
        yield cause
        todo += [cause.__cause__]
        todo += [cause.__context__] if while_handling and not cause.__suppress_context__ else []
        if is_pydantics(cause):
            todo += [detail.get("ctx", {}).get("error") for detail in cause.errors()]


def is_pydantics(error: BaseException) -> bool:
    """Whether pydantic raised it: it wraps what the checks of vLLM's configs say."""
    return type(error).__module__.partition(".")[0] in ("pydantic", "pydantic_core") and hasattr(error, "errors")


def says_no_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, whatever its type."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def on_behalf(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function for somebody else: what it raises is the caller's caller's, not the kit's."""
    return function(*args, **kwargs)
