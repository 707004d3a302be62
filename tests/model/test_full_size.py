"""The released size, with random weights: loads in bounded time and memory, and runs once."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from cytosyn_aug.config import TileSpec
from cytosyn_aug.model.checkpoint import ModelParts, load_model
from cytosyn_aug.model.tensors import WEIGHTS_NAME
from cytosyn_aug.model.transformer import SiT
from tests.support.synthetic import write_released

SD_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
MEASURE = """
    import json, re, resource, sys, time, torch
    from pathlib import Path
    from cytosyn_aug.model.generator import TileGenerator
    def peak():  # of this program; ru_maxrss would begin at what the test's own process had
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    TileGenerator.from_pretrained(None)  # imports and caches are not what is measured
    def own():
        return resource.getrusage(resource.RUSAGE_SELF).ru_utime
    before, began, spent = peak(), time.monotonic(), own()
    dtype = getattr(torch, sys.argv[2])
    generator = TileGenerator.from_pretrained(Path(sys.argv[1]), encoder=None, dtype=dtype)
    seconds = {"seconds": time.monotonic() - began, "own_seconds": own() - spent}
    print(json.dumps(seconds | {"grown_bytes": peak() - before}))
"""


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    with torch.device("meta"):
        vae, transformer = AutoencoderKL(**SD_VAE), SiT()
    draw = torch.Generator().manual_seed(0)
    noise = torch.empty(9_000_000).normal_(std=0.02, generator=draw).half()
    for part in (vae, transformer):
        # Random everywhere, also where training starts at zero: zeros would hide errors.
        part.half().to_empty(device="cpu")
        for parameter in part.parameters():  # from noise that is drawn once, for time
            start = int(torch.randint(len(noise) - parameter.numel(), (), generator=draw))
            parameter.data.copy_(noise[start : start + parameter.numel()].view_as(parameter))
    transformer.bn.float().reset_running_stats()
    parts = ModelParts(vae, transformer, None, None, TileSpec(), digest="")
    return write_released(tmp_path_factory.mktemp("released") / "m", parts, num_shards=2)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory and time to load not verified"
)
@pytest.mark.parametrize(("dtype", "factor"), [("float16", 1.2), ("bfloat16", 2.2)])
def test_it_loads_within_seconds_and_its_own_size(released, dtype, factor):
    """Mapped in the stored type; another type takes the converted copy besides."""
    size = sum(f.stat().st_size for f in released.rglob("*.safetensors"))
    assert size > 1.5e9
    program = [sys.executable, "-c", textwrap.dedent(MEASURE), str(released), dtype]
    run = subprocess.run(program, capture_output=True, text=True, check=True)
    measured = json.loads(run.stdout.splitlines()[-1])
    print(measured | {"file_bytes": size})
    assert 0.5 * size < measured["grown_bytes"] <= factor * size  # mapped pages count as memory
    # Of the time in all, virtual machines took 2 to 8 s to hand out the pages of the copy.
    assert measured["own_seconds"] < 5
    assert measured["seconds"] < 30


@pytest.mark.slow
def test_xl_runs_once(released):
    parts = load_model(released, encoder=None)  # processors multiply float32 fastest
    assert sum(p.numel() for p in parts.transformer.parameters()) == 682_906_128
    assert sum(p.numel() for p in parts.vae.parameters()) == 83_653_863
    with torch.no_grad():
        x = torch.randn(1, 4, 28, 28)
        out = parts.transformer(x, torch.full((1,), 0.5), torch.randn(1, 768))
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert out.std() > 0


@pytest.mark.slow
def test_one_bad_number_among_the_millions_is_found(released, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    for file in released.rglob("*.*"):
        if file.is_file():
            target = folder / file.relative_to(released)
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(file)
    index = json.loads((folder / "vae" / f"{WEIGHTS_NAME}.index.json").read_text())
    name = "decoder.conv_out.weight"
    shard = folder / "vae" / index["weight_map"][name]
    from safetensors.torch import load_file, save_file

    tensors = {k: v.clone() for k, v in load_file(shard).items()}
    tensors[name][1, 2, 0, 0] = float("nan")
    shard.unlink()
    save_file(tensors, shard)
    with pytest.raises(ValueError, match=r"not finite: decoder\.conv_out\.weight"):
        load_model(folder, encoder=None, dtype=torch.float16)
