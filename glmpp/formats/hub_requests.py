"""Requests to the Hub with limits, as the server may be broken or hostile: bytes, redirects, attempts, seconds.

`huggingface_hub` (1.0 or newer) supplies endpoint, token, session, timeout and the classes of errors, and is imported when
it is needed. Its session is one of httpx, or, since 2.0, of httpx2.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from typing import TypeVar
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

from glmpp.errors import GlmppError
from glmpp.words import printable

CONNECTIONS = 8
PAUSES = (0.5, 1.0)  # seconds before the second and the third attempt
SECONDS = 600.0  # for a whole repository; the headers of GLM-5.1-FP8's 142 shards take less than ten
MAX_REDIRECTS = 10
MAX_ERROR_BYTES = 10_000  # of the body of an error or a redirect
ERROR_HEADERS = ("X-Error-Code", "X-Error-Message", "X-HF-Warning", "Retry-After")  # what the library and the kit look at
T, Item = TypeVar("T"), TypeVar("Item")


class NoAnswer(Exception):
    """Nothing usable came from the Hub; the cause is the library's exception, or what the answer lacks."""

    request = None  # the one without an answer, if there was one


def theirs(call: Callable[..., T], *args, **kwargs) -> T:
    """What a call of the library gives. Raises NoAnswer for whatever it raises; the kit's own faults are not called so."""
    try:
        return call(*args, **kwargs)
    except Exception as error:  # any: of a malformed answer the library makes AttributeError, KeyError, TypeError
        raise NoAnswer from error


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
        todo: SimpleQueue = SimpleQueue()
        for pair in zip(futures.values(), items.values()):
            todo.put(pair)

        def work() -> None:
            with contextlib.suppress(Empty):
                while not self.stopped.is_set():
                    future, item = todo.get_nowait()
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
                why, may_pass, asked = self._explain(none)
                too_long = time.monotonic() + asked >= self.until
                if pause is None or not may_pass or too_long or self.stopped.wait(max(pause, asked)):
                    raise GlmppError(f"{label}: {why}") from None

    @contextlib.contextmanager
    def answer(self, url: str, **wanted: str) -> Iterator:
        """The answer to a GET with these headers, 2xx or 416, its body still to be read. Raises NoAnswer.

        The client would read the bodies of redirects and errors to their end, and unpack what is compressed: gigabytes.
        """
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers

        headers = theirs(build_hf_headers, headers={"Accept-Encoding": "identity", **wanted})
        self._hide(headers.get("authorization", "").removeprefix("Bearer "))
        session, auth = theirs(get_session), {}
        request = theirs(session.build_request, "GET", url, headers=headers, timeout=self.timeout)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                self._hide(request.url.userinfo.decode())
                answer = theirs(session.send, request, stream=True, follow_redirects=False, **auth)
                with contextlib.closing(answer):
                    if answer.next_request is None:
                        self._check(answer)
                        yield answer
                        return
                    self.body(answer, MAX_ERROR_BYTES)
                    # The client has copied the authorization to the next request, or left it out for another host.
                    request, auth = answer.next_request, {"auth": lambda request: request}
            raise NoAnswer from ConnectionError(f"more than {MAX_REDIRECTS} redirects")
        except NoAnswer as none:
            none.request = request
            raise

    def _check(self, answer) -> None:
        """Raises NoAnswer of an error, with the library's exception as its cause, and of an answer that is compressed."""
        from huggingface_hub.utils import hf_raise_for_status

        coding = answer.headers.get("Content-Encoding", "").lower()
        encoded = not {"", "identity", "aws-chunked"}.issuperset(re.split(r"[\s,]+", coding))
        unread = answer.is_success or encoded or "html" in answer.headers.get("Content-Type", "").lower()
        body = b"" if unread else self.body(answer, MAX_ERROR_BYTES).decode(errors="replace").encode()
        told = {name: answer.headers[name] for name in ERROR_HEADERS if name in answer.headers}
        # Without Content-Type: it may name a charset that unpacks, as bz2_codec does.
        told = {name: printable(self.without_secrets(text)).encode() for name, text in told.items()}
        if answer.status_code != 416:
            like = theirs(type(answer), answer.status_code, headers=told, content=body, request=answer.request)
            theirs(hf_raise_for_status, like)
        if encoded:
            raise NoAnswer from ConnectionError(f"encoded as {coding[:50]!r}, which was not asked for")

    def body(self, answer, end: int) -> bytes:
        """The first `end` bytes of an answer; fewer if it has fewer. Where it is read to its end, the connection is kept."""
        enough = end + ("Content-Length" in answer.headers)  # without it, the end may be long in coming
        data, chunks = bytearray(), answer.iter_raw()
        while len(data) < enough and not self.stopped.is_set() and (chunk := theirs(next, chunks, None)) is not None:
            data += chunk
        return bytes(memoryview(data)[:end])

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

    def _explain(self, none: NoAnswer) -> tuple[str, bool, float]:
        """What the reader can do about it; whether another attempt may help; the seconds that the server asks to wait."""
        from huggingface_hub import errors

        error, log_in = none.__cause__, "set a valid HF_TOKEN or log in with `hf auth login`"
        for kind, why in (
            (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set; unset it, or use Checkpoint.from_directory"),
            (errors.HFValidationError, f"{error} For a folder use Checkpoint.from_directory"),
            (errors.GatedRepoError, f"the repository is gated; accept its terms on its page and {log_in}"),
            (errors.RevisionNotFoundError, "the repository has no such branch, tag or commit"),
            (errors.RepositoryNotFoundError, f"no such repository, or a private one; check the name or {log_in}"),
        ):
            if isinstance(error, kind):
                return why, False, 0
        url = none.request and none.request.url
        way, variable = _proxy(url.scheme, url.host) if url else ("", "")
        answer = getattr(error, "response", None)
        if answer is None:
            why = self.without_secrets(f"{type(error).__name__}: {error}".removesuffix(": "))[:300]
            host = f"{url.scheme}://{url.netloc.decode()}" if url else self.endpoint
            check = f"{variable} and NO_PROXY" if way else "the connection, HF_ENDPOINT"
            check += f" and HF_HUB_DOWNLOAD_TIMEOUT (now {self.timeout} s)"
            return f"no usable answer from {host}{way} ({why}); check {check}", True, 0
        status, asked = answer.status_code, _seconds(answer.headers.get("Retry-After", ""))
        said = " ".join(self.without_secrets(getattr(error, "server_message", None) or "").split())[:200]
        advice = f"it asks to wait {asked:.0f} s; try again then" if asked else "try again later"
        if status in (401, 403):
            advice = f"access refused; {log_in}"
        elif status == 407:
            advice = f"give user and password in {variable or 'the address of the proxy'}"
        why = f"the server answers HTTP {status}{way} {said}".rstrip() + f"; {advice}"
        return why, status in (408, 429) or status >= 500, asked


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
