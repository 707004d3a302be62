"""Stages put together: what each needs of data and networks, from runs or from model folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from cytosyn_aug.config import TileSpec
from cytosyn_aug.model.checkpoint import ModelParts, load_encoder, load_model
from cytosyn_aug.model.decoder import SmallDecoder
from cytosyn_aug.model.encoder import StainProbe, TileEncoder
from cytosyn_aug.model.parts import load_strictly
from cytosyn_aug.model.transformer import SiT
from training import recipes
from training.data.batches import TilesOfSplit, identify, load_tiles, open_split, spread_evenly
from training.engine.checkpoints import is_run
from training.engine.loop import Stage
from training.engine.weights import bare_autoencoder, load_stage, mean_weights, stage_weights
from training.stage_inputs import StageInputs
from training.stages.decoder import DecoderRecipe, DecoderStage, build_decoder
from training.stages.distil import DistilRecipe, DistilStage, build_student
from training.stages.encoder import EncoderRecipe, EncoderStage, build_encoder
from training.stages.latent_space import LatentSpace, measure_latents, set_latent_statistics
from training.stages.latents import LatentsRecipe, StoredViews, write_views
from training.stages.repae import RepaeRecipe, RepaeStage
from training.stages.sit import SitRecipe, SitStage, build_transformer
from training.stages.vae import VaeRecipe, VaeStage, build_vae

Recipe = VaeRecipe | EncoderRecipe | SitRecipe | RepaeRecipe | DistilRecipe | DecoderRecipe


def find_recipe(name: str, stage: str) -> Recipe:
    """Return the recipe of a trained stage.

    Raises:
        ValueError: There is none of that name.
    """
    recipe = _recipe_function(name, stage)()
    assert isinstance(recipe, Recipe)
    return recipe


def _recipe_function(name: str, stage: str) -> Callable[[], object]:
    function = getattr(recipes, f"{name}_{stage}", None)
    if function is None:
        known = sorted(k for k in vars(recipes) if k.endswith(f"_{stage}"))
        raise ValueError(f"no recipe {name}_{stage} in training/recipes.py; there are {known}")
    return function  # type: ignore[no-any-return]


def run_folders(inputs: StageInputs) -> dict[str, Path]:
    """Return the run folders among the inputs, by their stage, in the order of training."""
    autoencoders = {
        "vae" if k == 0 else f"vae {k + 1}": folder for k, folder in enumerate(inputs.vae)
    }
    others = {
        "encoder": inputs.encoder,
        "sit": inputs.sit,
        "distil": inputs.student,
        "decoder": inputs.decoder,
    }
    runs: dict[str, Path] = {}
    for name, folder in (autoencoders | others).items():
        if folder is not None and is_run(folder) and folder not in runs.values():
            runs[name] = folder
    return runs


def build_stage(
    recipe: Recipe,
    data: Path,
    inputs: StageInputs,
    run_folder: Path,
    device: torch.device,
    compiles: bool = False,
) -> Stage:
    """Return a stage with its data and networks loaded.

    Args:
        recipe: What to train.
        data: Folder with train/ and val/.
        inputs: The networks it starts from or builds on.
        run_folder: Receives what is computed once and kept.
        device: Where it runs.
        compiles: Compile the step with `torch.compile`.
    """
    train, val = data / "train", data / "val"
    if isinstance(recipe, VaeRecipe):
        return VaeStage(recipe, open_split(train), open_split(val), device, compiles)
    if isinstance(recipe, EncoderRecipe):
        cache = run_folder / "teacher"
        return EncoderStage(recipe, load_tiles(train), load_tiles(val), device, cache, compiles)
    vae = load_vae(inputs)
    if isinstance(recipe, DecoderRecipe):
        return DecoderStage(recipe, open_split(train), open_split(val), vae, device, compiles)
    encoder = load_tile_encoder(inputs)
    if isinstance(recipe, RepaeRecipe):
        tiles = open_split(train)
        networks = (vae, _untaught_transformer(inputs, vae, encoder, tiles), encoder)
        return RepaeStage(recipe, tiles, open_split(val), *networks, device, compiles)
    space = LatentSpace(vae.to(device), encoder.to(device))
    assert inputs.latents is not None
    views = StoredViews(inputs.latents)
    views.check(space)
    if isinstance(recipe, SitRecipe):
        return SitStage(recipe, views, open_split(val), space, compiles)
    assert inputs.teacher is not None
    teacher = load_transformer(inputs, inputs.teacher)
    return DistilStage(recipe, views, open_split(val), space, teacher, compiles)


def write_latents(
    name: str, data: Path, inputs: StageInputs, folder: Path, device: torch.device
) -> int:
    """Run the latents stage: encode views of all tiles once."""
    space = LatentSpace(load_vae(inputs).to(device), load_tile_encoder(inputs).to(device))
    tiles = open_split(data / "train")
    return write_views(space, tiles, find_latents_recipe(name), folder, identify(data))


def find_latents_recipe(name: str) -> LatentsRecipe:
    """Return the recipe of the latents stage.

    Raises:
        ValueError: There is none of that name.
    """
    recipe = _recipe_function(name, "latents")()
    assert isinstance(recipe, LatentsRecipe)
    return recipe


def export_parts(inputs: StageInputs) -> ModelParts:
    """Return the trained networks as the parts of a model folder."""
    assert inputs.sit is not None
    transformer = load_transformer(inputs, inputs.sit)
    encoder, probe = _encoder_parts(inputs)
    student = None
    if inputs.student is not None:
        recipe = find_recipe(inputs.recipe, "distil")
        assert isinstance(recipe, DistilRecipe)
        student = build_student(recipe, transformer)
        load_stage(inputs.student, "distil", student, prefix="student.")
    vae = load_vae(inputs)
    decoder = load_decoder(inputs, vae)
    return ModelParts(
        vae,
        transformer,
        encoder,
        probe,
        TileSpec(size_px=8 * transformer.config["input_size"]),
        digest="",
        student=student,
        decoder=decoder,
    )


def _encoder_parts(inputs: StageInputs) -> tuple[TileEncoder | None, StainProbe | None]:
    """Return the encoder and its probe for a model folder; neither for H0-mini.

    H0-mini's licence allows no copies; whoever loads the model passes it as `encoder`.
    """
    source = inputs.encoder
    assert source is not None
    if is_run(source):
        encoder = load_tile_encoder(inputs)
        probe = StainProbe(conditioning_dim=encoder.config["embed_dim"])
        load_stage(source, "encoder", probe, prefix="stain_probe.")
        return encoder, probe
    if not (source / "model_index.json").is_file():
        return None, None
    parts = load_model(source)
    return parts.encoder, parts.stain_probe


def load_vae(inputs: StageInputs) -> AutoencoderKL:
    """Return the mean of the autoencoders, frozen; that of a folder has its own shape."""
    first = inputs.vae[0]
    if is_run(first):
        recipe = find_recipe(inputs.recipe, "vae")
        assert isinstance(recipe, VaeRecipe)
        vae = build_vae(recipe)
    else:
        vae = bare_autoencoder(first) or load_model(first, encoder=None).vae
    weights = mean_weights([stage_weights(source, "vae") for source in inputs.vae])
    load_strictly(vae, weights, str(first))
    return vae.eval().requires_grad_(False)


def load_decoder(inputs: StageInputs, vae: AutoencoderKL) -> SmallDecoder | None:
    """Return the small decoder of a run, shaped by the recipe, or of a model folder; frozen."""
    if inputs.decoder is None:
        return None
    if not is_run(inputs.decoder):
        return load_model(inputs.decoder, encoder=None).decoder
    recipe = find_recipe(inputs.recipe, "decoder")
    assert isinstance(recipe, DecoderRecipe)
    decoder = build_decoder(recipe, vae.config["latent_channels"])
    load_stage(inputs.decoder, "decoder", decoder)
    return decoder


def load_tile_encoder(inputs: StageInputs) -> TileEncoder:
    """Return the encoder of a run, of a model folder, or H0-mini itself, frozen."""
    source = inputs.encoder
    assert source is not None
    if is_run(source):
        recipe = find_recipe(inputs.recipe, "encoder")
        assert isinstance(recipe, EncoderRecipe)
        trained = load_stage(source, "encoder", build_encoder(recipe), prefix="encoder.")
        assert isinstance(trained, TileEncoder)
        return trained
    if not (source / "model_index.json").is_file():
        return load_encoder(source)
    encoder = load_model(source).encoder
    if encoder is None:
        raise ValueError(f"{source} holds no encoder; pass --encoder with H0-mini's folder")
    return encoder


def load_transformer(inputs: StageInputs, source: Path) -> SiT:
    """Return the transformer of a run, shaped by the recipe, or of a model folder as it is."""
    if not is_run(source):
        return load_model(source, encoder=None).transformer
    recipe = find_recipe(inputs.recipe, "sit")
    assert isinstance(recipe, SitRecipe)
    width = stage_weights(source, "sit")["y_embedder.linear.weight"].shape[1]
    transformer = load_stage(source, "sit", build_transformer(recipe, width))
    assert isinstance(transformer, SiT)
    return transformer


def _untaught_transformer(
    inputs: StageInputs, vae: AutoencoderKL, encoder: TileEncoder, tiles: TilesOfSplit
) -> SiT:
    """Return a transformer with projector: of a source if given, else untaught.

    An untaught one begins with the statistics of stored latents, or else of 256 tiles.
    """
    recipe = find_recipe(inputs.recipe, "sit")
    assert isinstance(recipe, SitRecipe)
    transformer = build_transformer(recipe, encoder.config["embed_dim"])
    if inputs.sit is None:
        if inputs.latents is not None:
            known = StoredViews(inputs.latents)
            known.check(LatentSpace(vae, encoder))
            moments = (known.latent_mean, known.latent_variance)
        else:
            moments = measure_latents(LatentSpace(vae, encoder).encode(spread_evenly(tiles, 256)))
        set_latent_statistics(transformer, *moments)
        return transformer
    weights = stage_weights(inputs.sit, "sit")
    kept = {k: v for k, v in transformer.state_dict().items() if k.startswith("projectors.")}
    load_strictly(transformer, kept | weights, str(inputs.sit))  # folders have no projector
    return transformer
