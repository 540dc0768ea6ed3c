"""assets/: the film of a pair is made by its command, and is small."""
import importlib.util
import os

from PIL import Image

import data_gen
import stage2_kl_align
from helpers import ROOT, TINY


def load(name):
    path = os.path.join(ROOT, "assets", f"{name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_film_is_made_by_its_command(tmp_path, monkeypatch):
    data = str(tmp_path / "data")
    data_gen.main(["--out", data, "--n", "8", "--n_test", "1"])
    monkeypatch.setattr(stage2_kl_align, "save_checkpoint", None)  # the film puts its own there
    out = str(tmp_path / "film.gif")
    monkeypatch.setattr("sys.argv", ["watch.py", "--init", TINY, "--data", data, "--steps", "5",
                                     "--out", out])
    load("watch").main()
    with Image.open(out) as film:
        assert film.n_frames == 2 and film.size == (900, 330)
        film.seek(0)
        first = film.convert("L").tobytes()
        film.seek(1)
        assert film.convert("L").tobytes() != first


def test_the_film_of_the_readme_is_small():
    path = os.path.join(ROOT, "assets", "watch.gif")
    assert os.path.getsize(path) <= 1.5e6
    with Image.open(path) as film:
        assert film.n_frames == 41


def test_the_overview_is_of_the_stored_run(tmp_path, monkeypatch):
    module = load("overview")
    monkeypatch.setattr(module, "HERE", str(tmp_path / "assets"))
    os.makedirs(tmp_path / "assets")
    os.symlink(os.path.join(ROOT, "tests"), tmp_path / "tests")
    module.main()
    with Image.open(tmp_path / "assets" / "overview.png") as made:
        with Image.open(os.path.join(ROOT, "assets", "overview.png")) as stored:
            assert made.size == stored.size
            bars = (770, 90, 1230, 318)  # words may differ with Pillow's fonts
            assert made.crop(bars).tobytes() == stored.crop(bars).tobytes()
