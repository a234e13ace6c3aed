"""Servers for tests of stores at URLs, each a process of its own: the web server of the standard library's sockets, nginx, and a
proxy that is slow to ask, and cuts, refuses or forgets answers where it is told to.

    python web.py files FOLDER                    serves files: HTTP/1.1, kept connections, ranges
    python web.py proxy PORT SECONDS FOLDER       stands before that port; FOLDER holds faults.json, and log.jsonl is written there
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE = 2**20
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")
CONFIGURATION = """
daemon off; master_process off; worker_processes 1; pid {place}/nginx.pid; error_log {place}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off; sendfile on; tcp_nodelay on; keepalive_requests 100000;
    client_body_temp_path {place}/body; proxy_temp_path {place}/proxy; fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi; scgi_temp_path {place}/scgi;
    server {{ listen 127.0.0.1:{port}; root {folder}; }}
}}
"""


class FilesHandler(BaseHTTPRequestHandler):
    """Answers GET and HEAD with a file or one range of it, and lists nothing."""

    protocol_version = "HTTP/1.1"
    root = Path()

    def do_GET(self) -> None:
        path = self.root / urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        if not path.is_file() or ".." in path.parts:
            self.send_error(404)
            return
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start, stop, status = 0, size, 200
            asked = self.headers.get("Range", "")
            if asked.startswith("bytes=") and "," not in asked:
                first, _, last = asked[6:].partition("-")
                start, stop = (
                    (int(first), min(int(last) + 1, size) if last else size) if first else (max(size - int(last), 0), size)
                )
                status = 206 if start < size else 416
            self.send_response(status)
            if status != 200:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}" if status == 206 else f"bytes */{size}")
            self.send_header("Content-Length", str(stop - start if status != 416 else 0))
            self.end_headers()
            self.wfile.flush()
            if self.command == "GET" and start < stop and status != 416:
                self.connection.sendfile(file, start, stop - start)

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""


class Quiet(ThreadingHTTPServer):
    """One thread a connection, however many; a client that hangs up is none of its business."""

    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request: Any, address: Any) -> None:
        """Say nothing."""


class Relay:
    """Passes requests on, each so many seconds after it came, as a line does that is as long; and answers, but for its faults."""

    def __init__(self, port: int, seconds: float, place: Path) -> None:
        self.port, self.seconds, self.place = port, seconds, place
        self.met: Counter[tuple[int, str]] = Counter()
        self.under_way = 0
        self.lock = threading.Lock()
        self.log = (place / "log.jsonl").open("a")

    def run(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        print(listening.getsockname()[1], flush=True)
        while True:
            threading.Thread(target=self.serve, args=[listening.accept()[0]], daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        upstream = socket.create_connection(("127.0.0.1", self.port))
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client, upstream, suppress(OSError):
            while request := head(client):
                method, path = request.split(b" ", 2)[:2]
                with self.lock:
                    self.under_way += 1
                    most = self.under_way
                time.sleep(self.seconds)
                going_on = self.answer(client, upstream, request, method, path.decode())
                with self.lock:
                    self.under_way -= 1
                    self.log.write(json.dumps({"method": method.decode(), "path": path.decode(), "under_way": most}) + "\n")
                    self.log.flush()
                if not going_on:
                    return

    def fault(self, path: str) -> str:
        """What is to go wrong now: of the first pair whose end the path has, unless that went wrong often enough."""
        told = json.loads((self.place / "faults.json").read_text())
        for end, (fault, times) in told["faults"].items():
            if path.endswith(end):
                with self.lock:
                    self.met[told["number"], end] += 1
                    return fault if times is None or self.met[told["number"], end] <= times else ""
        return ""

    def answer(self, client: socket.socket, upstream: socket.socket, request: bytes, method: bytes, path: str) -> bool:
        fault = self.fault(path)
        if fault.isdigit():
            client.sendall(f"HTTP/1.1 {fault} As told\r\nContent-Length: 0\r\n\r\n".encode())
            return True
        if fault == "hang":
            time.sleep(600)
        if fault == "close":
            return False
        upstream.sendall(request)
        answer = head(upstream)
        fields = dict(line.lower().split(b": ", 1) for line in answer.split(b"\r\n")[1:] if b": " in line)
        length = 0 if method == b"HEAD" else int(fields.get(b"content-length", b"0"))
        if fault == "cut":
            length //= 2
        if fault == "short":  # an honest length of half of what there is
            length //= 2
            answer = answer.replace(b"ength: " + fields[b"content-length"], b"ength: %d" % length)
        client.sendall(answer)
        return pass_on(upstream, client, length) and fault == ""


def pass_on(source: socket.socket, target: socket.socket, length: int) -> bool:
    """Pass so many bytes on, within the kernel where it can do that, and tell whether they came."""
    if not hasattr(os, "splice"):
        while length and (piece := source.recv(min(length, PIECE))):
            target.sendall(piece)
            length -= len(piece)
        return not length
    out, into = os.pipe()
    try:
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, PIECE)
        while length and (waiting := os.splice(source.fileno(), into, min(length, PIECE))):
            length -= waiting
            while waiting:
                waiting -= os.splice(out, target.fileno(), waiting)
        return not length
    finally:
        os.close(out)
        os.close(into)


def head(connection: socket.socket) -> bytes:
    """Read a request or an answer up to its body, and no further."""
    found = b""
    while not found.endswith(b"\r\n\r\n"):
        waiting = connection.recv(65_536, socket.MSG_PEEK)
        if not waiting:
            return b""
        at = (found + waiting).find(b"\r\n\r\n")
        found += connection.recv(len(waiting) if at < 0 else at + 4 - len(found))
    return found


@contextmanager
def _running(*arguments: Any) -> Iterator[int]:
    process = subprocess.Popen([sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def files(folder: Path) -> Iterator[int]:
    """Serve a folder by the standard library, and give the port."""
    with _running("files", folder) as port:
        yield port


@contextmanager
def nginx(folder: Path, place: Path) -> Iterator[int]:
    """Serve a folder by nginx, and give the port; what it writes is in `place`."""
    assert NGINX is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (place / "nginx.conf").write_text(CONFIGURATION.format(place=place, folder=folder, port=port))
    process = subprocess.Popen([NGINX, "-p", place, "-e", place / "error.log", "-c", place / "nginx.conf"])
    try:
        wait_for(port)
        yield port
    finally:
        process.terminate()
        process.wait()


class Proxy:
    """A proxy that runs: where it is, what it has passed on, and what it does wrong."""

    def __init__(self, port: int, place: Path) -> None:
        self.port, self.place = port, place
        self._passed = self._told = 0
        self.fail({})

    def fail(self, faults: dict[str, tuple[str, int | None]]) -> None:
        """From now on, for paths that end so: "cut", "short", "close", "hang" or a status, so many times or (None) for good."""
        written = self.place / "faults.new"
        self._told += 1
        written.write_text(json.dumps({"number": self._told, "faults": faults}))
        written.replace(self.place / "faults.json")

    def requests(self) -> list[dict[str, Any]]:
        """Requests answered since the last look."""
        found = [json.loads(line) for line in (self.place / "log.jsonl").read_text().splitlines()]
        new, self._passed = found[self._passed :], len(found)
        return new


@contextmanager
def proxy(port: int, place: Path, seconds: float = 0.05) -> Iterator[Proxy]:
    """Stand before a port and delay each request."""
    place.mkdir(exist_ok=True)
    (place / "log.jsonl").write_text("")
    with _running("proxy", port, seconds, place) as own:
        yield Proxy(own, place)


def wait_for(port: int) -> None:
    """Wait until something listens."""
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens at port {port}"
            time.sleep(0.05)


def main(kind: str, *arguments: str) -> None:
    """Run one of the two servers that are written here."""
    if kind == "files":
        FilesHandler.root = Path(arguments[0])
        server = Quiet(("127.0.0.1", 0), FilesHandler)
        print(server.server_port, flush=True)
        server.serve_forever()
    else:
        Relay(int(arguments[0]), float(arguments[1]), Path(arguments[2])).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
