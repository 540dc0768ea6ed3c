"""tests/bench_train.py: what it counts, that its steps do the same work, and that its one command runs."""
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench_train as bench
import stage2_kl_align as stage2


@pytest.fixture
def setting():
    """config, args, VLM, optimizer and the micro-batches of one step of the smoke shape; nothing learns."""
    config, batch, micro_batch, shrink = bench.SYSTEMS["smoke"]
    args = stage2.make_parser().parse_args([f"--batch={batch}", f"--micro_batch={micro_batch}", "--lr=0"])
    torch.manual_seed(0)
    vlm, optimizer = bench.build(config, args, False)
    rows = bench.make_rows(batch, shrink)
    parts = stage2.rows_of_step(0, rows, args, 0, 1, "_2")
    return config, args, vlm, optimizer, parts


def test_flops_are_those_that_torch_counts(setting):
    """Without padding (one pair a micro-batch); torch counts both halves of causal scores, so causal is 1."""
    config, args, vlm, optimizer, parts = setting
    row = parts[0][0]
    batches = bench.make_batches(vlm, [[row]], False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        bench.train_step(vlm, optimizer, batches, args)
    needed = bench.needed_flops(config, *row["lengths"], causal=1)
    assert counted.get_total_flops() == pytest.approx(sum(needed.values()), rel=.02)
    real = bench.needed_flops(bench.SYSTEMS["1.5b"][0], 60, 200, 320)  # estimated beforehand: 8.6 TFLOP
    assert sum(real.values()) == pytest.approx(8.6e12, rel=.01)
    _, _, _, shrink = bench.SYSTEMS["shrunk"]
    small = bench.needed_flops(bench.SYSTEMS["shrunk"][0], 60 // shrink, 200 // shrink, 320 // shrink)
    for part, count in small.items():  # the shrunk shape has the proportions of the real one
        assert count / sum(small.values()) == pytest.approx(real[part] / sum(real.values()), abs=.01), part


@pytest.mark.parametrize("twice", [False, True])
def test_all_rows_compute_the_same_values(setting, twice):
    """Loss, both KLs and cross-entropy on the same pairs: ours, with a mask, from full logits, with dL/dW."""
    _, args, vlm, optimizer, parts = setting
    batches = bench.make_batches(vlm, parts, twice)
    ours = bench.train_step(vlm, optimizer, batches, args)
    assert ours[1] > 1e-5 and ours[3] > 1  # there is something to compare
    for changed in (["mask"], ["full"], ["llm_grad"], ["full", "mask", "llm_grad"]):
        how = dict.fromkeys(changed, True)
        assert bench.train_step(vlm, optimizer, batches, args, **how) == pytest.approx(ours, rel=1e-4), how


def test_attention_of_ours_sees_no_mask(setting):
    """Without one it may take its fast causal path; a mask made inside transformers would undo that."""
    _, args, vlm, optimizer, parts = setting
    seen = []
    vlm.language_model.model.layers[0].register_forward_pre_hook(
        lambda block, inputs, named: seen.append(named["attention_mask"]), with_kwargs=True)
    bench.train_step(vlm, optimizer, bench.make_batches(vlm, parts, False), args)
    assert len(seen) == 2 * len(parts) and all(mask is None for mask in seen)


def test_the_command_and_its_json(tmp_path, monkeypatch, capsys):
    """All rows but the last, which runs out of memory after the warm-up: it says so and the others stay."""
    step, calls = bench.train_step, []

    def tight(*inputs, **how):
        calls.append(how)
        if how.get("llm_grad") and how.get("full") and len(calls) > len(bench.ROWS):
            raise torch.OutOfMemoryError
        return step(*inputs, **how)
    monkeypatch.setattr(bench, "train_step", tight)
    path = tmp_path / "bench.json"
    bench.main(["--system", "smoke", "--rounds", "1", "--no-compile", "--out", str(path)])
    result = json.loads(path.read_text())
    assert {"date", "device", "torch", "transformers", "command", "config", "batch", "micro_batch", "rounds",
            "compile", "dtype", "tflop", "peak_tflops", "left_out"} <= result.keys()
    assert list(result["rows"]) == [name for name in bench.ROWS if name != "not compiled"]
    assert result["rows"].pop("released style") is None
    assert any(line.startswith("released style: out of memory") for line in result["left_out"])
    for row in result["rows"].values():
        assert row["low"] <= row["over_ours"] <= row["high"] and row["pairs_s"] > 0 and row["tflops"] > 0
    printed = capsys.readouterr().out
    assert bench.table(result) in printed and "| released style | out of memory |" in printed
