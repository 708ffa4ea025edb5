"""Words of strangers as text, names of tensors and files, messages: whatever they are, they cannot end a line or hide."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What Unicode calls printable and shows as nothing or as a blank: fillers, selectors of a variant, Braille's blank.
BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U00016fe4\U0001bc9d\U0001d159\U000e0100-\U000e01ef]"
)

MESSAGE = 500  # characters of a message or a path
SHOWN = 4  # names of a list in a sentence


def printable(text: str) -> str:
    """A text as one line: what is not printable is escaped: newlines, tabs, surrogates, bidi and zero-width characters."""
    if text.isprintable() and not BLANK.search(text):
        return text
    hidden = (char for char in set(text) if not char.isprintable() or BLANK.match(char))
    return text.translate({ord(char): char.encode("unicode_escape").decode() for char in hidden})


def shown(text: str, limit: int = 200) -> str:
    """The same in at most `limit` characters: of a longer text its beginning, its length and its end.

    Of spaces side by side all but the last are escaped: with enough of them a terminal begins another line.
    """

    def line(part: str) -> str:
        return re.sub(" (?= )", r"\\x20", printable(part))

    if len(text) <= limit and len(whole := line(text)) <= limit:
        return whole
    left_out = f" … ({len(text):,} characters) … "
    end = (limit - len(left_out)) // 4
    start = line(text[:limit])[: limit - len(left_out) - end].rstrip(" ")  # no space beside another: see above
    return start + left_out + line(text[-limit:])[-end:].lstrip(" ")


def quoted(name: str) -> str:
    """A name in an error's sentence: its repr, cut as `shown` does."""
    return shown(repr(name))


def some(names: list[str]) -> str:
    """A list in a sentence: of a long one the first names and how many more there are."""
    first = ", ".join(map(shown, names[:SHOWN]))
    return first if len(names) <= SHOWN else f"{first} and {len(names) - SHOWN:,} more"


def joined(lines: Iterable[str]) -> str:
    """Lines as a text that has no others: what came into one as it was is escaped here."""
    return "\n".join(map(printable, lines))
