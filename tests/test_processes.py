"""Several processes, float32, gloo, one torchrun a world size: DDP and --shard equal one."""
import os
import re
import shutil

import pytest
import torch

import eval as evaluation
import model
import stage1_text_sft
from helpers import (LONG, STAGES, TINY, distance, equal, flags, metrics, row, save_picture, train,
                     train_with_processes, weights, write_rows)

TWO_ROWS_EACH = {"batch": 4, "micro_batch": 1, "steps": 2, "clip": 0.5, "lr": 1e-4}
FOUR_ROWS_EACH = TWO_ROWS_EACH | {"batch": 8, "micro_batch": 2, "save_every": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(data, folder):
    """name: (stage, data, flags). Text-only and picture rows fall on different processes.

    The last has one row for each process, and one of the two is too long: nobody waits for ever.
    """
    save_picture(folder / "p.png")
    too_long = row(LONG, image_url="p.png")
    short = write_rows(folder / "d.jsonl", [row(), too_long])
    return {
        "ddp1": (1, data, TWO_ROWS_EACH),
        "ddp2": (2, data, TWO_ROWS_EACH | {"workers": 2}),
        "ddp3": (3, data, TWO_ROWS_EACH),
        "own_words": (2, data, TWO_ROWS_EACH | {"on_policy": 0.75, "recompute": True}),
        "shard1": (1, data, FOUR_ROWS_EACH | {"shard": True}),
        "shard3": (3, data, FOUR_ROWS_EACH | {"shard": True}),
        "too_long": (3, short, {"batch": 2, "steps": 1, "max_length": 130, "lr": 1e-4}),
    }


DIFFERENCES = {
    "lr": {"lr": 0.5},
    "batch": {"batch": 8},
    "steps": {"steps": 3},
    "out": {"out": "elsewhere"},
    "init": {"init": "elsewhere"},
    "rows": None,
    "folder": {"data": "elsewhere"},
}


def line_of(run, out, **changes):
    stage, files, flags_of_run = run
    return stage, flags(stage, files, str(out), **(flags_of_run | changes))


@pytest.fixture(scope="module")
def ones(runs, folder):
    """name: weights after the same run in one process, all rows of a step in one micro-batch."""
    result = {}
    for name, (stage, files, changes) in runs.items():
        changes = changes | {"micro_batch": 8, "shard": None}
        result[name] = train(stage, files, str(folder / f"one_{name}"), **changes)
    return result


@pytest.fixture(scope="module")
def said_by_two(runs, ones, folder):
    together = []
    for name, run in runs.items():
        together.append(line_of(run, folder / f"two_{name}"))

    # Sharded runs that go on: one from its own first step, one from that of a single process.
    sharded = runs["shard3"]
    for name, start in {"resumed": "two_shard3", "from_one": "one_shard3"}.items():
        together.append(("copy", [str(folder / start / "step-1"), str(folder / name / "step-1")]))
        together.append(line_of(sharded, folder / name))
    together.append(line_of(sharded, folder / "recompute", recompute=True))
    together.append(line_of(sharded, folder / "no_step", steps=0))

    # The second process is started otherwise.
    other_data = write_rows(folder / "other.jsonl", [row(), row("1+1=", "2")])
    for name in ("ddp1", "ddp2", "ddp3"):
        line = line_of(runs[name], folder / "differ")
        for change in DIFFERENCES:
            changes = {"data": other_data} if change == "rows" else DIFFERENCES[change]
            stage, files, changes_of_run = runs[name]
            changes = {"out": str(folder / "differ")} | changes_of_run | changes
            files = changes.pop("data", files)
            out = changes.pop("out")
            other = stage, flags(stage, files, out, **changes)
            together.append(("differ", [line, other]))

    # The last one ends with a table, made by rank 0 alone: the other must not wait for it, nor it
    # for the other.
    stage, line = line_of(runs["ddp2"], folder / "table", steps=1)
    line.remove("--no-evaluate")
    together.append((stage, line))
    return train_with_processes(2, together, folder)


@pytest.fixture(scope="module")
def said_by_four(runs, folder):
    together = []
    for name in ("shard1", "shard3"):
        together.append(line_of(runs[name], folder / f"four_{name}"))
    return train_with_processes(4, together, folder)


def test_processes_that_were_started_otherwise_all_stop(said_by_two, folder):
    """Not a hang, and no run of which nobody knows what it learnt."""
    stopped = re.findall(r"STOPPED (\d): (.*)", said_by_two)
    said = "the processes differ in flags or data: start all of them with the same"
    expected = 3 * len(DIFFERENCES)
    assert stopped.count(("0", said)) == expected
    assert len(stopped) == 2 * expected
    assert not list(folder.glob("differ/*-*"))


RUNS = ["ddp1", "ddp2", "ddp3", "own_words", "shard1", "shard3", "too_long"]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(name, ones, said_by_two, folder):
    two = weights(folder / f"two_{name}")
    assert distance(two, ones[name]) < 1e-6 < 2e-5 < distance(weights(TINY), ones[name])
    by_one = metrics(folder / f"one_{name}")[-1]
    by_two = metrics(folder / f"two_{name}")[-1]
    assert by_one["loss"] == pytest.approx(by_two["loss"], rel=1e-5)
    assert by_one["gnorm"] == pytest.approx(by_two["gnorm"], rel=1e-4)
    assert by_one["dropped"] == by_two["dropped"] == (0.5 if name == "too_long" else 0)


@pytest.mark.parametrize("name", ["shard1", "shard3"])
def test_four_processes_do_what_one_does(name, ones, said_by_four, folder):
    assert distance(weights(folder / f"four_{name}"), ones[name]) < 1e-6


def test_the_table_at_the_end_is_made_once(said_by_two):
    assert said_by_two.count("relative gap") == 1


@pytest.mark.parametrize("world", [2, 4])
def test_a_process_holds_its_part_of_weights_and_moments(world, said_by_two, said_by_four):
    said = said_by_two if world == 2 else said_by_four
    for name, stage, n_layers in (("shard1", 1, 5), ("shard3", 3, 5 + 4)):
        out = {2: "two", 4: "four"}[world] + f"_{name}"
        assert set(re.findall(rf"HOLDS {out} (\d+)", said)) == {str(n_layers + 1)}  # and the rest
        held = [int(n) for n in re.findall(rf"HOLDS {out} \d+ (\d+)", said)]
        assert len(held) == 2 * world  # at two saves
        total = 0
        for parameter, tensor in weights(TINY).items():
            if parameter.split(".")[0] in STAGES[stage].TRAINABLE:
                total += 3 * 4 * tensor.numel()  # weight and two moments, float32
        assert total <= sum(held[:world]) <= 1.001 * total  # and a step count each
        assert max(held) <= total * (1 / world + 0.01)


def test_sharded_resume_is_exact(said_by_two, folder):
    assert equal(weights(folder / "resumed"), weights(folder / "two_shard3"))
    states = []
    for run in ("resumed", "two_shard3"):
        states.append(model.load_file(folder / run / "step-2" / "optimizer.safetensors"))
    assert equal(states[0], states[1])


def test_one_process_and_several_go_on_from_each_other(runs, ones, said_by_two, folder):
    assert distance(weights(folder / "from_one"), ones["shard3"]) < 1e-6
    shutil.copytree(folder / "two_shard3" / "step-1", folder / "from_two" / "step-1")
    _, files, changes = runs["shard3"]
    from_two = train(3, files, folder / "from_two", **(changes | {"shard": None}))
    assert distance(from_two, ones["shard3"]) < 1e-6


def files_and_tensors(checkpoint):
    """{file, or file/tensor: its type and shape}"""
    found = {}
    for path in sorted(checkpoint.rglob("*")):
        name = str(path.relative_to(checkpoint))
        found[name] = None
        if path.suffix == ".safetensors":
            for tensor, value in model.load_file(path).items():
                found[f"{name}/{tensor}"] = (value.dtype, value.shape)
    return found


def test_a_sharded_checkpoint_is_like_any_other(said_by_two, ones, data, folder):
    sharded = files_and_tensors(folder / "two_shard3" / "step-2")
    assert sharded == files_and_tensors(folder / "one_shard3" / "step-2")
    assert len(sharded) > 100
    out = str(folder / "two_shard3")
    evaluation.main([out, "--data", data, "--limit", "1"])
    assert os.path.exists(folder / "two_shard3" / "limit-1" / "eval.json")


def test_no_step_still_makes_a_model(said_by_two, folder):
    assert equal(weights(folder / "no_step"), weights(TINY))


def test_recompute_changes_no_bit(runs, said_by_two, data, folder):
    assert equal(weights(folder / "recompute"), weights(folder / "two_shard3"))
    for stage in (1, 2, 3):
        plain = train(stage, data, folder / f"plain{stage}", steps=1)
        again = train(stage, data, folder / f"again{stage}", steps=1, recompute=True)
        assert equal(again, plain)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_recompute_keeps_nothing_but_a_layer_s_input(stage, data):
    """Counts what autograd keeps for the backward pass of one batch."""
    kept = {}
    for recompute in (False, True):
        line = ["--init", TINY] + ["--recompute"] * recompute
        args = STAGES[stage].make_parser().parse_args(line)
        vlm, tokenizer = model.start_vlm(args, None, "cpu", ("language_model",))
        vlm.vision_model.requires_grad_(False)  # else it sees a blank picture
        vlm.projector.requires_grad_(False)
        rows = model.JsonLines([os.path.join(data, "stage1.jsonl")])
        [batch], _ = model.make_batches(tokenizer, vlm.config, [rows[k] for k in range(4)])
        tensors = {}

        def pack(tensor):
            tensors[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            vlm(batch)
        kept[recompute] = sum(tensors.values())
    assert 8 * kept[True] < kept[False], kept


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_batch_that_cannot_be_shared_out_evenly_is_refused_first(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(
        STAGES[stage], "setup_distributed", lambda: (0, 3, torch.device("cpu")))
    with pytest.raises(SystemExit, match="--batch 4 is no multiple of the 3 processes"):
        STAGES[stage].main(flags(stage, str(tmp_path / "data"), str(tmp_path / "out")))
    assert os.listdir(tmp_path) == []


def test_one_process_ignores_shard(data, tmp_path):
    plain = train(1, data, tmp_path / "plain", steps=1)
    assert equal(train(1, data, tmp_path / "shard", steps=1, shard=True), plain)


def test_others_wait_for_as_long_as_a_save_takes(monkeypatch):
    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        stage1_text_sft.dist, "init_process_group", lambda **given: asked.update(given))
    stage1_text_sft.setup_distributed()
    assert asked["timeout"].total_seconds() >= 3600
