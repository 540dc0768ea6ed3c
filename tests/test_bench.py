"""tests/bench_train.py: what it counts, that its steps do the same work, that its command runs."""
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench_train as bench
import stage2_kl_align as stage2
from bench_train import Variant

SMOKE = bench.SYSTEMS["smoke"]


@pytest.fixture(autouse=True)
def one_thread():
    """Shapes this small gain nothing from a second one and lose much where cores are shared."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def smoke():
    """Flags, VLM and optimizer of the smoke shape, and the rows of one step. Nothing learns."""
    args = stage2.make_parser().parse_args(
        [f"--batch={SMOKE.batch}", f"--micro_batch={SMOKE.micro_batch}", "--lr=0"])
    torch.manual_seed(0)
    vlm, optimizer = bench.build(SMOKE, args, False)
    rows = bench.make_rows(SMOKE.batch, SMOKE.shrink)
    micro_batches = stage2.rows_of_step(0, rows, args, 0, 1)
    return args, vlm, optimizer, micro_batches


def test_flops_are_those_that_torch_counts(smoke):
    args, vlm, optimizer, micro_batches = smoke
    row = micro_batches[0][0]
    batches = bench.make_batches(vlm, [[row]], False)  # one pair: no padding
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        bench.train_step(vlm, optimizer, batches, args, Variant())

    # torch counts both halves of causal scores, so causal is 1.  The textbook loss, which runs on a
    # CPU, makes both logit matrices again in its backward pass: five products with W, not three.
    needed = bench.needed_flops(SMOKE, *row["lengths"], causal=1)
    if not bench.CUDA:
        needed["lm_head"] *= 5 / 3
    assert counted.get_total_flops() == pytest.approx(sum(needed.values()), rel=0.02)


def test_flops_of_a_real_pair_and_their_shares_in_the_shrunk_shape():
    real = bench.needed_flops(bench.SYSTEMS["1.5b"], prompt=60, answer=200, strong=320)
    real_sum = sum(real.values())
    assert real_sum == pytest.approx(8.6e12, rel=0.01)  # estimated beforehand

    shrunk = bench.SYSTEMS["shrunk"]
    small = bench.needed_flops(
        shrunk, prompt=60 // shrunk.shrink, answer=200 // shrunk.shrink,
        strong=320 // shrunk.shrink)
    small_sum = sum(small.values())
    for part, count in small.items():
        assert count / small_sum == pytest.approx(real[part] / real_sum, abs=0.01), part


@pytest.mark.parametrize("two_pictures", [False, True])
def test_all_rows_compute_the_same_values(smoke, two_pictures):
    """Loss, both KLs and cross-entropy on the same pairs."""
    args, vlm, optimizer, micro_batches = smoke
    batches = bench.make_batches(vlm, micro_batches, two_pictures)
    ours = bench.train_step(vlm, optimizer, batches, args, Variant())
    assert ours["kl_teacher_student"] > 1e-5  # there is something to compare
    assert ours["ce"] > 1

    variants = [
        Variant(mask=True),
        Variant(full_logits=True),
        Variant(llm_grad=True),
        Variant(mask=True, full_logits=True, llm_grad=True),
    ]
    for variant in variants:
        values = bench.train_step(vlm, optimizer, batches, args, variant)
        assert values == pytest.approx(ours, rel=1e-4), variant


def test_which_weights_of_the_llm_get_a_gradient(smoke, monkeypatch):
    """Ours: none. "LLM gradients": all but lm_head, here the embedding. Released style: all."""
    args, vlm, optimizer, micro_batches = smoke
    batches = bench.make_batches(vlm, micro_batches, False)
    n_with_gradient = []

    def count():  # instead of vlm.zero_grad, at the end of a step
        with_gradient = [p for p in vlm.language_model.parameters() if p.grad is not None]
        n_with_gradient.append(len(with_gradient))
        torch.nn.Module.zero_grad(vlm)

    monkeypatch.setattr(vlm, "zero_grad", count)
    bench.train_step(vlm, optimizer, batches, args, Variant())
    bench.train_step(vlm, optimizer, batches, args, Variant(llm_grad=True))
    bench.train_step(vlm, optimizer, batches, args, Variant(llm_grad=True, full_logits=True))
    n_parameters = len(list(vlm.language_model.parameters()))
    assert n_with_gradient == [0, n_parameters - 1, n_parameters]


def test_attention_of_ours_sees_no_mask(smoke):
    """Without one it may take its fast causal path; transformers might make one of its own."""
    args, vlm, optimizer, micro_batches = smoke
    batches = bench.make_batches(vlm, micro_batches, False)
    masks = []

    def look(block, inputs, named):
        masks.append(named["attention_mask"])

    block = vlm.language_model.model.layers[0]
    block.register_forward_pre_hook(look, with_kwargs=True)
    bench.train_step(vlm, optimizer, batches, args, Variant())
    assert masks == [None] * (2 * len(batches))  # both forms of every micro-batch

    bench.train_step(vlm, optimizer, batches, args, Variant(mask=True))
    assert masks[-1] is not None  # the hook would see one


def test_the_command_and_its_json(tmp_path, monkeypatch, capsys):
    """The last row runs out of memory after the warm-up: it says so and the others stay."""
    train_step = bench.train_step
    variants = []

    def tight_step(vlm, optimizer, batches, args, variant):
        variants.append(variant)
        is_warm = len(variants) > len(bench.ROWS)
        if is_warm and variant == bench.ROWS["released style"]:
            raise torch.OutOfMemoryError
        return train_step(vlm, optimizer, batches, args, variant)

    monkeypatch.setattr(bench, "train_step", tight_step)
    path = tmp_path / "bench.json"
    bench.main(["--system", "smoke", "--rounds", "1", "--no-compile", "--out", str(path)])
    result = json.loads(path.read_text())
    printed = capsys.readouterr().out

    keys = {
        "system", "date", "device", "torch", "transformers", "command", "config", "batch",
        "micro_batch", "rounds", "compile", "dtype", "tflop", "peak_tflops", "left_out", "rows",
    }
    assert keys <= result.keys()
    expected = [name for name in bench.ROWS if name != "not compiled"]
    assert list(result["rows"]) == expected
    assert bench.table(result) in printed
    assert "| released style | out of memory |" in printed
    assert result["left_out"][0].startswith("released style: out of memory")

    assert result["rows"].pop("released style") is None
    for row in result["rows"].values():
        assert row["low"] <= row["over_ours"] <= row["high"]
        assert row["pairs_s"] > 0
        assert row["tflops"] > 0
