"""tiny/pretrain.py: what the base is shown and what never, right answers, going on after a kill."""
import os
import re
import sys
from random import Random

import pytest
import torch

from data_gen import FAMILIES, is_test, make_problem
from helpers import ROOT, TINY
from model import load_vlm

sys.path.insert(0, os.path.join(ROOT, "tiny"))
import pretrain  # noqa: E402

SMALL = ["--dense", "2", "--text", "2", "--joint", "2", "--pool", "40", "--batch", "4",
         "--no-compile"]


def value_of(terms):
    a, sign, b = re.fullmatch(r"(\d+)([-+*/])(\d+)", terms).groups()
    a = int(a)
    b = int(b)
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]


def test_solutions_of_every_second_family_only():
    r = Random(0)
    seen = {pretrain.schooled_problem(r)["family"] for _ in range(300)}
    assert seen == {family.__name__ for family in FAMILIES[::2]}


def test_never_the_givens_of_a_test_problem():
    r = Random(1)
    for _ in range(300):
        problem = pretrain.schooled_problem(r)
        assert not is_test(problem["family"], problem["numbers"])


def test_the_picture_of_a_problem_comes_without_its_solution():
    for i in range(24):
        problem = make_problem("train", i, 1)
        for _, answer in pretrain.problem_picture(i, 0).tasks.values():
            assert "†" not in answer
            assert problem["output"] not in answer


def test_sums_are_right():
    r = Random(2)
    for _ in range(300):
        prompt, answer = pretrain.arithmetic(r)
        assert value_of(prompt.removesuffix("=")) == int(answer), prompt


def test_chains_are_right_and_go_on_where_they_were():
    r = Random(3)
    n_sums = 0
    for _ in range(300):
        labels, question, answer = pretrain.chain(r)
        numbers = dict(re.fullmatch(r"(\w)=(\d+)°?", label).groups() for label in labels)
        start = re.match(r"Take (\w+)", question)[1]
        value = int(numbers.get(start, start if start.isdigit() else -1))
        for step in answer.split():
            terms, result = step.removesuffix(".").split("=")
            if terms == start:  # no sum: the value is read
                assert int(result) == value
                continue
            assert terms.startswith(str(value)), (question, answer)
            value = int(result)
            assert value_of(terms) == value, (question, answer)
            n_sums += 1
    assert n_sums > 300


def test_what_is_written_in_a_picture_is_what_is_asked():
    for i in range(30):
        picture = pretrain.chain_picture(i, 0)
        question, answer = picture.tasks["chain"]
        written = ""
        for pair in picture.cells:
            written += "".join(pretrain.CHARACTERS[k - 1] for k in pair if k > 0)
        for name in re.findall(r"\b[A-Za-z]\b", question):
            assert f"{name}=" in written


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    """Killed amid its second phase; the same command ends with the weights of a run in one go."""
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 1)
    pretrain.main(["--out", str(tmp_path / "whole"), *SMALL])

    command = ["--out", str(tmp_path / "killed"), *SMALL]
    text_losses = pretrain.text_losses
    calls = []

    def stops_at_the_second_step(school, r):
        calls.append(r)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return text_losses(school, r)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "text_losses", stops_at_the_second_step)
        pretrain.main(command)
    with pytest.raises(SystemExit, match="other flags"):
        pretrain.main([*command, "--lr", "1"])
    pretrain.main(command)

    assert not os.path.exists(tmp_path / "killed" / "pretrain.safetensors")
    whole, _ = load_vlm(str(tmp_path / "whole"))
    killed, _ = load_vlm(str(tmp_path / "killed"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, killed.state_dict()[name]), name


def test_the_embedded_base_is_what_the_script_writes():
    """Same tokens, same shapes: an edit of the script needs another base, or another script."""
    vlm, tokenizer = load_vlm(TINY)
    made = pretrain.make_tokenizer(pretrain.corpus(0))
    assert made.get_vocab() == tokenizer.get_vocab()
    new = pretrain.build(made, 0)
    assert new.config == vlm.config
    for name, tensor in new.state_dict().items():
        assert tensor.shape == vlm.state_dict()[name].shape, name
