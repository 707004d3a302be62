"""Download of model folders from the Hugging Face Hub, unless they are on disk.

Only configurations, weights and the model card are fetched; never code, never data sets. Every
failure says what to do, because those who meet it cannot ask anyone: the released weights are
gated, and the machines they run on are often offline.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NoReturn, cast

from cytosyn_aug.config import PART_NAMES

MODEL_PATTERNS = (
    "model_index.json",
    "README.md",
    *(
        f"{part}/*.{suffix}"
        for part in (*PART_NAMES, "scheduler")
        for suffix in ("json", "safetensors")
    ),
)
ENCODER_PATTERNS = ("config.json", "README.md", "*.safetensors", "*.safetensors.index.json")
_VARIANTS = ("*.fp16*", "*.fp32*", "*non_ema*")
_NEEDED_PARTS = ("transformer", "vae")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_announced: set[str] = set()


def find_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    patterns: tuple[str, ...] = MODEL_PATTERNS,
) -> Path:
    """Return a local folder as it is, or fetch a repository into the Hub's cache.

    An existing folder wins over a repository of the same name. A second call only asks whether
    anything changed, and fetches what an interrupted one left out; without a network the cache is
    used, if it is complete.

    Args:
        source: Existing folder, or `owner/name` on the Hub.
        revision: Branch, tag or commit on the Hub; None for `main`.
        token: Access token; None for the one you are logged in with.
        patterns: Files to fetch; `*` does not reach into folders below.

    Raises:
        FileNotFoundError: Neither a folder nor a repository, or it holds no safetensors.
        NotADirectoryError: A file was given.
        PermissionError: The repository is gated, or the token was refused.
        ConnectionError: The Hub cannot be reached and the cache is not enough, or it broke off.
        OSError: The cache cannot be written.
        ValueError: No such revision, or a revision for a local folder.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision {revision!r} was given for the local folder {folder}; revisions belong "
                "to the Hub, leave it out"
            )
        return folder
    if folder.is_file():
        raise NotADirectoryError(f"{source} is a file, expected a folder; give the one it is in")
    if not _HUB_ID.fullmatch(str(source)):
        raise _neither(source)
    return _fetch(str(source), revision, token, patterns)


def licence_of(folder: Path) -> str | None:
    """Return the licence that the front matter of a folder's README.md states, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8-sig", errors="replace")
    front = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    if front is None:
        return None
    licence = _stated("license", front[1])
    return (_stated("license_name", front[1]) or licence) if licence == "other" else licence


def announce_licence(source: str | Path, folder: Path) -> None:
    """Print the licence of weights to stderr, once per process and source."""
    if str(source) in _announced:
        return
    _announced.add(str(source))
    licence = licence_of(folder)
    stated = (
        f"weights of {source} are under {licence}, as its model card states"
        if licence
        else f"the model card of {source} states no licence"
    )
    print(f"cytosyn-aug: {stated}; not for clinical use", file=sys.stderr)


def _stated(key: str, front: str) -> str | None:
    """Return a scalar, or a list's items in one line, of YAML's top level."""
    match = re.search(rf"^{key}:[ \t]*(.*(?:\n[ \t]*- .*)*)", front, re.MULTILINE)
    lines = match[1].splitlines() if match else []
    items = [re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("- ") for line in lines]
    return ", ".join(bare for item in items if (bare := item.strip(" '\"[]"))) or None


def _neither(source: str | Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{source} is neither an existing folder nor a Hub id like 'owner/name'; check the path"
    )


def _fetch(source: str, revision: str | None, token: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download

    # The client's `*` also matches slashes.
    too_deep = "*/" * (1 + max(pattern.count("/") for pattern in patterns)) + "*"
    path = Path()
    # Variants are only asked for where a repository holds nothing else.
    for variants in (_VARIANTS, ()):
        try:
            path = Path(
                snapshot_download(
                    source,
                    revision=revision,
                    token=token,
                    allow_patterns=list(patterns),
                    ignore_patterns=[*variants, too_deep],
                )
            )
        except errors.HFValidationError as error:
            raise _neither(source) from error
        except _failures() as error:
            raise _explain(error, source, revision, token) from error
        if not _missing_weights(path, patterns):
            return path
    _refuse_incomplete(path, source, revision, token, patterns)


def _failures() -> tuple[type[Exception], ...]:
    """Return what the client raises if a download fails.

    Its HTTP library has changed twice; its own error inherits from that of each. The storage
    behind it (Xet) raises RuntimeError if the network fails.
    """
    from huggingface_hub.errors import HfHubHTTPError

    http_errors = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    return (OSError, RuntimeError, *http_errors)


def _explain(
    error: Exception, source: str, revision: str | None, token: str | None
) -> OSError | ValueError:
    """Return the error that tells a user what to do."""
    from huggingface_hub import constants, errors, get_token

    page = f"https://huggingface.co/{source}"
    has_token = bool(token or get_token())
    is_uncached = isinstance(error, errors.LocalEntryNotFoundError)
    # The client says "not in the cache", and keeps why it had to look there as the cause.
    reason = error.__cause__ or error if is_uncached else error
    status = getattr(getattr(reason, "response", None), "status_code", None)
    if isinstance(reason, errors.GatedRepoError):
        return PermissionError(_how_to_enter(source, page, has_token))
    if isinstance(reason, errors.RevisionNotFoundError):
        return ValueError(
            f"{source} has no revision {revision!r}, expected one of its branches, tags or "
            f"commits; they are listed at {page}/tree/main"
        )
    if isinstance(reason, errors.RepositoryNotFoundError) or (status == 401 and not has_token):
        return FileNotFoundError(
            f"{source} is no folder here and was not found on the Hub; check the spelling. A "
            f"private or gated repository looks the same without a token that may see it: open "
            f"{page}, then run `hf auth login` or set HF_TOKEN"
        )
    if status in (401, 403):
        return PermissionError(
            f"the Hub refused your token for {source} ({_one_line(reason)}). It may be mistyped or "
            "expired, or fine-grained without 'public gated repositories'; see "
            "https://huggingface.co/settings/tokens, then run `hf auth login` or set HF_TOKEN"
        )
    if is_uncached:
        wanted = source if revision is None else f"{source} at revision {revision!r}"
        state = "only partly" if hasattr(error, "snapshot_path") else "not"
        if isinstance(reason, errors.OfflineModeIsEnabled):
            why = "HF_HUB_OFFLINE is set; unset it once"
        elif status is not None:
            why = f"the Hub answers with status {status}; try again later"
        else:
            why = f"the Hub cannot be reached ({_one_line(reason)}); connect once"
        return ConnectionError(
            f"{wanted} is {state} in the cache {constants.HF_HUB_CACHE}, and {why}, or copy the "
            "repository to this machine and give its folder"
        )
    # Errors of the disk bear a number; those of the network reach here without one.
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return OSError(
            f"{source} cannot be kept in the cache {constants.HF_HUB_CACHE} ({_one_line(error)}); "
            "make room or rights there, or set HF_HOME to another folder"
        )
    return ConnectionError(
        f"fetching {source} broke off ({_one_line(error)}); run the same again to resume, finished "
        "files are kept. If it keeps breaking off, try with HF_HUB_DISABLE_XET=1"
    )


def _how_to_enter(source: str, page: str, has_token: bool) -> str:
    if has_token:
        text = f"{source} is gated and your token has no access to it; request access at {page} "
        text += "with the account of the token, and wait until it is granted"
    else:
        text = f"{source} is gated and no token was found; request access at {page}, then run "
        text += "`hf auth login` or set HF_TOKEN"
    if re.search("cytosyn|h0-mini", source, re.IGNORECASE):
        text += (
            ". CytoSyn and bioptimus/H0-mini are gated separately: without H0-mini, load CytoSyn "
            "with encoder=None and give precomputed features"
        )
    return text


def _one_line(error: BaseException) -> str:
    text = getattr(error, "server_message", None) or str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"


def _refuse_incomplete(
    folder: Path, source: str, revision: str | None, token: str | None, patterns: tuple[str, ...]
) -> NoReturn:
    """Say why a snapshot has no weights: pickles only, or a cache from a broken download."""
    from huggingface_hub import HfApi

    missing = _missing_weights(folder, patterns)
    try:
        stored = HfApi().list_repo_files(source, revision=revision, token=token)
    except _failures() as error:
        raise ConnectionError(
            f"{source} is only partly in the cache, {folder} lacks {missing}, and the Hub cannot "
            f"be asked for them ({_one_line(error)}); connect once and run again"
        ) from error
    pickles = [name for name in stored if name.endswith(_PICKLES)]
    if pickles:
        raise FileNotFoundError(
            f"{source} lacks {missing} and stores {pickles}; pickles can execute code and are not "
            f"loaded. Download with `hf download {source} --local-dir DIR`, translate each once "
            "with `cytosyn-aug convert FILE.bin FILE.safetensors`, and give the folder"
        )
    raise FileNotFoundError(
        f"{source} lacks {missing}; it stores {stored[:20]}. Is this the right repository and "
        "revision?"
    )


def _missing_weights(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """Return what is needed and absent: weights of parts, and shards that an index names."""
    parts = [folder / part for part in _NEEDED_PARTS if f"{part}/*.safetensors" in patterns]
    files = [
        part / "*.safetensors" for part in parts or [folder] if not any(part.glob("*.safetensors"))
    ]
    for index in sorted(folder.rglob("*.safetensors.index.json")):
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files += [index.parent / name for name in shards if not (index.parent / name).is_file()]
    return [file.relative_to(folder).as_posix() for file in files]
