"""Where a model folder is: on disk, or a snapshot of a repository on the Hugging Face Hub.

Only configurations, weights and the model card are fetched; never code, never data sets. Every
failure says what to do, because those who meet it cannot ask anyone: the released weights are
gated, and the machines they run on are often offline.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

MODEL_PATTERNS = (
    "model_index.json",
    "README.md",
    *(
        f"{part}/*.{suffix}"
        for part in ("transformer", "vae", "encoder", "stain_probe", "scheduler")
        for suffix in ("json", "safetensors")
    ),
)
ENCODER_PATTERNS = ("config.json", "README.md", "*.safetensors", "*.safetensors.index.json")
_VARIANTS = ("*.fp16.safetensors", "*.fp32.safetensors", "*non_ema*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_announced: set[str] = set()


def find_folder(
    source: Path | str,
    *,
    revision: str | None = None,
    token: str | None = None,
    patterns: tuple[str, ...] = MODEL_PATTERNS,
) -> Path:
    """Return a local folder as it is, or fetch a repository into the Hub's cache.

    A second call only asks whether anything changed; without a network the cache is used. A
    download that was interrupted is resumed.

    Args:
        source: Existing folder, or `owner/name` on the Hub.
        revision: Branch, tag or commit on the Hub; None for `main`.
        token: Access token; None for the one you are logged in with.
        patterns: Files to fetch.

    Raises:
        FileNotFoundError: Neither a folder nor a repository.
        PermissionError: The repository is gated or private.
        ConnectionError: No network and nothing usable in the cache, or it broke off.
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
    if not _HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(
            f"{source} is neither an existing folder nor a Hub id like 'owner/name'; check the path"
        )
    return _fetch(str(source), revision, token, patterns)


def licence_of(folder: Path) -> str | None:
    """Return the licence that the front matter of a folder's README.md states, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", card.read_text(errors="replace"), re.DOTALL)
    stated = {
        key: value.strip().strip("'\"")
        for key, value in re.findall(r"^(license\w*):\s*(\S.*)$", front[1] if front else "", re.M)
    }
    name = stated.get("license")
    return stated.get("license_name", name) if name == "other" else name


def announce_licence(source: Path | str, folder: Path) -> None:
    """Print the licence of weights to stderr, once a process and source."""
    if str(source) in _announced:
        return
    _announced.add(str(source))
    licence = licence_of(folder)
    stated = f"under {licence}, as their card states" if licence else "under a licence not stated"
    print(
        f"cytosyn-aug: the weights of {source} are {stated}; not for clinical use", file=sys.stderr
    )


def _fetch(source: str, revision: str | None, token: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, get_token, snapshot_download

    page = f"https://huggingface.co/{source}"
    try:
        path = snapshot_download(
            source,
            revision=revision,
            token=token,
            allow_patterns=list(patterns),
            ignore_patterns=list(_VARIANTS),
        )
    except errors.GatedRepoError as error:
        if token or get_token():
            reason = "your token has no access to it"
        else:
            reason = "no token was found; run `hf auth login` or set HF_TOKEN"
        raise PermissionError(
            f"{source} is gated, and {reason}. Ask for access at {page} (you must be logged in). "
            "CytoSyn and H0-mini are granted apart: without H0-mini load encoder=None and give "
            "precomputed features"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"{source} has no revision {revision!r}; its branches and tags are at {page}/tree/main"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{source} was not found on the Hub. Check the spelling; a private repository looks "
            f"the same without a token that may see it ({page})"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{source} is not in the cache and the Hub cannot be reached; connect once, or copy "
            "the repository here and give the folder"
        ) from error
    except Exception as error:
        if not isinstance(error, (OSError, *_transport_errors())):
            raise
        raise ConnectionError(
            f"fetching {source} broke off ({type(error).__name__}: {error}); run it again, "
            "finished files are kept"
        ) from error
    folder = Path(path)
    _check_complete(source, folder, patterns)
    return folder


def _transport_errors() -> tuple[type[Exception], ...]:
    """Return the base errors of the HTTP library that the Hub's client uses.

    The client has changed it twice; requests' errors are OSErrors, the others' are not.
    """
    libraries = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return tuple(library.HTTPError for library in libraries)


def _check_complete(source: str, folder: Path, patterns: tuple[str, ...]) -> None:
    """Refuse a snapshot without weights: pickles only, or a cache from a broken download."""
    if any(folder.rglob("*.safetensors")):
        return
    raise FileNotFoundError(
        f"{source} gave no safetensors files (looked for {', '.join(patterns)}). If it was fetched "
        "partly before, connect and run again; if it stores pickles, download them and run "
        "`cytosyn-aug convert`"
    )
