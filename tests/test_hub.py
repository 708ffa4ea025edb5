"""A checkpoint read from the Hub is the folder's, at the price of its headers; and what a bad repository is told.

The Hub is a server on the loopback, over folders on disk. It answers as huggingface.co does to what is asked of it:
X-Error-Code on refusals, a redirect to another host for the shards, ranges; and it counts the bytes it sends.
"""

from __future__ import annotations

import base64
import bz2
import contextlib
import gzip
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from email.utils import formatdate
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, unquote

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from glmpp import Checkpoint, cli
from glmpp.errors import GlmppError
from glmpp.formats import hub as reader
from glmpp.formats import hub_requests
from glmpp.formats.hub import FIRST_BYTES
from glmpp.formats.index import INDEX_FILE

pytest.importorskip("huggingface_hub", minversion="1.0")
from huggingface_hub import close_session, constants

REPO = "zai-org/tiny"
SHA, NEXT = "0123456789abcdef0123456789abcdef01234567", "f" * 40
MB = 1_000_000


class Hub(ThreadingHTTPServer):
    """Commits of one repository, each a folder; what was asked for; bytes sent of each file; faults by file name."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # what is counted as sent is soon on its way
        self.commits, self.branches = {SHA: folder}, {"main": SHA}
        self.log: list[tuple[str, dict[str, str]]] = []
        self.connections = 0
        self.sent: Counter[str] = Counter()
        self.ranges, self.faults = True, {}
        self.after_resolving = lambda: None
        self.released = threading.Event()  # set: what hangs goes on
        self.hung: list[str] = []  # "begun" and "over"

    def process_request(self, *args):
        self.connections += 1
        super().process_request(*args)

    def handle_error(self, *args):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client has hung up
            super().handle_error(*args)

    def asked(self, file: str) -> list[str]:
        return [path for path, _ in self.log if path.startswith("/cdn/") and path.endswith(f"/{file}")]


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = unquote(self.path.split("?")[0])
        self.server.log.append((path, {key.lower(): value for key, value in self.headers.items()}))
        fault = self.server.faults.get(path.split("/")[-1])
        try:
            if fault is None or not fault(self):
                self.route(path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def route(self, path: str):
        if match := re.fullmatch(rf"/api/models/{REPO}(?:/revision/(.+))?", path):
            revision = match[1] or "main"
            sha = self.server.branches.get(revision, revision)
            self.server.after_resolving()
            if sha not in self.server.commits:
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            files = sorted(file.name for file in self.server.commits[sha].iterdir())
            info = {"id": REPO, "sha": sha, "siblings": [{"rfilename": file} for file in files]}
            return self.reply(200, json.dumps(info).encode())
        if match := re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path):
            sha = self.server.branches.get(match[1], match[1])
            if match[2].endswith(".safetensors"):
                away = f"http://localhost:{self.server.server_port}/cdn/{sha}/{match[2]}"
                return self.reply(302, b"", Location=away)
            return self.send_part(self.server.commits[sha] / match[2])
        if match := re.fullmatch(r"/cdn/([^/]+)/(.+)", path):
            return self.send_part(self.server.commits[match[1]] / match[2])
        return self.refuse(404, "RepoNotFound", "Repository not found")

    def send_part(self, file: Path):
        size = file.stat().st_size
        start, stop, status = 0, size, 200
        if self.server.ranges and (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            start, stop, status = int(match[1]), min(int(match[2] or size) + 1, size), 206
            if start >= size:
                return self.refuse(416, None, "Range Not Satisfiable")
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        with open(file, "rb") as content:
            content.seek(start)
            while piece := content.read(min(65536, stop - content.tell())):
                self.server.sent[file.name] += len(piece)  # before the client can have it
                self.wfile.write(piece)

    def reply(self, status: int, body: bytes, **headers: str):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        return True

    def refuse(self, status: int, code: str | None, message: str):
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        return self.reply(status, json.dumps({"error": message}).encode(), **headers)


def times(count: int, fault):
    """The fault, `count` times; then it is over."""
    left = iter(range(count))
    return lambda answer: fault(answer) if next(left, None) is not None else False


def status(code: int, error_code: str | None = None):
    return lambda answer: answer.refuse(code, error_code, "not today")


def cut(answer: Answer, length: bool = True):
    """The status line promises 1000 bytes, 500 arrive; with `length` the client can see that some are missing."""
    answer.send_response(206)
    answer.send_header("Content-Range", "bytes 0-999/1000")
    answer.send_header(*(("Content-Length", "1000") if length else ("Connection", "close")))
    answer.end_headers()
    answer.wfile.write((900).to_bytes(8, "little") + b"{" + b" " * 491)
    answer.close_connection = True
    return True


def cut_in_silence(answer: Answer):
    return cut(answer, length=False)


def drip(where: str):
    """A byte at a time until the client hangs up: never a timeout, never an end; of the header's lines, or of the body."""

    def fault(answer: Answer):
        answer.send_response(200)
        answer.send_header("Content-Length", "1000000")
        answer.flush_headers() if where == "header" else answer.end_headers()
        answer.server.hung.append("begun")
        while not answer.server.released.wait(0.02):
            answer.wfile.write(b"x")
        answer.close_connection = True
        return True

    return fault


def endless(code: int):
    """A body that has no end, as the client sees when it counts."""

    def fault(answer: Answer):
        answer.send_response(code)
        answer.send_header("Connection", "close")
        if code == 302:
            answer.send_header("Location", unquote(answer.path) + "/away")
        answer.end_headers()
        while True:
            answer.server.sent["endless"] += 65536
            answer.wfile.write(b" " * 65536)

    return fault


def hang(answer: Answer):
    answer.server.hung.append("begun")
    answer.server.released.wait(100)
    answer.server.hung.append("over")
    answer.close_connection = True
    return True


def serve(folder: Path, monkeypatch):
    hub = Hub(folder)
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # a request for its user agent
    monkeypatch.setattr(hub_requests, "PAUSES", (0.01, 0.01))
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    close_session()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield hub
    hub.released.set()
    hub.shutdown()
    hub.server_close()
    close_session()


def link_shard(source: str, target: str):
    (os.link if source.endswith(".safetensors") else shutil.copy)(source, target)


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """The tiny checkpoint's folder; config and index to break, the shards only to move (10 MB that are not copied)."""
    return Path(shutil.copytree(tiny.directory, tmp_path / "model", copy_function=link_shard))


@pytest.fixture
def hub(folder, monkeypatch):
    yield from serve(folder, monkeypatch)


@pytest.fixture
def shard(folder) -> Path:
    """One shard of the folder, to break."""
    path = sorted(folder.glob("*.safetensors"))[1]
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    return path


def write_zeros(path: Path, count: int, nbytes: int) -> dict[str, str]:
    """A shard of `count` tensors with `nbytes` zeros each, which take no space on the disk; its part of the index."""
    entries = {
        f"{path.stem}.{i:05}": {"dtype": "U8", "shape": [nbytes], "data_offsets": [i * nbytes, (i + 1) * nbytes]}
        for i in range(count)
    }
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count * nbytes)
    return dict.fromkeys(entries, path.name)


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A repository of 12 shards with 40 MB each."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weight_map = {}
    for i in range(12):
        weight_map |= write_zeros(folder / f"model-{i}.safetensors", 8, 5 * MB)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    yield from serve(folder, monkeypatch)


def equal(remote: Checkpoint, local: Checkpoint) -> bool:
    return list(remote.items()) == list(local.items()) and remote.config == local.config


def refused(*words: str, revision: str | None = None, **more) -> str:
    """from_hub raises a GlmppError that says all these words; the message."""
    with pytest.raises(GlmppError) as caught:
        Checkpoint.from_hub(REPO, revision, progress=False, **more)
    message = str(caught.value)
    assert all(word in message for word in words), message
    return message


# --- the same as the folder ---


def test_names_order_specs_and_config_are_those_of_the_folder(hub, tiny):
    remote = Checkpoint.from_hub(REPO, progress=False)
    assert equal(remote, tiny) and len(remote) == 618
    assert remote.directory is None and remote.source == f"{REPO}@{SHA}"
    assert next(remote.read())[1].is_meta


def test_shard_10_comes_after_shard_9(large):
    remote = Checkpoint.from_hub(REPO, progress=False)
    assert equal(remote, Checkpoint.from_directory(large.commits[SHA]))
    assert list(dict.fromkeys(spec.file for spec in remote.values())) == [f"model-{i}.safetensors" for i in range(12)]


def test_one_file_without_an_index(hub, folder):
    for file in [*folder.glob("*.safetensors"), folder / INDEX_FILE]:
        file.unlink()
    write_zeros(folder / "model.safetensors", 3, 10)
    remote = Checkpoint.from_hub(REPO, progress=False)
    assert len(remote) == 3 and equal(remote, Checkpoint.from_directory(folder))


def test_a_shard_that_the_index_does_not_name_is_not_read(hub, folder, tiny):
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"not a shard")
    remote = Checkpoint.from_hub(REPO, progress=False)
    assert equal(remote, tiny) and not hub.asked("model-00009-of-00009.safetensors")
    assert "does not name them: model-00009-of-00009.safetensors" in remote.notes[0]


@pytest.mark.parametrize("beside", ["adapter_model.safetensors", "consolidated.safetensors"])
def test_without_an_index_the_files_are_the_folders(hub, folder, beside):
    (folder / INDEX_FILE).unlink()
    write_zeros(folder / beside, 3, 10)
    remote, local = Checkpoint.from_hub(REPO, progress=False), Checkpoint.from_directory(folder)
    assert equal(remote, local) and remote.notes == local.notes and beside in remote.files


def test_an_adapter_names_its_base_model(hub, folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    refused(f"{REPO}@{SHA}: is an adapter", "'org/base'")


@pytest.mark.parametrize("revision", [None, "main", SHA, "refs/pr/7"])
def test_one_commit_is_read_although_its_branch_moves(hub, tiny, tmp_path, revision):
    other = Path(shutil.copytree(tiny.directory, tmp_path / "next", copy_function=link_shard))
    (other / "config.json").write_text("{}")
    hub.commits[NEXT] = other
    hub.branches["refs/pr/7"] = SHA
    hub.after_resolving = lambda: hub.branches.update({"main": NEXT, "refs/pr/7": NEXT})
    remote = Checkpoint.from_hub(REPO, revision, progress=False)
    assert equal(remote, tiny) and remote.source == f"{REPO}@{SHA}"
    first, *rest = [path for path, _ in hub.log]
    assert first.startswith("/api/models/") and rest and all(f"/{SHA}/" in path for path in rest)


def test_a_user_sets_nothing_but_the_endpoint(hub, tiny, tmp_path):
    program = (
        "import glmpp, sys; assert 'huggingface_hub' not in sys.modules\n"
        f"c = glmpp.Checkpoint.from_hub('{REPO}'); print(c.source, len(c), c.nbytes)"
    )
    home = tmp_path / "home"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}/", "HF_HOME": str(home)}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == [f"{REPO}@{SHA}", "618", str(tiny.nbytes)], result.stderr
    assert result.stderr == ""  # a bar is for those who watch it
    assert not [file for file in home.rglob("*") if file.is_file()]


@pytest.mark.usefixtures("no_partition_variable")
@pytest.mark.usefixtures("no_partition_variable")
def test_the_command_takes_a_repository_and_shows_its_commit(hub, tiny, capsys):
    assert cli.main(["plan", REPO, "--pp", "3", "--revision", "main"]) == 0
    assert capsys.readouterr().out.startswith(f"{REPO}@{SHA}: 618 tensors, {tiny.nbytes / 1e9:.3f} GB\n")
    assert cli.main(["plan", REPO, "--pp", "3", "--revision", "nowhere"]) == 2
    assert "the repository has no such branch, tag or commit" in capsys.readouterr().err


def test_everything_is_asked_for_uncompressed_so_that_sizes_are_its_own(hub):
    Checkpoint.from_hub(REPO, progress=False)
    assert {headers["accept-encoding"] for _, headers in hub.log} == {"identity"}


def test_the_token_goes_to_the_hub_and_not_where_it_redirects_to(hub):
    Checkpoint.from_hub(REPO, progress=False)
    sent = {path.split("/")[1]: headers.get("authorization") for path, headers in hub.log}
    assert sent == {"api": "Bearer hf_of_this_test", "zai-org": "Bearer hf_of_this_test", "cdn": None}


# --- the price ---


def test_no_weight_is_downloaded(large):
    """Of 480 MB, 12 times the first 150 kB; one request each."""
    remote = Checkpoint.from_hub(REPO, progress=False)
    assert remote.nbytes == 480 * MB
    for file in {spec.file for spec in remote.values()}:
        assert large.sent[file] == FIRST_BYTES and len(large.asked(file)) == 1


def test_a_header_longer_than_the_first_request_takes_a_second_one(large):
    folder = large.commits[SHA]
    (folder / INDEX_FILE).unlink()
    write_zeros(folder / "model.safetensors", 3000, 10_000)
    with open(folder / "model.safetensors", "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    assert header > FIRST_BYTES
    assert equal(Checkpoint.from_hub(REPO, progress=False), Checkpoint.from_directory(folder))
    assert large.sent["model.safetensors"] == FIRST_BYTES + 8 + header and len(large.asked("model.safetensors")) == 2


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_header_that_just_fits_the_first_request(hub, folder, monkeypatch, more):
    (folder / INDEX_FILE).unlink()
    write_zeros(folder / "model.safetensors", 20, 1000)
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    monkeypatch.setattr(reader, "FIRST_BYTES", 8 + header + more)
    assert equal(Checkpoint.from_hub(REPO, progress=False), Checkpoint.from_directory(folder))
    assert len(hub.asked("model.safetensors")) == (2 if more < 0 else 1)


def test_a_server_that_ignores_the_range_is_hung_up_on(large):
    """What it sends beyond the header is what fits into the buffers of the sockets, not the 40 MB of each shard."""
    large.ranges = False
    assert equal(Checkpoint.from_hub(REPO, progress=False), Checkpoint.from_directory(large.commits[SHA]))
    assert sum(large.sent.values()) < 12 * 10 * MB


def test_a_connection_serves_one_request_after_another(large, monkeypatch):
    """One to the Hub and one to where it redirects to, for 12 shards."""
    monkeypatch.setattr(hub_requests, "CONNECTIONS", 1)
    Checkpoint.from_hub(REPO, progress=False)
    assert large.connections == 2


# --- a repository that is not in order ---


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(hub, shard, keep):
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(f"{REPO}@{SHA}/{shard.name}", "not a complete safetensors file")
    assert len(hub.asked(shard.name)) == 1


@pytest.mark.parametrize("length", [2**63, 150 * MB, 0])
def test_a_header_length_that_cannot_be_is_not_fetched(hub, shard, length):
    with open(shard, "r+b") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(200 * MB)
    refused(shard.name, "not a complete safetensors file")
    assert hub.sent[shard.name] == FIRST_BYTES


def test_a_header_that_is_not_json(hub, shard):
    with open(shard, "r+b") as file:
        file.seek(8)
        file.write(b"[")
    refused(shard.name, "not a JSON object")


def test_a_missing_shard_is_named_with_a_tensor_it_should_hold(hub, shard, tiny):
    shard.unlink()
    first = min(name for name, spec in tiny.items() if spec.file == shard.name)
    refused(f"{REPO}@{SHA}/{shard.name}", first, "missing")


def test_an_index_that_names_a_tensor_its_shard_does_not_hold(hub, folder, shard):
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["stray"] = shard.name
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (said,) = Checkpoint.from_hub(REPO, progress=False).notes
    assert shard.name in said and "'stray'" in said and "does not hold it" in said


def test_a_tensor_that_the_index_does_not_name(hub, folder, shard, tiny):
    index = json.loads((folder / INDEX_FILE).read_text())
    name = next(name for name, spec in tiny.items() if spec.file == shard.name)
    del index["weight_map"][name]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    remote = Checkpoint.from_hub(REPO, progress=False)
    assert equal(remote, tiny) and repr(name) in remote.notes[0] and "does not place there" in remote.notes[0]


@pytest.mark.parametrize("content", ["{", "[]", "null", "", "[" * 100_000, "\udc80"])
@pytest.mark.parametrize("file", ["config.json", INDEX_FILE])
def test_json_that_is_broken(hub, folder, file, content):
    (folder / file).write_bytes(content.encode(errors="surrogateescape"))
    refused(f"{REPO}@{SHA}/{file}", "JSON")


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 3}, {"a": ["model.safetensors"]}])
def test_an_index_without_a_weight_map(hub, folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    refused(f"{REPO}@{SHA}/{INDEX_FILE}", "weight_map")


def test_a_repository_without_config(hub, folder):
    (folder / "config.json").unlink()
    refused(f"{REPO}@{SHA}/config.json", "no such file")


def test_a_repository_of_pickles(hub, folder):
    for file in [*folder.glob("*.safetensors"), folder / INDEX_FILE]:
        file.rename(folder / file.name.replace("safetensors", "bin"))
    refused(f"{REPO}@{SHA}", "vLLM would open", ".bin", "glmpp reads safetensors only")


# --- no access ---


@pytest.mark.parametrize("repo_id", ["zai-org/other", "other"])
def test_a_repository_that_does_not_exist(hub, repo_id):
    with pytest.raises(GlmppError, match=f"^{repo_id}@main: no such repository, or a private one.*HF_TOKEN"):
        Checkpoint.from_hub(repo_id, progress=False)
    assert len(hub.log) == 1


@pytest.mark.parametrize("repo_id", ["models/zai-org/tiny", "../tiny", "", "a--b"])
def test_what_is_not_a_repository_id_is_not_asked_for(hub, repo_id):
    with pytest.raises(GlmppError, match="from_directory"):
        Checkpoint.from_hub(repo_id, progress=False)
    assert not hub.log


@pytest.mark.parametrize("revision", ["v2", "a" * 40])
def test_a_revision_that_does_not_exist(hub, revision):
    refused(f"{REPO}@{revision}: ", "no such branch", revision=revision)


@pytest.mark.parametrize("code", [401, 403])
def test_a_gated_repository(hub, code):
    """The Hub lists the files of a gated repository to everybody; it is the files that it refuses."""
    hub.faults["config.json"] = status(code, "GatedRepo")
    refused(f"{REPO}@{SHA}/config.json", "gated", "HF_TOKEN")
    assert len(hub.log) == 2


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_refusal_is_not_asked_again(hub, shard, code):
    hub.faults[shard.name] = status(code)
    refused(f"{REPO}@{SHA}/{shard.name}", f"HTTP {code}", "not today")
    assert len([path for path, _ in hub.log if path.endswith(f"{SHA}/{shard.name}")]) == 1


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(f"{REPO}@main", "HF_HUB_OFFLINE is set")
    assert not hub.log


def test_a_machine_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("pip install")


# --- a connection that is not in order ---


@pytest.mark.parametrize(
    "fault", [cut, cut_in_silence, status(500), status(429)], ids=["cut", "cut_in_silence", "500", "429"]
)
@pytest.mark.parametrize("which", ["config.json", INDEX_FILE, "shard"])
def test_two_faults_of_the_connection_are_survived_and_three_are_not(hub, tiny, shard, which, fault):
    file = shard.name if which == "shard" else which
    hub.faults[file] = times(2, fault)
    assert equal(Checkpoint.from_hub(REPO, progress=False), tiny)
    hub.faults[file] = times(3, fault)
    refused(f"{REPO}@{SHA}/{file}")


@pytest.mark.parametrize("which", ["tiny", "config.json", "shard"])
def test_a_server_that_does_not_answer(hub, shard, which, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.faults[shard.name if which == "shard" else which] = hang
    begin = time.monotonic()
    refused(REPO, "Timeout", "0.5 s", "check the connection")
    assert time.monotonic() - begin >= 1.5 and hub.hung == ["begun"] * 3  # three tries, none waited for the answer


@pytest.mark.parametrize("fault", [TypeError("ours"), AttributeError("ours"), KeyError("ours"), OSError("ours")], ids=repr)
@pytest.mark.parametrize("place", ["an answer's size", "a header", "a file's name"])
def test_a_fault_of_the_kit_is_not_told_as_one_of_the_connection(hub, monkeypatch, place, fault):
    """It goes up as it is, after one attempt."""

    def broken(*_, **__):
        raise fault

    if place == "an answer's size":
        monkeypatch.setattr("glmpp.formats.hub.re", SimpleNamespace(fullmatch=broken))
    elif place == "a header":
        monkeypatch.setattr("glmpp.formats.hub.read_header", broken)
    else:
        monkeypatch.setattr("glmpp.formats.hub._Repository.read", broken)
    with pytest.raises(type(fault)) as raised:
        Checkpoint.from_hub(REPO, progress=False)
    assert raised.value is fault
    paths = [path for path, _ in hub.log]
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize("fault", [TypeError, AttributeError, KeyError, ValueError], ids=lambda fault: fault.__name__)
def test_whatever_the_library_raises_is_an_answer_that_is_of_no_use(hub, monkeypatch, fault):
    def broken(*_, **__):
        tries.append(1)
        raise fault("theirs")

    tries: list[int] = []
    monkeypatch.setattr("huggingface_hub.utils.build_hf_headers", broken)
    refused(f"{REPO}@main", "no usable answer", "theirs")
    assert len(tries) == 3


@pytest.mark.parametrize(
    "said",
    [
        *(
            {"sha": sha}
            for sha in (3, None, "", "main", SHA[1:], SHA + "0", "g" * 40, SHA + "\n", "\x1b[31m" + SHA, "٣" * 40)
        ),
        *({"sha": SHA, "siblings": siblings} for siblings in (None, [{}], [{"rfilename": 3}], [{"rfilename": ["a"]}])),
    ],
)
def test_an_answer_with_other_kinds_of_values(hub, said):
    hub.faults["tiny"] = lambda answer: answer.reply(200, json.dumps({"id": REPO, "siblings": [], **said}).encode())
    refused(f"{REPO}@main", "names no commit or no files")


def test_nobody_listens(hub):
    hub.shutdown()
    hub.server_close()
    refused(f"{REPO}@main", "no usable answer from http://127.0.0.1", "ConnectError")


@pytest.mark.parametrize("body", [b"<html>log in to this network</html>", b"[]", b"{}", b'{"id": "a/b"}'])
def test_something_else_answers_in_place_of_the_hub(hub, body):
    hub.faults["tiny"] = lambda answer: answer.reply(200, body)
    refused(f"{REPO}@main", "http://127.0.0.1")


@pytest.mark.parametrize("body", [b'"oops"', b"[]", b"\xff"])
def test_an_error_whose_body_the_library_does_not_expect(hub, body):
    hub.faults["config.json"] = lambda answer: answer.reply(404, body)
    refused(f"{REPO}@{SHA}/config.json")


@pytest.mark.parametrize("told", ["bytes 0-99/*", "bytes 100-199/1000", "all of it"])
def test_an_answer_that_does_not_tell_the_size(hub, shard, told):
    hub.faults[shard.name] = lambda answer: answer.reply(206, b"x" * 100, Content_Range=told)
    refused(f"{REPO}@{SHA}/{shard.name}", "how large the file is", told)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_an_interrupt_does_not_wait_for_requests_that_are_under_way(hub, shard, monkeypatch, interruptible):
    main = threading.main_thread().ident
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 200)

    def interrupt(answer: Answer):
        signal.pthread_kill(main, signal.SIGINT)
        return hang(answer)

    # Python drops an interrupt that comes while a destructor or a callback of the collector runs: a user presses again.
    again = threading.Timer(20, signal.pthread_kill, (main, signal.SIGINT))
    hub.faults[shard.name] = times(1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        again.start()
        Checkpoint.from_hub(REPO, progress=False)
    again.cancel()
    assert hub.hung == ["begun"]  # and not "over"


# --- a server that is hostile ---

SECRETS = ["us3r:s%2Fcret", "us3r:s/cret", "s%2Fcret", "s/cret", "hf_of_this_test", "dXMzcjpzL2NyZXQ="]


def no_secret(message: str) -> str:
    assert not [secret for secret in SECRETS if secret in message], message
    return message


@contextlib.contextmanager
def at_most(nbytes: int):
    """What Python allocates meanwhile."""
    bomb(gzip.compress), bomb(bz2.compress)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < nbytes
    finally:
        tracemalloc.stop()


@cache
def bomb(compress) -> bytes:
    """100 MB, in 100 kB or less."""
    return compress(b" " * 100 * MB)


@pytest.mark.parametrize("coding", ["gzip", "GZIP, identity"])
@pytest.mark.parametrize("which", ["tiny", "config.json"])
def test_an_answer_that_is_compressed_all_the_same_is_not_unpacked(hub, which, coding):
    hub.faults[which] = lambda answer: answer.reply(200, bomb(gzip.compress), Content_Encoding=coding)
    with at_most(30 * MB):
        refused(f"{REPO}@", "gzip", "not asked for")


@pytest.mark.parametrize("code", [404, 429, 500])
@pytest.mark.parametrize("which", ["tiny", "config.json"])
def test_the_body_of_an_error_is_not_unpacked(hub, which, code):
    hub.faults[which] = lambda answer: answer.reply(
        code, bomb(gzip.compress), Content_Encoding="gzip", X_Error_Message="not today"
    )
    with at_most(30 * MB):
        refused(f"{REPO}@", f"HTTP {code}", "not today")


def test_the_charset_of_an_error_does_not_unpack_it(hub):
    hub.faults["tiny"] = lambda answer: answer.reply(404, bomb(bz2.compress), Content_Type="text/plain; charset=bz2_codec")
    with at_most(30 * MB):
        refused(f"{REPO}@main", "HTTP 404")


def test_the_body_of_a_redirect_is_not_unpacked(hub, tiny):
    away = f"/{REPO}/resolve/{SHA}/./config.json?again"
    hub.faults["config.json"] = times(
        1, lambda answer: answer.reply(307, bomb(gzip.compress), Content_Encoding="gzip", Location=away)
    )
    with at_most(30 * MB):
        assert equal(Checkpoint.from_hub(REPO, progress=False), tiny)


@pytest.mark.parametrize("coding", ["identity", "aws-chunked", ""])
def test_what_is_called_encoded_and_is_not_is_read(hub, folder, tiny, coding):
    content = (folder / "config.json").read_bytes()
    hub.faults["config.json"] = lambda answer: answer.reply(200, content, Content_Encoding=coding)
    assert equal(Checkpoint.from_hub(REPO, progress=False), tiny)


@pytest.mark.parametrize("code", [200, 302, 404, 503])
def test_a_list_of_files_that_has_no_end(hub, monkeypatch, code):
    monkeypatch.setattr(reader, "MAX_HEADER_BYTES", MB)
    hub.faults["tiny"] = endless(code)
    refused(f"{REPO}@main", {200: "more than 1,000,000 bytes", 302: "no such repository"}.get(code, f"HTTP {code}"))
    assert hub.sent["endless"] < 20 * MB  # what fits into the buffers of the sockets, in three attempts


@pytest.mark.parametrize("which", ["config.json", INDEX_FILE])
def test_a_json_file_larger_than_a_header_may_be_is_told_with_its_size(hub, folder, monkeypatch, which):
    monkeypatch.setattr(reader, "MAX_HEADER_BYTES", MB)
    with open(folder / which, "ab") as file:
        file.truncate(MB + 1)
    refused(f"{REPO}@{SHA}/{which}", "has 1,000,001 bytes", "at most 1,000,000")


def test_digits_without_end_are_no_size(hub, shard):
    hub.faults[shard.name] = lambda answer: answer.reply(206, b"x", Content_Range=f"bytes 0-0/{'9' * 5000}")
    assert len(refused(f"{REPO}@{SHA}/{shard.name}", "how large the file is")) < 1000


@pytest.mark.parametrize(
    "which, where", [("tiny", "header"), ("config.json", "body"), ("shard", "header"), ("shard", "body")]
)
def test_a_server_that_drips_is_left_when_the_time_is_over(hub, shard, which, where):
    file = {"shard": shard.name, "tiny": ""}.get(which, which)
    hub.faults[file or "tiny"] = drip(where)
    begin = time.monotonic()
    refused(f"{REPO}@{SHA}/{file}: " if file else f"{REPO}@main: ", "still waiting", "when the 3 s", seconds=3)
    assert 3 <= time.monotonic() - begin < 15 and hub.hung == ["begun"]


def test_a_thread_that_a_server_holds_does_not_keep_the_process(hub):
    hub.faults["held"] = hang
    program = "from glmpp.formats.hub import read_repository as read\n"
    program += f"read('{REPO}', progress=False)\nread('{REPO}', 'held', seconds=2)"
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DOWNLOAD_TIMEOUT": "500"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert f"{REPO}@held: still waiting for the server when the 2 s" in result.stderr, result.stderr
    assert hub.hung == ["begun"]


def test_time_without_end_may_be_given(hub, tiny):
    assert equal(Checkpoint.from_hub(REPO, progress=False, seconds=float("inf")), tiny)


def asked_to_wait(seconds: str):
    return lambda answer: answer.reply(429, b"", Retry_After=seconds)


@pytest.mark.parametrize(
    "form", [str, lambda seconds: formatdate(time.time() + seconds + 1, usegmt=True)], ids=["s", "date"]
)
def test_a_server_that_asks_to_wait_is_heard(hub, tiny, form):
    hub.faults["config.json"] = times(1, lambda answer: asked_to_wait(form(1))(answer))
    begin = time.monotonic()
    assert equal(Checkpoint.from_hub(REPO, progress=False), tiny)
    assert time.monotonic() - begin >= 1


def test_a_server_that_asks_to_wait_longer_than_there_is_time_is_not_asked_again(hub):
    hub.faults["config.json"] = asked_to_wait("3600")
    refused(f"{REPO}@{SHA}/config.json", "HTTP 429", "asks to wait 3600 s")
    assert len(hub.log) == 2


@pytest.mark.parametrize(
    "told",
    ["", "soon", "-5", "1.5", "9" * 5000, "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Oct 99999 07:28:00 GMT", "\u0663x"],
)
def test_what_asks_for_no_time_to_come_is_no_wait(told):
    assert hub_requests._seconds(told) == 0


@pytest.mark.parametrize("count", [10, 11])
def test_ten_redirects_are_followed(hub, tiny, count):
    hub.faults["config.json"] = times(count, lambda answer: answer.reply(307, b"away", Location=answer.path))
    if count == 10:
        assert equal(Checkpoint.from_hub(REPO, progress=False), tiny)
    else:
        hub.faults["config.json"] = lambda answer: answer.reply(307, b"away", Location=answer.path)
        refused(f"{REPO}@{SHA}/config.json", "more than 10 redirects")
        assert len(hub.log) == 1 + 3 * 11


def echo(code: int):
    """The server sends back what it was sent, as an error."""

    def fault(answer: Answer):
        sent = answer.headers.get("Authorization", "")
        plain = base64.b64decode(sent.removeprefix("Basic ")).decode() if sent.startswith("Basic ") else ""
        said = f"{sent} {plain} {plain.partition(':')[2]} hf_of_this_test http://{quote(plain, safe=':')}@host/"
        answer.reply(code, said.encode(), X_Error_Message=said, X_HF_Warning=f"{code}-{plain and 1}; look: {said}")
        return True

    return fault


@pytest.fixture(params=["token", "password"])
def credentials(request, hub, monkeypatch):
    """The Hub's address, without and with user and password; these go in place of the token."""
    if request.param == "password":
        endpoint = f"http://us3r:s%2Fcret@127.0.0.1:{hub.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    return request.param


@pytest.mark.parametrize("code", [400, 401, 403, 404, 500])
def test_what_the_server_says_of_credentials_is_not_printed(hub, credentials, monkeypatch, caplog, code):
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)  # the library logs a server's warnings
    hub.faults["config.json"] = echo(code)
    no_secret(refused(f"{REPO}@{SHA}/config.json", f"HTTP {code}", "***"))
    no_secret(caplog.text)
    sent = dict(hub.log)[f"/{REPO}/resolve/{SHA}/config.json"]["authorization"]
    assert sent == {"token": "Bearer hf_of_this_test", "password": "Basic dXMzcjpzL2NyZXQ="}[credentials]


@pytest.mark.usefixtures("credentials")
def test_an_address_is_told_without_user_and_password(hub, folder):
    hub.faults["tiny"] = times(1, lambda answer: answer.reply(200, b"{}"))
    no_secret(refused(f"{REPO}@main", "127.0.0.1", "names no commit"))
    hub.faults["config.json"] = times(3, cut)
    no_secret(refused(f"{REPO}@{SHA}/config.json", f"no usable answer from http://127.0.0.1:{hub.server_port} "))
    away = "http://us3r:s%2Fcret@127.0.0.1:9/"
    hub.faults["config.json"] = lambda answer: answer.reply(302, b"", Location=away)
    no_secret(refused(f"{REPO}@{SHA}/config.json", "no usable answer from http://127.0.0.1:9 "))
    hub.faults["config.json"] = lambda answer: answer.reply(302, b"", Location=away.replace(":9", ":99999999"))
    no_secret(refused(f"{REPO}@{SHA}/config.json", "no usable answer"))
    del hub.faults["config.json"]
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "http://us3r:s%2Fcret@host/hf_of_this_test"}}))
    no_secret(refused(f"{REPO}@{SHA}/http://***@host/***", "missing"))


@pytest.mark.parametrize("endpoint", ["https://us3r:s/cret@host", "https://us3r:s%2Fcret@[host", "us3r:s%2Fcret@host"])
def test_an_address_that_is_none_is_told_without_user_and_password(hub, monkeypatch, endpoint):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    no_secret(refused(f"{REPO}@main", "no usable answer from "))
    assert not hub.log


text = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), max_size=12)


@given(text, text, text, text.filter(lambda password: len(password) > 3))
@example("", "", "", "a@b:c/d")
def test_no_address_keeps_its_user_and_password(before, after, user, password):
    """Whatever the text around it, as the user wrote it and percent-encoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", f"https://{user}:{password}@host")
        hub = hub_requests.Requests(1)
    clear = hub.without_secrets(f"{before} https://{user}:{password}@host https://u:{quote(password, safe='')}@h {after}")
    assert f"{password}@" not in clear and f"{quote(password, safe='')}@" not in clear
    assert clear.endswith(f"@h {hub.without_secrets(after)}")


@pytest.fixture
def dead_proxy(monkeypatch):
    """Where nobody listens, for everything that is asked of http; its port."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with socket.socket() as taken:  # bound and not listening: nobody else can have the port
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["", "http://"])
def test_a_dead_proxy_is_named(hub, dead_proxy, monkeypatch, variable, scheme):
    monkeypatch.setenv(variable, f"{scheme}us3r:s%2Fcret@127.0.0.1:{dead_proxy}")
    close_session()
    message = no_secret(refused(f"through the proxy http://***@127.0.0.1:{dead_proxy} (from {variable})", "NO_PROXY"))
    assert "check the connection" not in message and not hub.log
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    close_session()
    Checkpoint.from_hub(REPO, progress=False)


def test_a_dead_proxy_of_https_is_named(hub, dead_proxy, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("HTTPS_PROXY", f"http://us3r:s%2Fcret@127.0.0.1:{dead_proxy}")
    close_session()
    no_secret(refused("https://hub.invalid", f"through the proxy http://***@127.0.0.1:{dead_proxy} (from HTTPS_PROXY)"))


def test_a_proxy_that_wants_a_password(hub, dead_proxy, monkeypatch):
    """Here the server of this test is the proxy."""
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    close_session()
    hub.faults["tiny"] = status(407)
    refused(
        f"HTTP 407 through the proxy http://127.0.0.1:{hub.server_port} (from HTTP_PROXY)", "user and password in HTTP_PROXY"
    )
    assert len(hub.log) == 1


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "a\0b", "", "9" * 5000, "\x1b[31m"])
def test_files_of_any_name_are_only_looked_up(hub, folder, tiny, file):
    names = [path.name for path in folder.iterdir()]

    def listing(answer: Answer):
        siblings = [{"rfilename": name, "more": {}} for name in (*names, file)]
        return answer.reply(200, json.dumps({"sha": SHA.upper(), "siblings": siblings, "more": [None]}).encode())

    hub.commits[SHA.upper()] = folder
    hub.faults["tiny"] = listing
    assert equal(Checkpoint.from_hub(REPO, progress=False), tiny)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": file, "b": f"{file}/other"}}))
    message = refused(f"{REPO}@{SHA.upper()}/", "the index places 1 tensors in it")
    assert message.isprintable() and len(message) < 3000
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": file, "b": names[0]}}))
    refused()


@pytest.mark.parametrize("revision", ["", ".", ".."])
def test_a_revision_that_leads_to_another_address_is_not_asked_for(hub, revision):
    refused(f"{REPO}@", f"{revision!r} is no branch", revision=revision)
    assert not hub.log


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8))
@example("a/../b")
@example("../..")
@example("a?b#c%2F..")
def test_a_revision_is_one_part_of_the_address(hub, revision):
    if revision not in (".", ".."):
        hub.log.clear()
        paths: list[str] = []
        gone = status(404, "RevisionNotFound")
        hub.faults[revision.split("/")[-1]] = lambda answer: paths.append(answer.path) or gone(answer)
        refused("no such branch", revision=revision)
        assert paths == [f"/api/models/{REPO}/revision/{quote(revision, safe='')}"]
