"""Each diff under "Fork it" in the README applies to the code as it stands, and the changed script trains."""
import os
import re
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
    TEXT = f.read()
FORKS = re.findall(r"\(`(\w+\.py)`[^)]*\):\n\n```diff\n(.*?)```",
                   TEXT[TEXT.index("<!-- forks -->"):TEXT.index("<!-- /forks -->")], re.S)


@pytest.mark.parametrize("name,diff", FORKS)
def test_fork(tmp_path, name, diff):
    for file in ("data_gen.py", "model.py", "stage1_text_sft.py", "stage2_kl_align.py", "eval.py"):
        shutil.copy(os.path.join(ROOT, file), tmp_path)
    lines = diff.splitlines()
    assert sum(line[0] in "+-" for line in lines) < 10
    old, new = ("\n".join(line[1:] for line in lines if line[0] in " " + sign) for sign in "-+")
    code = (tmp_path / name).read_text(encoding="utf-8")
    assert code.count(old) == 1, f"the diff for {name} no longer applies"
    (tmp_path / name).write_text(code.replace(old, new), encoding="utf-8")
    python = lambda *command: subprocess.run([sys.executable, *command], capture_output=True, text=True,
                                             cwd=tmp_path)
    done = python("data_gen.py", "--n", "12", "--n_test", "1")
    assert done.returncode == 0, done.stderr
    done = python("stage2_kl_align.py", "--init", os.path.join(ROOT, "tiny"), "--steps", "2", "--batch", "4",
                  "--micro_batch", "4", "--log_every", "1", "--no-evaluate")
    assert done.returncode == 0 and "step 2/2" in done.stdout + done.stderr, done.stderr


def test_there_are_forks():
    assert len(FORKS) >= 3
