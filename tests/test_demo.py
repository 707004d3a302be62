import re

import pytest

from cytosyn_aug import demo
from cytosyn_aug.cli.main import main
from cytosyn_aug.demo import CONTENT, LABORATORIES, load_laboratories


@pytest.mark.slow
def test_the_demo_writes_a_page_whose_pictures_exist(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "NUM_VARIATIONS", 1)  # for time only, like the steps
    monkeypatch.setattr(demo, "_STEPS", 2)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    page = tmp_path / "demo" / "index.html"
    assert capsys.readouterr().out.strip() == str(page)
    pictures = re.findall(r'src="([^"]+)"', page.read_text())
    assert sorted(pictures) == ["stain_transfer.png", "unconditional.png", "variations.png"]
    assert all((page.parent / name).stat().st_size > 10_000 for name in pictures)
    rows = re.findall(
        r'<td class="number">\d\.\d{3}</td><td class="number">\d\.\d{3}</td></tr>', page.read_text()
    )
    assert len(rows) == len(CONTENT) * len(LABORATORIES)


def test_a_folder_without_a_model_is_one_line_and_exit_2(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), "--model", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "model_index.json does not exist" in message
    assert len(message.splitlines()) == 1


def test_an_unknown_command_is_exit_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["restore"])
    assert stop.value.code == 2


def test_the_sample_tiles_are_three_laboratories_of_the_models_size():
    for tiles in load_laboratories().values():
        assert tiles.shape[0] >= 4
        assert tiles.shape[1:] == (3, 224, 224)
