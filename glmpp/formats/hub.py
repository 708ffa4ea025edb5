"""A checkpoint that lies on the Hub: the mapping that the downloaded folder would give, from its headers alone.

A safetensors file begins with its header, so one range request per shard is enough.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import TypeVar
from urllib.parse import quote

import msgspec

from glmpp.errors import GlmppError
from glmpp.formats.config import ONCE
from glmpp.formats.files import parse_json
from glmpp.formats.header import MAX_HEADER_BYTES, read_header
from glmpp.formats.hub_requests import SECONDS, Requests
from glmpp.formats.index import parse_index
from glmpp.formats.tensor import TensorSpec
from glmpp.formats.weights import ADAPTER, adapter_line, by_file, check_readable, missing_line, notes, weight_files
from glmpp.progress import progress_bar

FIRST_BYTES = 150_000  # of each shard; of GLM-5.1-FP8's 119,000 tensors a 142nd makes a header of 111 kB
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}", re.IGNORECASE)
T = TypeVar("T")
Read = tuple[list[TensorSpec], dict, str, list[str]]


class _File(msgspec.Struct, gc=False):
    rfilename: str


class _Listing(msgspec.Struct):
    """What the Hub says of a revision."""

    sha: str
    siblings: list[_File]


def read_repository(
    repo_id: str, revision: str | None = None, progress: bool | None = None, seconds: float = SECONDS
) -> Read:
    """Read config.json, the index and the safetensors headers of a model repository; no weight is downloaded.

    Args:
        repo_id: `owner/name`.
        revision: a branch, tag or commit (default: main), resolved once; every file comes from that one commit.
        progress: show a progress bar over the shards.
        seconds: how long all of it may take.

    Returns:
        What `Checkpoint.from_directory` finds in the downloaded folder: its tensors and its config; the source,
        `owner/name@commit`; and what is to be told of the choice of files. 150 kB of each shard are transferred, and the
        whole header where that is longer.

    Raises:
        GlmppError: no such repository or revision, no access, offline, no answer in three attempts of
            HF_HUB_DOWNLOAD_TIMEOUT seconds, not everything within `seconds`, or whatever `from_directory` refuses; the
            message names commit and file. Token, and user and password of addresses, are not in it.
    """
    hub = Requests(seconds)
    try:
        return _read(_Repository(hub, repo_id, revision), progress)
    except GlmppError as error:
        raise GlmppError(hub.without_secrets(str(error))) from None
    finally:  # after an error or an interrupt nobody waits for the requests that are under way
        hub.stopped.set()


def _read(repo: _Repository, progress: bool | None) -> Read:
    if "config.json" not in repo.files and ADAPTER in repo.files:
        raise GlmppError(adapter_line(repo.source, parse_json(repo.get(ADAPTER), f"{repo.source}/{ADAPTER}")))
    config = parse_json(repo.get("config.json"), f"{repo.source}/config.json", ONCE)
    found = weight_files(repo.files)
    check_readable(found, repo.source, repo.files)
    index = found.index
    listed = by_file(parse_index(repo.get(index), f"{repo.source}/{index}") if index else None)
    for file in found.missing(listed):
        said = missing_line(f"{repo.source}/{file}", listed[file], file in repo.files)
        raise GlmppError(f"{said}. Choose another revision")
    files = found.opened(listed)
    headers = repo.each(repo.read_tensors, *files)
    specs: list[TensorSpec] = []
    held: dict[str, list[str]] = {}
    for header, file in zip(progress_bar(headers, "reading headers", total=len(files), show=progress), files):
        held[file] = sorted(header)
        specs += [TensorSpec(name, *header[name][:2], file) for name in held[file]]
    return specs, config, repo.source, notes(found, listed, held)


class _Repository:
    """One commit of a model repository: the names of its files, and the beginning of each."""

    def __init__(self, hub: Requests, repo_id: str, revision: str | None):
        self.hub, self.repo_id, self.source = hub, repo_id, f"{repo_id}@{revision or 'main'}"
        ((self.sha, self.files),) = hub.run(self.resolve, {self.source: revision})
        self.source = f"{repo_id}@{self.sha}"

    def each(self, call: Callable[[str], T], *files: str) -> Iterator[T]:
        """What a call gives of each file, within the deadline."""
        return self.hub.run(call, {f"{self.source}/{file}": file for file in files})

    def get(self, file: str) -> bytes:
        return next(self.each(self.read, file))

    def resolve(self, revision: str | None) -> tuple[str, set[str]]:
        """The commit that a revision is now, and its files."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise GlmppError(f"{self.source}: {error} For a folder use Checkpoint.from_directory") from None
        if revision in ("", ".", ".."):  # in an address they would lead to another one
            raise GlmppError(f"{self.source}: {revision!r} is no branch, tag or commit")
        url = f"{self.hub.endpoint}/api/models/{self.repo_id}"
        if revision is not None:
            url += f"/revision/{quote(revision, safe='', errors='replace')}"

        def get() -> _Listing | None:
            data = self.hub.get(url, MAX_HEADER_BYTES + 1).data
            if len(data) > MAX_HEADER_BYTES:
                raise GlmppError(f"{self.source}: the list of its files has more than {MAX_HEADER_BYTES:,} bytes")
            try:
                return msgspec.json.decode(data, type=_Listing)
            except msgspec.ValidationError:
                return None
            except (ValueError, msgspec.DecodeError, RecursionError) as error:
                raise self.hub.broken(error) from error

        said = self.hub.ask(self.source, get)
        if said is None or not COMMIT.fullmatch(said.sha):
            raise GlmppError(
                f"{self.source}: {self.hub.endpoint} names no commit or no files (expected: 'sha', "
                "40 or 64 hex digits, and 'siblings', each with 'rfilename'); check HF_ENDPOINT"
            )
        return said.sha, {file.rfilename for file in said.siblings}

    def read(self, file: str) -> bytes:
        """A whole file; a JSON file, as it may be no longer than a header."""
        if file not in self.files:
            raise GlmppError(
                f"{self.source}/{file}: no such file in the repository; from_hub reads models in the transformers layout"
            )
        data, size = self._beginning(file, MAX_HEADER_BYTES)
        if size > MAX_HEADER_BYTES:
            raise GlmppError(
                f"{self.source}/{file}: has {size:,} bytes; at most {MAX_HEADER_BYTES:,} are read of such a file"
            )
        return data

    def read_tensors(self, file: str) -> dict[str, tuple]:
        head, size = self._beginning(file, FIRST_BYTES)
        end = 8 + int.from_bytes(head[:8], "little")
        if len(head) < end <= min(size, MAX_HEADER_BYTES):
            head, size = self._beginning(file, end)
        return read_header(io.BytesIO(head), size, f"{self.source}/{file}")

    def _beginning(self, file: str, end: int) -> tuple[bytes, int]:
        """The first `end` bytes of a file, or all if it has fewer, and the size of the file."""
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repo_id, file, revision=self.sha, endpoint=self.hub.endpoint)

        def get() -> tuple[bytes, int]:
            status, headers, data = self.hub.get(url, end, Range=f"bytes=0-{end - 1}")
            if status == 416:  # of an empty file there is no first byte
                return b"", 0
            told = headers.get("Content-Range" if status == 206 else "Content-Length", "")
            if not (match := re.fullmatch(r"(?:bytes 0-\d+/)?(\d{1,18})", told)):
                raise self.hub.broken(ConnectionError(f"the answer does not say how large the file is: {told[:100]!r}"))
            size = int(match[1])
            if len(data) < min(end, size):
                raise self.hub.broken(ConnectionError(f"cut after {len(data)} of {min(end, size)} bytes"))
            return data[:size], size

        return self.hub.ask(f"{self.source}/{file}", get)
