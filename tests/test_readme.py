"""What the README says is true: its commands, counts, pasted outputs; and the house rules."""
import importlib
import json
import os
import re
import shlex
import subprocess

import pytest

import ablation
import count_memory
import data_gen
import eval as evaluation
from bench_kl import accuracy_table, time_table
from bench_train import table
from count_tokens import measure, python_files
from helpers import ROOT, STAGES, TINY, save_picture

CEILINGS = {  # tokens at most
    "data_gen.py": 6000,
    "model.py": 5400,
    "stage1_text_sft.py": 2400,
    "stage2_kl_align.py": 6100,
    "stage3_mm_instruct.py": 2400,
    "eval.py": 6400,
    "convert/data.py": 1300,
    "convert/benchmarks.py": 1300,
    "convert/released.py": 1300,
    "convert/deepseek_vl.py": 1600,
    "convert/llava.py": 1300,
}
SCRIPTS = ["data_gen.py", "model.py", "stage1_text_sft.py", "stage2_kl_align.py",
           "stage3_mm_instruct.py", "eval.py"]


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def read_result(name):
    return json.loads(read(f"tests/results/{name}.json"))


def between(mark):
    """What stands in the code block between two marks of the README."""
    block = rf"<!-- {mark} -->\n```\w*\n(.*?)\n```\n<!-- /{mark} -->"
    return re.search(block, read("README.md"), re.S)[1]


# --------------------------------------------------------------------------------------------------
# The house

def test_token_counts_in_the_readme_are_true():
    for name in SCRIPTS:
        tokens, _, _, lines = measure(name)
        assert f"| `{name}` | {tokens:,} | {lines} |" in read("README.md"), (name, tokens, lines)


@pytest.mark.parametrize("name", CEILINGS)
def test_a_file_stays_within_its_ceiling(name):
    tokens, _, _, _ = measure(name)
    assert tokens <= CEILINGS[name]


def test_one_act_a_line():
    """At most 12 tokens a code line (the tables of data_gen.py: 15) and 100 columns."""
    names = python_files()
    assert len(names) > 20
    for name in names:
        _, density, widest, _ = measure(name)
        assert density < (15.05 if name == "data_gen.py" else 12.05), (name, density)
        assert widest <= 100, (name, widest)


def test_files_of_the_card():
    """Of what git tracks; in a copy without git there is nothing to ask."""
    listing = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listing.stdout.split()}
    allowed = {*SCRIPTS, "tests", "requirements.txt", "README.md", "tiny", "assets", "convert",
               ".ci", ".gitignore", "LICENSE"}
    assert "model.py" in top and top <= allowed


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "model.py"])
def test_help_of_every_script(script, capsys):
    module = importlib.import_module(script.removesuffix(".py"))
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0 and "--" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Commands

def test_ci_runs_the_readme_command():
    lines = read("README.md").splitlines()
    command = between("tests")
    assert command.startswith("python3 -m venv")
    assert command.endswith("python -m pytest -q tests")
    assert lines.index(command) < 30 and lines.index(between("run")) < 30  # they come first

    script = read(".ci/run").replace('bash -c "$command"', "exit 0")
    path = os.path.join(ROOT, ".ci", "run")
    done = subprocess.run(["bash", "-c", script, path], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == f"+ {command}", done.stderr


def test_the_commands_for_own_data(tmp_path, monkeypatch):
    """The rows of the section "Your own data" go through its commands, each for one step."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("pictures")
    save_picture("pictures/p.png")
    for line in between("own rows").splitlines():
        name, content = line.split(maxsplit=1)
        with open(name, "w", encoding="utf-8") as f:
            f.write(content)

    commands = between("own data").splitlines()
    assert len(commands) == 4
    convert = importlib.import_module("convert.data")
    for command in commands:
        _, script, *flags = command.split()
        if script == "convert/data.py":
            convert.main([*flags, "--workers", "1"])
            continue
        [stage] = [module for module in STAGES.values() if module.__file__.endswith(script)]
        stage.main([*flags, "--init", TINY, "--steps", "1", "--batch", "2"])
    for name in ("stage1", "stage2", "stage3"):
        assert os.path.exists(f"out/{name}/step-1/hashes.json")


# --------------------------------------------------------------------------------------------------
# Pasted outputs and numbers

def test_the_pasted_ladder_is_what_show_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data_gen.main(["--show", "0"])
    assert capsys.readouterr().out.strip() == between("show data").strip()
    assert os.path.exists("data_show_0.png")


def test_the_tables_of_variants_are_those_of_the_stored_runs():
    runs = read_result("ablation")["runs"]
    text = ablation.trials_table(read_result("ablation")["trials"])
    assert f"<!-- trials -->\n{text}\n<!-- /trials -->" in read("README.md")
    text = ablation.runs_table(runs)
    assert f"<!-- ablation -->\n{text}\n<!-- /ablation -->" in read("README.md")
    text = ablation.differences_table(runs)
    assert f"<!-- differences -->\n{text}\n<!-- /differences -->" in read("README.md")


def test_numbers_in_sentences_are_those_of_the_stored_runs():
    runs = read_result("ablation")["runs"]

    def points(name, other, key="all"):
        mean, _ = ablation.difference(ablation.points_of(runs, name, other, key))
        return f"{mean:.1f}"

    def level(name, key="vision_only", seeds=runs):
        results = [runs[seed][name] for seed in seeds if name in runs[seed]]
        values = [100 * ablation.figure(result, key) for result in results]
        return f"{sum(values) / len(values):.1f}"

    three = ("3407", "3408", "3409")
    own = ablation.points_of(runs, "own_words_all", "stage2", "all")
    later = ablation.points_of(runs, "then_100_own_words", "then_100", "all")
    for words in (
        f"adds {points('stage2', 'ce_only')} points in `all`, "
        f"{points('stage2', 'ce_only', 'vision_dominant')} on `vision_dominant`",
        f"{float(points('ce_only', 'stage1')):.0f} of stage 2's "
        f"{float(points('stage2', 'stage1')):.0f} points come without it",
        f"it ends {points('stage3_without_stage2', 'stage3')} points lower, "
        f"tuned {points('stage3_without_stage2', 'stage3_tuned')}.",
        f"without it, {float(points('stage2', 'without_stage1')):.0f} points less",
        f"`neighbours` loses {points('stage2', 'neighbours')} points",
        f"{ablation.with_interval(own)} points in `all` over four seeds, undecided; "
        f"in the last 100 steps only: {ablation.with_interval(later)}.",
        f"frozen; {level('ce_only', 'vision_dominant')}, against "
        f"{level('stage2', 'vision_dominant')}<",
        f">{level('neighbours')}, against {level('stage2')}: that teacher",
        f">{level('alpha1', 'all')} and {level('alpha0', 'all')}, against "
        f"{level('stage2', 'all')} together",
        f">{level('stage3_without_stage2')}, against {level('stage3')}<",
        f">{level('without_stage1', seeds=three)} on `vision_only`, of 48.8 in text; "
        f"{level('without_stage1', seeds=('3410', '3411'))} on the other base",
        f">{level('own_words_all')} (",
        f"4 seeds), against {level('stage2', seeds=(*three, '3410'))}<",
        f"teacher to student: {points('stage2', 'alpha1')} points less in `all`",
        f"the reverse: {points('stage2', 'alpha0')} less",
        f"| {points('stage3_without_stage2', 'stage3')} points less in `all` |",
        f"| {points('stage2', 'own_words_half')} points less in `all`, within",
        f"| {points('stage2', 'neighbours')} points less in `all` |",
    ):
        assert words in read("README.md"), words


def test_the_kernel_tables_are_those_of_the_stored_run():
    result = read_result("bench_kl_cpu")
    accuracy = accuracy_table(result["accuracy"])
    times = time_table(result["shapes"])
    assert f"<!-- accuracy -->\n{accuracy}\n<!-- /accuracy -->" in read("README.md")
    assert f"<!-- cpu -->\n{times}\n<!-- /cpu -->" in read("tests/results/README.md")


def test_the_memory_table_is_that_of_the_stored_count():
    text = count_memory.table(read_result("memory"))
    assert f"<!-- memory -->\n{text}\n<!-- /memory -->" in read("README.md")


def test_the_training_table_is_that_of_the_stored_run():
    text = table(read_result("bench_train_shrunk"))
    assert f"<!-- train -->\n{text}\n<!-- /train -->" in read("tests/results/README.md")


def test_the_table_of_the_default_run_is_the_stored_one():
    assert evaluation.table(read_result("default_run")["models"]) == between("table3")


def words_outside_tables_and_code(text):
    for what in (r"```.*?```", r"\$\$.*?\$\$", r"<!--.*?-->", r"^\|.*?$"):
        text = re.sub(what, "", text, flags=re.S | re.M)
    return text.split()


def test_the_readme_is_short():
    assert len(words_outside_tables_and_code(read("README.md"))) <= 2500


def commands_of_the_readme():
    """[(script, flags)] of every line that runs a script of the card, "..." left out."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", read("README.md"), re.S):
        for line in block.splitlines():
            command = line.split("  #")[0].replace("...", "")
            script = re.search(r"(?<=[ /])(\w+\.py)( .*)?$", command)
            if script and script[1] in SCRIPTS and "/" + script[1] not in command:
                found.append((script[1], (script[2] or "").split("&&")[0]))
    return found


@pytest.mark.parametrize("script,flags", commands_of_the_readme())
def test_a_command_of_the_readme_is_understood(script, flags):
    importlib.import_module(script.removesuffix(".py")).parse_args(shlex.split(flags))


def test_there_are_commands_in_the_readme():
    scripts = {script for script, _ in commands_of_the_readme()}
    assert scripts == set(SCRIPTS) - {"model.py"}


def test_the_versions_with_a_picture():
    assert evaluation.IMAGE_VERSIONS == [name for name in data_gen.LADDER if name != "text_only"]
