"""Load from one thread: many HTTP connections on raw sockets, so that the client takes as little
as can be of the cores that it shares with the server under test. Knows requests and events, not
who answers."""

import json
import re
import selectors
import socket
import time

# An event that carries text: chat and completion streams of every server have one of these.
EVENT = re.compile(rb'"(?:content|text)":"(?!")')


class Seen:
    """What clients saw: events with text, times of first events, answers, failures."""

    def __init__(self):
        self.events = 0
        self.first = []
        self.answers = 0
        self.seconds = 0.0

    def tokens_a_second(self):
        return self.events / self.seconds

    def answers_a_second(self):
        return self.answers / self.seconds


def request(address, path, body):
    """The bytes of one POST."""
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


def get(address, path):
    """Status and body of one GET; status 0 while nobody answers."""
    try:
        with socket.create_connection(address, timeout=5) as link:
            link.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while piece := link.recv(65536):
                answer += piece
    except OSError:
        return 0, b""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


def post(address, path, body):
    """One answer, parsed."""
    with socket.create_connection(address, timeout=120) as link:
        wire = request(address, path, body)
        link.sendall(wire.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1))
        answer = b""
        while piece := link.recv(1 << 20):
            answer += piece
    head, _, content = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise RuntimeError(f"{path}: {answer[:400]!r}")
    if b"transfer-encoding: chunked" in head.lower():
        content = unchunk(content)
    return json.loads(content)


def unchunk(content):
    """The body of a chunked answer."""
    whole = b""
    while content:
        size, _, content = content.partition(b"\r\n")
        length = int(size, 16)
        whole += content[:length]
        content = content[length + 2 :]
    return whole


class Connection:
    """One client: sends a request when the last one is answered. A stream ends with its connection
    (some servers end it after some answers anyway); other answers share one."""

    def __init__(self, address, path, bodies):
        self.address, self.path, self.bodies = address, path, bodies
        self.link = None

    def send(self, poll):
        """False when there is nothing more to ask."""
        body = next(self.bodies, None)
        if body is None:
            return False
        wire = request(self.address, self.path, body)
        self.stream = body.get("stream", False)
        if self.stream:
            wire = wire.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
        self.asked, self.first, self.headed = time.perf_counter(), True, False
        self.tail = b""
        if self.link is None:
            self.link = socket.create_connection(self.address)
            self.link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            poll.register(self.link, selectors.EVENT_READ, self)
        self.link.sendall(wire)
        return True

    def read(self, poll, seen, now):
        """Takes in what has arrived; True at the end of an answer."""
        piece = self.link.recv(1 << 18)
        if not self.headed:
            if b" 200 " not in piece[:16]:
                raise RuntimeError(f"{self.path}: {piece[:400]!r}")
            self.headed = True
            if not self.stream:
                head, _, piece = piece.partition(b"\r\n\r\n")
                self.left = int(re.search(rb"(?i)content-length: *(\d+)", head)[1])
        if self.stream:
            ended = self.events(seen, piece, now)
            if ended:
                self.close(poll)
        else:
            self.left -= len(piece)
            ended = self.left <= 0
        seen.answers += ended
        return ended

    def events(self, seen, piece, now):
        """Counts the events of a stream; True at its end."""
        text = self.tail + piece
        events = len(EVENT.findall(text))
        if events and self.first:
            self.first = False
            seen.first.append(now - self.asked)
        seen.events += events
        # The beginning of an event may have come, or its end: none is counted twice.
        line = text[text.rfind(b"\n") + 1 :]
        self.tail = line if not EVENT.search(line) else b""
        return not piece

    def close(self, poll):
        if self.link is not None:
            poll.unregister(self.link)
            self.link.close()
            self.link = None


def load(address, path, clients, seconds=None, ramp=0.0):
    """Runs one connection for each iterator of bodies in `clients`, until all are exhausted, or
    for `seconds` after a `ramp` that is not counted. Returns what was seen."""
    connections = [Connection(address, path, bodies) for bodies in clients]
    poll = selectors.DefaultSelector()
    seen, ramped = Seen(), ramp == 0.0
    begun = time.perf_counter()
    live = sum(connection.send(poll) for connection in connections)
    while live:
        for key, _ in poll.select(timeout=60):
            connection = key.data
            if connection.read(poll, seen, time.perf_counter()) and not connection.send(poll):
                live -= 1
        now = time.perf_counter()
        if not ramped and now - begun >= ramp:
            ramped, begun, seen = True, now, Seen()
        if seconds is not None and ramped and now - begun >= seconds:
            break
    seen.seconds = time.perf_counter() - begun
    for connection in connections:
        connection.close(poll)
    return seen
