"""Requests to the Hub with limits, as the server may be broken or hostile: bytes, redirects, attempts, seconds.

`huggingface_hub` (1.0 or newer) supplies endpoint, token, session and timeout, and is imported when it is needed. Its
`model_info` and `parse_safetensors_file_metadata` read an answer of any length, and unpack what is compressed.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from email.utils import parsedate_to_datetime
from typing import NamedTuple, TypeVar
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

import msgspec

from glmpp.errors import GlmppError

CONNECTIONS = 8
PAUSES = (0.5, 1.0)  # seconds before the second and the third attempt
SECONDS = 600.0  # for a whole repository; the headers of GLM-5.1-FP8's 142 shards take less than ten
MAX_REDIRECTS = 10
MAX_ERROR_BYTES = 10_000  # of the body of an error or a redirect
LOG_IN = "set a valid HF_TOKEN or log in with `hf auth login`"
# X-Error-Code of a refusal. Source: `hf_raise_for_status` of huggingface_hub 2.4.0.
REFUSALS = {
    "GatedRepo": f"the repository is gated; accept its terms on its page and {LOG_IN}",
    "RevisionNotFound": "the repository has no such branch, tag or commit",
    "RepoNotFound": f"no such repository, or a private one; check the name or {LOG_IN}",
}
T, Item = TypeVar("T"), TypeVar("Item")


class NoAnswer(Exception):
    """Nothing usable came from the Hub: why, whether another attempt may help, and the seconds that it asks to wait."""

    def __init__(self, why: str, may_pass: bool = True, wait: float = 0):
        super().__init__(why)
        self.why, self.may_pass, self.wait = why, may_pass, wait


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    data: bytes  # the beginning of the body


class Requests:
    """The requests that read one repository: they share a deadline and end together.

    Attributes:
        endpoint: the Hub's address, without a slash at its end.
        stopped: set it and no request begins any more.
    """

    def __init__(self, seconds: float):
        try:
            from huggingface_hub import constants
        except ImportError:
            raise GlmppError("reading from the Hub needs huggingface_hub: pip install 'huggingface_hub>=1.0'") from None
        except ValueError as error:  # it reads HF_HUB_… when it is imported
            raise GlmppError(f"a variable HF_HUB_… is no number: {error}") from None
        self.endpoint, self.stopped = constants.ENDPOINT, threading.Event()
        self.seconds, self.until = seconds, time.monotonic() + seconds
        self.timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds; of its own the library's session waits for ever
        self.secrets: set[str] = set()
        for address in (self.endpoint, *getproxies().values()):
            if match := re.match(r"(?:\w+://)?(.+)@", address):
                self._hide(match[1])

    def run(self, call: Callable[[Item], T], items: dict[str, Item]) -> Iterator[T]:
        """What a call gives of each item, in their order, by 8 threads; the keys name the items in errors.

        The threads are daemons: at its end Python waits for those of a ThreadPoolExecutor, which a server can hold for ever.

        Raises:
            GlmppError: the seconds are over.
        """
        futures: dict[str, Future] = {label: Future() for label in items}
        todo = iter([*zip(futures.values(), items.values())])

        def work() -> None:
            for future, item in todo:
                if self.stopped.is_set():
                    return
                try:
                    future.set_result(call(item))
                except BaseException as error:
                    future.set_exception(error)

        for _ in range(min(CONNECTIONS, len(items))):
            threading.Thread(target=work, daemon=True).start()
        for label, future in futures.items():
            if not wait([future], min(max(self.until - time.monotonic(), 0), threading.TIMEOUT_MAX)).done:
                raise GlmppError(
                    f"{label}: still waiting for the server when the {self.seconds:g} s for the whole repository were over; "
                    "try again later, or allow more seconds (--timeout)"
                )
            yield future.result()

    def ask(self, label: str, request: Callable[[], T]) -> T:
        """What a request gives, in three attempts. Raises GlmppError, which begins with the label."""
        for pause in (*PAUSES, None):
            try:
                return request()
            except NoAnswer as none:
                too_long = time.monotonic() + none.wait >= self.until
                if pause is None or not none.may_pass or too_long or self.stopped.wait(max(pause, none.wait)):
                    raise GlmppError(f"{label}: {none.why}") from None

    def get(self, url: str, most: int, **wanted: str) -> Answer:
        """The answer to a GET with these headers: 2xx or 416, and at most so many bytes of its body. Raises NoAnswer.

        Redirects are followed here: the client would read their bodies to the end.
        """
        from huggingface_hub import errors, get_session
        from huggingface_hub.utils import build_hf_headers

        request = None
        try:
            headers = build_hf_headers(headers={"Accept-Encoding": "identity", **wanted})
            self._hide(headers.get("authorization", "").removeprefix("Bearer "))
            session = get_session()
            request = session.build_request("GET", url, headers=headers, timeout=self.timeout)
            for _ in range(MAX_REDIRECTS + 1):
                self._hide(request.url.userinfo.decode())
                with contextlib.closing(session.send(request, stream=True, follow_redirects=False)) as answer:
                    data = self._body(answer, most if answer.is_success else MAX_ERROR_BYTES)
                    if answer.next_request is None:
                        break
                    request = answer.next_request  # with the authorization, but for another host
            else:
                raise ConnectionError(f"more than {MAX_REDIRECTS} redirects")
        except errors.OfflineModeIsEnabled:
            raise NoAnswer("HF_HUB_OFFLINE is set; unset it, or use Checkpoint.from_directory", False) from None
        except Exception as error:  # any: of a malformed answer the client makes AttributeError, KeyError, TypeError
            raise self.broken(error, request) from error
        coding = answer.headers.get("Content-Encoding", "").lower()
        encoded = not {"", "identity", "aws-chunked"}.issuperset(re.split(r"[\s,]+", coding))
        if not answer.is_success and answer.status_code != 416:
            raise self._refusal(answer, request.url, b"" if encoded else data)
        if encoded:
            raise self.broken(ConnectionError(f"encoded as {coding[:50]!r}, which was not asked for"), request)
        return Answer(answer.status_code, answer.headers, data)

    def _body(self, answer, end: int) -> bytes:
        """The first `end` bytes of an answer; fewer if it has fewer. Where it is read to its end, the connection is kept."""
        enough = end + ("Content-Length" in answer.headers)  # without it, the end may be long in coming
        data, chunks = bytearray(), answer.iter_raw()
        while len(data) < enough and not self.stopped.is_set() and (chunk := next(chunks, None)) is not None:
            data += chunk
        return bytes(memoryview(data)[:end])

    def _refusal(self, answer, url, body: bytes) -> NoAnswer:
        """What an error of the server is told as."""
        status, code, said = answer.status_code, answer.headers.get("X-Error-Code"), answer.headers.get("X-Error-Message")
        if code in REFUSALS:
            return NoAnswer(REFUSALS[code], False)
        if not said:
            with contextlib.suppress(ValueError, msgspec.DecodeError, RecursionError):
                said = msgspec.json.decode(body, type=dict[str, object]).get("error")
        said = " ".join(self.without_secrets(str(said or "")).split())[:200]
        if code is None and status == 401 and url.path.startswith("/api/") and not said.startswith("Invalid credentials"):
            return NoAnswer(REFUSALS["RepoNotFound"], False)
        (way, variable), wait = _proxy(url.scheme, url.host), _seconds(answer.headers.get("Retry-After", ""))
        advice = f"it asks to wait {wait:.0f} s; try again then" if wait else "try again later"
        if status in (401, 403):
            advice = f"access refused; {LOG_IN}"
        elif status == 407:
            advice = f"give user and password in {variable or 'the address of the proxy'}"
        why = f"the server answers HTTP {status}{way} {said}".rstrip()
        return NoAnswer(f"{why}; {advice}", status in (408, 429) or status >= 500, wait)

    def broken(self, error: Exception, request=None) -> NoAnswer:
        """What is told where no answer came, or one of no use."""
        url = request and request.url
        way, variable = _proxy(url.scheme, url.host) if url else ("", "")
        why = self.without_secrets(f"{type(error).__name__}: {error}".removesuffix(": "))[:300]
        host = f"{url.scheme}://{url.netloc.decode()}" if url else self.endpoint
        check = f"{variable} and NO_PROXY" if way else "the connection, HF_ENDPOINT"
        check += f" and HF_HUB_DOWNLOAD_TIMEOUT (now {self.timeout} s)"
        return NoAnswer(f"no usable answer from {host}{way} ({why}); check {check}")

    def without_secrets(self, text: str) -> str:
        """A text without the token, and without user and password of addresses."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            if len(secret) > 3:  # a shorter one is in every text
                text = text.replace(secret, "***")
        return re.sub(r"://[^/?#\s]*@", "://***@", text)

    def _hide(self, credentials: str) -> None:
        """Keep a token, or user:password as in an address, out of what is told; also decoded, and as a header has it."""
        for text in (credentials, unquote(credentials)):
            password, encoded = text.partition(":")[2], base64.b64encode(text.encode(errors="replace")).decode()
            self.secrets.update((text, encoded, password, *re.split("[/?#@]", password)))  # an address may end at these


def _proxy(scheme: str, host: str) -> tuple[str, str]:
    """The proxy on the way to a host, in words, and the variable that names it; "" and "" where there is none."""
    known = getproxies()
    kind = next((kind for kind in (scheme, "all") if known.get(kind)), None)
    if kind is None or proxy_bypass(host):
        return "", ""
    variables = [name for name in (f"{kind}_proxy", f"{kind.upper()}_PROXY") if os.environ.get(name)]
    variable = variables[0] if variables else "the system's settings"
    address = known[kind] if "://" in known[kind] else f"http://{known[kind]}"
    return f" through the proxy {address} (from {variable})", variable


def _seconds(told: str) -> float:
    """How long a Retry-After asks to wait: seconds, or until a date. 0 if it says neither."""
    if re.fullmatch(r"\d{1,9}", told):
        return float(told)
    with contextlib.suppress(Exception):  # whatever a malformed date leads to
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    return 0.0
