"""The three loops: same text, same result for any number of processes, exact normalisation, exact resume."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data_gen
import model
import stage1_text_sft
import stage2_kl_align
import stage3_mm_instruct

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STAGES = {1: stage1_text_sft, 2: stage2_kl_align, 3: stage3_mm_instruct}
TINY = os.path.join(ROOT, "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("set") / "data")
    data_gen.main(["--out", folder, "--n", "24", "--n_test", "12"])
    return folder


def flags(stage, data, out, **more):
    base = {"init": TINY, "data": data, "out": out, "batch": 4, "micro_batch": 2, "steps": 3, "log_every": 1,
            "lr": 1e-3} | more
    return [f"--{k}={v}" for k, v in base.items()] + (["--no-evaluate"] if stage > 1 else [])


def train(stage, data, out, **more):
    STAGES[stage].main(flags(stage, data, str(out), **more))
    return weights(out)


def weights(out):
    tensors = load_file(os.path.join(model.newest_checkpoint(str(out)), "model.safetensors"))
    return {name: t.clone() for name, t in tensors.items()}  # not memory-mapped: some tests damage the file


def distance(a, b):
    """||a - b|| / ||b|| over all parameters. Not the largest difference: where a gradient is pure rounding
    noise, Adam turns it into a step of up to lr either way."""
    norm = lambda pairs: sum(((x.double() - y) ** 2).sum().item() for x, y in pairs) ** 0.5
    return norm((a[k], b[k].double()) for k in b) / norm((b[k], 0.0) for k in b)


def source(stage):
    with open(STAGES[stage].__file__, encoding="utf-8") as f:
        return f.read()


def test_blocks_marked_identical_are_identical():
    blocks = [re.findall(r"# >>> identical in stage1/2/3: .*?\n# <<<\n", source(k), re.S) for k in (1, 2, 3)]
    assert blocks[0] == blocks[1] == blocks[2] and len(blocks[0]) >= 4


def test_stage3_is_stage1_with_a_small_diff():
    one, three = source(1).splitlines(), source(3).splitlines()
    import difflib
    changed = [line for line in difflib.ndiff(one, three) if line.startswith("+ ")]
    assert 0 < len(changed) <= 40


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_only_what_should_learn_learns(stage, data, tmp_path):
    before, after = load_file(os.path.join(TINY, "model.safetensors")), train(stage, data, tmp_path / "out")
    for name, tensor in after.items():
        learns = name.split(".")[0] in STAGES[stage].TRAINABLE
        assert torch.equal(tensor, before[name].float()) == (not learns), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accumulation_does_not_change_the_result(stage, data, tmp_path):
    whole, parts = (train(stage, data, tmp_path / f"{m}", micro_batch=m, lr=1e-4) for m in (4, 1))
    assert distance(parts, whole) < 1e-6


def test_two_processes_do_what_one_does(data, tmp_path):
    """fp32, gloo, torchrun, compared by update; text-only and picture rows fall on different processes."""
    for stage in (2, 3):
        same = dict(batch=5, steps=2, clip=0.5, lr=1e-4)  # 5: one process has a row and a micro-batch more
        one = train(stage, data, tmp_path / f"one{stage}", micro_batch=5, **same)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                   STAGES[stage].__file__, *flags(stage, data, str(tmp_path / f"two{stage}"), micro_batch=1,
                                                  **same)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        two = weights(tmp_path / f"two{stage}")
        before = load_file(os.path.join(TINY, "model.safetensors"))
        assert distance(two, one) < 1e-6 < 1e-4 < distance(before, one)
        logged = [[json.loads(line)["loss"] for line in open(tmp_path / f"{w}{stage}" / "metrics.jsonl")]
                  for w in ("one", "two")]
        assert logged[0] == pytest.approx(logged[1], rel=1e-6)


def test_the_logged_loss_is_one_mean_over_all_answer_tokens(data, tmp_path):
    train(1, data, tmp_path / "out", steps=1, batch=8, micro_batch=2)
    with open(tmp_path / "out" / "metrics.jsonl") as f:
        logged = json.loads(f.read())["loss"]
    vlm, tokenizer = model.load_vlm(TINY)
    rows = model.read_rows(os.path.join(data, "stage1.jsonl"))
    args = stage1_text_sft.make_parser().parse_args(["--batch", "8"])
    batch = model.make_batch(vlm, tokenizer,
                             sum(stage1_text_sft.rows_of_step(0, rows, args, 0, 1), []))
    with torch.no_grad():
        logits = vlm(batch) @ vlm.lm_head.T
    want = F.cross_entropy(logits, batch.labels[batch.labels != -100]).item()
    assert logged == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_resume_is_exact(stage, data, tmp_path):
    straight = train(stage, data, tmp_path / "a", steps=4, save_every=2)
    shutil.copytree(tmp_path / "a" / "step-2", tmp_path / "b" / "step-2")
    with open(tmp_path / "a" / "metrics.jsonl") as f:  # as a run leaves it that was killed after step 3
        (tmp_path / "b" / "metrics.jsonl").write_text("".join(f.readlines()[:3]) + '{"step"')
    resumed = train(stage, data, tmp_path / "b", steps=4, save_every=2)
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    a, b = (load_file(tmp_path / r / "step-4" / "optimizer.safetensors") for r in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)["step"] for line in open(tmp_path / "b" / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4]


def test_micro_batches_share_a_batch_out_and_hold_alike_lengths(data):
    rows = model.read_rows(os.path.join(data, "stage3.jsonl"))
    args = stage3_mm_instruct.make_parser().parse_args(["--batch", "21", "--micro_batch", "4"])
    length = lambda row: (bool(row["image_url"]), len(row["instruction"]) + len(row["output"]))
    shares = [stage3_mm_instruct.rows_of_step(1, rows, args, rank, 2) for rank in (0, 1)]
    assert [[len(part) for part in share] for share in shares] == [[4, 4, 3], [4, 4, 2]]
    flat = [[row for part in share for row in part] for share in shares]
    assert all(list(map(length, mine)) == sorted(map(length, mine)) for mine in flat)
    want = [rows[stage3_mm_instruct.shuffled(48, 3407, 0)[k]] for k in range(21, 42)]
    assert sorted(map(json.dumps, flat[0] + flat[1])) == sorted(map(json.dumps, want))


def test_a_batch_smaller_than_the_world_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(stage1_text_sft, "setup_distributed", lambda: (0, 5, torch.device("cpu")))
    with pytest.raises(SystemExit, match="--batch 4 leaves some of the 5 processes"):
        train(1, data, tmp_path / "out")


def test_a_damaged_checkpoint_is_passed_over(data, tmp_path, capsys):
    straight = train(1, data, tmp_path / "a", steps=4, save_every=2)
    path = tmp_path / "a" / "step-4" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one bit: safetensors alone would load it silently
    path.write_bytes(content)
    with pytest.raises(SystemExit, match="damaged"):
        model.load_vlm(str(tmp_path / "a" / "step-4"))
    again = train(1, data, tmp_path / "a", steps=4, save_every=2)
    assert all(torch.equal(v, straight[k]) for k, v in again.items())
    assert "step-4 is damaged" in capsys.readouterr().err


def test_a_folder_without_manifest_does_not_exist(data, tmp_path):
    train(1, data, tmp_path / "a", steps=1)
    os.remove(tmp_path / "a" / "step-1" / "manifest.json")
    assert model.newest_checkpoint(str(tmp_path / "a")) is None


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(data, tmp_path, monkeypatch):
    train(1, data, tmp_path / "a", steps=1)
    stamp = os.stat(tmp_path / "a" / "step-1" / "model.safetensors").st_mtime_ns
    train(1, data, tmp_path / "a", steps=1)
    assert os.stat(tmp_path / "a" / "step-1" / "model.safetensors").st_mtime_ns == stamp
    # Before weights are loaded: those of another model would not fit, which tells a user nothing.
    monkeypatch.setattr(model, "load_checkpoint", lambda *_: pytest.fail("loaded before the flags were compared"))
    with pytest.raises(SystemExit, match="--lr: 0.001 there, 0.5 here"):
        train(1, data, tmp_path / "a", steps=1, lr=0.5)


def test_an_edited_script_does_not_go_on(data, tmp_path, monkeypatch):
    """Or a fork's numbers would be those of the run before it."""
    train(1, data, tmp_path / "a", steps=1)
    with open(stage1_text_sft.__file__, encoding="utf-8") as f:
        (tmp_path / "fork.py").write_text(f.read() + "# ten lines changed\n", encoding="utf-8")
    monkeypatch.setattr(stage1_text_sft, "__file__", str(tmp_path / "fork.py"))
    with pytest.raises(SystemExit, match="the script was edited.*another --out"):
        train(1, data, tmp_path / "a", steps=1)


def test_a_run_that_was_stopped_is_no_parent_yet(data, tmp_path):
    train(1, data, tmp_path / "a", steps=2, save_every=1)
    assert model.finished(str(tmp_path / "a")) and not model.finished(str(tmp_path / "nothing"))
    shutil.rmtree(tmp_path / "a" / "step-2")
    assert not model.finished(str(tmp_path / "a"))


def test_zero_steps_and_zero_learning_rate(data, tmp_path):
    before = load_file(os.path.join(TINY, "model.safetensors"))
    for out, change in (("a", {"steps": 0}), ("b", {"lr": 0.0, "steps": 1})):
        after = train(2, data, tmp_path / out, **change)
        assert all(torch.equal(v, before[k].float()) for k, v in after.items())


def test_cross_entropy_only_is_lambda_zero(data, tmp_path):
    train(2, data, tmp_path / "a", steps=1, lam=0.0)
    numbers = json.loads(open(tmp_path / "a" / "metrics.jsonl").read())
    assert numbers["loss"] == pytest.approx(numbers["ce"], rel=1e-5) and numbers["kl_ts"] > 0


def test_nan_stops_before_the_step_and_saves_nothing(data, tmp_path):
    vlm, tokenizer = model.load_vlm(TINY)
    vlm.projector.up.bias.data[0] = float("nan")
    model.save_vlm(str(tmp_path / "bad"), vlm, tokenizer)
    with pytest.raises(SystemExit, match="step 1: loss nan.*rows"):
        train(2, data, tmp_path / "out", init=str(tmp_path / "bad"))
    assert model.newest_checkpoint(str(tmp_path / "out")) is None


def test_caption_loss_is_small_for_a_model_that_reads_and_large_for_another_picture(data, tmp_path):
    """The number by which stage 1 shows that it unlearnt to look; None when the data has no such pictures."""
    vlm, tokenizer = model.load_vlm(TINY)
    assert model.caption_loss(vlm, tokenizer, data, "cpu") < .5
    shutil.copytree(data, tmp_path / "d")
    for path in (tmp_path / "d" / "images").glob("test-*-labelled.png"):
        shutil.copy(str(path).replace("labelled", "figure"), path)  # the same figure without its numbers
    assert model.caption_loss(vlm, tokenizer, str(tmp_path / "d"), "cpu") > 1
    os.remove(tmp_path / "d" / "test.jsonl")
    assert model.caption_loss(vlm, tokenizer, str(tmp_path / "d"), "cpu") is None


def test_pairs_must_share_their_answer(data, tmp_path):
    shutil.copytree(data, tmp_path / "d")
    path = tmp_path / "d" / "stage2_top.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {"output_2": "7"})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit, match="stage2_top.jsonl:3: the answers of a pair differ"):
        train(2, str(tmp_path / "d"), tmp_path / "out")


@pytest.mark.parametrize("kernel", ["eager", pytest.param("triton", marks=pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"))])
def test_show_adds_up_to_what_training_logs(data, tmp_path, capsys, kernel):
    """Batch of one: the table's last line is the first logged loss, kernel and all."""
    args = stage2_kl_align.make_parser().parse_args(["--batch", "1"])
    rows = model.read_rows(os.path.join(data, "stage2_top.jsonl"))
    (first,), = stage2_kl_align.rows_of_step(0, rows, args, 0, 1, "_2")
    stage2_kl_align.main(["--init", TINY, "--data", data, "--kernel", kernel,
                          "--show", str(rows.index(first))])
    mean, whole = re.search(r"-> loss (\S+); all at once, as in training: (\S+)",
                            capsys.readouterr().out).groups()
    train(2, data, tmp_path / "out", steps=1, batch=1, micro_batch=1)
    logged = json.loads(open(tmp_path / "out" / "metrics.jsonl").read())["loss"]
    assert float(mean) == pytest.approx(logged, abs=2e-4) and float(whole) == pytest.approx(logged, abs=1e-4)


def test_missing_prerequisites_are_made_first(tmp_path, monkeypatch, capsys):
    """`stage3` in an empty folder makes data, stage 1 and stage 2, says so, and ends with a table."""
    monkeypatch.chdir(tmp_path)
    os.symlink(TINY, "tiny")
    small = {"--steps": "1", "--batch": "2", "--micro_batch": "2"}
    for module in STAGES.values():  # shrink the defaults, not the path through the code
        original = module.make_parser

        def shrunk(original=original):
            parser = original()
            parser.set_defaults(**{k[2:]: int(v) for k, v in small.items()})
            return parser
        monkeypatch.setattr(module, "make_parser", shrunk)
    original = data_gen.parse_args
    monkeypatch.setattr(data_gen, "parse_args", lambda argv: original([*argv, "--n", "12", "--n_test", "2"]))
    stage3_mm_instruct.main([])
    out = capsys.readouterr().out
    order = [out.index(s) for s in (
        "data/ is missing", "out/stage2 is missing", "out/stage1 is missing", "stage 1 done", "stage 2 done",
        "stage 3 done", "relative gap")]
    assert order == sorted(order) and os.path.exists("out/accuracy.png")
    assert set(json.load(open("out/stage3/eval.json"))) == {
        "benchmark", "versions", "all", "gap", "relative_gap", "seconds"}
