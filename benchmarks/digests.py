"""Digests of results, for proving that a change of code changed none of them.

usage: python -m benchmarks.digests [--only transforms commands training] > before.txt
       (change the code)
       python -m benchmarks.digests > after.txt; diff before.txt after.txt

Prints one line per result: its name and the first 16 digits of a SHA-256. Only public names and
commands are used, so the script itself survives every move. Digests hold for one machine, one
version of torch and one thread. `training` builds a model with the smoke recipes and takes minutes.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

if TYPE_CHECKING:
    from cytosyn_aug import StainReference, TileGenerator

ROOT = Path(__file__).parent.parent
# What differs between two runs of the same code.
VOLATILE = {
    "seconds",
    "began",
    "ended",
    "time",
    "created",
    "date",
    "host",
    "elapsed_s",
    "tiles_per_second",
}


def main() -> None:
    """Print the digests of the groups that were asked for."""
    groups = {"transforms": transforms, "commands": commands, "training": training}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(groups), default=list(groups))
    only = parser.parse_args().only
    torch.set_num_threads(1)
    for name in only:
        with tempfile.TemporaryDirectory() as folder:
            for key, digest in groups[name](Path(folder)):
                print(f"{name}/{key} {digest}", flush=True)


def digest(value: object) -> str:
    """Return 16 digits that tell any tensor, array, text, bytes or JSON value from another."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().numpy()
    if isinstance(value, np.ndarray):
        data = f"{value.dtype}{value.shape}".encode() + value.tobytes()
    elif isinstance(value, bytes):
        data = value
    elif isinstance(value, str):
        data = value.encode()
    else:
        data = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def transforms(folder: Path) -> Iterator[tuple[str, str]]:
    """Digest what every public transform makes of the sample tiles, and its arguments."""
    import cytosyn_aug as ca
    from cytosyn_aug.demo import load_laboratories

    laboratories = load_laboratories()
    generator = ca.TileGenerator.from_pretrained()
    references = {
        name: ca.StainReference.fit(generator, tiles, laboratory=name)
        for name, tiles in laboratories.items()
    }
    macenko = ca.MacenkoReference.fit(laboratories["CMU"])
    reinhard = ca.ReinhardReference.fit(laboratories["CMU"])
    density = ca.DensityReference.fit(laboratories["CMU"])
    classical = {"macenko": macenko, "reinhard": reinhard, "density": density}
    for name, reference in {**references, **classical}.items():
        reference.save(folder / f"{name}.json")
        yield f"reference/{name}", digest((folder / f"{name}.json").read_text())
    tiles = torch.cat([laboratories["Helsinki"][:3], laboratories["TIAToolbox"][:3]])
    several, cmu = list(references.values()), references["CMU"]
    source = ca.StainReference.fit(generator, laboratories["Helsinki"])
    arguments: dict[str, tuple[object, ...]] = {
        "StainTransfer": (generator, several, {"p": 0.7, "strength": 0.8}),
        "StainTransfer/none": (generator, several, {"p": 1.0, "preserve": "none"}),
        "StainNormalize": (generator, cmu, {}),
        "StainNormalize/source": (generator, cmu, {"source": source}),
        "ConditionedResample": (generator, {"p": 0.8}),
        "MacenkoNormalize": (macenko, {}),
        "ReinhardNormalize": (reinhard, {}),
        "DensityTransport": (density, {}),
    }
    for name, (*positional, keywords) in arguments.items():
        kind = getattr(ca, name.split("/")[0])
        yield from _digest_transform(name, kind, positional, keywords, tiles)
    torch.manual_seed(0)
    for k, view in enumerate(ca.StainViews(generator, several, views=2)(tiles)):
        yield f"StainViews/{k}", digest(torch.as_tensor(view))
    yield from _digest_caches(generator, cmu, tiles, folder)
    yield from _digest_samples(generator, tiles)
    yield from _digest_albumentations(generator, several, macenko, tiles)


def _digest_caches(
    generator: "TileGenerator", reference: "StainReference", tiles: torch.Tensor, folder: Path
) -> Iterator[tuple[str, str]]:
    import cytosyn_aug as ca

    edits = [
        ca.StainNormalize(generator, reference=reference),
        ca.ConditionedResample(generator, p=1.0),
    ]
    for contents in ("images", "latents"):
        spec = ca.variants_spec(generator, contents, edits, seed=3)
        with ca.LatentCache.open(folder / contents, spec) as cache:
            ca.fill_variants(generator, tiles, cache, edits)
            yield f"variants_spec/{contents}", digest(str(spec))
            torch.manual_seed(0)
            cached = ca.CachedVariants(cache, p=0.8)(tiles if contents == "images" else tiles[0])
            if contents == "images":
                yield "CachedVariants", digest(torch.as_tensor(cached))
            else:
                yield "CachedVariants/latents", digest(str(type(cached).__name__))
    spec = ca.encodings_spec(generator, ["moments"])
    with ca.LatentCache.open(folder / "moments", spec) as cache:
        yield "encode_cached", digest(ca.encode_cached(generator, tiles, cache).mean)


def _digest_samples(generator: "TileGenerator", tiles: torch.Tensor) -> Iterator[tuple[str, str]]:
    torch.manual_seed(0)
    yield "sample", digest(generator.sample(per_condition=3, seed=5))
    cls = generator.features(tiles).cls
    yield "features", digest(cls)
    settings = {"steps": 4, "sampler": "euler_maruyama", "guidance_scale": 1.5, "seed": 5}
    yield "sample/sde", digest(generator.sample(cls[:1], **settings))


def _digest_transform(
    name: str, kind: Callable[..., object], positional: list[object], keywords: dict[str, object],
    tiles: torch.Tensor,
) -> Iterator[tuple[str, str]]:  # fmt: skip
    transform = kind(*positional, **keywords)
    torch.manual_seed(0)
    yield name, digest(torch.as_tensor(transform(tiles)))  # type: ignore[operator]
    torch.manual_seed(1)
    picture = Image.fromarray(tiles[0].permute(1, 2, 0).contiguous().numpy())
    yield f"{name}/pil", digest(np.asarray(transform(picture)))  # type: ignore[operator]


def _digest_albumentations(
    generator: object, references: list[object], macenko: object, tiles: torch.Tensor
) -> Iterator[tuple[str, str]]:
    import cytosyn_aug.albumentations as caa

    made = {
        "StainTransfer": caa.StainTransfer(generator, references=references, p=1.0),
        "StainNormalize": caa.StainNormalize(generator, reference=references[0], p=1.0),
        "ConditionedResample": caa.ConditionedResample(generator, p=1.0),
        "MacenkoNormalize": caa.MacenkoNormalize(macenko, p=1.0),
    }
    image = tiles[0].permute(1, 2, 0).contiguous().numpy()
    for name, transform in made.items():
        yield f"albumentations/{name}/to_dict", digest(transform.to_dict())
        torch.manual_seed(2)
        yield f"albumentations/{name}", digest(transform(image=image)["image"])


def commands(folder: Path) -> Iterator[tuple[str, str]]:
    """Digest what the commands write, from the sample tiles and from a synthetic slide."""
    from cytosyn_aug.demo import load_laboratories

    for name, tiles in load_laboratories().items():
        (folder / "in" / name).mkdir(parents=True)
        for k, tile in enumerate(tiles[:4]):
            picture = Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy())
            picture.save(folder / "in" / name / f"s{k}_{k * 224}_0.png")
    _script(sys.executable, str(ROOT / "examples" / "make_slides.py"), str(folder / "slides"))
    for slide in sorted((folder / "slides").glob("*.svs"))[2:]:
        slide.unlink()
    lab = ("--reference", "in/CMU")
    lines = {
        "augment": (
            "augment",
            "in",
            "@",
            "--references",
            "in/CMU",
            "in/Helsinki",
            "--variants",
            "2",
        ),
        "augment-none": ("augment", "in", "@", "--references", "in/CMU", "--preserve", "none"),
        "resample": ("augment", "in", "@", "--mode", "resample", "--format", "webp"),
        "augment-tar": ("augment", "in", "@", "--references", "in/CMU", "--format", "tar"),
        "normalize": ("normalize", "in", "@", *lab),
        "normalize-slide-source": ("normalize", "in", "@", *lab, "--stain-source", "slide"),
        "normalize-macenko": ("normalize", "in", "@", *lab, "--method", "macenko"),
        "normalize-reinhard": ("normalize", "in", "@", *lab, "--method", "reinhard"),
        "normalize-transport": ("normalize", "in", "@", *lab, "--method", "transport"),
        "normalize-slide": ("normalize-slide", "slides", "@", *lab),
        "sample": ("sample", "@", "--n", "3"),
        "cut": ("normalize", "slides", "@", *lab, "--unit-tiles", "64"),
    }
    for name, words in lines.items():
        _command(folder, *(name if word == "@" else word for word in words), "--quiet")
        yield from _digest_folder(name, folder / name)
    _command(folder, "cache", "in", "cache", "--quiet")
    yield "cache/spec", digest((folder / "cache" / "cache.json").read_text())
    for name in ("augment", "normalize", "normalize-slide"):
        _command(folder, "report", name, "--out", f"{name}.html")
        page = (folder / f"{name}.html").read_text()
        yield f"report/{name}/pictures", digest(sorted(re.findall(r"base64,([^\"']+)", page)))
        yield f"report/{name}/plots", digest(_untimed_plots(page))
    _command(folder, "demo", "--out", "demo")
    for file in sorted((folder / "demo").glob("*.png")):
        yield f"demo/{file.name}", digest(np.asarray(Image.open(file)))
    for words in (("info", "--json"),):
        yield f"says/{words[0]}", digest(_command(folder, *words).replace(str(ROOT), "ROOT"))


def _digest_folder(name: str, out: Path) -> Iterator[tuple[str, str]]:
    files = {
        f.relative_to(out).as_posix(): digest(f.read_bytes())
        for f in sorted(out.rglob("*"))
        if f.is_file() and f.suffix in {".png", ".webp", ".tar", ".tif"}
    }
    yield f"{name}/files", digest(files)
    rows = pq.read_table(out / "manifest.parquet").to_pylist()
    yield f"{name}/manifest", digest([_stable(row) for row in rows])
    yield f"{name}/run", digest(_stable(json.loads((out / "run.json").read_text())))


def _untimed_plots(page: str) -> list[str]:
    """Return the plots of a page but that of throughput, which differs between runs."""
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    return sorted(plot for plot in plots if "minute" not in plot and "per second" not in plot)


def _stable(value: object) -> object:
    """Return a JSON value without what differs between two runs of the same code."""
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, list):
        return [_stable(v) for v in value]
    if isinstance(value, str):
        return re.sub(r"/\S*?/tmp\w+|/tmp/tmp\w+", "TMP", value)
    return value


def training(folder: Path) -> Iterator[tuple[str, str]]:
    """Digest the losses of every stage by the smoke recipes, and the exported model."""
    _script("bash", str(ROOT / "training" / "smoke.sh"), str(folder / "smoke"))
    for log in sorted((folder / "smoke").glob("*.log")):
        losses = re.sub(r"\d+(\.\d+)? ?(s|ms|steps/s|/s|GB|MB)\b", "", log.read_text())
        yield f"log/{log.stem}", digest(losses.replace(str(folder), "TMP"))
    for curve in sorted((folder / "smoke").rglob("*.csv")):
        yield f"csv/{curve.relative_to(folder / 'smoke')}", digest(curve.read_text())
    model = folder / "smoke" / "model"
    yield "model_index.json", digest((model / "model_index.json").read_text())
    for file in sorted(model.rglob("*.safetensors")):
        yield f"weights/{file.relative_to(model)}", digest(file.read_bytes())


def _command(folder: Path, *words: str) -> str:
    """Run a command of the package in this process, which has loaded torch; return what it said."""
    said = io.StringIO()
    before, arguments = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["cytosyn-aug", *words]
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_module("cytosyn_aug", run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"cytosyn-aug {' '.join(words)} ended with {end.code}")
    finally:
        os.chdir(before)
        sys.argv = arguments
    return said.getvalue()


def _script(*words: str) -> None:
    """Run a script of the repository in a process of its own."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    main()
