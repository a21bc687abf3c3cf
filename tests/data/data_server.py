"""A web server on the loopback that serves bytes, and can be told to misbehave, request by request."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
import time
from collections import defaultdict
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server = self.server
        path = self.path.split("?")[0]
        with server.lock:
            server.requests.append((self.path, dict(self.headers)))
            server.active[self.headers["Host"]] += 1
            server.busiest = max(server.busiest, server.active[self.headers["Host"]])
            queue = server.behaviours.get(path, [])
            behaviour = queue.pop(0) if len(queue) > 1 or (queue and queue[0].endswith("!")) else (queue or [""])[0]
            if behaviour.endswith("!"):
                behaviour = behaviour[:-1]
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                self.answer(path, behaviour)
        finally:
            with server.lock:
                server.active[self.headers["Host"]] -= 1

    def answer(self, path, behaviour):
        server = self.server
        self.close_connection = True
        if server.delay:
            time.sleep(server.delay)
        kind, _, value = behaviour.partition(":")
        if kind == "status":
            code, _, wait = value.partition(":")
            self.send_response(int(code))
            if wait:
                self.send_header("Retry-After", wait)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"sorry")
            return
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if kind == "stall-head":
            server.stopped.wait(20)
            return
        body = server.files.get(path)
        if body is None:
            self.send_error(404)
            return
        if kind == "wrong":
            body = bytes(len(body))
        self.send_body(body, kind, value)

    def send_body(self, body, kind, value):
        server = self.server
        tag = '"' + hashlib.md5(body).hexdigest() + '"' if server.tags else None
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        start, end = 0, len(body)
        partial = asked and kind != "ignore-range" and (condition is None or condition == tag)
        if partial:
            start = int(asked[1])
            end = min(int(asked[2]) + 1 if asked[2] else len(body), len(body))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(206 if partial else 200)
        if partial:
            shift = 7 if kind == "shifted" else 0
            self.send_header("Content-Range", f"bytes {start + shift}-{end - 1 + shift}/{len(body)}")
        if tag:
            self.send_header("ETag", tag)
        length = {"lie-long": end - start + 1000, "lie-short": (end - start) // 2}.get(kind, end - start)
        if kind != "no-length":
            self.send_header("Content-Length", str(length))
        self.end_headers()
        sent = body[start:end]
        if kind == "drop":
            self.wfile.write(sent[: int(value or len(sent) // 2)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if kind == "stall":
            self.wfile.write(sent[: len(sent) // 2])
            self.wfile.flush()
            server.stopped.wait(20)
            return
        if kind == "drip":
            for byte in range(len(sent)):
                self.wfile.write(sent[byte : byte + 1])
                self.wfile.flush()
                if server.stopped.wait(0.1):
                    return
        if kind == "slow":  # in twenty parts
            step = max(len(sent) // 20, 1)
            for offset in range(0, len(sent), step):
                self.wfile.write(sent[offset : offset + step])
                self.wfile.flush()
                if server.stopped.wait(float(value or 0.05)):
                    return
            return
        self.wfile.write(sent[:length])


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address="127.0.0.1"):
        super().__init__((address, 0), Handler)
        self.files: dict[str, bytes] = {}
        self.behaviours: dict[str, list[str]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.active: dict[str, int] = defaultdict(int)
        self.busiest = 0
        self.delay = 0.0
        self.tags = True
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def handle_error(self, request, client_address):
        pass

    @property
    def url(self):
        return f"http://{self.server_address[0]}:{self.server_address[1]}"

    def serve(self, path, body, *behaviours):
        """Serve ``body``; behaviours are used up one a request, the last stays, unless it ends in "!"."""
        self.files[path] = body
        self.behaviours[path] = list(behaviours)
        return self.url + path

    def asked(self, path):
        return [headers for asked, headers in self.requests if asked == path]


@contextmanager
def running_server(address="127.0.0.1"):
    server = Server(address)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
