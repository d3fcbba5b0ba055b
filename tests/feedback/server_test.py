"""The server answers who knows the token, about its samples and nothing else."""

import http.client
import json
import os
import socket
import time
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from gendiff.feedback import ask, labels, server
from gendiff.feedback.ask import Options

PATHS = ["/", "/page.js", "/page.css", "/state", "/lines", "/sample/{}", "/backdrop"]


class Client:
    """Requests to a served page, word for word."""

    def __init__(self, board, url):
        self.board = board
        parts = urllib.parse.urlsplit(url)
        self.host, self.port, self.token = parts.hostname, parts.port, parts.query.removeprefix("token=")

    def __call__(self, path, method="GET", body=None, token=True, **headers):
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        given = {"Authorization": f"Bearer {self.token}"} if token else {}
        if body is not None:
            given["Content-Type"] = "application/json"
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.putrequest(method, path, skip_host="Host" in given)
        for name, value in given.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        answer.body = answer.read()
        connection.close()
        return answer

    def line(self, row=0, **change):
        found = self.board.samples
        mark = labels.mark(found.ids[row], found.hashes[row], "malign", "anna", seconds=1.0)
        return labels.as_json(mark) | change

    def post(self, *lines, **headers):
        return self("/lines?rater=anna", "POST", json.dumps(lines).encode(), **headers)


@pytest.fixture
def client(tmp_path):
    np.save(tmp_path / "samples.npy", np.random.default_rng(0).normal(size=(7, 2)))
    options = Options(port=0, rater="anna", meaning="far out")
    board = ask.make_board(tmp_path, options, need=(1, 1))
    with ask.serving(board, options) as url:
        yield Client(board, url)


def paths(client):
    return [path.format(client.board.samples.hashes[0]) for path in PATHS]


def test_every_path_needs_the_token(client):
    for path in [*paths(client), "/none"]:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer " + client.token[:-1]},
            {"Authorization": "Bearer ü"},
            {"Cookie": f"gendiff={client.token}; a=b"},
            {"Cookie": "gendiff-0=é"},
        ):
            encoded = {name: value.encode() for name, value in headers.items()}
            answer = client(path, token=False, **encoded)
            assert (answer.status, client.token.encode() in answer.body) == (401, False), path
        assert client(path + "?token=" + client.token[::-1], token=False).status == 401
    assert client("/state?token=" + client.token, token=False).status == 401, "only the page takes it from the address"
    assert client("/lines", "POST", b"[]", token=False).status == 401
    assert client("/finish", "POST", b"", token=False).status == 401
    assert not client.board.finished.is_set()
    for path in paths(client):
        assert client(path).status == 200


def test_the_token_becomes_a_cookie(client):
    answer = client("/?token=" + client.token, token=False)
    assert (answer.status, answer.getheader("Location")) == (303, "/")
    cookie = answer.getheader("Set-Cookie")
    assert "HttpOnly" in cookie
    assert "samesite=lax" in cookie.lower()
    assert client("/state", token=False, Cookie="x:y=1; " + cookie.partition(";")[0]).status == 200


def test_foreign_hosts_and_origins_are_refused(client):
    for host in ("evil.example", f"evil.example:{client.port}", "127.0.0.1.evil.example", "", "[::1"):
        answer = client("/state", Host=host)
        assert answer.status in (400, 403), host  # the HTTP library refuses some by itself
    for host in ("localhost", "localhost:9999", "127.0.0.1:80", "[::1]:1"):
        assert client("/state", Host=host).status == 200, "a tunnel may end at another port"
    assert client.post(client.line(), Origin="http://evil.example").status == 403
    assert client.post(client.line(), Origin="null").status == 403
    assert labels.read(client.board.path) == []
    assert client.post(client.line(), Origin=f"http://127.0.0.1:{client.port}").status == 200


def test_answers_carry_the_browser_s_rules(client):
    for path in [*paths(client), "/none"]:
        headers = client(path).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"]
        assert "server" not in headers


def test_no_path_leads_out(client, tmp_path):
    (tmp_path / "secret.png").write_text("secret")
    for path in (
        "/secret.png",
        "/labels.jsonl",
        "/sample/secret.png",
        "/sample/../secret.png",
        "/sample/..%2fsecret.png",
        "/sample/%2e%2e/secret.png",
        "/sample//etc/passwd",
        "/../../../../etc/passwd",
        "/page.js/../server.py",
        "/page/../server.py",
        "/server.py",
        "//etc/passwd",
        "/sample/" + "0" * 64,
    ):
        answer = client(path)
        assert (answer.status, b"secret" in answer.body) == (404, False), path


def test_a_sample_that_became_a_link_is_not_shown(tmp_path, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(pixels).save(outside)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    options = Options(port=0)
    board = ask.make_board(tmp_path, options)
    with ask.serving(board, options) as url:
        client = Client(board, url)
        path = "/sample/" + board.samples.hashes[0]
        assert client(path).getheader("Content-Type") == "image/png"
        (tmp_path / "a.png").unlink()
        (tmp_path / "a.png").symlink_to(outside)
        answer = client(path)
    assert answer.status == 500
    assert b"must be a file inside" in answer.body
    assert b"PNG" not in answer.body


def test_marks_are_stored_and_told(client):
    sent = [client.line(0), client.line(1, label=None), client.line(2, rater="bob")]
    answer = client.post(*sent, {"type": "meaning", "text": "farther", "rater": "anna"})
    assert answer.status == 200
    told = json.loads(answer.body)
    assert [mark["id"] for mark in told["marks"]] == [sent[0]["id"], sent[1]["id"]], "of the rater who asks"
    assert (told["next"], told["meaning"], told["enough"]) == (3, "farther", False)
    assert [mark.id for mark in labels.read(client.board.path)] == [line["id"] for line in sent]
    assert client.post(sent[0]).status == 200
    assert json.loads(client("/lines?since=3").body)["next"] == 3, "a line that comes twice counts once"
    assert json.loads(client.post(client.line(3, label="benign")).body)["enough"]
    about = json.loads(client("/state").body)
    assert (about["rater"], about["kind"], len(about["samples"]), about["need"]) == ("anna", "point", 7, [1, 1])


def test_wrong_lines_are_refused_whole(client):
    good = client.line(0)
    for wrong, message in (
        (client.line(1, hash="0" * 64), b"of other samples"),
        (client.line(1, label="bad"), b"label must be"),
        (client.line(1, seconds=-1), b"seconds must be"),
        ("text", b"a line must be an object"),
    ):
        answer = client.post(good, wrong)
        assert answer.status in (400, 409)
        assert message in answer.body
    for body in (b"{}", b"[", b"\xff", b"[" + b" " * 2**20 + b"]"):
        assert client("/lines", "POST", body).status == 400
    assert client("/lines?since=-1").status == 400
    assert client("/lines", "POST", b"[]", Content_Type="text/plain").status == 400
    assert labels.read(client.board.path) == []


def test_a_file_damaged_meanwhile_is_told(client):
    client.post(client.line(0))
    client.board.path.write_text("damage\n" + client.board.path.read_text())
    answer = client("/lines")
    assert answer.status == 409
    assert b"labels.jsonl, line 1 must be a JSON line" in answer.body


def test_other_methods_and_protocols_get_nothing(client):
    assert client("/state", "POST", b"[]").status == 405
    assert client("/finish").status == 405
    assert client("/state", Connection="Upgrade", Upgrade="websocket", Sec_WebSocket_Key="x", token=False).status >= 400


def test_brackets_nested_too_deeply_are_refused(client):
    for body in (b"[" * 100_000, b'[{"type": ' * 20_000, b"[" * 100_000 + b"]" * 100_000):
        answer = client("/lines", "POST", body)
        assert answer.status == 400, answer.body


@pytest.mark.parametrize("change", [{"text": "half \ud83d"}, {"rater": "\udc80"}, {"session": "\ude00"}])
def test_text_that_is_no_unicode_is_refused_before_it_is_stored(client, change):
    before = client.board.path.read_bytes()
    line = {"type": "meaning", "text": "near", "rater": "anna"} | change
    for body in (json.dumps([line]).encode(), json.dumps([line], ensure_ascii=False).encode("utf-8", "surrogatepass")):
        answer = client("/lines", "POST", body)
        assert answer.status == 400
        assert b"must be Unicode text" in answer.body
    assert client.board.path.read_bytes() == before
    for path in ("/state", "/lines"):
        assert client(path).status == 200


@pytest.mark.parametrize("rater", ["%0A", "a%00b", "x" * 65, "%E2%80%8B"])
def test_a_rater_whose_marks_could_not_be_stored_is_told_at_once(client, rater):
    answer = client("/state?rater=" + rater)
    assert answer.status == 400
    assert b"rater must be" in answer.body
    assert client("/state?rater=b%ED%A0%BDla").status == 200, "shown with a sign for what is no Unicode"


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_names_that_are_no_unicode_are_shown_escaped(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"f\xe9")
    os.mkdir(folder)
    with open(os.path.join(folder, b"caf\xe9.png"), "wb") as file:
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(file, "PNG")
    options = Options(port=0, rater="anna")
    board = ask.make_board(tmp_path / os.fsdecode(b"f\xe9"), options)
    assert ask.invitation(board, options, "http://x:1/?token=x").encode()
    with ask.serving(board, options) as url:
        client = Client(board, url)
        about = json.loads(client("/state").body)
        assert about["samples"] == [["caf\\xe9.png", board.samples.hashes[0]]]
        assert about["labels"].endswith("f\\xe9/labels.jsonl")
        assert client.post(client.line()).status == 200
        assert [mark.sample for mark in labels.read(board.path)] == ["caf\\xe9.png"]
        os.remove(os.path.join(folder, b"caf\xe9.png"))
        answer = client("/sample/" + board.samples.hashes[0])
        assert (answer.status, b"caf\\xe9.png" in answer.body) == (500, True)


@pytest.mark.parametrize("how", ["removed", "emptied", "folder removed"])
def test_labels_that_vanish_are_written_again_and_told(client, how, caplog, tmp_path_factory):
    client.post(client.line(0), client.line(1, label="benign"))
    before, path = labels.records(client.board.path), client.board.path
    if how == "emptied":
        path.write_bytes(b"")
    else:
        path.unlink()
    if how == "folder removed":
        path.parent.rename(tmp_path_factory.mktemp("elsewhere") / "folder")
        answer = client.post(client.line(2))
        assert (answer.status, b"could not be written" in answer.body) == (507, True)
        path.parent.mkdir()
    told = json.loads(client.post(client.line(3)).body)
    assert labels.records(path)[: len(before)] == before
    assert len(labels.read(path)) == 3
    assert told["next"] == 3
    assert "4 lines" not in told["notice"]
    assert "labels.jsonl had vanished or was emptied: its 3 lines were written again" in told["notice"]
    assert "were written again" in caplog.text


def test_labels_that_are_replaced_are_told(client):
    client.post(client.line(0), client.line(1))
    kept = client.board.path.read_bytes().splitlines(keepends=True)[:2]
    client.board.path.unlink()
    client.board.path.write_bytes(b"".join(kept))
    told = json.loads(client("/lines").body)
    assert (told["next"], "was replaced: 1 of its marks are gone" in told["notice"]) == (1, True)


def test_posts_parse_new_lines_only(client, monkeypatch):
    client.post(*(client.line(i % 7) for i in range(200)))
    lines = []
    monkeypatch.setattr(labels, "parse", lambda record, parse=labels.parse: lines.append(record) or parse(record))
    assert client.post(client.line(0)).status == 200
    assert len(lines) < 10


HEAD = b"POST /lines HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("what", ["nothing", "half a head", "half a body", "a second half", "drops"])
def test_half_open_connections_are_closed(client, monkeypatch, what):
    monkeypatch.setattr(server, "PATIENCE", 0.6)
    body = HEAD + f"Authorization: Bearer {client.token}\r\nContent-Type: application/json\r\n".encode()
    body += b"Content-Length: 100\r\n\r\n["
    whole = HEAD.replace(b"POST", b"GET") + f"Authorization: Bearer {client.token}\r\n\r\n".encode()
    sent = {"nothing": b"", "half a body": body, "a second half": whole + HEAD}.get(what, HEAD)
    with socket.create_connection((client.host, client.port), timeout=20) as connection:
        connection.sendall(sent)
        started, answer = time.monotonic(), b""
        connection.settimeout(0.1 if what == "drops" else 20)
        while time.monotonic() - started < 20:
            try:
                if not (more := connection.recv(4096)):
                    break
                answer += more
            except TimeoutError:
                connection.sendall(b"X")
            except OSError:  # closed while drops were on their way
                break
        seconds = time.monotonic() - started
    assert 0.5 < seconds < 10
    assert (b" 408 " in answer) == (what == "half a body")
    assert client("/lines").status == 200


def test_who_hangs_up_leaves_no_traceback(client, caplog):
    head = HEAD + f"Authorization: Bearer {client.token}\r\nContent-Type: application/json\r\n".encode()
    with socket.create_connection((client.host, client.port), timeout=20) as connection:
        connection.sendall(head + b"Content-Length: 100\r\n\r\n[")
    time.sleep(0.3)
    assert client("/lines").status == 200
    assert "Traceback" not in caplog.text
