"""Each diff under "Fork it" in the README applies to the code as it stands, and the fork trains."""
import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT, TINY

FILES = ("data_gen.py", "model.py", "stage1_text_sft.py", "stage2_kl_align.py", "eval.py")


def read_forks():
    """[(file, diff)] between the marks of the README."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        text = f.read()
    section = text.split("<!-- forks -->")[1].split("<!-- /forks -->")[0]
    return re.findall(r"\(`(\w+\.py)`[^)]*\):\n\n```diff\n(.*?)```", section, re.S)


def apply(diff, code):
    """The code with the diff's lines changed; they must stand in it exactly once."""
    lines = diff.splitlines()
    old = "\n".join(line[1:] for line in lines if line[0] in " -")
    new = "\n".join(line[1:] for line in lines if line[0] in " +")
    assert code.count(old) == 1, "the diff no longer applies"
    return code.replace(old, new)


def run(folder, *command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("name,diff", read_forks())
def test_a_fork_trains(tmp_path, name, diff):
    changed = [line for line in diff.splitlines() if line[0] in "+-"]
    assert len(changed) < 10
    for file in FILES:
        shutil.copy(os.path.join(ROOT, file), tmp_path)
    path = tmp_path / name
    path.write_text(apply(diff, path.read_text(encoding="utf-8")), encoding="utf-8")

    made = run(tmp_path, "data_gen.py", "--n", "12", "--n_test", "1")
    assert made.returncode == 0, made.stderr
    trained = run(tmp_path, "stage2_kl_align.py", "--init", TINY, "--steps", "2", "--batch", "4",
                  "--micro_batch", "4", "--no-evaluate")
    assert trained.returncode == 0, trained.stderr
    assert "step 2/2" in trained.stdout + trained.stderr


def test_there_are_forks():
    assert len(read_forks()) >= 3
