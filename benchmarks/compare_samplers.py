"""Compare samplers of a model at equal numbers of forwards: one table and one plot.

usage: python -m benchmarks.compare_samplers --model FOLDER --data SLIDES --out REPORT [--num 1000]
SLIDES holds <slide>/<tile>. Of 2 x num tiles, evenly spaced, every second one is a source: tiles
are drawn from its features, from the same noise by every sampler, and compared with the other half.
The real sources compared with that half give the floor. Rows are kept in REPORT/rows.jsonl and the
features of all tiles in REPORT/kept, so an interrupted comparison resumes; one of another model,
other tiles or another precision is refused.

frechet   between normal fits of 16 principal components of AlexNet features
recall    share of the other half within the 5th-neighbour distance of a drawn tile
coverage  share of the other half that a drawn tile is within the 5th-neighbour distance of
fidelity  mean cosine of a drawn tile's features to its source's, by the model's encoder
to ODE    root mean square distance of latents from those of the long ODE

Sources: Heusel et al. (2017), Kynkaanniemi et al. (2019), Naeem et al. (2020).
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from cytosyn_aug.io.files import write_atomically
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.solvers import (
    Velocity,
    adams_bashforth2,
    bind_student,
    euler,
    euler_maruyama,
    flow_map,
    guide,
    linear_grid,
    polynomial_grid,
    reference_grid,
    sample_noise,
    shifted_grid,
)
from training.evaluation.extractors import load_extractor
from training.evaluation.metrics import principal_components
from training.evaluation.result_store import ResultStore
from training.evaluation.scores import ReferenceSet
from training.evaluation.scores import score_features as score

FORWARDS = (1, 2, 4, 8)
NUM_COMPONENTS = 16
SAMPLERS = ("student", "Euler", "Heun", "UniPC", "AB2", "ODE", "SDE")
COLUMNS = ("frechet", "recall", "coverage", "fidelity", "to_ode", "seconds")


class Run(NamedTuple):
    """One row: a sampler, its forwards, and how it draws latents (seeds, condition)."""

    sampler: str
    forwards: int
    draw: Callable[[Sequence[int], Tensor], Tensor]


def heun(velocity: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Integrate dx/dt = v with Heun's method, two velocities per step."""
    for now, following in pairwise(times):
        v = velocity(x, now)
        ahead = velocity(x + (following - now) * v, following)
        x = x + (following - now) * (v + ahead) / 2
    return x


def unipc(velocity: Velocity, x: Tensor, num_steps: int) -> Tensor:
    """Sample with diffusers' UniPC, set up for a flow.

    The network is given the noise levels, which are its times; diffusers' timesteps are rounded.
    """
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, solver_type="bh2"
    )
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    scheduler.set_begin_index(0)
    for time_, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        x = scheduler.step(velocity(x, time_), timestep, x, return_dict=False)[0]
    return x


def runs(generator: TileGenerator, scale: float, num_reference: int) -> Iterator[Run]:
    """Yield the rows of the table, the long ODE first; `num_reference` 0 leaves out both."""

    def start(seeds: Sequence[int]) -> Tensor:
        return sample_noise(seeds, generator.latent_shape).to(generator.device)

    def solved(solver: Callable[[Velocity, Tensor], Tensor]) -> Callable[..., Tensor]:
        def draw(seeds: Sequence[int], condition: Tensor) -> Tensor:
            null = generator.null_condition
            velocity = guide(generator.velocity, condition, null, scale, high=0.75)
            return solver(velocity, start(seeds))

        return draw

    def jumped(n: int) -> Callable[..., Tensor]:
        def draw(seeds: Sequence[int], condition: Tensor) -> Tensor:
            average = bind_student(generator.student, condition, scale)
            return flow_map(average, start(seeds), shifted_grid(n))

        return draw

    def stochastic(seeds: Sequence[int], condition: Tensor) -> Tensor:
        def solver(velocity: Velocity, x: Tensor) -> Tensor:
            def noise(step: int) -> Tensor:
                return sample_noise(seeds, generator.latent_shape, stream=step + 1)

            return euler_maruyama(
                velocity, x.double(), noise, reference_grid(num_reference)
            ).float()

        return solved(solver)(seeds, condition)

    if num_reference:
        ode = solved(lambda v, x: euler(v, x, linear_grid(num_reference)))
        yield Run("ODE", num_reference, ode)
    for n in FORWARDS:
        if generator.student is not None:
            yield Run("student", n, jumped(n))
        yield Run("Euler", n, solved(lambda v, x, n=n: euler(v, x, linear_grid(n))))
        if n % 2 == 0:
            yield Run("Heun", n, solved(lambda v, x, n=n: heun(v, x, linear_grid(n // 2))))
        yield Run("UniPC", n, solved(lambda v, x, n=n: unipc(v, x, n)))
        ab2 = solved(lambda v, x, n=n: adams_bashforth2(v, x, polynomial_grid(n)))
        yield Run("AB2", n, ab2)
    if num_reference:
        yield Run("SDE", num_reference, stochastic)


def measure(real: ReferenceSet, made: Tensor) -> dict[str, float]:
    """Return what a set of features [N, F] scores against real ones."""
    scores = score(real, made)
    return {
        "frechet": scores.frechet_projected,
        "recall": scores.recall,
        "coverage": scores.coverage,
    }


def compare(
    generator: TileGenerator,
    images: Tensor,
    out: Path,
    scale: float,
    num_reference: int,
    samplers: Sequence[str],
    is_few_step: bool,
) -> list[dict[str, object]]:
    """Return the rows of the table, and write each as soon as it is known.

    Args:
        generator: The model.
        images: uint8 [2 N, 3, size, size]; even ones are sources, odd ones the other half.
        out: Folder of `rows.jsonl`.
        scale: Guidance scale in t <= 0.75, 1 = noise.
        num_reference: Forwards of the references.
        samplers: Names of those to draw with.
        is_few_step: Decode all with the small decoder.
    """
    identity = {
        "model": generator.digest,
        "tiles": hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16],
        "guidance": scale,
        "precision": str(generator.dtype),
        "small decoder": is_few_step,
    }
    check_identity(out / "comparison.json", identity)
    judge = load_extractor("alexnet", device=generator.device, kept=ResultStore(out / "kept"))
    sources, half = (judge.features(images[k::2]) for k in (0, 1))
    cls = generator.features(images[0::2]).cls
    others = ReferenceSet.of(half, principal_components(half, NUM_COMPONENTS))
    file, ode_file = out / "rows.jsonl", out / "ode.safetensors"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not rows:
        rows = [{"sampler": "real", "forwards": 0} | measure(others, sources)]
        file.write_text(json.dumps(rows[0]) + "\n")
    done = {(row["sampler"], row["forwards"]) for row in rows}
    for run in runs(generator, scale, num_reference):
        if (run.sampler, run.forwards) in done or run.sampler not in samplers:
            continue
        began = time.monotonic()
        latents = draw_all(run, cls, generator.batch_size)
        row = {"sampler": run.sampler, "forwards": run.forwards}
        row["seconds"] = time.monotonic() - began
        if run.sampler == "ODE":
            save_file({"latents": latents}, ode_file)
        made = generator.decode(latents, is_few_step=is_few_step).cpu()
        row |= measure(others, judge.features(made))
        row["fidelity"] = float(torch.cosine_similarity(generator.features(made).cls, cls).mean())
        if ode_file.exists():
            row["to_ode"] = distance(latents, load_file(ode_file)["latents"])
        with file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        rows.append(row)
        print(table([row]), flush=True)
    return rows


def check_identity(file: Path, identity: dict[str, object]) -> None:
    """Write down what is compared, or compare it with what was.

    Raises:
        ValueError: The folder is of another comparison; names what differs.
    """
    if not file.exists():
        write_atomically(file, json.dumps(identity, indent=1).encode())
        return
    was = json.loads(file.read_text())
    changed = {k: (was.get(k), v) for k, v in identity.items() if was.get(k) != v}
    if changed:
        raise ValueError(
            f"{file.parent} holds another comparison (was, now): {changed}; choose another --out"
        )


def draw_all(run: Run, cls: Tensor, batch_size: int) -> Tensor:
    """Return whitened latents [N, C, h, w] on the CPU; tile i has seed i."""
    drawn = []
    for start in range(0, len(cls), batch_size):
        condition = cls[start : start + batch_size]
        drawn.append(run.draw(range(start, start + len(condition)), condition).float().cpu())
    return torch.cat(drawn)


def distance(first: Tensor, second: Tensor) -> float:
    """Return the root mean square difference."""
    return float((first - second).square().mean().sqrt())


def table(rows: list[dict[str, object]]) -> str:
    """Return rows in Markdown."""
    lines = []
    for row in rows:
        cells = [f"{row[c]:.3f}" if c in row else "-" for c in COLUMNS]
        lines.append(f"| {row['sampler']} | {row['forwards']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, object]], file: Path) -> None:
    """Draw Frechet distance and recall against forwards, where matplotlib is installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("matplotlib is not installed; no plot")
        return
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    references = {"ODE": "--", "SDE": "-."}
    for axes, key, label in zip(
        panels, ("frechet", "recall"), ("Frechet distance", "recall"), strict=True
    ):
        for name in SAMPLERS:
            points = [(r["forwards"], r[key]) for r in rows if r["sampler"] == name]
            if points and name in references:
                style, forwards = references[name], points[0][0]
                legend = f"{name}, {forwards} forwards"
                axes.axhline(points[0][1], linestyle=style, color="grey", label=legend)
            elif points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
        # Real tiles would flatten the rest: their value stands in words.
        real = next(r[key] for r in rows if r["sampler"] == "real")
        axes.set(title=f"real tiles: {real:.3f}", xscale="log", xlabel="forwards", ylabel=label)
        axes.set_xticks(FORWARDS, labels=map(str, FORWARDS))
        axes.minorticks_off()
    panels[0].set(yscale="log", yticks=(1, 2, 5, 10), yticklabels=("1", "2", "5", "10"))
    panels[0].minorticks_off()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(file, dpi=110)


def main() -> None:
    """Compare and write `table.md` and `plot.png`."""
    from training.data.batches import load_tiles

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder; default: tiny")
    parser.add_argument("--data", type=Path, required=True, help="folder <slide>/<tile>")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=1000, help="tiles drawn by every sampler")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale")
    parser.add_argument("--reference", type=int, default=250, help="steps of SDE and ODE; 0: none")
    parser.add_argument("--only", nargs="+", default=SAMPLERS, choices=SAMPLERS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--small-decoder", action="store_true", help="for every row")
    parser.add_argument("--compile", action="store_true", help="for the long references")
    parser.add_argument("--threads", type=int, help="of the processor; default: all")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    generator = TileGenerator.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    if args.compile:
        generator.transformer.compile(dynamic=False)
    images = load_tiles(args.data, generator.tile.size_px).images
    if len(images) < 2 * args.num:
        parser.error(f"{args.data} holds {len(images)} tiles, expected {2 * args.num} for --num")
    chosen = torch.linspace(0, len(images) - 1, 2 * args.num).round().long()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = compare(
        generator,
        images[chosen],
        args.out,
        args.guidance,
        args.reference,
        args.only,
        args.small_decoder,
    )
    head = f"| sampler | forwards | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}\n"
    (args.out / "table.md").write_text(head + table(rows) + "\n")
    plot(rows, args.out / "plot.png")
    print(head + table(rows))


if __name__ == "__main__":
    main()
