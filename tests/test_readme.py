"""What the README says is true: its commands, line counts, pasted outputs and numbers."""
import importlib
import json
import os
import re
import subprocess

import pytest

import data_gen
import eval as evaluation

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUDGET = {"data_gen.py": 420, "model.py": 938, "stage1_text_sft.py": 280, "stage2_kl_align.py": 544,
          "stage3_mm_instruct.py": 290, "eval.py": 1084}


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def between(mark):
    return re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)\n```\n<!-- /{mark} -->", read("README.md"), re.S)[1]


def test_line_counts_are_true_and_within_budget():
    for name, limit in BUDGET.items():
        lines = read(name).count("\n")
        assert f"| `{name}` | {lines} |" in read("README.md"), f"{name} has {lines} lines"
        assert lines <= limit, f"{name} has {lines} lines, its budget is {limit}"
        assert max(map(len, read(name).splitlines())) <= 110, name


def test_ci_runs_the_readme_command():
    readme, command = read("README.md").splitlines(), between("tests")
    assert command.startswith("python3 -m venv") and command.endswith("python -m pytest -q tests")
    assert readme.index(command) < 30 and readme.index(between("run")) < 30  # the two commands come first
    done = subprocess.run(["bash", "-c", read(".ci/run").replace('bash -c "$command"', "exit 0"),
                           os.path.join(ROOT, ".ci", "run")], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == f"+ {command}", done.stderr


def test_the_pasted_ladder_is_what_show_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data_gen.main(["--show", "0"])
    assert capsys.readouterr().out.strip() == between("show data").strip()
    assert os.path.exists("data_show_0.png")


def test_result_tables_come_from_the_stored_runs():
    """The multi-seed table is exactly what tests/ablation.py makes of its file."""
    from ablation import markdown
    with open(os.path.join(ROOT, "tests", "results", "ablation.json")) as f:
        table = markdown(json.load(f)["runs"])
    assert f"<!-- ablation -->\n{table}\n<!-- /ablation -->" in read("README.md")


def test_kernel_tables_come_from_the_stored_run():
    """The accuracy and the CPU times are exactly what tests/bench_kl.py makes of its file."""
    from bench_kl import accuracy_table, time_table
    with open(os.path.join(ROOT, "tests", "results", "bench_kl_cpu.json")) as f:
        result = json.load(f)
    tables = {"accuracy": accuracy_table(result["accuracy"]), "cpu": time_table(result["shapes"])}
    for mark, table in tables.items():
        assert f"<!-- {mark} -->\n{table}\n<!-- /{mark} -->" in read("README.md")


def test_the_training_table_comes_from_the_stored_run():
    from bench_train import table
    with open(os.path.join(ROOT, "tests", "results", "bench_train_shrunk.json")) as f:
        assert f"<!-- train -->\n{table(json.load(f))}\n<!-- /train -->" in read("README.md")


def test_the_table_of_the_first_run_is_the_stored_one():
    with open(os.path.join(ROOT, "tests", "results", "default_run.json")) as f:
        models = json.load(f)["models"]
    assert evaluation.table(
        {name: models[name] for name in ("out/stage1", "out/stage2")}) == between("table1")


@pytest.mark.parametrize("script", [name for name in BUDGET if name != "model.py"])
def test_help_of_every_script(script, capsys):
    module = importlib.import_module(script.removesuffix(".py"))
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0 and "--" in capsys.readouterr().out


def test_files_of_the_card_and_no_machine_paths():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    top = {name.split("/")[0] for name in tracked}
    allowed = {*BUDGET, "tests", "requirements.txt", "README.md", "tiny", "assets", ".ci", ".gitignore",
               "LICENSE"}
    assert not tracked or top <= allowed, top - allowed
    assert evaluation.IMAGE_VERSIONS == [v for v in data_gen.LADDER if v != "text_only"]
