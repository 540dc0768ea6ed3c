"""The three loops: same text, same result for any number of processes and workers, exact resume."""
import difflib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from filelock import FileLock

import data_gen
import eval as evaluation
import model
import stage1_text_sft
import stage2_kl_align
import stage3_mm_instruct
from helpers import (LONG, ROOT, STAGES, TINY, batch_of, cross_entropy, distance, equal, flags,
                     labels_of, metrics, pair, row, save_picture, takes_ctrl_c, train, weights,
                     write_rows)


def source(stage):
    with open(STAGES[stage].__file__, encoding="utf-8") as f:
        return f.read()


# --------------------------------------------------------------------------------------------------
# The text

def test_blocks_marked_identical_are_identical():
    block = re.compile(r"# >>> identical in stage1/2/3: .*?\n# <<<\n", re.S)
    one = block.findall(source(1))
    assert len(one) == 5
    assert one == block.findall(source(2))
    assert one == block.findall(source(3))


def test_stage3_is_stage1_with_a_small_diff():
    one = source(1).splitlines()
    three = source(3).splitlines()
    difference = difflib.ndiff(one, three)
    added = [line for line in difference if line.startswith("+ ")]
    assert 0 < len(added) <= 40


# --------------------------------------------------------------------------------------------------
# Flags

@pytest.mark.parametrize("wrong", [
    "--clip -1", "--warmup 5", "--warmup nan", "--lr -1", "--lr inf", "--seed -1", "--steps -1",
    "--batch 0", "--micro_batch 0", "--max_length 0", "--save_every 0", "--workers -1",
    "--weight_decay -0.1", "--alpha 2", "--alpha -0.1", "--lam 1.5", "--tau -1", "--show -1",
    "--on_policy 1.1", "--on_policy_tokens 0"])
def test_a_value_that_cannot_be_meant_is_refused_before_anything_runs(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit):
        stage2_kl_align.main([*wrong.split(), "--data", str(tmp_path / "new")])
    assert wrong.split()[0] in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_temperature_of_0_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(SystemExit, match="--tau must be above 0"):
        stage2_kl_align.main(["--tau", "0", "--data", str(tmp_path / "new")])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("wrong", [
    "--llm a", "--vision a", "--llm a --vision b --init c", "--projector gated"])
def test_a_flag_that_would_be_ignored_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        stage2_kl_align.parse_args(wrong.split())
    assert "--llm and --vision" in capsys.readouterr().err


def test_the_first_line_says_what_is_not_the_default(capsys):
    stage1_text_sft.parse_args(["--lr", "0.5", "--batch", "32"])
    assert capsys.readouterr().out == "stage1_text_sft.py lr=0.5*\n"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_help_shows_the_defaults(stage, capsys):
    with pytest.raises(SystemExit):
        STAGES[stage].main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.001)" in said or "(default: 0.0003)" in said
    assert f"(default: out/stage{stage})" in said


# --------------------------------------------------------------------------------------------------
# What learns, and how the loss is averaged

@pytest.mark.parametrize("stage", [1, 2, 3])
def test_only_what_should_learn_learns(stage, data, tmp_path):
    before = weights(TINY)
    after = train(stage, data, tmp_path / "out")
    for name, tensor in after.items():
        learns = name.split(".")[0] in STAGES[stage].TRAINABLE
        assert torch.equal(tensor, before[name]) == (not learns), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulation_does_not_change_the_result(stage, data, tmp_path):
    whole = train(stage, data, tmp_path / "whole", micro_batch=4, lr=1e-4)
    parts = train(stage, data, tmp_path / "parts", micro_batch=1, lr=1e-4)
    assert distance(parts, whole) < 1e-6


def test_the_logged_loss_is_one_mean_over_all_answer_tokens(data, tmp_path):
    train(1, data, tmp_path / "out", steps=1, batch=8, micro_batch=2)
    [logged] = metrics(tmp_path / "out")
    vlm, tokenizer = model.load_vlm(TINY)
    rows = model.JsonLines([os.path.join(data, "stage1.jsonl")])
    args = stage1_text_sft.make_parser().parse_args(["--batch", "8", "--micro_batch", "8"])
    [micro_batch] = stage1_text_sft.rows_of_step(0, rows, args, 0, 1)
    [batch] = batch_of(vlm, tokenizer, micro_batch)
    assert logged["loss"] == pytest.approx(cross_entropy(vlm, batch), rel=1e-5)


def test_cross_entropy_only_is_lambda_zero(data, tmp_path):
    train(2, data, tmp_path / "out", steps=1, lam=0.0)
    [numbers] = metrics(tmp_path / "out")
    assert numbers["loss"] == pytest.approx(numbers["ce"], rel=1e-5)
    assert numbers["kl_ts"] > 0


def test_nan_stops_before_the_step_and_saves_nothing(data, tmp_path):
    vlm, tokenizer = model.load_vlm(TINY)
    vlm.projector.up.bias.data[0] = float("nan")
    model.save_vlm(str(tmp_path / "bad"), vlm, tokenizer)
    said = "step 1: loss nan.*lower --lr; or delete the newest step-N"
    with pytest.raises(SystemExit, match=said):
        train(2, data, tmp_path / "out", init=str(tmp_path / "bad"))
    assert model.newest_checkpoint(str(tmp_path / "out")) is None


def test_zero_steps_and_zero_learning_rate(data, tmp_path):
    before = weights(TINY)
    after_none = train(2, data, tmp_path / "no_step", steps=0)
    assert equal(after_none, before)
    at_rate_zero = train(2, data, tmp_path / "no_rate", steps=1, lr=0.0)
    assert equal(at_rate_zero, before)


# --------------------------------------------------------------------------------------------------
# The rows of a step

def test_micro_batches_share_a_batch_out_and_hold_alike_lengths(data):
    rows = model.JsonLines([os.path.join(data, "stage3.jsonl")])
    args = stage3_mm_instruct.make_parser().parse_args(["--batch", "21", "--micro_batch", "4"])
    shares = []
    for rank in (0, 1):
        shares.append(stage3_mm_instruct.rows_of_step(1, rows, args, rank, 2))
    sizes = [[len(part) for part in share] for share in shares]
    assert sizes == [[4, 4, 3], [4, 4, 2]]

    def length(one):
        n_letters = len(one["instruction"]) + len(one["output"])
        return one["image_url"] != "", n_letters

    everything = []
    for share in shares:
        mine = sum(share, [])
        lengths = [length(one) for one in mine]
        assert lengths == sorted(lengths)
        everything += mine
    order = stage3_mm_instruct.shuffled(48, 3407, 0)
    wanted = [rows[int(order[k])] | {"position": k} for k in range(21, 42)]
    assert sorted(map(json.dumps, everything)) == sorted(map(json.dumps, wanted))


def test_a_batch_reaches_into_the_next_epoch(data):
    rows = model.JsonLines([os.path.join(data, "stage1.jsonl")])  # 24 of them
    args = stage1_text_sft.make_parser().parse_args(["--batch", "10", "--micro_batch", "10"])
    seen = []
    for step in range(12):  # five epochs
        [batch] = stage1_text_sft.rows_of_step(step, rows, args, 0, 1)
        seen += [one["id"] for one in batch]
    counts = {name: seen.count(name) for name in seen}
    assert set(counts.values()) == {5} and len(counts) == 24
    assert seen[:20] != seen[24:44]  # another order


# --------------------------------------------------------------------------------------------------
# Batches made by workers

def step_batches(rows, *line):
    """StepBatches of stage 1 over the rows of a file, one row a step."""
    vlm, tokenizer = model.load_vlm(TINY)
    args = stage1_text_sft.make_parser().parse_args(["--batch", "1", *line])
    return stage1_text_sft.StepBatches(rows, tokenizer, vlm.config, args, rank=0, world=1)


def test_any_number_of_workers_makes_the_same_batches(tmp_path):
    """2,000 rows of different length in random order: where workers share a file, some go wrong."""
    rows = []
    for k in range(2000):
        longer = "+1" * (k % 40)
        rows.append(row(f"{k}{longer}", f"{k}"))
    lines = model.JsonLines([write_rows(tmp_path / "d.jsonl", rows)])
    seen = {}
    for workers in (0, 1, 2, 4):
        dataset = step_batches(lines, "--steps", "2000", "--workers", str(workers))
        labels = []
        for step, item in stage1_text_sft.batches_of_steps(dataset, 0):
            [[batch]], n_answer_tokens, n_dropped = item
            assert n_answer_tokens == len(labels_of(batch)) and n_dropped == 0
            ids = batch.input_ids.tolist()
            labels.append((step, ids, batch.labels.tolist()))
        seen[workers] = labels
    assert len(seen[0]) == 2000
    assert seen[0] == seen[1] == seen[2] == seen[4]


def test_what_a_worker_gets_can_be_sent_to_it(data):
    """spawn, as on macOS and Windows, sends it through pickle: no open file, no model."""
    dataset = step_batches(model.JsonLines([os.path.join(data, "stage1.jsonl")]))
    content = pickle.dumps(dataset)
    assert len(content) < 1e6
    again = pickle.loads(content)
    [[batch]] = dataset[3][0]
    [[same]] = again[3][0]
    assert torch.equal(batch.input_ids, same.input_ids)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_broke_after_the_start_ends_the_run_in_one_line(tmp_path, workers):
    save_picture(tmp_path / "p.png")
    path = write_rows(tmp_path / "d.jsonl", [row(), row(image_url="p.png")])
    lines = model.JsonLines([path])
    (tmp_path / "p.png").write_bytes(b"no picture")
    dataset = step_batches(lines, "--steps", "2", "--workers", str(workers))

    @model.says_it_in_one_line
    def read_all(argv):
        list(stage1_text_sft.batches_of_steps(dataset, 0))

    with pytest.raises(SystemExit) as stopped:
        read_all()
    assert re.fullmatch(r"(model\.BadFile: )?/\S+d\.jsonl:2: picture \S+p\.png cannot be read: .*"
                        r" \(when that is mended, the same command goes on\)", stopped.value.code)


def test_resuming_with_other_workers_is_exact(data, tmp_path):
    straight = train(3, data, tmp_path / "a", steps=4, save_every=2)
    shutil.copytree(tmp_path / "a" / "step-2", tmp_path / "b" / "step-2")
    resumed = train(3, data, tmp_path / "b", steps=4, save_every=2, workers=2)
    assert equal(resumed, straight)


# --------------------------------------------------------------------------------------------------
# Checkpoints

@pytest.mark.parametrize("stage", [1, 2])
def test_resume_is_exact(stage, data, tmp_path):
    straight = train(stage, data, tmp_path / "a", steps=4, save_every=2)
    shutil.copytree(tmp_path / "a" / "step-2", tmp_path / "b" / "step-2")
    resumed = train(stage, data, tmp_path / "b", steps=4, save_every=2)
    assert equal(resumed, straight)

    states = []
    for run in ("a", "b"):
        path = tmp_path / run / "step-4" / "optimizer.safetensors"
        states.append(model.load_file(path))
    assert equal(states[0], states[1])
    assert [numbers["step"] for numbers in metrics(tmp_path / "b")] == [4]


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage(path, how):
    if how == "flipped":
        flip_last_byte(path)
    elif how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "emptied":
        os.truncate(path, 0)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied", "removed"])
@pytest.mark.parametrize("name", [
    "llm/model.safetensors", "vision/model.safetensors", "projector.safetensors", "hashes.json",
    "optimizer.safetensors", "trainer_state.json", "tokenizer.json", "vlm.json"])
def test_a_damaged_checkpoint_is_none(name, how, data, tmp_path_factory, tmp_path, capsys):
    whole = trained_once(data, tmp_path_factory)
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run" / "step-2" / name, how)
    assert model.newest_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / "step-1")
    assert "step-2 is damaged" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="is damaged|holds no model"):  # also when it is named
        model.load_vlm(str(tmp_path / "run" / "step-2"))


RUNS = {}  # the run below, made once


def trained_once(data, tmp_path_factory):
    if "run" not in RUNS:
        RUNS["run"] = tmp_path_factory.mktemp("once") / "run"
        train(1, data, RUNS["run"], steps=2, save_every=1)
    return RUNS["run"]


def test_files_that_others_put_into_a_checkpoint_do_not_damage_it(data, tmp_path):
    """eval.py writes its replies there."""
    train(1, data, tmp_path / "a", steps=1)
    checkpoint = str(tmp_path / "a" / "step-1")
    (tmp_path / "a" / "step-1" / "eval.json").write_text("{}")
    assert model.newest_checkpoint(str(tmp_path / "a")) == checkpoint
    model.load_vlm(checkpoint)
    (tmp_path / "a" / "step-1" / "hashes.json").write_text("{}")
    assert model.newest_checkpoint(str(tmp_path / "a")) is None


def test_a_new_checkpoint_outlives_damaged_ones_with_higher_numbers(data, tmp_path):
    train(1, data, tmp_path / "a", steps=4, save_every=1)
    for step in ("step-3", "step-4"):
        flip_last_byte(tmp_path / "a" / step / "llm" / "model.safetensors")
    train(1, data, tmp_path / "a", steps=4, save_every=1)
    assert model.steps_in(str(tmp_path / "a")) == [4, 3]
    assert model.is_finished(str(tmp_path / "a"))


def test_a_run_goes_on_from_the_last_undamaged_checkpoint(data, tmp_path):
    straight = train(1, data, tmp_path / "a", steps=4, save_every=2)
    flip_last_byte(tmp_path / "a" / "step-4" / "llm" / "model.safetensors")
    again = train(1, data, tmp_path / "a", steps=4, save_every=2)
    assert equal(again, straight)


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(data, tmp_path, monkeypatch):
    train(1, data, tmp_path / "a", steps=1)
    path = tmp_path / "a" / "step-1" / "llm" / "model.safetensors"
    stamp = path.stat().st_mtime_ns
    train(1, data, tmp_path / "a", steps=1, micro_batch=4, workers=1)  # these decide nothing
    assert path.stat().st_mtime_ns == stamp

    # Before weights are loaded: those of another model would not fit, which tells a user nothing.
    monkeypatch.setattr(stage1_text_sft, "start_vlm", lambda *_: pytest.fail("loaded first"))
    with pytest.raises(SystemExit, match=r"another run \(--lr was 0.001\): give stage1_text"):
        train(1, data, tmp_path / "a", steps=1, lr=0.5)


def test_other_rows_and_other_weights_are_refused(data, tmp_path):
    path = tmp_path / "d.jsonl"
    write_rows(path, [row(), row("1+1=", "2")])
    vlm, tokenizer = model.load_vlm(TINY)
    model.save_vlm(str(tmp_path / "start"), vlm, tokenizer)
    start = str(tmp_path / "start")
    train(1, path, tmp_path / "a", steps=1, init=start)

    write_rows(path, [row(), row("1+1=", "3")])
    with pytest.raises(SystemExit, match=r"another run \(other rows\)"):
        train(1, path, tmp_path / "a", steps=1, init=start)
    write_rows(path, [row(), row("1+1=", "2")])
    vlm.projector.up.bias.data[0] += 1
    model.save_vlm(start, vlm, tokenizer)
    with pytest.raises(SystemExit, match=r"another run \(other weights\)"):
        train(1, path, tmp_path / "a", steps=1, init=start)


def test_an_edited_script_does_not_go_on(data, tmp_path, monkeypatch):
    """Or a fork's numbers would be those of the run before it."""
    train(1, data, tmp_path / "a", steps=1)
    (tmp_path / "fork.py").write_text(source(1) + "# ten lines changed\n", encoding="utf-8")
    monkeypatch.setattr(stage1_text_sft, "__file__", str(tmp_path / "fork.py"))
    with pytest.raises(SystemExit, match=r"other fork.py\): .*another --out"):
        train(1, data, tmp_path / "a", steps=1)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_edited_model_py_does_not_go_on(stage, data, tmp_path, monkeypatch):
    train(stage, data, tmp_path / "a", steps=1)
    with open(model.__file__, encoding="utf-8") as f:
        text = f.read()
    (tmp_path / "model.py").write_text(text + "# another projector\n", encoding="utf-8")
    monkeypatch.setattr(model, "__file__", str(tmp_path / "model.py"))
    with pytest.raises(SystemExit, match=r"from another run \(other model.py\)"):
        train(stage, data, tmp_path / "a", steps=1)


def test_no_resume_deletes_what_a_run_wrote_and_nothing_else(data, tmp_path):
    out = tmp_path / "out"
    train(1, data, out, steps=2, save_every=1)
    (out / "notes.txt").write_text("mine")
    (out / "step-by-step").mkdir()
    (out / "part-7").mkdir()
    stage1_text_sft.main([*flags(1, data, out, steps=1), "--no-resume"])
    assert sorted(os.listdir(out)) == [
        "lock", "loss.png", "metrics.jsonl", "notes.txt", "step-1", "step-by-step"]
    assert len(metrics(out)) == 1


@pytest.mark.parametrize("out", ["parent", "", "parent/step-1"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_out_that_holds_the_parent_is_refused(stage, out, data, tmp_path):
    """--no-resume would delete it, and so would the third checkpoint."""
    parent = tmp_path / "parent"
    train(1, data, parent, steps=1)
    before = sorted(os.listdir(parent))
    line = flags(stage, data, str(tmp_path / out), init=str(parent))
    with pytest.raises(SystemExit, match=r"--out .* holds the model to start from, .*name another"):
        STAGES[stage].main([*line, "--no-resume"])
    assert sorted(os.listdir(parent)) == before
    model.load_vlm(str(parent / "step-1"))


class Impatient(FileLock):
    def acquire(self, timeout):
        return super().acquire(timeout=timeout / 100)


HOLD = """
import sys, time
import filelock
held = filelock.FileLock(sys.argv[1])
held.acquire()
print("held", flush=True)
time.sleep(99)
"""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_writers_do_not_share_a_folder(stage, data, tmp_path, monkeypatch):
    """The second is refused before it deletes anything; a kill -9 frees the folder."""
    out = tmp_path / "out"
    train(1, data, tmp_path / "copy", steps=1)
    shutil.copytree(tmp_path / "copy" / "step-1", out / "step-1")
    command = [sys.executable, "-c", HOLD, str(out / "lock")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    other.stdout.readline()
    monkeypatch.setattr(model, "FileLock", Impatient)
    with pytest.raises(SystemExit, match=r"--out \S+out: another process writes there; wait"):
        STAGES[stage].main([*flags(stage, data, str(out)), "--no-resume"])
    assert model.steps_in(str(out)) == [1]

    other.kill()
    other.wait()
    STAGES[stage].main([*flags(stage, data, str(out)), "--no-resume"])
    assert model.steps_in(str(out)) == [3]


def test_a_run_holds_its_folder_after_its_workers_have_ended(data, tmp_path):
    out = tmp_path / "out"
    train(1, data, out, workers=2)
    with pytest.raises(TimeoutError):
        FileLock(str(out / "lock")).acquire(timeout=0)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_fails_at_the_first_save_fails_before_the_first_step(
        stage, data, tmp_path, monkeypatch):
    """A tokenizer or settings that cannot be written, a disk without room for a checkpoint."""
    def broken(*_, **__):
        raise OSError("cannot be written")

    learn = {1: 1_053_312, 2: 727_296 + 33_024, 3: 727_296 + 33_024 + 1_053_312}[stage]
    for place in ("PreTrainedTokenizerFast.save_pretrained", "AutoModelForCausalLM", "disk"):
        with monkeypatch.context() as patch:
            message = "cannot be written"
            if place == "AutoModelForCausalLM":
                vlm, _ = model.load_vlm(TINY)
                patch.setattr(type(vlm.language_model), "save_pretrained", broken)
            elif place == "disk":
                usage = shutil._ntuple_diskusage(10 ** 9, 10 ** 9, 12 * learn - 1)
                patch.setattr(shutil, "disk_usage", lambda out: usage)
                message = f"a checkpoint takes {12 * learn:,} bytes; make room"
            else:
                patch.setattr(f"transformers.{place}", broken)
            with pytest.raises(SystemExit, match=message):
                train(stage, data, tmp_path / "out", steps=1)
        assert os.listdir(tmp_path / "out") == ["lock"]  # no step was logged
    train(stage, data, tmp_path / "out", steps=1)


def test_files_of_a_checkpoint_can_be_read_by_whom_the_umask_lets(data, tmp_path):
    before = os.umask(0o022)
    train(1, data, tmp_path / "out", steps=1)
    os.umask(before)
    modes = {}
    for path in (tmp_path / "out" / "step-1").rglob("*.*"):
        modes[path.name] = oct(path.stat().st_mode & 0o777)
    assert len(modes) > 10 and set(modes.values()) == {"0o644"}


def test_the_newest_two_checkpoints_are_kept(data, tmp_path):
    train(1, data, tmp_path / "a", steps=4, save_every=1)
    assert model.steps_in(str(tmp_path / "a")) == [4, 3]


def test_a_run_that_was_stopped_is_no_parent_yet(data, tmp_path, capsys):
    train(1, data, tmp_path / "a", steps=2, save_every=1)
    assert model.is_finished(str(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a" / "step-2")
    assert not model.is_finished(str(tmp_path / "a"))
    assert "a is missing or unfinished" in capsys.readouterr().out
    assert not model.is_finished(str(tmp_path / "nothing"))


def test_an_unfinished_parent_is_named(data, tmp_path, capsys):
    """Given by --init, or evaluated: the first line says how far it came."""
    train(1, data, tmp_path / "a", steps=2, save_every=1)
    train(2, data, tmp_path / "b", steps=0, init=str(tmp_path / "a"))
    assert ", unfinished" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "a" / "step-2")
    train(2, data, tmp_path / "c", steps=0, init=str(tmp_path / "a"))
    assert "a/step-1: step 1 of 2, unfinished" in capsys.readouterr().out
    evaluation.main([str(tmp_path / "a"), "--ask", "7*8=", "--max_new_tokens", "1"])
    assert "a/step-1: step 1 of 2, unfinished" in capsys.readouterr().out


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_dropout_of_a_config_is_not_active(stage, data, tmp_path):
    shutil.copytree(TINY, tmp_path / "m")
    for part in ("llm", "vision"):
        config = model.read_json(tmp_path / "m" / part / "config.json")
        config["attention_dropout"] = 0.5
        model.write_json(config, tmp_path / "m" / part / "config.json")
    dropped = train(stage, data, tmp_path / "a", init=str(tmp_path / "m"))
    assert equal(dropped, train(stage, data, tmp_path / "b"))


# --------------------------------------------------------------------------------------------------
# What a user is told, in one line, and what to type

def test_a_folder_that_is_not_of_data_gen(tmp_path):
    """It is neither "missing" nor to be deleted."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"mine/stage1.jsonl is no .jsonl file; give one folder of "
                                         r"data_gen.py or .jsonl files"):
        train(1, tmp_path / "mine", tmp_path / "out")
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]


def test_a_parent_of_another_run_says_whose_flags_it_wants(data, tmp_path, monkeypatch):
    """Stage 2 goes on with a stopped out/stage1; its user typed no flag of stage 1."""
    monkeypatch.chdir(tmp_path)
    train(1, data, "out/stage1", steps=2, save_every=1)
    shutil.rmtree("out/stage1/step-2")
    line = ["--data", data, "--no-evaluate"]
    with pytest.raises(SystemExit, match=r"out/stage1/step-1 is from another run .*--steps was 2.*"
                                         r"give stage1_text_sft.py its flags, .* --no-resume"):
        stage2_kl_align.main(line)


def test_from_another_folder_tiny_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = stage1_text_sft.parse_args([])
    assert os.path.samefile(args.init, TINY)
    monkeypatch.chdir(ROOT)
    assert stage1_text_sft.parse_args([]).init == "tiny"


@pytest.mark.parametrize("out", ["file", "file/out", "/proc/out"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_out_that_cannot_be_written_is_one_line_before_the_model_is_loaded(
        stage, out, data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(STAGES[stage], "start_vlm", lambda *_: pytest.fail("loaded first"))
    path = out if out.startswith("/") else str(tmp_path / out)
    with pytest.raises(SystemExit) as stopped:
        train(stage, data, path)
    said = stopped.value.code
    assert path in said and said.endswith("the same command goes on)") and "\n" not in said


FULL = """
import resource, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import torch
import stage1_text_sft
torch.set_num_threads(1)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
stage1_text_sft.main()
"""


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(data, tmp_path):
    """No file may be larger than 3 MB: the weights of the second save do not fit."""
    straight = train(1, data, tmp_path / "a", save_every=1)
    train(1, data, tmp_path / "start", steps=3, save_every=1)
    shutil.copytree(tmp_path / "start" / "step-2", tmp_path / "b" / "step-2")
    command = [sys.executable, "-c", FULL, ROOT, "3000000"]
    command += flags(1, data, str(tmp_path / "b"), save_every=1)
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().split("\n")[-1]
    assert re.fullmatch(r"\S+part-3: .*File too large.*; free space, then the same command goes on",
                        last)
    assert "Traceback" not in done.stderr
    assert model.steps_in(str(tmp_path / "b")) == [2]
    assert equal(train(1, data, tmp_path / "b", save_every=1), straight)


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for module in STAGES.values():
        with pytest.raises(SystemExit, match="more processes than GPUs: lower --nproc_per_node"):
            module.setup_distributed()


def test_ctrl_c_is_one_line(data, tmp_path):
    command = [sys.executable, os.path.join(ROOT, "stage1_text_sft.py")]
    command += flags(1, data, str(tmp_path / "out"), steps=10 ** 6)
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           preexec_fn=takes_ctrl_c)
    for line in run.stdout:
        if line.startswith("step 10/"):
            break
    run.send_signal(signal.SIGINT)
    try:
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert said.strip().split("\n")[-1] == "stopped; the same command goes on"
    assert run.returncode == 130 and "Traceback" not in said


@pytest.mark.parametrize("line", ["half a line", '{"step": 4, "lo', "[]", "\x00\x00"])
def test_a_bad_line_in_the_log_is_passed_over(line, data, tmp_path):
    out = tmp_path / "out"
    train(1, data, out, steps=2, save_every=1)
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(line + "\n")
    (out / "loss.png").unlink()
    train(1, data, out, steps=2, save_every=1)
    assert (out / "loss.png").exists()


# --------------------------------------------------------------------------------------------------
# Rows that are too long

def test_a_row_that_does_not_fit_is_dropped_and_counted(tmp_path, capsys):
    """Loss and weights are those of the batch without it, whoever shares a micro-batch with it."""
    save_picture(tmp_path / "p.png")
    rows = [
        row(),
        row(LONG, image_url="p.png"),
        row("7*8=", "56", image_url="p.png"),
        row(output="12 " * 90),
    ]
    path = write_rows(tmp_path / "d.jsonl", rows)
    short = {"batch": 4, "max_length": 150, "lr": 1e-4, "steps": 1}
    whole = train(3, path, tmp_path / "whole", micro_batch=4, **short)
    parts = train(3, path, tmp_path / "parts", micro_batch=1, **short)
    assert distance(parts, whole) < 1e-6
    [numbers] = metrics(tmp_path / "whole")
    assert numbers["dropped"] == 0.5
    assert "50.0% too long" in "".join(capsys.readouterr())

    vlm, tokenizer = model.load_vlm(TINY)
    fitting = [rows[0], rows[2]]
    [batch] = batch_of(vlm, tokenizer, fitting, tmp_path)
    assert numbers["loss"] == pytest.approx(cross_entropy(vlm, batch), rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_batch_of_which_nothing_fits_changes_nothing(stage, tmp_path):
    save_picture(tmp_path / "p.png")
    rows = [pair(instruction=LONG, instruction_2=LONG), pair(instruction=LONG)]
    path = write_rows(tmp_path / "d.jsonl", rows)
    short = {"batch": 2, "steps": 1, "max_length": 130, "weight_decay": 0}
    after = train(stage, path, tmp_path / "out", **short)
    [numbers] = metrics(tmp_path / "out")
    assert numbers["dropped"] == 1 and numbers["loss"] == 0
    assert equal(after, weights(TINY))


def test_of_a_pair_either_form_is_enough_to_drop_both(tmp_path):
    save_picture(tmp_path / "p.png")
    vlm, tokenizer = model.load_vlm(TINY)
    rows = [pair(), pair(instruction=LONG), pair(instruction_2=LONG)]
    forms = ("", "_2")
    strong, weak = batch_of(vlm, tokenizer, rows, tmp_path, forms, max_length=150)
    first_strong, first_weak = batch_of(vlm, tokenizer, rows[:1], tmp_path, forms)
    assert torch.equal(labels_of(strong), labels_of(first_strong))
    assert torch.equal(labels_of(weak), labels_of(first_weak))
    assert len(weak.pixel_values) == 1


# --------------------------------------------------------------------------------------------------
# What a run says and makes

def test_caption_loss_is_small_for_a_model_that_reads_and_large_for_other_pictures(data, tmp_path):
    """The number by which stage 1 shows that it unlearnt to look."""
    vlm, tokenizer = model.load_vlm(TINY)
    assert evaluation.caption_loss(vlm, tokenizer, data, "cpu") < 0.5
    shutil.copytree(data, tmp_path / "d")
    for path in (tmp_path / "d" / "images").glob("test-*-labelled.png"):
        without_numbers = str(path).replace("labelled", "figure")
        shutil.copy(without_numbers, path)
    assert evaluation.caption_loss(vlm, tokenizer, str(tmp_path / "d"), "cpu") > 1


def test_pairs_must_share_their_answer(data, tmp_path):
    shutil.copytree(data, tmp_path / "d")
    path = tmp_path / "d" / "stage2_top.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[2] = json.loads(lines[2]) | {"output_2": "7"}
    write_rows(path, lines)
    with pytest.raises(SystemExit, match="stage2_top.jsonl:3: the answers of a pair differ"):
        train(2, tmp_path / "d", tmp_path / "out")


@pytest.mark.parametrize("kernel", [
    "eager",
    pytest.param("triton", marks=pytest.mark.skipif(
        stage2_kl_align.triton is None, reason="Triton is not installed"))])
def test_show_adds_up_to_what_training_logs(kernel, data, tmp_path, capsys):
    """Batch of one: the table's last line is the first logged loss, kernel and all."""
    args = stage2_kl_align.make_parser().parse_args(["--batch", "1"])
    rows = model.JsonLines([os.path.join(data, "stage2_top.jsonl")])
    [[first]] = stage2_kl_align.rows_of_step(0, rows, args, 0, 1)
    number = [one["where"] for one in rows].index(first["where"])
    line = ["--init", TINY, "--data", data, "--kernel", kernel, "--show", str(number)]
    stage2_kl_align.main(line)
    said = capsys.readouterr().out
    shown = re.search(r"kl_ts (\S+) kl_st (\S+) ce (\S+) -> loss (\S+)", said).groups()

    train(2, data, tmp_path / "out", steps=1, batch=1, micro_batch=1)
    [numbers] = metrics(tmp_path / "out")
    logged = [numbers[name] for name in ("kl_ts", "kl_st", "ce", "loss")]
    assert [float(text) for text in shown] == pytest.approx(logged, abs=1e-4)


def test_show_of_a_pair_that_is_not_there(data):
    with pytest.raises(SystemExit, match="--show 72: there are pairs 0 to 71"):
        stage2_kl_align.main(["--init", TINY, "--data", data, "--show", "72"])


def test_missing_prerequisites_are_made_first(tmp_path, monkeypatch, capsys):
    """`stage3` in an empty folder makes data, stages 1 and 2, says so, and ends with a table."""
    monkeypatch.chdir(tmp_path)
    os.symlink(TINY, "tiny")

    def shrink(module):  # the defaults, not the path through the code
        original = module.make_parser

        def shrunk():
            parser = original()
            parser.set_defaults(steps=1, batch=2, micro_batch=2)
            return parser

        monkeypatch.setattr(module, "make_parser", shrunk)

    for module in STAGES.values():
        shrink(module)
    original = data_gen.parse_args
    few = ["--n", "12", "--n_test", "2"]
    monkeypatch.setattr(data_gen, "parse_args", lambda argv: original([*argv, *few]))

    stage3_mm_instruct.main([])
    out = capsys.readouterr().out
    said = ["data/ is missing", "out/stage2 is missing", "out/stage1 is missing", "stage 1 done",
            "stage 2 done", "stage 3 done", "relative gap"]
    places = [out.index(words) for words in said]
    assert places == sorted(places)
    assert os.path.exists("out/accuracy.png")
    with open("out/stage3/eval.json", encoding="utf-8") as f:
        assert json.load(f).keys() == {
            "versions", "all", "gap", "relative_gap", "groups", "unparsed", "missing"}


def test_own_files_train_every_stage_and_end_without_a_table_but_with_a_loss_curve(
        tmp_path, capsys):
    save_picture(tmp_path / "p.png")
    single = write_rows(tmp_path / "single.jsonl", [row(), row(image_url="p.png")])
    pairs = write_rows(tmp_path / "pairs.jsonl", [pair(), pair()])
    train(1, single, tmp_path / "one", batch=2, steps=1)
    short = ["--batch", "2", "--steps", "1"]
    one = str(tmp_path / "one")
    two = str(tmp_path / "two")
    three = str(tmp_path / "three")
    STAGES[2].main([*short, "--init", one, "--data", pairs, "--out", two])
    STAGES[3].main([*short, "--init", two, "--data", single, single, "--out", three])
    said = capsys.readouterr().out
    assert "stage 3 done" in said
    assert "accuracy" not in said and "caption loss" not in said
    for out in (one, two, three):
        assert os.path.exists(os.path.join(out, "loss.png"))
