"""Bytes and JSON from files, with errors that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

from glmpp.errors import GlmppError


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise GlmppError(f"{path}: cannot be read: {error.strerror}") from None


def opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise GlmppError(f"{path}: cannot be opened: {error.strerror}") from None


def parse_json(raw: bytes, label: str) -> dict:
    """A JSON object from bytes. Raises GlmppError, in which they are called `label`."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise GlmppError(f"{label}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise GlmppError(f"{label}: expected a JSON object, found {type(value).__name__}")
    return value


def printable(text: str) -> str:
    """Text from a checkpoint for a terminal or a page: its control characters escaped."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)
