"""Each diff under "Fork it" in the README applies to the code as it stands, and the fork trains."""
import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from safetensors import safe_open

from helpers import ROOT, TINY

MODULES = ("data_gen", "model", "eval", "stage1_text_sft", "stage2_kl_align")


def read_forks():
    """[(summary, diff)] between the marks of the README."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        text = f.read()
    section = text.split("<!-- forks -->")[1].split("<!-- /forks -->")[0]
    return re.findall(r"<summary>(.*?)</summary>\n\n```diff\n(.*?)```", section, re.S)


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A function: diff -> the modules with it applied, imported from a copy, by name."""

    def apply(diff):
        for name in MODULES:
            shutil.copy(os.path.join(ROOT, f"{name}.py"), tmp_path)
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
        subprocess.run(["git", "apply", "-"], cwd=tmp_path, check=True, input=diff, text=True)
        monkeypatch.syspath_prepend(tmp_path)
        for name in MODULES:
            monkeypatch.delitem(sys.modules, name, raising=False)
        modules = {name: importlib.import_module(name) for name in MODULES}
        for name, module in modules.items():
            assert module.__file__ == str(tmp_path / f"{name}.py")
            monkeypatch.setitem(sys.modules, name, module)  # and away with it after the test
        return modules

    return apply


def backbones(folder):
    """The two of tiny/ as someone else's: folders for --llm and --vision."""
    shutil.copytree(os.path.join(TINY, "llm"), folder / "llm")
    for name in os.listdir(TINY):
        if name.startswith(("tokenizer", "chat_template")):
            shutil.copy(os.path.join(TINY, name), folder / "llm")
    return ["--llm", str(folder / "llm"), "--vision", os.path.join(TINY, "vision")]


@pytest.mark.parametrize("summary,diff", read_forks())
def test_a_fork_trains(summary, diff, fork, tmp_path):
    changed = [line for line in diff.splitlines() if re.match(r"[+-](?![+-]{2} )", line)]
    assert 0 < len(changed) <= 10
    modules = fork(diff)
    flags = re.findall(r"`(--.*?)`", summary)[:1]
    start = backbones(tmp_path) if "--projector linear" in flags else ["--init", TINY]

    data = str(tmp_path / "data")
    modules["data_gen"].main(["--out", data, "--n", "13", "--n_test", "1"])
    line = [*start, "--data", data, "--out", str(tmp_path / "out"), "--batch", "4", "--steps", "2",
            "--save_every", "1", "--no-evaluate"]
    line += " ".join(flags).split()
    modules["stage2_kl_align"].main(line)
    assert (tmp_path / "out" / "step-2" / "hashes.json").exists()

    # It goes on, too; and a running mean of weights is in the checkpoint.
    shutil.rmtree(tmp_path / "out" / "step-2")
    modules["stage2_kl_align"].main(line)
    assert (tmp_path / "out" / "step-2" / "hashes.json").exists()
    if '"mean"' in diff:
        path = tmp_path / "out" / "step-2" / "optimizer.safetensors"
        with safe_open(path, "pt") as tensors:
            assert "projector.up.weight/mean" in tensors.keys()


def test_there_are_forks():
    summaries = [summary for summary, _ in read_forks()]
    for word in ("Jensen-Shannon", "running mean", "rung", "family", "projector"):
        assert any(word in summary for summary in summaries), word
