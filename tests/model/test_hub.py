"""The real Hub client against a small server: what arrives, and what a user is told."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cytosyn_aug.model.hub import ENCODER_PATTERNS, announce_licence, find_folder, licence_of

CARD = "---\nlicense: cc-by-nc-nd-4.0\ngated: true\n---\n# A model\n"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FILES = {
    "README.md": CARD,
    "model_index.json": "{}",
    "pipeline.py": "raise SystemExit('executed')",
    "transformer/config.json": "{}",
    WEIGHTS: "weights of main, as long as this line",
    "transformer/diffusion_pytorch_model.fp16.safetensors": "a variant",
    "transformer/diffusion_pytorch_model.non_ema.safetensors": "a variant",
    "transformer/before/diffusion_pytorch_model.safetensors": "an old attempt",
    "transformer/sit.py": "raise SystemExit('executed')",
    "vae/diffusion_pytorch_model.safetensors": "vae",
    "data/tiles.tar": "forty million tiles",
    "data/features.safetensors": "forty million features",
}
SHARDS = [f"transformer/model-{k}-of-2.safetensors" for k in (1, 2)]
SHARDED = {
    "transformer/model.safetensors.index.json": json.dumps(
        {"weight_map": {name: Path(name).name for name in SHARDS}}
    ),
    **dict.fromkeys([*SHARDS, "vae/model.safetensors"], "weights"),
}
COMMITS = {"main": "a" * 40, "v2": "b" * 40}
MEMBER = "hf_member"
# What the Hub answers: status, X-Error-Code, X-Error-Message.
REFUSALS = {
    "no access": (403, "GatedRepo", "Access to model owner/name is restricted"),
    "no login": (401, "GatedRepo", "You must be authenticated"),
    "missing": (404, "RepoNotFound", "Repository not found"),
    "missing or private": (401, "", "Invalid username or password."),
    "bad token": (401, "", "Invalid credentials in Authorization header"),
    "narrow token": (403, "", "Please enable access to public gated repositories"),
    "down": (500, "", "Internal error"),
}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's protocol as a snapshot needs."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub, path = self.server.hub, urlsplit(self.path).path
        pieces = path.strip("/").split("/")
        is_api = pieces[0] == "api"
        file = "" if is_api else "/".join(pieces[4:])
        hub.requests.append((self.command, file))
        if refusal := hub.refusal(is_api, file, self.headers.get("Authorization")):
            return self.refuse(*refusal)
        if is_api:
            return self.send_listing(pieces)
        commit = COMMITS.get(pieces[3], pieces[3])
        if file not in hub.files:
            return self.refuse(404, "EntryNotFound", "no such file")
        return self.send_file(file, commit)

    def send_listing(self, pieces):
        """Answer /api/models/owner/name[/revision/main] or .../tree/main."""
        kind, name = pieces[4:6] if len(pieces) > 4 else ("revision", "main")
        commit = COMMITS.get(name, name)
        if commit not in COMMITS.values():
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        files = self.server.hub.files
        listing = {"id": "/".join(pieces[2:4]), "sha": commit, "private": False}
        listing["siblings"] = [{"rfilename": name} for name in files]
        if kind == "tree":
            listing = [
                {"type": "file", "path": name, "size": len(body), "oid": digest(body, commit)}
                for name, body in files.items()
            ]
        return self.send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def send_file(self, file, commit):
        hub = self.server.hub
        whole = content(hub.files[file], commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest(hub.files[file], commit)}"'}
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        sent = whole[start:]
        if hub.breaks_at == file:
            sent = sent[: len(sent) // 2]
        self.send(206 if start else 200, sent, headers, len(whole) - start)

    def refuse(self, status, code, message):
        self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, status, body, headers, length=None):
        self.send_response(status)
        size = len(body) if length is None else length
        for name, value in {**headers, "Content-Length": str(size)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def content(body, commit):
    return (body + (" v2" if commit == COMMITS["v2"] else "")).encode()


def digest(body, commit):
    return hashlib.sha1(content(body, commit)).hexdigest()


class Hub:
    """A server, and `find_folder` in a process of its own: the client reads its settings once."""

    program = """
        import json, sys, time
        time.sleep = lambda _: None  # the client waits between its attempts
        from cytosyn_aug.model.hub import find_folder
        try:
            found = ["found", str(find_folder(sys.argv[1], **json.loads(sys.argv[2])))]
        except (OSError, ValueError) as error:
            found = [type(error).__name__, str(error), type(error.__cause__).__name__]
        assert "torch" not in sys.modules, "finding a folder must not load torch"
        print(json.dumps(found))
    """

    def __init__(self, cache):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
        self.server.hub = self
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.cache, self.address = cache, f"http://127.0.0.1:{self.server.server_port}"
        self.files, self.requests, self.causes = dict(FILES), [], []
        self.refuses = self.gates = self.breaks_at = None  # faults that a test sets

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def refusal(self, is_api, file, authorization):
        """Return status, code and message, or None for those who may have a file.

        The Hub gates files, not always their listing, and never the model card.
        """
        if self.refuses:
            return REFUSALS[self.refuses]
        is_gated = self.gates == "everything" or (self.gates and file not in ("", "README.md"))
        if is_gated and authorization != f"Bearer {MEMBER}":
            return REFUSALS["no access" if authorization else "no login"]
        return None

    def find(self, source="owner/name", *, environment=None, **arguments):
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith(("HF_", "HUGGING")) and "proxy" not in name.lower()
        }
        settings = {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(self.cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(self.program), source, json.dumps(arguments)],
            env=inherited | settings | (environment or {}),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 0, run.stderr
        kind, value, *cause = json.loads(run.stdout.splitlines()[-1])
        self.causes += cause
        return kind, value


@pytest.fixture
def hub(tmp_path):
    running = Hub(tmp_path / "cache")
    yield running
    running.stop()


def files_in(folder):
    root = Path(folder)
    return {f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file()}


def assert_told(answer, kind, *texts):
    assert answer[0] == kind, answer[1]
    assert [text for text in texts if text not in answer[1]] == [], answer[1]


def test_weights_and_card_arrive_but_no_code_data_or_variants(hub):
    kind, folder = hub.find()
    assert kind == "found", folder
    assert files_in(folder) == {
        "README.md",
        "model_index.json",
        "transformer/config.json",
        WEIGHTS,
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_a_variant_arrives_where_there_is_nothing_else(hub):
    variant = "transformer/diffusion_pytorch_model.fp16.safetensors"
    hub.files = {k: v for k, v in FILES.items() if k != WEIGHTS and "non_ema" not in k}
    kind, folder = hub.find()
    assert kind == "found", folder
    assert variant in files_in(folder)


def test_of_an_encoder_only_its_root_arrives(hub):
    wanted = dict.fromkeys(["README.md", "config.json", "model.safetensors"], "{}")
    unwanted = ["pytorch_model.bin", "model.py", "checkpoints/model.safetensors", "x/config.json"]
    hub.files = wanted | dict.fromkeys(unwanted, "{}")
    kind, folder = hub.find(patterns=ENCODER_PATTERNS)
    assert (kind, files_in(folder)) == ("found", set(wanted))


@pytest.mark.slow
@pytest.mark.parametrize("revision", ["v2", COMMITS["v2"]])
def test_a_revision_is_another_snapshot(hub, revision):
    (_, first), (_, second) = hub.find(), hub.find(revision=revision)
    texts = [Path(folder, WEIGHTS).read_text() for folder in (first, second)]
    assert texts == [FILES[WEIGHTS], FILES[WEIGHTS] + " v2"]


def test_a_second_call_fetches_nothing_again(hub):
    first = hub.find()
    hub.requests.clear()
    assert hub.find() == first
    assert not [file for command, file in hub.requests if command == "GET" and file]


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["files", "everything"])
def test_a_gated_repository_opens_for_a_token_with_access(hub, gates):
    hub.gates = gates
    assert_told(hub.find(), "PermissionError", "is gated and no token was found", "hf auth login")
    page = "https://huggingface.co/owner/name"
    for login in ({"token": "hf_other"}, {"environment": {"HF_TOKEN": "hf_other"}}):
        outsider = hub.find(**login)
        assert_told(outsider, "PermissionError", "your token has no access to it", page)
        assert "hf_other" not in outsider[1]
    assert hub.find(token=MEMBER)[0] == "found"
    assert hub.find(environment={"HF_TOKEN": MEMBER})[0] == "found"


@pytest.mark.slow
def test_a_refused_cytosyn_says_that_features_do_without_h0_mini(hub):
    hub.gates = "files"
    answer = hub.find("Owkin-Bioptimus/CytoSyn")
    page = "https://huggingface.co/Owkin-Bioptimus/CytoSyn"
    assert_told(answer, "PermissionError", page, "gated separately", "precomputed features")
    assert "H0-mini" not in hub.find()[1]


def test_the_card_that_a_refusal_left_in_the_cache_is_no_model(hub):
    hub.gates = "files"
    hub.find()
    hub.stop()
    assert_told(hub.find(), "ConnectionError", "only partly in the cache", "connect")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refuses", "token", "kind", "texts"),
    [
        ("missing", "hf_x", "FileNotFoundError", ["was not found on the Hub", "private or gated"]),
        ("missing or private", None, "FileNotFoundError", ["not found on the Hub", "HF_TOKEN"]),
        ("bad token", "hf_x", "PermissionError", ["Invalid credentials", "hf auth login"]),
        ("narrow token", "hf_x", "PermissionError", ["enable access to", "settings/tokens"]),
        ("down", None, "ConnectionError", ["not in the cache", "answers with status 500"]),
    ],
)
def test_a_refusal_says_what_to_do(hub, refuses, token, kind, texts):
    hub.refuses = refuses
    assert_told(hub.find(token=token), kind, "owner/name", *texts)
    assert hub.causes != ["NoneType"]  # raised from the client's own error


@pytest.mark.parametrize("revision", ["v9", "c" * 40])
def test_a_wrong_revision_is_named(hub, revision):
    answer = hub.find(revision=revision)
    assert_told(answer, "ValueError", f"has no revision '{revision}'", "/tree/main")


def test_a_broken_download_is_finished_by_the_next_call(hub):
    hub.breaks_at = WEIGHTS
    assert_told(hub.find(), "ConnectionError", "broke off", "run the same again")
    hub.breaks_at = None
    hub.requests.clear()
    kind, folder = hub.find()
    assert (kind, Path(folder, WEIGHTS).read_text()) == ("found", FILES[WEIGHTS])
    assert {file for command, file in hub.requests if command == "GET" and file} == {WEIGHTS}


def test_a_failure_of_the_storage_behind_the_hub_is_a_broken_download(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Data processing error: CAS service error")  # as Xet does

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConnectionError, match=r"CAS service error.*run the same again"):
        find_folder("owner/name")


def test_without_a_network_a_warm_cache_serves(hub):
    found = hub.find()
    hub.stop()
    assert hub.find() == found
    assert hub.find(environment={"HF_HUB_OFFLINE": "1"}) == found


def test_without_a_network_a_broken_download_is_refused(hub):
    hub.breaks_at = WEIGHTS
    hub.find()
    hub.stop()
    assert_told(hub.find(), "ConnectionError", "only partly in the cache", "connect")


@pytest.mark.slow
@pytest.mark.parametrize("lost", [SHARDS[1], "vae/model.safetensors"])
def test_without_a_network_and_listing_lost_weights_are_named(hub, lost):
    hub.files = SHARDED
    _, folder = hub.find()
    hub.stop()
    Path(folder, lost).unlink()
    # Older clients keep no listing, and call any snapshot complete.
    shutil.rmtree(Path(folder).parents[1] / "trees", ignore_errors=True)
    named = lost if lost in SHARDS else "vae/*.safetensors"
    assert_told(hub.find(), "ConnectionError", "only partly in the cache", named, "connect once")


def test_no_network_and_no_cache_says_so(hub):
    hub.stop()
    assert_told(hub.find(), "ConnectionError", "is not in the cache", "cannot be reached")
    offline = hub.find(revision="v2", environment={"HF_HUB_OFFLINE": "1"})
    assert_told(offline, "ConnectionError", "at revision 'v2'", "HF_HUB_OFFLINE is set")


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path):
    file = tmp_path / "file"
    file.touch()
    answer = hub.find(environment={"HF_HUB_CACHE": str(file)})
    assert_told(answer, "OSError", f"cannot be kept in the cache {file}", "HF_HOME")


def test_pickles_are_refused_and_conversion_is_advised(hub):
    hub.files = {"model_index.json": "{}", "vae/x.bin": "", "transformer/x.safetensors": "x"}
    answer = hub.find()
    assert_told(answer, "FileNotFoundError", "vae/*.safetensors", "x.bin", "cytosyn-aug convert")


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ({"README.md": CARD, "model.safetensors": "x"}, "transformer/*.safetensors"),
        ({k: v for k, v in SHARDED.items() if k != SHARDS[0]}, SHARDS[0]),
    ],
)
def test_a_repository_that_lacks_weights_is_refused(hub, files, missing):
    hub.files = files
    assert_told(hub.find(), "FileNotFoundError", missing, "the right repository")


def test_a_local_folder_is_itself_and_has_no_revision(tmp_path, monkeypatch):
    assert find_folder(tmp_path) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_folder("owner/name") == Path("owner/name")
    with pytest.raises(ValueError, match="belong to the Hub"):
        find_folder(tmp_path, revision="v2")


def test_a_file_is_not_a_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(NotADirectoryError, match="give the one it is in"):
        find_folder(file)


@pytest.mark.parametrize("source", ["no-such", "/no/such", "a/b/c", "../x", "a/b--c", "a/b."])
def test_what_is_neither_folder_nor_id_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither an existing folder nor a Hub id"):
        find_folder(source)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (CARD, "cc-by-nc-nd-4.0"),
        (CARD.replace("\n", "\r\n"), "cc-by-nc-nd-4.0"),
        ("\ufeff---\ntags:\n- x\nlicense: 'mit'  # as upstream\n---", "mit"),
        ("---\nlicense: other\nlicense_name: house-rules\n---\n", "house-rules"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense: mit\nlicense_name: not-asked\n---\n", "mit"),
        ("---\nlicense:\n- mit\n- apache-2.0\ntags: [x]\n---\n", "mit, apache-2.0"),
        ("---\nlicense:\nlicense_link: LICENSE\n---\n", None),
        ("---\ntags: [x]\n---\nlicense: mit\n", None),
        ("# no front matter\nlicense: mit\n", None),
        (None, None),
    ],
)
def test_the_licence_is_read_off_the_card(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert licence_of(tmp_path) == licence


@pytest.mark.parametrize(
    ("card", "stated"),
    [
        (CARD, "weights of {} are under cc-by-nc-nd-4.0, as its model card states"),
        ("", "the model card of {} states no licence"),
    ],
)
def test_a_licence_is_announced_once_a_source(tmp_path, capsys, card, stated):
    (tmp_path / "README.md").write_text(card)
    sources = [f"{tmp_path}/{name}" for name in "ab"]
    for source in (*sources, *sources):
        announce_licence(source, tmp_path)
    expected = [f"cytosyn-aug: {stated.format(s)}; not for clinical use" for s in sources]
    captured = capsys.readouterr()
    assert (captured.err.splitlines(), captured.out) == (expected, "")
