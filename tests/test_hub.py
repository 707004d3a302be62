"""The real Hub client against a small server: what arrives, and what a user is told."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from cytosyn_aug.hub import announce_licence, find_folder, licence_of

CARD = "---\nlicense: cc-by-nc-nd-4.0\ngated: true\n---\n# A model\n"
FILES = {
    "README.md": CARD,
    "model_index.json": "{}",
    "pipeline.py": "raise SystemExit('executed')",
    "transformer/config.json": "{}",
    "transformer/diffusion_pytorch_model.safetensors": "weights of main",
    "transformer/diffusion_pytorch_model.fp16.safetensors": "a variant",
    "transformer/sit.py": "raise SystemExit('executed')",
    "vae/diffusion_pytorch_model.safetensors": "vae",
    "data/tiles.tar": "forty million tiles",
}
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's protocol as a snapshot needs."""

    fault = None  # set on the class by a test

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        if FakeHub.fault in ("GatedRepo", "RepoNotFound"):
            return self.refuse(403 if FakeHub.fault == "GatedRepo" else 404, FakeHub.fault)
        pieces = self.path.split("?")[0].strip("/").split("/")
        if pieces[:2] == ["api", "models"]:
            name = pieces[5] if len(pieces) > 5 else "main"
            commit = COMMITS.get(name, name)
            if commit not in COMMITS.values():
                return self.refuse(404, "RevisionNotFound")
            return self.send_json(self.listing(pieces[4] if len(pieces) > 4 else "", commit))
        commit, path = COMMITS.get(pieces[3], pieces[3]), "/".join(pieces[4:])
        if path not in FILES:
            return self.refuse(404, "EntryNotFound")
        return self.send_file(path, commit)

    def listing(self, kind, commit):
        if kind == "tree":
            return [
                {"type": "file", "path": k, "size": len(v), "oid": digest(k, commit)}
                for k, v in FILES.items()
            ]
        names = [{"rfilename": k} for k in FILES]
        return {"id": "owner/name", "sha": commit, "siblings": names, "private": False}

    def send_json(self, content):
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send_file(self, path, commit):
        body = content(path, commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(path, commit)}"'}
        if FakeHub.fault == "breaks" and "transformer/diff" in path and self.command == "GET":
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:3])
            self.close_connection = True
            return
        self.send(200, body, headers)

    def refuse(self, status, code):
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def content(path, commit):
    return (FILES[path] + (" v2" if commit == COMMITS["v2"] else "")).encode()


def digest(path, commit):
    return hashlib.sha1(content(path, commit)).hexdigest()


class Hub:
    """Runs `find_folder` in a process of its own, since the client reads its settings once."""

    def __init__(self, cache):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.cache, self.address = cache, f"http://127.0.0.1:{self.server.server_port}"
        FakeHub.fault = None

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def find(self, **arguments):
        program = """
            import json, sys
            from cytosyn_aug.hub import find_folder
            try:
                folder = find_folder("owner/name", **json.loads(sys.argv[1]))
                print(json.dumps(["found", str(folder)]))
            except Exception as error:
                print(json.dumps([type(error).__name__, str(error)]))
        """
        environment = os.environ | {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(self.cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        environment.pop("HF_TOKEN", None)
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), json.dumps(arguments)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        kind, value = json.loads(run.stdout.splitlines()[-1])
        return kind, value


@pytest.fixture
def hub(tmp_path):
    running = Hub(tmp_path / "cache")
    yield running
    running.stop()


def files_in(folder):
    root = Path(folder)
    return {str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()}


def test_weights_and_card_arrive_but_no_code_and_no_data(hub):
    kind, folder = hub.find()
    assert kind == "found", folder
    assert files_in(folder) == {
        "README.md",
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_a_revision_is_another_snapshot(hub):
    (_, first), (_, second) = hub.find(), hub.find(revision="v2")
    name = "transformer/diffusion_pytorch_model.safetensors"
    texts = [Path(folder, name).read_text() for folder in (first, second)]
    assert texts == ["weights of main", "weights of main v2"]


def test_without_a_network_the_cache_serves(hub):
    _, folder = hub.find()
    hub.stop()
    assert hub.find() == ("found", folder)


@pytest.mark.parametrize(
    ("fault", "arguments", "kind", "message"),
    [
        ("GatedRepo", {}, "PermissionError", "is gated, and no token was found"),
        ("GatedRepo", {"token": "hf_x"}, "PermissionError", "your token has no access"),
        ("RepoNotFound", {}, "FileNotFoundError", "was not found on the Hub"),
        (None, {"revision": "v9"}, "ValueError", "has no revision 'v9'"),
        ("breaks", {}, "ConnectionError", "run it again"),
    ],
)
def test_a_refusal_says_what_to_do(hub, fault, arguments, kind, message):
    FakeHub.fault = fault
    got, text = hub.find(**arguments)
    assert (got, message in text) == (kind, True), text


def test_a_broken_download_is_finished_by_the_next_call(hub):
    FakeHub.fault = "breaks"
    assert hub.find()[0] == "ConnectionError"
    FakeHub.fault = None
    kind, folder = hub.find()
    assert kind == "found"
    assert "transformer/diffusion_pytorch_model.safetensors" in files_in(folder)


def test_no_network_and_no_cache_says_so(hub):
    hub.stop()
    kind, text = hub.find()
    assert kind == "ConnectionError"
    assert "not in the cache" in text


def test_a_local_folder_is_itself_and_has_no_revision(tmp_path):
    assert find_folder(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="belong to the Hub"):
        find_folder(tmp_path, revision="v2")


@pytest.mark.parametrize("source", ["no-such-folder", "a/b/c", "../x"])
def test_what_is_neither_folder_nor_id_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither an existing folder nor a Hub id"):
        find_folder(source)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (CARD, "cc-by-nc-nd-4.0"),
        ("---\nlicense: other\nlicense_name: house-rules\n---\n", "house-rules"),
        ("---\ntags: [x]\n---\nlicense: mit\n", None),
        ("# no front matter", None),
        (None, None),
    ],
)
def test_the_licence_is_read_off_the_card(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == licence


def test_a_licence_is_announced_once(tmp_path, capsys):
    (tmp_path / "README.md").write_text(CARD)
    for _ in range(2):
        announce_licence(tmp_path, tmp_path)
    assert capsys.readouterr().err.count("cc-by-nc-nd-4.0") == 1
