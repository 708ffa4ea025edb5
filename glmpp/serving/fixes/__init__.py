"""Fixes of single model classes of vLLM at run time, for what a loader cannot cure: one module for each, off by default.

A module of this package has a docstring (what is wrong, what the fix does), `RELEASES` that it was tried on,
`ARCHITECTURES` that it is for, as in config.json, and `apply()`, which changes vLLM's classes and imports vLLM itself.
`CURES` says for which failures it is offered: an exception and a pattern of the file that it rises in, or a kind of
incompleteness and a pattern of the parameter; `SCHEME`, if there is one, which words the quantisation's config has.
It has to be called before the model is built. That it cures, and changes nothing else, is shown by `make test-upstream`.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Iterable, Sequence
from types import ModuleType

from glmpp.errors import GlmppError

KNOWN = "known"  # instead of names: all that are for the release and the model
NAMES = tuple(sorted(found.name for found in pkgutil.iter_modules(__path__)))
_applied: set[str] = set()


def named(names: str | Sequence[str]) -> list[str]:
    """One name or several as a list. Raises GlmppError for what is neither the name of a fix nor KNOWN."""
    names = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if unknown := [name for name in names if name != KNOWN and name not in NAMES]:
        raise GlmppError(f"fix {unknown[0]!r} is unknown; there are {', '.join(NAMES)}, and {KNOWN!r} for all that fit")
    return names


def fix(name: str) -> ModuleType:
    """The module of a fix."""
    return importlib.import_module(f"{__name__}.{name}")


def about(name: str) -> str:
    """What a fix is for, in one line."""
    return fix(name).__doc__.splitlines()[0].rstrip(".")


def known(release: str | None, architectures: Iterable[str]) -> list[str]:
    """Names of the fixes that were tried on a release and are for one of a model's architectures."""
    return [name for name in NAMES if tried_on(name, release) and set(fix(name).ARCHITECTURES) & set(architectures)]


def curing(release: str | None, config: dict, failures: Iterable[tuple[str, str]]) -> list[str]:
    """Of the fixes that are known those that are for one of a load's failures.

    Args:
        failures: exception and file, or kind of incompleteness and parameter.
    """
    failures, found = list(failures), []
    quantised = json.dumps(config.get("quantization_config") or {})
    for name in known(release, config.get("architectures") or []):
        one = fix(name)
        fits = all(f'"{word}"' in quantised for word in getattr(one, "SCHEME", ()))
        if fits and any(kind == what and re.search(where, place) for what, where in one.CURES for kind, place in failures):
            found.append(name)
    return found


def tried_on(name: str, release: str | None) -> bool:
    """Whether a fix was tried on a release, or on a build of it ("0.33.0+cpu")."""
    return (release or "").partition("+")[0] in fix(name).RELEASES


def chosen(names: str | Sequence[str], release: str | None, architectures: Sequence[str]) -> list[str]:
    """The fixes that names stand for, each of which fits.

    Args:
        names: of fixes, or KNOWN for all that fit, which may be none.

    Raises:
        GlmppError: a name that is unknown, or a fix that was not tried on the release or is for other models: what was
            asked for by name and does not apply must not pass for done.
    """
    wanted: list[str] = []
    for name in named(names):
        wanted += known(release, architectures) if name == KNOWN else [name]
    for name in wanted:
        if not tried_on(name, release):
            tried = ", ".join(fix(name).RELEASES)
            raise GlmppError(f"fix {name} was tried on vLLM {tried}, not on {release}, and is not applied: leave it out")
        if not set(fix(name).ARCHITECTURES) & set(architectures):
            its, of = ", ".join(fix(name).ARCHITECTURES), ", ".join(architectures) or "no architecture"
            raise GlmppError(f"fix {name} is for {its}; this model is of {of}. Leave it out, or say {KNOWN!r}")
    return list(dict.fromkeys(wanted))


def apply(names: str | Sequence[str], release: str | None, architectures: Sequence[str]) -> list[str]:
    """Apply fixes to this process, each at most once, before a model is built.

    Args:
        names, release, architectures: as in `chosen`.

    Returns:
        Those that are active for the model now, applied here or before.

    Raises:
        GlmppError: as `chosen`; nothing is applied then.
    """
    active = chosen(names, release, architectures)
    for name in active:
        if name not in _applied:
            fix(name).apply()
            _applied.add(name)
    return active
