"""Reports in a real browser: everything is drawn, fits, and prints on paper."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from cytosyn_aug import offline
from cytosyn_aug.runs.manifest import open_manifest
from tests.support.offline_runs import QUIET
from tests.support.synthetic import save_tile, synthetic_tiles

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium: reports were not looked at in a browser (apt-get install chromium)",
)
needs_poppler = pytest.mark.skipif(
    shutil.which("pdftotext") is None,
    reason="no pdftotext: paper was not checked for clipped tables (apt-get install poppler-utils)",
)
LONG = "a_folder_with_a_name_that_takes_up_a_whole_line_and_has_no_place_to_break_it_" * 2
RED = (214, 24, 60)


@pytest.fixture(scope="module")
def out(tmp_path_factory, small, laboratories):
    """A run with a red tile in it, long names, and many tiles that failed."""
    folder = tmp_path_factory.mktemp("in")
    for k, tile in enumerate(synthetic_tiles(8)):
        save_tile(folder / "a" / f"s_{k}_0.png", tile)
    red = torch.tensor(RED, dtype=torch.uint8)[:, None, None].expand(3, 112, 112)
    save_tile(folder / "a" / "red.png", red)
    for k in range(60):
        (folder / f"{LONG}{k}.png").write_bytes(b"")
    out = tmp_path_factory.mktemp("out")
    offline.augment(folder, out, small, references=laboratories, variants=2, work=QUIET)
    offline.report(out)
    return out


def chromium(tmp_path, page, *arguments):
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def screenshot(tmp_path, page, width, height):
    file = tmp_path / "page.png"
    chromium(tmp_path, page, f"--window-size={width},{height}", f"--screenshot={file}")
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


@pytest.mark.parametrize("width", [1280, 500])
def test_everything_is_drawn_and_fits_the_window(out, tmp_path, width):
    found = screenshot(tmp_path, out / "report.html", width, 6000)
    assert (found[:, -4:] == 255).all(), "something runs out of the window on the right"
    is_red = np.abs(found - RED).max(2) < 12
    tile = is_red.reshape(len(found) // 10, 10, -1).sum((1, 2)).max()
    assert tile > 10 * 60, "the red tile is not there: pictures are not drawn"
    # Curves of the plots: nothing else on the page has exactly this blue.
    assert (np.abs(found - (0, 114, 178)).max(2) < 3).sum() > 300


def test_no_picture_is_drawn_from_elsewhere(out, tmp_path):
    """The page forbids it to itself: a picture slipped in from a file is not shown."""
    save_tile(tmp_path / "dark.png", torch.full((3, 400, 400), 9, dtype=torch.uint8))
    text = (out / "report.html").read_text()
    elsewhere = (tmp_path / "dark.png").as_uri()
    slipped = f'<img src="{elsewhere}"><script>document.body.innerHTML=""</script>'
    page = tmp_path / "page.html"
    page.write_text(text.replace("<main>", f"<main>{slipped}"))
    found = screenshot(tmp_path, page, 1280, 3000)
    assert (np.abs(found - 9).max(2) < 3).sum() < 1000
    assert (found != 255).any(2).mean() > 0.1


def test_it_prints_on_several_pages(out, tmp_path):
    file = printed(out, tmp_path)
    content = file.read_bytes()
    pages = len(re.findall(rb"/Type\s*/Page\b", content))
    assert 4 <= pages <= 30
    assert b"/Subtype /Image" in content


@needs_poppler
def test_nothing_is_clipped_on_paper(out, tmp_path):
    file = printed(out, tmp_path)
    text = subprocess.run(
        ["pdftotext", "-raw", str(file), "-"], capture_output=True, text=True, check=True
    ).stdout
    joined = "".join(text.split())
    manifest = open_manifest(out)
    for value in (manifest.identity["input"]["names_sha256"], manifest.context["input"]):
        assert value in joined
    for k in range(60):
        assert f"{LONG}{k}.png" in joined
    subprocess.run(["pdftoppm", "-r", "40", "-png", str(file), str(tmp_path / "sheet")], check=True)
    for sheet in tmp_path.glob("sheet*.png"):
        pixels = np.asarray(Image.open(sheet).convert("L"))
        margin = pixels.shape[1] // 30
        assert (pixels[:, -margin:] == 255).all(), f"{sheet.name} runs into its right margin"
        assert (pixels[:, :margin] == 255).all()


def printed(out, tmp_path):
    file = tmp_path / "report.pdf"
    chromium(tmp_path, out / "report.html", "--no-pdf-header-footer", f"--print-to-pdf={file}")
    return file
