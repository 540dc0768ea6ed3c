"""Stage 2 with --on_policy: the student's own words, both KLs on them and no hard loss."""
import os
import re
import shutil

import pytest
import torch

import eval as evaluation
import model
import stage2_kl_align
from helpers import TINY, batch_of, distance, equal, metrics, pair, save_picture, train
from model import IGNORE


@pytest.fixture(scope="module")
def vlm_and_tokenizer():
    vlm, tokenizer = model.load_vlm(TINY)
    return vlm, tokenizer


def dataset_of(vlm_and_tokenizer, data, *line):
    vlm, tokenizer = vlm_and_tokenizer
    args = stage2_kl_align.make_parser().parse_args(["--batch", "8", "--micro_batch", "4", *line])
    rows = model.JsonLines([os.path.join(data, "stage2_top.jsonl")])
    return stage2_kl_align.StepBatches(rows, tokenizer, vlm.config, args, rank=0, world=1)


def own_words(vlm_and_tokenizer, dataset, step=0):
    vlm, _ = vlm_and_tokenizer
    return stage2_kl_align.with_own_words(vlm, step, dataset, torch.device("cpu"))


def answers(tokenizer, batch):
    """The text at the answer positions of each row, without its end."""
    found = []
    for ids, is_answer in zip(batch.input_ids, batch.is_answer):
        predicted = ids[1:][is_answer[:-1]]
        found.append(tokenizer.decode(predicted, skip_special_tokens=True))
    return found


def test_the_reply_of_eval_stands_for_the_answer_in_both_forms(vlm_and_tokenizer, data):
    vlm, tokenizer = vlm_and_tokenizer
    dataset = dataset_of(vlm_and_tokenizer, data, "--on_policy", "1")
    micro_batches, n_answer_tokens, n_dropped = own_words(vlm_and_tokenizer, dataset)
    assert not vlm.training  # as everywhere

    questions = []
    for rows in stage2_kl_align.rows_of_step(0, dataset.rows, dataset.args, 0, 1):
        for row in rows:
            weak = {field: row[f"{field}_2"] for field in model.ROW}
            questions.append(row | weak)
    flags = evaluation.parse_args([TINY])
    flags.max_new_tokens = 64
    wanted = dict((row["where"], reply) for row, reply in
                  evaluation.generate_replies(vlm, tokenizer, questions, flags))

    for form in (0, 1):
        said = sum([answers(tokenizer, batches[form]) for batches in micro_batches], [])
        assert said == [wanted[row["where"]] for row in questions]
    assert len(set(said)) > 3 and n_dropped == 0
    rows_with_kl = sum(int(batches[1].is_answer.sum()) for batches in micro_batches)
    assert n_answer_tokens == rows_with_kl > 8 * 5


@pytest.mark.parametrize("share,n_own", [(0.0, 0), (0.25, 2), (0.4, 3), (1.0, 8)])
def test_own_pairs_are_the_first_of_the_permutation(share, n_own, vlm_and_tokenizer, data):
    _, tokenizer = vlm_and_tokenizer
    dataset = dataset_of(vlm_and_tokenizer, data, "--on_policy", str(share))
    order = stage2_kl_align.shuffled(len(dataset.rows), dataset.args.seed, 0)
    step = 1
    given = {dataset.rows[int(k)]["output"] for k in order[8 + n_own:16]}

    micro_batches, _, _ = own_words(vlm_and_tokenizer, dataset, step)
    without_label = 0
    for _, weak in micro_batches:
        for text, labels, is_answer in zip(answers(tokenizer, weak), weak.labels, weak.is_answer):
            if (labels[is_answer] == IGNORE).all():
                without_label += 1
            else:
                assert (labels[is_answer] != IGNORE).all()
                assert text in given
    assert without_label == n_own


def test_a_reply_that_reaches_the_limit_just_ends_there(vlm_and_tokenizer, data):
    vlm, tokenizer = vlm_and_tokenizer
    dataset = dataset_of(
        vlm_and_tokenizer, data, "--on_policy", "1", "--on_policy_tokens", "3")
    micro_batches, n_answer_tokens, _ = own_words(vlm_and_tokenizer, dataset)
    assert n_answer_tokens == 8 * (3 + 1)  # each token, and what would be next


def test_a_reply_without_a_word_counts_where_it_ended(vlm_and_tokenizer, data, monkeypatch):
    vlm, tokenizer = vlm_and_tokenizer

    def end_at_once(batch, *limits):
        return torch.full((len(batch.input_ids), 1), tokenizer.eos_token_id)

    monkeypatch.setattr(vlm, "generate", end_at_once)
    dataset = dataset_of(vlm_and_tokenizer, data, "--on_policy", "1")
    _, n_answer_tokens, n_dropped = own_words(vlm_and_tokenizer, dataset)
    assert (n_answer_tokens, n_dropped) == (8, 0)


def test_a_pair_whose_own_words_do_not_fit_is_dropped_and_counted(vlm_and_tokenizer, data):
    dataset = dataset_of(vlm_and_tokenizer, data, "--on_policy", "1", "--max_length", "105")
    _, _, n_dropped = own_words(vlm_and_tokenizer, dataset)
    assert 0 < n_dropped <= 8


def test_no_hard_loss_on_own_words(data, tmp_path):
    train(2, data, tmp_path / "out", steps=1, on_policy=1)
    [numbers] = metrics(tmp_path / "out")
    assert numbers["ce"] == 0
    assert numbers["kl_ts"] > 0 and numbers["kl_st"] > 0
    half_of_both = 0.5 * (0.5 * numbers["kl_ts"] + 0.5 * numbers["kl_st"])
    assert numbers["loss"] == pytest.approx(half_of_both, rel=1e-5)
    assert 0 < numbers["writing"] < 1 and 0 < numbers["agree"] <= 1


def test_micro_batches_do_not_change_the_result(data, tmp_path):
    settings = {"steps": 2, "on_policy": 0.5, "lr": 1e-4}
    whole = train(2, data, tmp_path / "whole", micro_batch=4, **settings)
    parts = train(2, data, tmp_path / "parts", micro_batch=1, **settings)
    assert distance(parts, whole) < 1e-6
    given = train(2, data, tmp_path / "given", steps=2, lr=1e-4)
    assert distance(given, whole) > 1e-6


def test_resume_is_exact(data, tmp_path):
    settings = {"steps": 3, "save_every": 1, "on_policy": 0.5}
    straight = train(2, data, tmp_path / "a", **settings)
    shutil.copytree(tmp_path / "a" / "step-2", tmp_path / "b" / "step-2")
    resumed = train(2, data, tmp_path / "b", **settings)
    assert equal(resumed, straight)


def test_show_prints_own_words_and_what_the_teacher_thinks_of_them(data, capsys):
    line = ["--init", TINY, "--data", data, "--show", "1", "--on_policy", "1"]
    stage2_kl_align.main(line)
    said = capsys.readouterr().out
    tokens = []
    for line in said.splitlines():
        cells = [cell.strip() for cell in line.split(" | ")]
        if len(cells) == 4 and cells[0][0].isdigit():
            token = re.fullmatch(r"\d+ +\d+ +(\'.*\') +\d\.\d\d", cells[0])[1]
            tokens.append(token)
            # The student is greedy, so each token is its own first choice.
            assert cells[2].startswith(f"{token} "), line
    mean = re.search(r"mean of (\d+) tokens: kl_ts (\S+) kl_st (\S+) ce (\S+) -> loss (\S+)",
                     said)
    assert len(tokens) == int(mean[1]) > 5
    assert tokens[-1] == "'<|im_end|>'"
    assert float(mean[4]) == 0
    half_of_both = 0.25 * (float(mean[2]) + float(mean[3]))
    assert float(mean[5]) == pytest.approx(half_of_both, abs=1e-4)


def test_two_forms_with_two_answers_are_no_pair(vlm_and_tokenizer, tmp_path):
    vlm, tokenizer = vlm_and_tokenizer
    save_picture(tmp_path / "p.png")
    other = pair(output_2="90-30=60. †Answer: 61°")  # as many tokens
    strong, weak = batch_of(vlm, tokenizer, [other], tmp_path, forms=("", "_2"))
    with pytest.raises(AssertionError, match="two answers"):
        stage2_kl_align.pair_of_rows(vlm, vlm, strong, weak)
