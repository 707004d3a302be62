"""Arrows point down: who may import whom, checked on the syntax tree."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module may import only from rows above its own.
ROWS = [
    {"config", "schedules", "shared", "isolation"},
    {
        "images",
        "flow",
        "weights",
        "differences",
        "compvis",
        "hub",
        "files",
        "slurm",
        "page",
        "ray_actors",
    },
    {"seams", "slide_writer", "threads", "plots", "pace"},
    {"draws", "json_files", "facts", "tensor_files", "cache_spec", "unit_rows"},
    {"tar_files", "image_files", "run_folder"},
    {"listing"},
    {"manifest"},
    {"tallies"},
    {"tile_transform", "records"},
    {"index", "waiting"},
    {"upkeep"},
    {"cache"},
    {"misses"},
    {"transformer", "encoder", "small_decoder", "sampling", "stain", "released", "conditions"},
    {"structure"},
    {"slides", "tissue", "drawing", "batching"},
    {"slide_tiles"},
    {"reading", "table_inputs", "shard_inputs"},
    {"inputs", "run_pictures"},
    {"tile_sets", "colour_table", "slide_view"},
    {"slide_blocks"},
    {"macenko", "reinhard"},
    {"classical", "colour", "tissue_colours", "run_seams"},
    {"drafts", "run_measures"},
    {"checkpoint", "static_graphs", "run_facts", "colour_plots"},
    {"convert", "origin", "run_plots", "run_sections"},
    {"loaded", "run_report"},
    {"generator"},
    {"reference", "info", "doctor", "encodings"},
    {"editing", "memory"},
    {"written"},
    {"edits"},
    {"filling"},
    {"variants", "replay", "transforms", "resampling", "slide_stain", "slide_recipe"},
    {"views", "whole_slides"},
    {"image_transform", "slide_facts"},
    {"offline_recipes", "slide_report"},
    {"batch_edits", "outputs"},
    {"record_edits", "pipeline", "slide_sources", "laboratories", "budget"},
    {"unit_work"},
    {"running"},
    {"plans", "report"},
    {"slide_runs"},
    {"offline", "work_options"},
    {
        "albumentations",
        "demo",
        "slide_command",
        "report_command",
        "budget_command",
    },
    {"offline_command"},
    {"cli"},
]
FORBIDDEN_NAMES = {"utils", "util", "helpers", "misc", "common", "core", "base"}
TRAINING_ROWS = [
    {"tcga", "splits", "shards", "workers", "parallel", "muon", "precision", "resume", "kept"},
    {"sources"},
    {"tile_folders"},
    {"data", "losses", "mean_flow", "perception", "sheets", "weights", "candidates", "pass_costs"},
    {"metrics", "cutting", "discriminator", "latents"},
    {"loop"},
    {"codecs", "extractors", "neighbours", "likelihood", "catalogue"},
    {"views"},
    {"vae", "encoder", "sit", "distil", "comparison"},
    {"repae", "decoder", "card", "judgement"},
    {"recipes", "restaining", "report", "tiles"},
    {"stages", "evaluate", "tile_command"},
    {"step_costs"},
    {"plan"},
    {"model_card"},
    {"export"},
    {"__main__"},
]


def imported_modules(file: Path, package: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
    return {n.split(".")[1] for n in names if n.startswith(f"{package}.")}


@pytest.mark.parametrize(("package", "rows"), [("cytosyn_aug", ROWS), ("training", TRAINING_ROWS)])
def test_modules_import_only_from_rows_below(package, rows):
    height = {name: k for k, row in enumerate(rows) for name in row}
    for file in (ROOT / package).glob("*.py"):
        if file.stem == "__init__":
            continue
        assert file.stem in height, f"{file.name} has no row; add it to this test"
        for name in imported_modules(file, package):
            if name in height:
                assert height[name] < height[file.stem], f"{file.stem} imports {name}"


def test_the_library_does_not_know_training():
    for file in (ROOT / "cytosyn_aug").glob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            module = getattr(node, "module", None) or ""
            names = [module, *(a.name for a in getattr(node, "names", []))]
            assert not any(str(n).split(".")[0] == "training" for n in names), file.name


def test_no_module_is_a_dumping_ground():
    stems = {f.stem for p in ("cytosyn_aug", "training") for f in (ROOT / p).glob("*.py")}
    assert not stems & FORBIDDEN_NAMES
