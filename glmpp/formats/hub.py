"""A checkpoint that lies on the Hub: the mapping that the downloaded folder would give, from its headers alone.

A safetensors file begins with its header, so one range request per shard is enough. `huggingface_hub` (1.0 or newer)
supplies endpoint, token, session and timeout, and is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from glmpp.errors import GlmppError
from glmpp.formats.files import parse_json
from glmpp.formats.header import MAX_HEADER_BYTES, read_header
from glmpp.formats.index import INDEX_FILE, check_index, natural_key, parse_index
from glmpp.formats.tensor import TensorSpec
from glmpp.progress import progress_bar

FIRST_BYTES = 150_000  # of each shard; of GLM-5.1-FP8's 119,000 tensors a 142nd makes a header of 111 kB
CONNECTIONS = 8
PAUSES = (0.5, 1.0)  # seconds before the second and the third attempt
T = TypeVar("T")


def read_repository(
    repo_id: str, revision: str | None = None, progress: bool | None = None
) -> tuple[list[TensorSpec], dict, str]:
    """Read config.json, the index and the safetensors headers of a model repository; no weight is downloaded.

    Args:
        repo_id: `owner/name`.
        revision: a branch, tag or commit (default: main), resolved once; every file comes from that one commit.
        progress: show a progress bar over the shards.

    Returns:
        What `Checkpoint.from_directory` finds in the downloaded folder: its tensors and its config; and the source,
        `owner/name@commit`. 150 kB of each shard are transferred, and the whole header where that is longer.

    Raises:
        GlmppError: no such repository or revision, no access, offline, no answer in three attempts of
            HF_HUB_DOWNLOAD_TIMEOUT seconds, or whatever `from_directory` refuses; the message names commit and file.
    """
    repo = _Repository(repo_id, revision)
    config = parse_json(repo.read("config.json"), f"{repo.source}/config.json")
    listed: dict[str, set[str]] = {}  # shard -> the tensors that the index places in it
    if INDEX_FILE in repo.files:
        weight_map = parse_index(repo.read(INDEX_FILE), f"{repo.source}/{INDEX_FILE}")
        for name, file in weight_map.items():
            listed.setdefault(file, set()).add(name)
    elif "model.safetensors" not in repo.files:
        raise GlmppError(f"{repo.source}: holds neither {INDEX_FILE} nor model.safetensors; only safetensors are read")
    for file, names in listed.items():
        if file not in repo.files:
            raise GlmppError(
                f"{repo.source}/{file}: the shard is missing; the index places {len(names)} tensors in it, "
                f"e.g. {min(names)!r}. Choose another revision"
            )

    files = sorted(listed, key=natural_key) or ["model.safetensors"]
    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        headers = pool.map(repo.read_tensors, files)
        headers = list(progress_bar(headers, "reading headers", total=len(files), show=progress))
    finally:  # after an error or an interrupt nobody waits for the requests that are under way
        repo.stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
    specs: list[TensorSpec] = []
    for file, held in zip(files, headers):
        if listed:
            check_index(f"{repo.source}/{file}", listed[file], held.keys())
        specs += [TensorSpec(name, *held[name][:2], file) for name in sorted(held)]
    return specs, config, repo.source


class _NoAnswer(Exception):
    """Nothing usable came from the Hub; the cause is the library's exception, or what the answer lacks."""


def _theirs(call: Callable[..., T], *args, **kwargs) -> T:
    """What a call of the library gives. Raises _NoAnswer for whatever it raises; the kit's own faults are not called so."""
    try:
        return call(*args, **kwargs)
    except Exception as error:  # any: of a malformed answer the library makes AttributeError, KeyError, TypeError
        raise _NoAnswer from error


class _Repository:
    """One commit of a model repository: the names of its files, and the beginning of each."""

    def __init__(self, repo_id: str, revision: str | None):
        try:
            from huggingface_hub import HfApi, constants
        except ImportError:
            raise GlmppError("reading from the Hub needs huggingface_hub: pip install 'huggingface_hub>=1.0'") from None
        self.repo_id, self.source, self.stopped = repo_id, f"{repo_id}@{revision or 'main'}", threading.Event()
        self.timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds; of its own the library's session waits for ever
        self.api = HfApi()
        info = self._ask(self.source, lambda: _theirs(self.api.model_info, repo_id, revision=revision, timeout=self.timeout))
        names = [None] if info.siblings is None else [sibling.rfilename for sibling in info.siblings]
        if not (info.sha and all(isinstance(said, str) for said in (info.sha, *names))):
            raise GlmppError(f"{self.source}: {self.api.endpoint} names no commit or no files; check HF_ENDPOINT")
        self.sha, self.source, self.files = info.sha, f"{repo_id}@{info.sha}", set(names)

    def read(self, file: str) -> bytes:
        """A whole file; a JSON file, as it may be no longer than a header."""
        if file not in self.files:
            raise GlmppError(
                f"{self.source}/{file}: no such file in the repository; from_hub reads models in the transformers layout"
            )
        return self._beginning(file, MAX_HEADER_BYTES)[0]

    def read_tensors(self, file: str) -> dict[str, tuple]:
        head, size = self._beginning(file, FIRST_BYTES)
        end = 8 + int.from_bytes(head[:8], "little")
        if len(head) < end <= min(size, MAX_HEADER_BYTES):
            head, size = self._beginning(file, end)
        return read_header(io.BytesIO(head), size, f"{self.source}/{file}")

    def _beginning(self, file: str, end: int) -> tuple[bytes, int]:
        """The first `end` bytes of a file, or all if it has fewer, and the size of the file."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        def get() -> tuple[bytes, int]:
            url = _theirs(hf_hub_url, self.repo_id, file, revision=self.sha, endpoint=self.api.endpoint)
            wanted = {"Range": f"bytes=0-{end - 1}", "Accept-Encoding": "identity"}  # sizes are those of the file itself
            headers = _theirs(build_hf_headers, headers=wanted)
            with contextlib.ExitStack() as opened:
                request = _theirs(get_session).stream("GET", url, headers=headers, timeout=self.timeout)
                answer = _theirs(opened.enter_context, request)
                if answer.status_code == 416:  # of an empty file there is no first byte
                    return b"", 0
                _theirs(hf_raise_for_status, answer)
                told = answer.headers.get("Content-Range" if answer.status_code == 206 else "Content-Length", "")
                if not (match := re.fullmatch(r"(?:bytes 0-\d+/)?(\d+)", told)):
                    raise _NoAnswer from ConnectionError(f"the answer does not say how large the file is: {told!r}")
                data, size, chunks = bytearray(), int(match[1]), answer.iter_bytes()
                while (chunk := _theirs(next, chunks, None)) is not None:
                    data += chunk
                    if len(data) >= end or self.stopped.is_set():  # a server without ranges goes on to the last byte
                        break
            if len(data) < min(end, size):
                raise _NoAnswer from ConnectionError(f"cut after {len(data)} of {min(end, size)} bytes")
            return bytes(data[:end]), size

        return self._ask(f"{self.source}/{file}", get)

    def _ask(self, label: str, request: Callable[[], T]) -> T:
        for pause in (*PAUSES, None):
            try:
                return request()
            except _NoAnswer as none:
                why, may_pass = self._explain(none.__cause__)
                if pause is None or not may_pass or self.stopped.wait(pause):
                    raise GlmppError(f"{label}: {why}") from None

    def _explain(self, error: BaseException) -> tuple[str, bool]:
        """What the reader can do about an error, and whether another attempt may help."""
        from huggingface_hub import errors

        log_in = "set a valid HF_TOKEN or log in with `hf auth login`"
        for kind, why in (
            (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set; unset it, or use Checkpoint.from_directory"),
            (errors.HFValidationError, f"{error} For a folder use Checkpoint.from_directory"),
            (errors.GatedRepoError, f"the repository is gated; accept its terms on its page and {log_in}"),
            (errors.RevisionNotFoundError, "the repository has no such branch, tag or commit"),
            (errors.RepositoryNotFoundError, f"no such repository, or a private one; check the name or {log_in}"),
        ):
            if isinstance(error, kind):
                return why, False
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None:
            why = f"{type(error).__name__}: {error}".removesuffix(": ")
            check = f"check the connection, HF_ENDPOINT and HF_HUB_DOWNLOAD_TIMEOUT (now {self.timeout} s)"
            return f"no usable answer from {self.api.endpoint} ({why}); {check}", True
        said = " ".join((getattr(error, "server_message", None) or "").split())[:200]
        advice = f"access refused; {log_in}" if status in (401, 403) else "try again later"
        return f"the server answers HTTP {status} {said}".rstrip() + f"; {advice}", status in (408, 429) or status >= 500
