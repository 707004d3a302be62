"""Time sampling beside REPA-E's published code and diffusers' solvers: same weights, same process.

usage: python -m benchmarks.sampler [REPAE_CHECKOUT] [--size base] [--steps 8] [--batch 4]
       [--repeats 9] [--compile] [--compare REPORT]
REPAE_CHECKOUT is a clone of https://github.com/End2End-Diffusion/REPA-E, of which models/sit.py and
samplers.py are imported as they are. SiT-B/2 with all layers random, guidance 2.5 in t <= 0.75.
The rows take turns, and medians of their times are compared. The exit status is 1 if ours is slower
than theirs in float32, not twice as fast in bfloat16, or further from theirs than 1e-5 and 2e-2.
Without kernels for bfloat16 those rows are left out, and a line says so.

--compare prints, for the rows in a REPORT of benchmarks/compare_samplers.py on the embedded model,
forwards beside Frechet distance and time, without a checkout nothing but that. --compile adds our
Euler with the network compiled as a whole.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

from benchmarks.compare_samplers import heun, runs, unipc
from benchmarks.compare_with_repae import NULL_CLASS, FeatureEmbedder, load, randomise
from cytosyn_aug.demo import load_laboratories
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.sampler import Forward, Guidance, bind_velocity, draw_latents, time_grid
from cytosyn_aug.model.solvers import Velocity, euler, guide, linear_grid
from cytosyn_aug.model.transformer import SiT
from training.engine.precision import has_fast_bfloat16

GUIDANCE = Guidance(2.5, 0.0, 0.75)
NUM_FEATURES = 768
SIZES = {  # width, depth, heads
    "tiny": (192, 7, 3),
    "base": (768, 12, 12),
    "xl": (1152, 28, 16),
}
BARS = {torch.float32: (1.0, 1e-5), torch.bfloat16: (0.5, 2e-2)}  # time ratio, relative error
Run = Callable[[], Tensor]


def build(sit: object, size: str, features: Tensor) -> tuple[SiT, nn.Module]:
    """Return our network and theirs with the same random weights, in evaluation mode."""
    width, depth, heads = SIZES[size]
    shared = {
        "input_size": 28, "patch_size": 2, "in_channels": 4, "hidden_size": width, "depth": depth,
        "num_heads": heads, "encoder_depth": depth // 3, "z_dims": (NUM_FEATURES,),
    }  # fmt: skip
    theirs = sit.SiT(
        **shared, path_type="linear", decoder_hidden_size=width, num_classes=NULL_CLASS,
        qk_norm=False, fused_attn=True,
    )  # fmt: skip
    theirs.y_embedder = FeatureEmbedder(features, width)
    randomise(theirs, torch.Generator().manual_seed(0))
    ours = SiT(**shared, conditioning_dim=NUM_FEATURES)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval().requires_grad_(False), theirs.eval().requires_grad_(False)


def flow_match_euler(velocity: Velocity, x: Tensor, num_steps: int) -> Tensor:
    """Sample with diffusers' flow-matching Euler scheduler on equal steps."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / num_steps, num_steps).tolist())
    for sigma, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        x = scheduler.step(velocity(x, sigma), timestep, x, return_dict=False)[0]
    return x


class Bench:
    """The networks and their inputs, and what is run with them."""

    def __init__(self, checkout: Path, size: str, batch: int, num_steps: int) -> None:
        draw = torch.Generator().manual_seed(1)
        self.features = torch.randn(batch, NUM_FEATURES, generator=draw)
        sit = load(checkout / "models" / "sit.py")
        self.samplers = load(checkout / "samplers.py")
        self.ours, self.theirs = build(sit, size, self.features)
        self.short = SiT.from_config(self.ours.config)
        self.short.load_state_dict(self.ours.state_dict())
        nn.Module.to(self.short.eval().requires_grad_(False), torch.bfloat16)
        self.start = torch.randn(batch, 4, 28, 28, generator=draw)
        self.num_steps = num_steps
        shape = (num_steps, *self.start.shape)
        self.noise = torch.randn(shape, generator=draw, dtype=torch.float64)
        self.classes = torch.arange(batch)
        self.null = torch.zeros(NUM_FEATURES)

    def theirs_stochastic(self) -> Tensor:
        """Run their Euler-Maruyama sampler on our noise."""
        recorded = itertools.chain(self.noise, itertools.repeat(None))
        with mock.patch.object(torch, "randn_like", side_effect=recorded):
            return self._reference(self.samplers.euler_maruyama_sampler)

    def theirs_euler(self) -> Tensor:
        """Run their Euler sampler."""
        return self._reference(self.samplers.euler_sampler)

    def _reference(self, sampler: Callable[..., Tensor]) -> Tensor:
        return sampler(
            self.theirs, self.start, self.classes, num_steps=self.num_steps,
            cfg_scale=GUIDANCE.scale, guidance_low=GUIDANCE.low, guidance_high=GUIDANCE.high,
        )  # fmt: skip

    def ours_stochastic(self, network: SiT) -> Tensor:
        """Run our Euler-Maruyama sampler on the same noise."""
        times = time_grid("euler_maruyama", self.num_steps)
        return draw_latents(
            network, self.start.double(), times, self.features, self.null,
            sampler="euler_maruyama", guidance=GUIDANCE, step_noise=self.noise.__getitem__,
        )  # fmt: skip

    def ours_euler(self, network: SiT, forward: Forward | None = None) -> Tensor:
        """Run Euler's method with everything modulated beforehand."""
        times = linear_grid(self.num_steps)
        bound = bind_velocity(
            network, times, self.features, self.null, GUIDANCE, forward or network.forward_modulated
        )
        return euler(bound, self.start.double(), times)

    def solved(self, solver: Callable[..., Tensor], argument: object) -> Tensor:
        """Run a solver of others on our network, guided step by step."""
        return solver(guide(self.ours, self.features, self.null, *GUIDANCE), self.start, argument)

    def rows(self) -> dict[str, tuple[Run, str, torch.dtype | None]]:
        """Return what is timed: how, beside which row, and by which bar it is judged."""
        sde, ode, n = "REPA-E Euler-Maruyama", "REPA-E Euler", self.num_steps
        return {
            sde: (self.theirs_stochastic, sde, None),
            "ours Euler-Maruyama float32": (
                lambda: self.ours_stochastic(self.ours), sde, torch.float32),
            "ours Euler-Maruyama bfloat16": (
                lambda: self.ours_stochastic(self.short), sde, torch.bfloat16),
            ode: (self.theirs_euler, ode, None),
            "ours Euler float32": (lambda: self.ours_euler(self.ours), ode, torch.float32),
            "ours Euler bfloat16": (lambda: self.ours_euler(self.short), ode, torch.bfloat16),
            "diffusers FlowMatchEuler float32": (
                lambda: self.solved(flow_match_euler, n), ode, None),
            "diffusers UniPC float32": (lambda: self.solved(unipc, n), ode, None),
            "Heun float32, half the steps": (
                lambda: self.solved(heun, linear_grid(n // 2)), ode, None),
        }  # fmt: skip


def measure(bench: Bench, repeats: int, is_compiled: bool) -> int:
    """Print a table of interleaved medians; return how many bars are missed."""
    rows = bench.rows()
    if is_compiled:
        forward = torch.compile(bench.ours.forward_modulated, fullgraph=True)
        rows["ours Euler float32, compiled"] = (
            lambda: bench.ours_euler(bench.ours, forward), "REPA-E Euler", None)  # fmt: skip
    if not has_fast_bfloat16():
        rows = {name: row for name, row in rows.items() if row[2] is not torch.bfloat16}
        print("bfloat16 was NOT measured: this processor only emulates it\n")
    results = {name: run() for name, (run, _, _) in rows.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, (run, _, _) in rows.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    missed = 0
    print("| sampler | s | time over REPA-E's | relative error | |\n|---|---|---|---|---|")
    for name, (_, beside, dtype) in rows.items():
        pairs = zip(seconds[name], seconds[beside], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        theirs = results[beside].double()
        error = float((results[name].double() - theirs).norm() / theirs.norm())
        verdict = ""
        if dtype is not None:
            is_met = ratio <= BARS[dtype][0] and error < BARS[dtype][1]
            verdict, missed = "met" if is_met else "MISSED", missed + (not is_met)
        median = statistics.median(seconds[name])
        print(f"| {name} | {median:.2f} | {ratio:.2f} | {error:.1e} | {verdict} |", flush=True)
    return missed


def print_comparison(report: Path, repeats: int) -> None:
    """Print forwards, Frechet distance and time of a comparison of samplers; time all anew.

    The rows of a comparison may come from several runs, and their times do not compare.

    Raises:
        ValueError: The comparison is of another model than the embedded one.
    """
    generator = TileGenerator.from_pretrained()
    compared = json.loads((report / "comparison.json").read_text())
    if compared["model"] != generator.digest:
        raise ValueError(
            f"{report} compares model {compared['model']}, and the embedded one is "
            f"{generator.digest}; make a new comparison"
        )
    rows = [json.loads(line) for line in (report / "rows.jsonl").read_text().splitlines()]
    frechet = {(row["sampler"], row["forwards"]): row["frechet"] for row in rows}
    tiles = load_laboratories()["Helsinki"]
    condition = generator.features(tiles).cls
    num_reference = max(forwards for _, forwards in frechet)
    timed = [
        run
        for run in runs(generator, compared["guidance"], num_reference)
        if (run.sampler, run.forwards) in frechet
    ]
    seconds: list[list[float]] = [[] for _ in timed]
    for repeat in range(repeats):
        for run, times in zip(timed, seconds, strict=True):
            if repeat and run.forwards == num_reference:
                continue  # minutes each; nothing hangs on a few per cent of them
            began = time.perf_counter()
            run.draw(range(len(tiles)), condition)
            times.append(time.perf_counter() - began)
    print(f"\n| sampler | forwards | Frechet | ms per tile, of {len(tiles)} |\n|---|---|---|---|")
    for run, times in zip(timed, seconds, strict=True):
        each = 1000 * statistics.median(times) / len(tiles)
        distance = frechet[run.sampler, run.forwards]
        print(f"| {run.sampler} | {run.forwards} | {distance:.2f} | {each:.0f} |")
    latents = torch.zeros(len(tiles), *generator.latent_shape)
    for name, is_few_step in (("small decoder", True), ("autoencoder's decoder", False)):
        began = time.perf_counter()
        generator.decode(latents, is_few_step=is_few_step)
        each = 1000 * (time.perf_counter() - began) / len(tiles)
        print(f"| and the {name} | - | - | {each:.0f} |")


def main() -> int:
    """Print the tables; return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, metavar="REPAE_CHECKOUT", nargs="?")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--compare", type=Path, metavar="REPORT")
    args = parser.parse_args()
    if not args.checkout and not args.compare:
        parser.error("give a checkout of REPA-E, --compare REPORT, or both")
    missed = 0
    if args.checkout:
        print(
            f"SiT {args.size}, {args.batch} tiles, {args.steps} steps, guidance 2.5 in t <= 0.75, "
            f"torch {torch.__version__}, {torch.get_num_threads()} threads\n"
        )
        with torch.no_grad():
            bench = Bench(args.checkout, args.size, args.batch, args.steps)
            missed = measure(bench, args.repeats, args.compile)
    if args.compare:
        with torch.no_grad():
            print_comparison(args.compare, args.repeats)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
