"""The commands for whole data sets: augment, normalize, cache, sample, and slurm around them.

Exit codes: 0 done; 1 done, but some tiles failed and are named; 2 the run could not be made or not
go on. No torch is imported to show help.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cytosyn_aug.config import Method
from cytosyn_aug.slurm import SlurmJob, array_script

if TYPE_CHECKING:
    from cytosyn_aug.generator import TileGenerator
    from cytosyn_aug.ray_actors import RayCluster
    from cytosyn_aug.running import Summary, Work

AddCommand = Callable[[str, Callable[..., int], str, str], argparse.ArgumentParser]
_DTYPES = ["float32", "bfloat16", "float16"]
_NAMED = 20
_IN = "folder of tiles, .csv or .parquet with paths, tar shards (file or folder), or slides"


def add_commands(add: AddCommand, parse: Callable[[list[str]], argparse.Namespace]) -> None:
    """Add the commands to a parser.

    Args:
        add: Takes name, function, one sentence and an example.
        parse: Parses a whole command line.
    """
    _add_augment(add)
    _add_normalize(add, parse)
    _add_cache(add)
    _add_sample(add)
    slurm = add(
        "slurm",
        partial(_slurm, parse),
        "print a SLURM job array that shares one of these commands among many machines",
        "cytosyn-aug slurm --shards 16 --gpus 1 -- augment TILES OUT --references LAB > job.sh",
    )
    slurm.add_argument("--shards", type=int, required=True, help="jobs of the array")
    slurm.add_argument("--gpus", type=int, default=1, help="of each job")
    slurm.add_argument("--cpus", type=int, default=8, help="of each job")
    slurm.add_argument("--memory", default="32G", help="of each job")
    slurm.add_argument("--time", default="24:00:00", help="limit of each job")
    slurm.add_argument("--partition")
    slurm.add_argument("--account")
    slurm.add_argument("--setup", default="", help="line to run before, such as activating a venv")
    slurm.add_argument("words", nargs=argparse.REMAINDER, help="-- and the command to share")


def _add_augment(add: AddCommand) -> None:
    augment = add(
        "augment",
        _augment,
        "write variants of all tiles of a data set, and a manifest; resumes",
        "cytosyn-aug augment TILES OUT --references LAB_A LAB_B.json --variants 2",
    )
    augment.add_argument("source", metavar="IN", type=Path, help=_IN)
    augment.add_argument("out", metavar="OUT", type=Path, help="folder to write or continue")
    augment.add_argument("--variants", type=int, default=1, metavar="K", help="of each tile")
    augment.add_argument("--mode", default="stain", choices=["stain", "resample"])
    augment.add_argument(
        "--references",
        nargs="+",
        default=[],
        metavar="DIR|FILE",
        help="laboratories to restain to: folders of tiles, slides, or saved .json; taken in turn",
    )
    augment.add_argument(
        "--strength",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="S",
        help="one, or least and largest to draw between; 1 goes to the reference, 0 stays",
    )
    augment.add_argument(
        "--preserve", default="color", choices=["color", "none"], help="none moves structure"
    )
    augment.add_argument("--steps", type=int, help="of resampling; default: the model's")
    augment.add_argument("--guidance-scale", type=float, default=1.0, help="of resampling")
    augment.add_argument(
        "--min-similarity",
        type=float,
        default=-1.0,
        metavar="C",
        help="leave out what is drawn anew and less like its source, by the cosine of features",
    )
    augment.add_argument(
        "--max-similarity", type=float, default=1.0, metavar="C", help="the same, but more like it"
    )
    augment.add_argument("--seed", type=int, default=0)
    augment.add_argument(
        "--allow-geometry-change",
        action="store_true",
        help="go on although masks lie beside tiles whose structure will move; they stay behind",
    )
    _add_input(augment)
    _add_format(augment, ["png", "webp", "tar", "latents", "images"])
    _add_model(augment)
    _add_work(augment)


def _add_normalize(add: AddCommand, parse: Callable[[list[str]], argparse.Namespace]) -> None:
    normalize = add(
        "normalize",
        partial(_normalize, parse),
        "restain all tiles of a data set, or whole slides, to one reference; resumes",
        "cytosyn-aug normalize TILES OUT --reference LAB_A",
    )
    normalize.add_argument("source", metavar="IN", type=Path, help=_IN)
    normalize.add_argument("out", metavar="OUT", type=Path, help="folder to write or continue")
    normalize.add_argument(
        "--reference",
        required=True,
        metavar="DIR|FILE",
        help="folder of tiles, slide, or saved .json",
    )
    normalize.add_argument("--method", default="cytosyn", choices=get_args(Method))
    normalize.add_argument(
        "--stain-source",
        default="tile",
        choices=["tile", "slide"],
        help="whose stain is changed; slide is better, and even, where names say the slide",
    )
    normalize.add_argument("--strength", type=float, default=1.0, metavar="S", help="0 to 1")
    _add_input(normalize)
    _add_format(
        normalize,
        ["png", "webp", "tar", "slide"],
        "pixels without loss; slide: slides to slides, as normalize-slide does with its defaults",
    )
    _add_model(normalize)
    _add_work(normalize)


def _add_cache(add: AddCommand) -> None:
    cache = add(
        "cache",
        _cache,
        "put what the model sees in all tiles of a data set into a cache; resumes",
        "cytosyn-aug cache TILES CACHE --contents features",
    )
    cache.add_argument("source", metavar="IN", type=Path, help=_IN)
    cache.add_argument("out", metavar="CACHE", type=Path, help="cache to make or to add to")
    cache.add_argument(
        "--contents",
        nargs="+",
        default=["moments", "features"],
        choices=["moments", "features"],
    )
    cache.add_argument(
        "--compact", action="store_true", help="merge small shards in the end, once all is there"
    )
    _add_input(cache)
    _add_model(cache)
    _add_work(cache)


def _add_sample(add: AddCommand) -> None:
    sample = add(
        "sample",
        _sample,
        "generate tiles, and write a manifest; resumes",
        "cytosyn-aug sample OUT --n 1000 --conditions features.npy",
    )
    sample.add_argument("out", metavar="OUT", type=Path, help="folder to write or continue")
    sample.add_argument("--n", type=int, required=True, help="tiles")
    sample.add_argument(
        "--conditions",
        type=Path,
        metavar="FILE",
        help=".npy or .safetensors with a CLS vector a row, taken in turn",
    )
    sample.add_argument("--steps", type=int, help="default: the model's")
    sample.add_argument("--guidance-scale", type=float, default=1.0)
    sample.add_argument("--seed", type=int, default=0)
    _add_format(sample, ["png", "webp", "tar"])
    _add_model(sample)
    _add_work(sample)


def _add_input(parser: argparse.ArgumentParser) -> None:
    kinds = ["tree", "table", "shards", "slides"]
    parser.add_argument("--input", choices=kinds, help="what IN is; default: look")
    parser.add_argument(
        "--mpp",
        type=float,
        help="microns per pixel of the tiles, default: the model's; of slides, default: their own",
    )


def _add_format(
    parser: argparse.ArgumentParser, formats: list[str], text: str = "pixels without loss"
) -> None:
    parser.add_argument("--format", default="png", choices=formats, help=text)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="DIR|ID", help="folder or Hub id; default: tiny")
    group.add_argument("--encoder", default="auto", help="folder, file or Hub id; or none")
    group.add_argument("--revision", help="branch, tag or commit on the Hub")
    group.add_argument("--key-map", type=Path, metavar="FILE", help="JSON that renames tensors")
    group.add_argument("--device", default="cpu")
    group.add_argument("--dtype", default="float32", choices=_DTYPES)
    group.add_argument("--batch-size", type=int, default=16, help="tiles in the networks at once")


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work")
    group.add_argument("--dry-run", action="store_true", help="say what would be done, as JSON")
    group.add_argument("--overwrite", action="store_true", help="remove what OUT holds, first")
    group.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="do the I-th of N parts, from 0"
    )
    group.add_argument("--unit-tiles", type=int, default=256, help="tiles lost at most by a kill")
    group.add_argument("--readers", type=int, default=4, help="threads that decode")
    group.add_argument("--writers", type=int, default=4, help="threads that encode")
    group.add_argument("--quiet", action="store_true", help="show no progress")
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine", default="local", choices=["local", "ray"], help="this process, or Ray actors"
    )
    group.add_argument(
        "--address", help="of a running Ray, such as auto; default: RAY_ADDRESS, or start one here"
    )
    group.add_argument("--actors", type=int, metavar="N", help="default: all there is room for")
    group.add_argument(
        "--actor-cpus",
        type=int,
        metavar="N",
        help="of each; default: this process's threads of torch, 1 with cuda",
    )
    group.add_argument(
        "--actor-gpus", type=float, metavar="N", help="of each, may be 0.5; default: 1 with cuda"
    )


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not slash or not (index.isdigit() and count.isdigit()) or int(index) >= int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard, expected I/N such as 0/4 to 3/4")
    return int(index), int(count)


def _augment(args: argparse.Namespace) -> int:
    from cytosyn_aug import offline

    if len(args.strength) > 2:
        raise ValueError(f"got {len(args.strength)} strengths, expected one or two")
    summary = offline.augment(
        _path(args, args.source),
        _path(args, args.out),
        _load(args),
        references=args.references,
        variants=args.variants,
        mode=args.mode,
        strength=(args.strength[0], args.strength[-1]),
        preserve=args.preserve,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        allow_geometry_change=args.allow_geometry_change,
        min_similarity=args.min_similarity,
        max_similarity=args.max_similarity,
        format=args.format,
        **_input(args),
        work=_work(args),
    )
    return _report(summary)


def _normalize(parse: Callable[[list[str]], argparse.Namespace], args: argparse.Namespace) -> int:
    if args.format == "slide":
        return _normalize_slides(parse, args)
    from cytosyn_aug import offline

    summary = offline.normalize(
        _path(args, args.source),
        _path(args, args.out),
        _load(args),
        reference=args.reference,
        method=args.method,
        stain_source=args.stain_source,
        strength=args.strength,
        format=args.format,
        **_input(args),
        work=_work(args),
    )
    return _report(summary)


# What both commands have. Whatever else is given to `normalize` for slides would mean nothing.
_OF_SLIDES = ("method", "strength", "model", "encoder", "device", "overwrite", "quiet")


def _normalize_slides(
    parse: Callable[[list[str]], argparse.Namespace], args: argparse.Namespace
) -> int:
    """Do what `normalize-slide` does, with the options that both commands have."""
    words = [str(args.source), str(args.out), "--reference", args.reference]
    usual = parse(["normalize", *words])
    given = {k: v for k, v in vars(args).items() if k in vars(usual) and v != vars(usual)[k]}
    strange = sorted(given.keys() - {*_OF_SLIDES, "format", "input", "mpp", "run"})
    if args.input not in (None, "slides"):
        strange.append("input")
    if strange:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in strange)
        raise ValueError(f"{flags} mean nothing for --format slide; see normalize-slide --help")
    slides = parse(["normalize-slide", *words])
    for name in _OF_SLIDES:
        setattr(slides, name, getattr(args, name))
    slides.slide_mpp = args.mpp
    run: Callable[[argparse.Namespace], int] = slides.run
    return run(slides)


def _cache(args: argparse.Namespace) -> int:
    from cytosyn_aug import offline

    summary = offline.cache(
        _path(args, args.source),
        _path(args, args.out),
        _load(args),
        contents=args.contents,
        compact=args.compact,
        **_input(args),
        work=_work(args),
    )
    return _report(summary)


def _sample(args: argparse.Namespace) -> int:
    from cytosyn_aug import offline

    summary = offline.sample(
        _path(args, args.out),
        _load(args),
        n=args.n,
        conditions=args.conditions,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        format=args.format,
        unit_tiles=args.unit_tiles,
        work=_work(args),
    )
    return _report(summary)


def _slurm(parse: Callable[[list[str]], argparse.Namespace], args: argparse.Namespace) -> int:
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    nested = parse(words)  # a typing error is found now, not when the job starts
    if not hasattr(nested, "shard"):
        raise ValueError("expected augment, normalize, cache or sample after --")
    if nested.shard != (0, 1) or nested.overwrite or nested.dry_run:
        raise ValueError("leave --shard, --overwrite and --dry-run away; the script says --shard")
    if getattr(nested, "format", "") == "slide":
        raise ValueError(
            "--format slide takes no --shard: a slide has one job. Print an array of "
            "`cytosyn-aug normalize-slide SLIDE OUT ...`, one slide a job, yourself"
        )
    job = SlurmJob(
        shards=args.shards,
        gpus=args.gpus,
        cpus=args.cpus,
        memory=args.memory,
        time=args.time,
        partition=args.partition,
        account=args.account,
        setup=args.setup,
    )
    print(array_script(f"cytosyn-aug {shlex.join(words)}", nested.command, job), end="")
    return 0


def _load(args: argparse.Namespace) -> TileGenerator:
    import torch

    from cytosyn_aug.generator import TileGenerator

    device, cluster = args.device, _ray(args)  # refused before the model is read
    if cluster is not None and device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: what comes before the actors is done on the processor", file=sys.stderr)
        device = "cpu"
    return TileGenerator.from_pretrained(
        args.model,
        encoder=None if args.encoder == "none" else args.encoder,
        revision=args.revision,
        key_map=args.key_map,
        device=device,
        dtype=getattr(torch, args.dtype),
        batch_size=args.batch_size,
    )


def _input(args: argparse.Namespace) -> dict[str, Any]:  # Any: arguments of offline's functions
    return {"mpp": args.mpp, "input": args.input, "unit_tiles": args.unit_tiles}


def _work(args: argparse.Namespace) -> Work:
    from cytosyn_aug.running import Work

    return Work(
        shard=args.shard,
        readers=args.readers,
        writers=args.writers,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        progress=not args.quiet,
        ray=_ray(args),
    )


def _ray(args: argparse.Namespace) -> RayCluster | None:
    from cytosyn_aug.ray_actors import RayCluster

    given = {
        "address": args.address,
        "actors": args.actors,
        "cpus": args.actor_cpus,
        "gpus": args.actor_gpus,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    if args.engine == "ray":
        return RayCluster(device=args.device, **asked)
    if asked:
        raise ValueError(f"{', '.join(asked)} of actors only go with --engine ray")
    return None


def _path(args: argparse.Namespace, path: Path) -> Path:
    """Return a path as other machines understand it, if they take part."""
    return path if args.engine == "local" else path.absolute()


def _report(summary: Summary) -> int:
    """Print what became of a run; return the exit code."""
    for note in summary.notes:
        print(note, file=sys.stderr)
    if summary.estimate is not None:
        print(json.dumps(summary.estimate, indent=1))
        return 1 if summary.estimate["unusable_tiles"] else 0
    _name_failures(summary.failed, summary.counts.get("failed", 0))
    counts = ", ".join(f"{number} {status}" for status, number in summary.counts.items())
    state = "" if summary.is_complete else "; the manifest follows when the other parts are done"
    print(f"{summary.out}: {counts or 'nothing in this part'}{state}")
    return 1 if summary.counts.get("failed") else 0


def _name_failures(failed: Sequence[tuple[str, str]], number: int) -> None:
    for name, reason in failed[:_NAMED]:
        shown = name.encode("unicode_escape").decode()  # names may hold line breaks
        print(f"failed: {shown} {reason}", file=sys.stderr)
    if number > _NAMED:
        print(f"and {number - _NAMED} more failed, see the manifest", file=sys.stderr)
