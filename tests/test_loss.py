"""The alignment loss: against a float64 reference, in its limits, in its directions, when damaged.

Both ways to compute it run the same tests: "eager" is align_rows, the textbook, and "triton" the
kernel.  Without a GPU the kernel runs in Triton's interpreter (conftest.py); without Triton its
tests are skipped.
"""
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import bench_kl
import stage2_kl_align

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = torch.cuda.is_available()
EAGER = "eager"
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"))


@pytest.fixture(params=[EAGER, TRITON])
def kernel(request):
    """Which of the two a test is for; new tensors are made where it runs."""
    on_gpu = request.param == "triton" and HAS_GPU
    torch.set_default_device("cuda" if on_gpu else "cpu")
    yield request.param
    torch.set_default_device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These tensors are small: with two threads, one waits for the other longer than it works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


COMPILE_TEST = "test_the_kernel_compiles_to_few_instructions_without_spills"


@pytest.fixture(scope="module", autouse=True)
def compiling(request):
    """compile_kernel.py in a process of its own: its 20 seconds pass beside the other tests.

    None where the one test that reads what it prints is not selected, or cannot run.
    """
    selected = any(COMPILE_TEST in item.name for item in request.session.items)
    if not (selected and HAS_TRITON and importlib.util.find_spec("triton.backends.nvidia")):
        yield None
        return
    script = os.path.join(os.path.dirname(__file__), "compile_kernel.py")
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.Popen(
        [sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()  # does nothing to one that has ended
    process.wait()


only_eager = pytest.mark.parametrize("kernel", [EAGER], indirect=True)
only_triton = pytest.mark.parametrize("kernel", [TRITON], indirect=True)


# --------------------------------------------------------------------------------------------------
# The reference, random inputs, and what the tests compare

def reference(hs, ht, W, labels, *, alpha, lam, tau=1.0, standardize=False, n_total=None):
    """Equations (1)-(4) as written, on full logits, in the dtype of the inputs."""
    z_s = hs @ W.T  # (N, V)
    z_t = (ht @ W.T).detach()
    s = z_s / tau
    t = z_t / tau
    if standardize:
        s = s / (z_s.std(-1, keepdim=True) + 1e-6)
        t = t / (z_t.std(-1, keepdim=True) + 1e-6)
    ln_q = s.log_softmax(-1)
    ln_p = t.log_softmax(-1)
    fkl = (ln_p.exp() * (ln_p - ln_q)).sum()
    rkl = (ln_q.exp() * (ln_q - ln_p)).sum()
    hard = F.cross_entropy(z_s, labels, reduction="sum", ignore_index=-100)
    loss = lam * tau ** 2 * (alpha * fkl + (1 - alpha) * rkl) + (1 - lam) * hard
    return loss / (n_total or max(1, len(labels)))


def example(N=5, H=32, V=101, scale=0.5):
    """-> hs, ht (N, H), W (V, H), labels (N,), every third -100; hs is scale * noise from ht"""
    torch.manual_seed(0)
    ht = torch.randn(N, H)
    hs = ht + scale * torch.randn(N, H)
    labels = torch.randint(0, V, (N,))
    labels[::3] = -100
    W = torch.randn(V, H) * 0.5
    return hs.requires_grad_(), ht, W, labels


def arriving_student(scale, dtype=torch.float32):
    """16 rows, 2,000 words, logits of deviation 3: KL about 4 nats x scale^2. No hard loss."""
    torch.manual_seed(0)
    W = torch.randn(2000, 256) / 16 * 3
    ht = torch.randn(16, 256).to(dtype)
    hs = ht.float() + scale * torch.randn(16, 256)
    labels = torch.full((16,), -100)
    return hs.requires_grad_(), ht, W.to(dtype), labels


def run(hs, ht, W, labels, **setting):
    """-> loss, parts, gradient by hs"""
    loss, parts = stage2_kl_align.kl_align_loss(hs, ht, W, labels, **setting)
    [gradient] = torch.autograd.grad(loss, hs)
    return loss.detach(), parts, gradient


def expected(hs, ht, W, labels, **setting):
    """-> loss, gradient by hs, both by the reference in float64"""
    hs = hs.detach().double().requires_grad_()
    loss = reference(hs, ht.double(), W.double(), labels, **setting)
    [gradient] = torch.autograd.grad(loss, hs)
    return loss.detach(), gradient


def relative_error(got, wanted):
    distance = (got.double() - wanted.double()).norm()
    return (distance / wanted.double().norm().clamp_min(1e-30)).item()


def assert_is_the_reference(inputs, kernel, tolerance=1e-5, **setting):
    loss, _, gradient = run(*inputs, kernel=kernel, **setting)
    wanted_loss, wanted_gradient = expected(*inputs, **setting)
    assert relative_error(loss, wanted_loss) <= tolerance
    assert relative_error(gradient, wanted_gradient) <= tolerance


def set_chunk_rows(patch, n):
    """Chunks of n rows, whatever V is."""
    patch.setattr(stage2_kl_align, "MIN_ROWS", n)
    patch.setattr(stage2_kl_align, "CHUNK_ELEMENTS", 1)
    patch.setattr(stage2_kl_align, "KERNEL_ROWS", n)


# --------------------------------------------------------------------------------------------------
# Right values, right gradients

@pytest.mark.parametrize("tau", [1, 2])
@pytest.mark.parametrize("lam", [0, 0.1, 1])
@pytest.mark.parametrize("alpha", [0, 0.2, 0.5, 1])
def test_float32_is_the_reference_in_float64(kernel, alpha, lam, tau):
    assert_is_the_reference(example(), kernel, alpha=alpha, lam=lam, tau=tau)


@pytest.mark.parametrize("tau", [1, 2])
@pytest.mark.parametrize("lam", [0, 0.1, 1])
@pytest.mark.parametrize("alpha", [0, 0.2, 0.5, 1])
@only_eager
def test_standardized_is_the_reference_in_float64(kernel, alpha, lam, tau):
    setting = {"alpha": alpha, "lam": lam, "tau": tau, "standardize": True}
    assert_is_the_reference(example(), kernel, **setting)


@pytest.mark.parametrize("standardize", [False, True])
def test_the_gradient_of_the_reference_is_right(standardize):
    hs, ht, W, labels = example(N=3, H=4, V=5)
    loss = functools.partial(
        reference, ht=ht.double(), W=W.double(), labels=labels, alpha=0.3, lam=0.6, tau=2,
        standardize=standardize)
    assert torch.autograd.gradcheck(loss, hs.detach().double().requires_grad_())


def test_three_words_by_hand(kernel):
    """Teacher p = (1/2, 1/4, 1/4), student q = (1/8, 3/8, 1/2), the label is the first word.

    KL(p || q) = 1/2 ln 4 + 1/4 ln 2/3 + 1/4 ln 1/2 = ln 2 - 1/4 ln 3 = 0.4185
    KL(q || p) = 1/8 ln 1/4 + 3/8 ln 3/2 + 1/2 ln 2 = 3/8 ln 3 - 1/8 ln 2 = 0.3253
    hard loss  = -ln 1/8 = 3 ln 2
    The gradients by the logits:
    KL(p || q): q - p = (-3/8, 1/8, 1/4)
    KL(q || p): q (ln q/p - KL(q || p)), with ln q/p = (-2 ln 2, ln 3/2, ln 2)
    hard loss:  q - (1, 0, 0) = (-7/8, 3/8, 1/2)
    """
    hs = torch.tensor([[1 / 8, 3 / 8, 1 / 2]]).log().requires_grad_()
    ht = torch.tensor([[1 / 2, 1 / 4, 1 / 4]]).log()
    W = torch.eye(3)  # so hidden rows are logits
    label = torch.tensor([0])
    loss, parts, gradient = run(hs, ht, W, label, alpha=1 / 4, lam=1 / 2, kernel=kernel)

    ln2 = math.log(2)
    ln3 = math.log(3)
    fkl = ln2 - ln3 / 4
    rkl = 3 / 8 * ln3 - ln2 / 8
    assert parts["kl_teacher_student"].item() == pytest.approx(fkl, rel=1e-5)
    assert parts["kl_student_teacher"].item() == pytest.approx(rkl, rel=1e-5)
    assert parts["ce"].item() == pytest.approx(3 * ln2, rel=1e-5)
    wanted_loss = 1 / 2 * (1 / 4 * fkl + 3 / 4 * rkl) + 1 / 2 * 3 * ln2
    assert loss.item() == pytest.approx(wanted_loss, rel=1e-5)

    by_fkl = torch.tensor([-3 / 8, 1 / 8, 1 / 4])
    q = torch.tensor([1 / 8, 3 / 8, 1 / 2])
    by_rkl = q * (torch.tensor([-2 * ln2, ln3 - ln2, ln2]) - rkl)
    by_hard = torch.tensor([-7 / 8, 3 / 8, 1 / 2])
    wanted = 1 / 2 * (1 / 4 * by_fkl + 3 / 4 * by_rkl) + 1 / 2 * by_hard
    assert gradient[0].tolist() == pytest.approx(wanted.tolist(), abs=1e-6)

    # The same example stands in the script, with these numbers.
    with open(stage2_kl_align.__file__, encoding="utf-8") as f:
        lesson = f.read()
    for value in (fkl, rkl, 3 * ln2):
        assert f"= {value:.4f}\n" in lesson
    for by in (by_fkl, by_rkl, by_hard):
        assert "= ({:.4f}, {:.4f}, {:.4f})\n".format(*by.tolist()) in lesson


def test_directions_and_alpha_are_not_swapped(kernel):
    """Teacher sure of one word, student torn between two: KL(t || s) = ln 2, reverse 10 - ln 2"""
    hs = torch.tensor([[0.0, 0.0, -30.0]]).requires_grad_()
    ht = torch.tensor([[0.0, -20.0, -30.0]])
    W = torch.eye(3)
    label = torch.tensor([0])
    only_fkl, parts, _ = run(hs, ht, W, label, alpha=1, lam=1, kernel=kernel)
    only_rkl, _, _ = run(hs, ht, W, label, alpha=0, lam=1, kernel=kernel)
    assert parts["kl_teacher_student"].item() == pytest.approx(math.log(2), rel=1e-4)
    assert parts["kl_student_teacher"].item() == pytest.approx(10 - math.log(2), rel=1e-4)
    assert only_fkl.item() == pytest.approx(parts["kl_teacher_student"].item())
    assert only_rkl.item() == pytest.approx(parts["kl_student_teacher"].item())


# --------------------------------------------------------------------------------------------------
# Accuracy while the student arrives at the teacher

# What float32 leaves of a KL: the textbook's is a sum of p (ln p - ln q), terms of both signs.  Its
# error was at most 1.4e-7 nats a token for V up to 20,000.  The kernel's terms are all >= 0.
NATS_LOST = {"eager": 5e-7, "triton": 0}


def check_kl_values(inputs, parts, kernel, tolerance):
    for alpha, name in ((1, "kl_teacher_student"), (0, "kl_student_teacher")):
        wanted, _ = expected(*inputs, alpha=alpha, lam=1)
        allowed = tolerance * wanted.item() + NATS_LOST[kernel]
        assert parts[name].item() == pytest.approx(wanted.item(), abs=allowed, rel=0)


@pytest.mark.parametrize("scale", [1, 0.1, 0.03, 0.01, 0.003, 0.001])
def test_bfloat16_gradient_keeps_its_accuracy_as_the_student_arrives(kernel, scale):
    """KL from 4 to 4e-6 nats, error 1.5 % (measured). Two rounded logit matrices: beyond 100 %."""
    inputs = arriving_student(scale, torch.bfloat16)
    _, parts, gradient = run(*inputs, alpha=0.5, lam=1, kernel=kernel)
    _, wanted = expected(*inputs, alpha=0.5, lam=1)
    assert relative_error(gradient, wanted) <= 4e-2
    check_kl_values(inputs, parts, kernel, tolerance=4e-2)


# Scale of the noise, and the highest error of the float32 gradient: about twice the measured one.
FLOAT32_ERRORS = {
    "eager": {0.1: 5e-6, 0.03: 1e-5, 0.01: 3e-5, 0.001: 3e-4, 0.0001: 3e-3},
    "triton": {0.1: 5e-6, 0.03: 5e-6, 0.01: 1e-5, 0.001: 1e-4, 0.0001: 1e-3},
}


@pytest.mark.parametrize("scale", [0.1, 0.03, 0.01, 0.001, 0.0001])
def test_float32_keeps_its_digits_as_the_student_arrives(kernel, scale):
    """KL from 4e-2 to 4e-8 nats. With exp(delta) - 1 the kernel would lose 3 % of the last."""
    inputs = arriving_student(scale)
    _, parts, gradient = run(*inputs, alpha=0.5, lam=1, kernel=kernel)
    _, wanted = expected(*inputs, alpha=0.5, lam=1)
    assert relative_error(gradient, wanted) <= FLOAT32_ERRORS[kernel][scale]
    check_kl_values(inputs, parts, kernel, tolerance=1e-3)


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_equal_inputs_have_no_kl_and_no_gradient(kernel, alpha):
    """Both KLs are exactly 0, the kernel's gradient too.

    The textbook's is q sum(p) - p, and probabilities in float32 sum to 1 +- 5e-7 (measured, V
    151,936): a row of dL/dhs is at most so much of the longest row of W.
    """
    _, ht, W, labels = example(V=4097)
    hs = ht.clone().requires_grad_()
    _, parts, gradient = run(hs, ht, W, labels, alpha=alpha, lam=1, n_total=1, kernel=kernel)
    assert parts["kl_teacher_student"] == 0
    assert parts["kl_student_teacher"] == 0
    allowed = {"eager": 1e-6, "triton": 0}[kernel] * W.norm(dim=1).max()
    assert gradient.norm(dim=1).max() <= allowed


def test_equal_inputs_still_have_their_hard_loss(kernel):
    _, ht, W, labels = example()
    hs = ht.clone().requires_grad_()
    assert_is_the_reference((hs, ht, W, labels), kernel, alpha=0.5, lam=0.3)


# --------------------------------------------------------------------------------------------------
# Large, infinite, missing

def test_huge_logits_stay_finite(kernel):
    hs, ht, W, labels = example()
    hs = (hs * 3000).detach().requires_grad_()
    loss, _, gradient = run(hs, ht * -3000, W, labels, alpha=0.5, lam=0.5, kernel=kernel)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_of_a_one_hot_teacher_the_kl_is_the_hard_loss(kernel):
    V = 11
    W = torch.eye(V)
    labels = torch.arange(V)
    ht = torch.full((V, V), -60.0).fill_diagonal_(60.0)  # exp(-120) is 0 in float32
    torch.manual_seed(0)
    hs = torch.randn(V, V).requires_grad_()
    _, parts, _ = run(hs, ht, W, labels, alpha=1, lam=1, kernel=kernel)
    assert parts["kl_teacher_student"].item() == pytest.approx(parts["ce"].item(), rel=1e-5)


def with_shift(h, shift):
    """One more hidden unit; with a column of ones in W it is added to every logit."""
    unit = torch.full((len(h), 1), shift)
    return torch.cat([h.detach(), unit], dim=1).requires_grad_()


def test_a_constant_added_to_all_logits_of_one_side_changes_nothing(kernel):
    hs, ht, W, labels = example()
    W = torch.cat([W, torch.ones(len(W), 1)], dim=1)
    setting = {"alpha": 0.3, "lam": 0.5, "kernel": kernel}
    plain, _, _ = run(with_shift(hs, 0.0), with_shift(ht, 0.0), W, labels, **setting)
    shifted, _, _ = run(with_shift(hs, 20.0), with_shift(ht, 0.0), W, labels, **setting)
    assert relative_error(shifted, plain) < 1e-5


def test_logits_around_3000_leave_the_gradient_its_digits(kernel):
    """KL 3e-4, all logits multiples of 2^-11, so T, D and T + D are exact. Measured error: 5e-6.

    In the kernel, two log-sum-exps, each rounded at 3,000, and then subtracted, are off by 3e-3.
    """
    torch.manual_seed(0)
    step = 2.0 ** -11
    ht = 3000 + (3 * torch.randn(24, 101) / step).round() * step
    hs = ht + (0.03 * torch.randn(24, 101) / step).round() * step
    no_labels = torch.full((24,), -100)
    inputs = (hs.requires_grad_(), ht, torch.eye(101), no_labels)
    _, _, gradient = run(*inputs, alpha=0.5, lam=1, kernel=kernel)
    _, wanted = expected(*inputs, alpha=0.5, lam=1)
    assert relative_error(gradient, wanted) <= 1e-5


LOUD = {"first": slice(0, 100), "last": slice(4000, 4097)}  # words with logits 60 times as large


@pytest.mark.parametrize("place", list(LOUD))
def test_the_running_maximum_over_blocks_may_grow_or_stay(kernel, place):
    """4,097 words are three blocks. exp() of the loud ones' distance overflows, or is 0."""
    inputs = example(N=3, V=4097, H=8)
    inputs[2][LOUD[place]] *= 60
    for tau in (1, 2):
        assert_is_the_reference(inputs, kernel, tolerance=1e-4, alpha=0.5, lam=0.5, tau=tau)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_not_a_number_is_passed_on(kernel, side):
    hs, ht, W, labels = example()
    broken = hs if side == "student" else ht
    with torch.no_grad():
        broken[3, 2] = float("nan")
    for tau in (1, 2):
        with np.errstate(invalid="ignore"):  # the interpreter computes with NumPy
            loss, _, _ = run(hs, ht, W, labels, alpha=0.5, lam=0.5, tau=tau, kernel=kernel)
        assert loss.isnan()


@only_eager
def test_a_deviation_of_zero_is_not_one(kernel):
    hs, ht, W, labels = example()
    flat = torch.zeros_like(ht)  # all logits alike
    setting = {"alpha": 0.5, "lam": 0.5, "standardize": True, "kernel": kernel}
    for student, teacher in ((flat, ht), (hs.detach(), flat)):
        student = student.clone().requires_grad_()
        loss, _, gradient = run(student, teacher, W, labels, **setting)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("N,V", [(1, 101), (5, 3), (3, 4097), (2, 151_936), (2, 152_064)])
def test_odd_shapes(kernel, N, V):
    """G W is one float32 sum over all of V: on a CPU off by 6e-5 at 152,064 (measured)."""
    tolerance = 1e-4 if V > 100_000 else 1e-5
    assert_is_the_reference(example(N=N, V=V), kernel, tolerance, alpha=0.5, lam=0.5)


def test_no_row_at_all(kernel):
    """A process may get no answer token of a batch; DDP still waits for its gradients."""
    hs, ht, W, labels = example(N=0)
    loss, parts = stage2_kl_align.kl_align_loss(
        hs, ht, W, labels, alpha=0.5, lam=0.5, kernel=kernel)
    assert loss == 0
    assert parts["kl_teacher_student"] == 0
    assert loss.requires_grad
    loss.backward()
    assert hs.grad.shape == (0, 32)


# --------------------------------------------------------------------------------------------------
# Labels

def test_rows_without_a_label_still_have_their_kl(kernel):
    hs, ht, W, labels = example()
    setting = {"alpha": 0.5, "lam": 0.5, "kernel": kernel}
    labels[:] = -100
    loss, parts, gradient = run(hs, ht, W, labels, **setting)
    assert parts["ce"] == 0
    assert parts["kl_teacher_student"] > 0
    assert gradient.isfinite().all()

    labels[::2] = -1  # any negative label says the same
    loss_too, parts, gradient_too = run(hs, ht, W, labels, **setting)
    assert parts["ce"] == 0
    assert torch.equal(loss, loss_too)
    assert torch.equal(gradient, gradient_too)


def test_labels_of_any_width_and_stride(kernel):
    hs, ht, W, labels = example()
    setting = {"alpha": 0.5, "lam": 0.5, "kernel": kernel}
    loss, _, gradient = run(hs, ht, W, labels, **setting)
    every_other = torch.stack([labels, labels * 0 + 7], dim=1)[:, 0]
    assert every_other.stride() == (2,)
    for same in (labels.int(), labels.short(), every_other):
        loss_too, _, gradient_too = run(hs, ht, W, same, **setting)
        assert torch.equal(loss, loss_too)
        assert torch.equal(gradient, gradient_too)

    expanded = torch.tensor([5]).expand(len(hs))  # stride 0
    loss, _, _ = run(hs, ht, W, expanded, **setting)
    loss_too, _, _ = run(hs, ht, W, expanded.clone(), **setting)
    assert torch.equal(loss, loss_too)


@pytest.mark.parametrize("label", [101, 10 ** 6])
def test_a_label_beyond_the_vocabulary_does_not_pass(kernel, label):
    """The textbook raises an IndexError (on a CPU). The kernel cannot: its loss is not a number."""
    hs, ht, W, labels = example()
    labels[1] = label
    setting = {"alpha": 0.5, "lam": 0.5, "kernel": kernel}
    if kernel == "eager":
        with pytest.raises(IndexError):
            run(hs, ht, W, labels, **setting)
    else:
        loss, parts, _ = run(hs, ht, W, labels, **setting)
        assert loss.isnan()
        assert parts["ce"].isnan()
        assert parts["kl_teacher_student"].isfinite()


# --------------------------------------------------------------------------------------------------
# Chunks, sums of micro-batches, autograd

@pytest.mark.parametrize("n", [1, 3])  # of 5 rows: the last chunk of 3 has 2
def test_chunks_of_any_size_give_the_same(kernel, n):
    inputs = example()
    setting = {"alpha": 0.3, "lam": 0.4, "tau": 2, "kernel": kernel}
    loss, parts, gradient = run(*inputs, **setting)
    with pytest.MonkeyPatch.context() as patch:
        set_chunk_rows(patch, n)
        loss_too, parts_too, gradient_too = run(*inputs, **setting)
    assert relative_error(loss_too, loss) < 1e-6
    assert relative_error(gradient_too, gradient) < 1e-6
    for name, part in parts.items():
        assert relative_error(parts_too[name], part) < 1e-6


def test_the_gradient_scales_with_what_comes_from_above(kernel):
    inputs = example()
    setting = {"alpha": 0.3, "lam": 0.4, "tau": 2, "kernel": kernel}
    _, _, gradient = run(*inputs, **setting)
    loss, _ = stage2_kl_align.kl_align_loss(*inputs, **setting)
    [tripled] = torch.autograd.grad(3 * loss, inputs[0])
    assert relative_error(tripled, 3 * gradient) < 1e-6


def test_micro_batches_add_up(kernel):
    """With the n_total of all, sums and gradients of 3 and 2 rows are those of 5."""
    hs, ht, W, labels = example()
    setting = {"alpha": 0.3, "lam": 0.4, "tau": 2, "kernel": kernel}
    loss, parts, gradient = run(hs, ht, W, labels, **setting)
    loss_sum = 0.0
    ce_sum = 0.0
    gradients = []
    for rows in (slice(0, 3), slice(3, 5)):
        student = hs[rows].detach().requires_grad_()
        part_loss, part, part_gradient = run(
            student, ht[rows], W, labels[rows], n_total=5, **setting)
        loss_sum += part_loss
        ce_sum += part["ce"]
        gradients.append(part_gradient)
    assert relative_error(loss_sum, loss) < 1e-6
    assert relative_error(ce_sum, parts["ce"]) < 1e-6
    assert relative_error(torch.cat(gradients), gradient) < 1e-6


def test_twice_the_same_and_without_a_gradient(kernel):
    hs, ht, W, labels = example()
    setting = {"alpha": 0.3, "lam": 0.4, "tau": 2, "kernel": kernel}
    with torch.inference_mode():
        value, _ = stage2_kl_align.kl_align_loss(hs, ht, W, labels, **setting)
    assert not value.requires_grad
    loss, _, gradient = run(hs, ht, W, labels, **setting)  # training after inference
    loss_too, _, gradient_too = run(hs, ht, W, labels, **setting)
    assert torch.equal(loss, loss_too)  # to the last bit
    assert torch.equal(gradient, gradient_too)
    assert relative_error(value, loss) < 1e-6  # a GPU may sum otherwise where G is not wanted
    with torch.no_grad():
        value, _ = stage2_kl_align.kl_align_loss(hs, ht, W, labels, **setting)
    assert not value.requires_grad
    assert relative_error(value, loss) < 1e-6


class Watch(TorchDispatchMode):
    """Notes each operation that makes Python wait for a device, and every tensor that is made."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.waits = []
        self.largest = 0  # elements of the largest tensor
        self.storages = []  # (elements, weak reference)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation).split(".")[1]
        if name in self.WAITS:
            self.waits.append(name)
        result = operation(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
                self.storages.append((leaf.numel(), StorageWeakRef(leaf.untyped_storage())))
        return result

    def largest_alive(self):
        """Elements of the largest tensor that is still in memory."""
        alive = [numel for numel, storage in self.storages if not storage.expired()]
        return max(alive)


def no_kernel(T, D, labels, out, tau, weights, train):
    """Stands in for align_rows_triton: the interpreter itself looks at every value."""
    out.zero_()


def check_memory(kernel, standardize=False):
    """64 rows of 4,096 words in chunks of 8: all logits would be 262,144 elements."""
    hs, ht, W, labels = example(N=64, V=4096, H=4)
    chunk = 8 * 4096
    limit = {"eager": chunk, "triton": 2 * chunk}[kernel]  # the kernel's slab: T over D
    with pytest.MonkeyPatch.context() as patch:
        set_chunk_rows(patch, 8)
        patch.setattr(stage2_kl_align, "align_rows_triton", no_kernel)
        with Watch() as seen:
            loss, _ = stage2_kl_align.kl_align_loss(
                hs, ht, W, labels, alpha=0.5, lam=0.5, standardize=standardize, kernel=kernel)
            kept = seen.largest_alive()
            loss.backward()
    assert seen.largest == limit
    assert kept < chunk  # of logits nothing waits for the backward pass
    assert not seen.waits


def test_logits_of_one_chunk_only_and_no_waiting_for_the_device(kernel):
    check_memory(kernel)


@only_eager
def test_standardized_logits_of_one_chunk_only(kernel):
    check_memory(kernel, standardize=True)


class Peak(TorchDispatchMode):
    """Follows how many bytes of new tensors are alive at once; here they need no real memory."""

    def __init__(self):
        super().__init__()
        self.bytes_of = {}  # {weak reference to a storage: its size}
        self.highest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given = {StorageWeakRef(leaf.untyped_storage()).cdata
                 for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if StorageWeakRef(storage).cdata not in given:  # no view, not written in place
                    self.bytes_of[StorageWeakRef(storage)] = storage.nbytes()
        alive = [size for storage, size in self.bytes_of.items() if not storage.expired()]
        self.highest = max(self.highest, sum(alive))
        return result


def product_on_a_gpu(G, W):
    """What product() makes there: float32 from bfloat16, without copies of G and W."""
    return torch.empty(len(G), W.shape[1], device=G.device)


def peak_bytes(N, H, V, dtype):
    """Beyond the inputs, forward and backward, hidden rows of this type, W in bfloat16."""
    hs = torch.empty(N, H, dtype=dtype, device="meta", requires_grad=True)
    ht = torch.empty(N, H, dtype=dtype, device="meta")
    W = torch.empty(V, H, dtype=torch.bfloat16, device="meta")
    labels = torch.zeros(N, dtype=torch.int64, device="meta")
    with pytest.MonkeyPatch.context() as patch, Peak() as peak:
        patch.setattr(stage2_kl_align, "align_rows_triton", no_kernel)
        patch.setattr(stage2_kl_align, "product", product_on_a_gpu)
        loss, _ = stage2_kl_align.kl_align_loss(
            hs, ht, W, labels, alpha=0.5, lam=0.5, kernel="triton")
        loss.backward()
    return peak.highest


@only_triton
def test_memory_at_real_shapes(kernel):
    """At most 1.5 GB beside the inputs; the slab is 1.24 GB of it."""
    for N, H, V in bench_kl.SHAPES_CUDA:
        for dtype in (torch.float32, torch.bfloat16):
            slab = 2 * min(N, stage2_kl_align.KERNEL_ROWS) * V * 2
            assert slab < peak_bytes(N, H, V, dtype) <= 1.5e9, (N, H, V, dtype)


class Launches(TorchDispatchMode):
    """Counts operations that do something on a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        if not (operation.is_view or "detach" in name or "empty" in name):
            self.count += 1
        return operation(*args, **(kwargs or {}))


def launches(N):
    """Of a forward pass over N rows in chunks of 8."""
    with pytest.MonkeyPatch.context() as patch, Launches() as seen:
        set_chunk_rows(patch, 8)
        patch.setattr(stage2_kl_align, "align_rows_triton", no_kernel)
        stage2_kl_align.kl_align_loss(*example(N=N), alpha=0.5, lam=0.5, kernel="triton")
    return seen.count


@only_triton
def test_launches_of_a_chunk(kernel):
    """Two copies of rows, product (5), kernel, product (11), one copy of its result."""
    assert launches(16) - launches(8) == 6
    assert launches(24) - launches(16) == 6


class Traffic(TorchDispatchMode):
    """Adds up what operations read and write of (N, V) tensors, in bytes an element."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.bytes = 0

    def moved(self, tree):
        n_bytes = 0
        for leaf in pytree.tree_leaves(tree):
            is_logits = isinstance(leaf, torch.Tensor) and leaf.shape == self.shape
            if is_logits and 0 not in leaf.stride():  # stride 0: one number, expanded
                n_bytes += leaf.element_size()
        return n_bytes

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = str(operation)
        if operation.is_view or "detach" in name or "empty" in name:
            return result  # moves nothing
        self.bytes += self.moved(result)
        if "nll_loss" not in name:  # which picks one logit a row
            self.bytes += self.moved((args, kwargs))
        return result


@only_eager
def test_the_traffic_of_the_textbook_is_what_its_comment_says(kernel):
    """140 bytes an element forward, 140 again (checkpoint), 124 backward; the kernel's way: 16."""
    hs, ht, W, labels = example(N=8, V=4096, H=4)
    with Traffic((8, 4096)) as traffic:
        loss, _ = stage2_kl_align.kl_align_loss(
            hs, ht, W.bfloat16(), labels, alpha=0.5, lam=0.5, kernel=kernel)
        forward = traffic.bytes
        loss.backward()
    assert forward == 140
    assert traffic.bytes == 404
    with open(stage2_kl_align.__file__, encoding="utf-8") as f:
        assert "404 n V" in f.read()


def test_the_teacher_is_a_constant_even_if_it_asks_for_a_gradient(kernel):
    hs, ht, W, labels = example()
    ht.requires_grad_()
    loss, _ = stage2_kl_align.kl_align_loss(
        hs, ht, W, labels, alpha=0.5, lam=0.5, kernel=kernel)
    _, by_teacher = torch.autograd.grad(loss, (hs, ht), allow_unused=True)
    assert by_teacher is None


@pytest.mark.parametrize("standardize", [False, True])
@only_eager
def test_a_head_that_learns_gets_the_gradient_of_the_student_alone(kernel, standardize):
    """Its teacher is a constant, also where the teacher's logits come from the same head."""
    hs, ht, W, labels = example()
    W.requires_grad_()
    setting = {"alpha": 0.3, "lam": 0.5, "standardize": standardize}
    hs64 = hs.detach().double().requires_grad_()
    W64 = W.detach().double().requires_grad_()
    loss = reference(hs64, ht.double(), W64, labels, **setting)
    by_hs, by_W = torch.autograd.grad(loss, (hs64, W64))

    with pytest.MonkeyPatch.context() as patch:
        set_chunk_rows(patch, 3)
        for student in (hs, hs.detach(), hs):  # the middle one: only the head learns
            loss, _ = stage2_kl_align.kl_align_loss(
                student, ht, W, labels, kernel=kernel, **setting)
            loss.backward()
    assert relative_error(hs.grad, 2 * by_hs) < 1e-5
    assert relative_error(W.grad, 3 * by_W) < 1e-5


@only_triton
def test_a_second_derivative_is_an_error(kernel):
    hs, ht, W, labels = example()
    loss, _ = stage2_kl_align.kl_align_loss(
        hs, ht, W, labels, alpha=0.5, lam=0.5, kernel=kernel)
    [gradient] = torch.autograd.grad(loss ** 2, hs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_compiler_goes_around_it(kernel):
    hs, ht, W, labels = example()
    setting = {"alpha": 0.5, "lam": 0.5, "kernel": kernel}
    compiled = []

    def keep_graph(graph, inputs):
        compiled.append(graph.code)
        return graph.forward

    def doubled(h):
        loss, _ = stage2_kl_align.kl_align_loss(1 * h, ht, W, labels, **setting)
        return 2 * loss

    loss, _, gradient = run(hs, ht, W, labels, **setting)
    twice = torch.compile(doubled, backend=keep_graph)(hs)
    [gradient_of_twice] = torch.autograd.grad(twice, hs)
    assert torch.equal(twice, 2 * loss)
    assert torch.equal(gradient_of_twice, 2 * gradient)
    assert len(compiled) == 2  # 1 * h before it, 2 * loss after it
    assert "softmax" not in "".join(compiled)


def test_autocast_and_float32_agree_to_bfloat16_precision(kernel):
    inputs = example()
    setting = {"alpha": 0.5, "lam": 0.5, "kernel": kernel}
    loss, _, gradient = run(*inputs, **setting)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        rounded, _, rounded_gradient = run(*inputs, **setting)
    assert rounded.dtype == torch.float32
    assert rounded_gradient.dtype == torch.float32
    assert relative_error(rounded, loss) < 2e-2
    assert relative_error(rounded_gradient, gradient) < 2e-2
    loss_after, _, gradient_after = run(*inputs, **setting)  # and off again
    assert torch.equal(loss, loss_after)
    assert torch.equal(gradient, gradient_after)


def test_bfloat16_hidden_rows_get_a_bfloat16_gradient(kernel):
    hs, ht, W, labels = example()
    setting = {"alpha": 0.5, "lam": 0.5, "kernel": kernel}
    student = hs.detach().bfloat16().requires_grad_()
    loss, _, gradient = run(student, ht.bfloat16(), W.bfloat16(), labels, **setting)
    rounded = (student.float(), ht.bfloat16().float(), W.bfloat16().float(), labels)
    _, wanted = expected(*rounded, alpha=0.5, lam=0.5)
    assert loss.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert relative_error(gradient, wanted) < 2e-2


# --------------------------------------------------------------------------------------------------
# Settings, dispatch, row offsets, the benchmark


def test_shapes_that_do_not_fit_are_refused(kernel):
    hs, ht, W, labels = example()
    setting = {"alpha": 0.5, "lam": 0.5, "kernel": kernel}
    wrong = [
        (hs, ht[:-1], W, labels),
        (hs, ht, W, labels[:-1]),
        (hs, ht, W[:, :-1], labels),  # torch says so itself
    ]
    for inputs in wrong:
        with pytest.raises((ValueError, RuntimeError), match="do not fit|shape"):
            stage2_kl_align.kl_align_loss(*inputs, **setting)


@only_triton
def test_the_kernel_refuses_what_only_the_textbook_can(kernel):
    hs, ht, W, labels = example()
    setting = {"alpha": 0.5, "lam": 0.5, "kernel": kernel}
    with pytest.raises(ValueError, match="eager"):
        stage2_kl_align.kl_align_loss(hs, ht, W, labels, standardize=True, **setting)
    W.requires_grad_()
    with pytest.raises(ValueError, match="eager"):
        stage2_kl_align.kl_align_loss(hs, ht, W, labels, **setting)


@dataclass
class Counted:
    """A function that counts its calls."""
    function: object
    calls: int = 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def test_each_kernel_is_what_it_says(kernel, monkeypatch):
    """"auto" must not run the slow interpreter, and "triton" must not quietly be something else."""
    textbook = Counted(stage2_kl_align.align_rows)
    fused = Counted(stage2_kl_align.align_rows_triton)
    monkeypatch.setattr(stage2_kl_align, "align_rows", textbook)
    monkeypatch.setattr(stage2_kl_align, "align_rows_triton", fused)
    inputs = example()
    with torch.no_grad():
        stage2_kl_align.kl_align_loss(*inputs, alpha=0.5, lam=0.5, kernel=kernel)
        wanted = {"eager": (1, 0), "triton": (0, 1)}[kernel]
        assert (textbook.calls, fused.calls) == wanted
        stage2_kl_align.kl_align_loss(*inputs, alpha=0.5, lam=0.5, kernel="auto")
    on_gpu = inputs[0].is_cuda
    assert textbook.calls == wanted[0] + (0 if on_gpu else 1)
    assert fused.calls == wanted[1] + (1 if on_gpu else 0)


@pytest.mark.skipif(HAS_GPU, reason="a GPU needs no interpreter")
def test_without_the_interpreter_a_cpu_has_no_kernel(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        stage2_kl_align.kl_align_loss(*example(), alpha=0.5, lam=0.5, kernel="triton")


@only_triton
def test_rows_beyond_2_to_the_31(kernel):
    """Elements are counted in 64 bits: 16,384 rows of a real vocabulary are 2.5e9 of them.

    Three rows, 2^31 - 64 elements apart; in 32 bits the third would begin 128 before the first.
    Memory that nobody touches costs nothing.
    """
    n = 3
    V = 64
    stride = 2 ** 31 - 64
    memory = torch.empty(256 + 2 * stride + 2 * V, dtype=torch.int8)
    far_T = memory.as_strided((n, V), (stride, 1), storage_offset=256)
    far_D = memory.as_strided((n, V), (stride, 1), storage_offset=256 + V)
    torch.manual_seed(0)
    near_T = torch.randint(-9, 9, (n, V)).to(torch.int8)
    near_D = torch.randint(-9, 9, (n, V)).to(torch.int8)
    far_T.copy_(near_T)
    far_D.copy_(near_D)
    labels = torch.tensor([3, 4, 5])
    weights = (99.0, 99.0, 99.0)  # large: G is rounded to whole numbers here
    far = torch.zeros(n, 3)
    near = torch.zeros(n, 3)
    stage2_kl_align.align_rows_triton(far_T, far_D, labels, far, 1.0, weights, True)
    stage2_kl_align.align_rows_triton(near_T, near_D, labels, near, 1.0, weights, True)
    assert torch.equal(far, near)
    assert torch.equal(far_D, near_D)


def test_the_first_choice_of_each_row():
    torch.manual_seed(0)
    W = torch.eye(5)
    hs = torch.randn(2500, 5)
    assert torch.equal(stage2_kl_align.first_choice(hs, W), hs.argmax(-1))
    assert len(stage2_kl_align.first_choice(hs[:0], W)) == 0


def check_peer(peer, inputs, **setting):
    hs = inputs[0]
    loss, _, gradient = run(*inputs, **setting)
    peer_loss = peer(*inputs)
    [peer_gradient] = torch.autograd.grad(peer_loss, hs)
    assert relative_error(peer_loss.detach(), loss) < 1e-5
    assert relative_error(peer_gradient, gradient) < 1e-5


def test_the_benchmark_compares_equal_functions():
    hs, ht, W, labels = example()
    inputs = (hs, ht, W, labels.clamp_min(0))  # the peers' means are over rows with a label
    setting = {"alpha": bench_kl.ALPHA, "lam": bench_kl.LAM, "kernel": "eager"}
    check_peer(bench_kl.ours, inputs, **setting)
    check_peer(bench_kl.full_logits, inputs, **setting)
    check_peer(bench_kl.released_formula, inputs, standardize=True, **setting)
    if importlib.util.find_spec("liger_kernel"):
        check_peer(functools.partial(bench_kl.liger_chunked, compiled=False), inputs, **setting)
    bench_kl.three_products(hs.detach(), ht, W, chunk=4)


# --------------------------------------------------------------------------------------------------
# The tests above are worth something only if they fail when the loss is wrong.  Below: slips of the
# pen, each with the one test that has to find it.

@dataclass
class Slip:
    what: str
    right: str  # text of stage2_kl_align.py
    wrong: str  # what the slip makes of it, wherever it stands
    found_by: object  # a test above, with all its arguments but the kernel


fixed = functools.partial
NUMBERS = fixed(test_float32_is_the_reference_in_float64, alpha=0.2, lam=0.4, tau=1)
NUMBERS_WITH_TAU = fixed(test_float32_is_the_reference_in_float64, alpha=0.2, lam=0.4, tau=2)
STANDARDIZED = fixed(test_standardized_is_the_reference_in_float64, alpha=0.2, lam=0.4, tau=2)
BFLOAT16 = fixed(test_bfloat16_gradient_keeps_its_accuracy_as_the_student_arrives, scale=0.001)
FLOAT32_FAR = fixed(test_float32_keeps_its_digits_as_the_student_arrives, scale=0.03)
FLOAT32_NEAR = fixed(test_float32_keeps_its_digits_as_the_student_arrives, scale=0.0001)
CHUNKS = fixed(test_chunks_of_any_size_give_the_same, n=3)
LOUD_AT_THE_END = fixed(test_the_running_maximum_over_blocks_may_grow_or_stay, place="last")
THREE_BLOCKS = fixed(test_odd_shapes, N=3, V=4097)
BEYOND = fixed(test_a_label_beyond_the_vocabulary_does_not_pass, label=101)
HEAD = fixed(test_a_head_that_learns_gets_the_gradient_of_the_student_alone, standardize=False)
EQUAL = fixed(test_equal_inputs_have_no_kl_and_no_gradient, alpha=0.3)

TEXTBOOK_SLIPS = [
    Slip("the KLs change places",
         "torch.stack([fkl, rkl, hard])",
         "torch.stack([rkl, fkl, hard])",
         test_three_words_by_hand),
    Slip("alpha at the wrong KL",
         "(alpha * fkl + (1 - alpha) * rkl)",
         "(alpha * rkl + (1 - alpha) * fkl)",
         test_directions_and_alpha_are_not_swapped),
    Slip("sign of D",
         "z_s = z_t + (",
         "z_s = z_t - (",
         NUMBERS),
    Slip("D between the student and itself",
         "((hs - ht).to(W.dtype)",
         "((hs - hs).to(W.dtype)",
         NUMBERS),
    Slip("no tau^2",
         "loss = lam * tau ** 2 * (",
         "loss = lam * (",
         NUMBERS_WITH_TAU),
    Slip("student without tau",
         "s = z_s / tau",
         "s = z_s",
         NUMBERS_WITH_TAU),
    Slip("hard loss of q",
         "F.cross_entropy(z_s, labels",
         "F.cross_entropy(s, labels",
         NUMBERS_WITH_TAU),
    Slip("hard loss a mean",
         'ignore_index=IGNORE, reduction="sum")  # (3)',
         'ignore_index=IGNORE, reduction="mean")  # (3)',
         NUMBERS),
    Slip("negative labels are word 0",
         "labels.long().masked_fill(labels < 0, IGNORE)",
         "labels.long().clamp_min(0)",
         test_rows_without_a_label_still_have_their_kl),
    Slip("two rounded logit matrices",
         "((hs - ht).to(W.dtype) @ W.T).float()",
         "(hs.to(W.dtype) @ W.T).float() - z_t",
         BFLOAT16),
    Slip("rounded before the difference",
         "((hs - ht).to(W.dtype)",
         "((hs.to(W.dtype) - ht.to(W.dtype))",
         BFLOAT16),
    Slip("softmax in bfloat16",
         "(hs - ht).to(W.dtype) @ W.T).float()",
         "(hs - ht).to(W.dtype) @ W.T).float(); z_t = z_t.bfloat16(); z_s = z_s.bfloat16()",
         BFLOAT16),
    Slip("student by the teacher's deviation",
         "s / (z_s.std(",
         "s / (z_t.std(",
         STANDARDIZED),
    Slip("the deviation is a constant",
         "s / (z_s.std(",
         "s / (z_s.detach().std(",
         STANDARDIZED),
    Slip("two rounded log-sum-exps",
         "ln_q = F.log_softmax(s, dim=-1)",
         "ln_q = s - s.logsumexp(-1, keepdim=True)",
         test_logits_around_3000_leave_the_gradient_its_digits),
    Slip("logarithm of a softmax",
         "ln_q = F.log_softmax(s, dim=-1)",
         "ln_q = F.softmax(s, dim=-1).log()",
         test_huge_logits_stay_finite),
    Slip("what is not a number is hidden",
         "@ W.T).float()",
         "@ W.T).float().nan_to_num()",
         fixed(test_not_a_number_is_passed_on, side="teacher")),
    Slip("division by a deviation of zero",
         "std(-1, keepdim=True) + 1e-6",
         "std(-1, keepdim=True)",
         test_a_deviation_of_zero_is_not_one),
    Slip("only the last chunk counts",
         "sums = sums + checkpoint(",
         "sums = checkpoint(",
         CHUNKS),
    Slip("labels of the first chunk",
         "ht[rows], W, labels[rows], tau",
         "ht[rows], W, labels[:len(ht[rows])], tau",
         CHUNKS),
    Slip("the last chunk is forgotten",
         "range(0, max(1, len(hs)), n)",
         "range(0, max(1, len(hs) - n + 1), n)",
         CHUNKS),
    Slip("nothing for DDP to wait for without a row",
         "range(0, max(1, len(hs)), n)",
         "range(0, len(hs), n)",
         test_no_row_at_all),
    Slip("n_total of this call",
         "standardize) / n_total",
         "standardize) / max(1, len(hs))",
         test_micro_batches_add_up),
    Slip("all logits kept",
         "checkpoint(\n            align_rows, hs[rows], ht[rows], W, labels[rows], tau, "
         "standardize, use_reentrant=False)",
         "align_rows(hs[rows], ht[rows], W, labels[rows], tau, standardize)",
         test_logits_of_one_chunk_only_and_no_waiting_for_the_device),
    Slip("Python waits for the device",
         "fkl = (p * (ln_p - ln_q)).sum()",
         "fkl = (p * (ln_p - ln_q)).sum() if p.sum() > -1 else 0",
         test_logits_of_one_chunk_only_and_no_waiting_for_the_device),
    Slip("a compiler enters",
         "@torch.compiler.disable",
         "#",
         test_a_compiler_goes_around_it),
    Slip("the teacher learns",
         "ht = ht.detach()",
         "ht = ht",
         test_the_teacher_is_a_constant_even_if_it_asks_for_a_gradient),
    Slip("the teacher's head learns",
         "z_t = z_t.detach()",
         "z_t = z_t",
         HEAD),
    Slip("the head learns from the difference alone",
         "z_t = (ht.to(W.dtype) @ W.T).float()",
         "z_t = (ht.to(W.dtype) @ W.T).float().detach()",
         HEAD),
]

KERNEL_SLIPS = [
    Slip("the KLs change places",
         "tl.store(out_ptr + 3 * row, tl.sum(tl.sum(fkl, 1), 0))",
         "tl.store(out_ptr + 3 * row, tl.sum(tl.sum(rkl, 1), 0))",
         test_three_words_by_hand),
    Slip("alpha at the wrong gradient",
         "g = w_fkl * q_minus_p + w_rkl * q_delta",
         "g = w_rkl * q_minus_p + w_fkl * q_delta",
         NUMBERS),
    Slip("alpha at the wrong KL",
         "(alpha * fkl + (1 - alpha) * rkl)",
         "(alpha * rkl + (1 - alpha) * fkl)",
         test_directions_and_alpha_are_not_swapped),
    Slip("sign of D",
         "q = tl.exp2((t + e - row_max_s)",
         "q = tl.exp2((t - e - row_max_s)",
         NUMBERS),
    Slip("sign of delta",
         "delta = e - shift",
         "delta = shift - e",
         NUMBERS),
    Slip("D between the student and itself",
         "torch.sub(hs[rows].float(), h_t,",
         "torch.sub(h_t, h_t,",
         NUMBERS),
    Slip("no tau^2 in the gradient",
         "kl_weight = lam * tau ** 2 / n_total",
         "kl_weight = lam / n_total",
         NUMBERS_WITH_TAU),
    Slip("no tau^2 in the loss",
         "loss = lam * tau ** 2 * (",
         "loss = lam * (",
         NUMBERS_WITH_TAU),
    Slip("D without tau",
         "e = D * inv_tau",
         "e = D",
         NUMBERS_WITH_TAU),
    Slip("chain rule of s = z_s / tau",
         "g = (g - w_rkl * row_rkl * q) * inv_tau",
         "g = (g - w_rkl * row_rkl * q)",
         NUMBERS_WITH_TAU),
    Slip("hard loss of q",
         "lse_z = row_max_z + tl.log(",
         "lse_z = lse_z + 0 * tl.log(",
         NUMBERS_WITH_TAU),
    Slip("gradient of the hard loss of q",
         "w_label * tl.exp2((T + D - lse_z) * LOG2E)",
         "w_label * q",
         NUMBERS_WITH_TAU),
    Slip("no centre in the gradient",
         "g += (w_label - w_rkl * row_rkl) * q",
         "g += w_label * q",
         NUMBERS),
    Slip("no centre in the gradient, with tau",
         "g = (g - w_rkl * row_rkl * q) * inv_tau",
         "g = g * inv_tau",
         NUMBERS_WITH_TAU),
    Slip("B at the old maximum",
         "B = B * old_scale + tl.sum(",
         "B = B + tl.sum(",
         LOUD_AT_THE_END),
    Slip("B of each thread at its own maximum",
         "tl.sum(B * thread_scale, 0)",
         "tl.sum(B, 0)",
         NUMBERS),
    Slip("Z_s of each thread at its own maximum",
         "sum_s = tl.sum(Z_s * thread_scale, 0)",
         "sum_s = tl.sum(Z_s, 0)",
         NUMBERS),
    Slip("Z_t of each thread at its own maximum",
         "tl.sum(Z_t * tl.exp2((max_t - row_max_t) * LOG2E), 0)",
         "tl.sum(Z_t, 0)",
         NUMBERS),
    Slip("Z_z of each thread at its own maximum",
         "tl.sum(Z_z * tl.exp2((max_z - row_max_z) * LOG2E), 0)",
         "tl.sum(Z_z, 0)",
         NUMBERS_WITH_TAU),
    Slip("the maximum of the first thread",
         "row_max_t = tl.max(max_t, 0)",
         "row_max_t = tl.sum(tl.where(tl.arange(0, BLOCK // 8) == 0, max_t, 0.0), 0)",
         LOUD_AT_THE_END),
    Slip("no maximum",
         "exp_s = tl.exp2((s - new_max[:, None]) * LOG2E)",
         "exp_s = tl.exp2(s * LOG2E)",
         test_huge_logits_stay_finite),
    Slip("Z at the old maximum",
         "Z_t = Z_t * tl.exp2((max_t - new_max) * LOG2E) + ",
         "Z_t = Z_t + ",
         LOUD_AT_THE_END),
    Slip("Z_z at the old maximum",
         "Z_z = Z_z * tl.exp2((max_z - new_max) * LOG2E) + ",
         "Z_z = Z_z + ",
         LOUD_AT_THE_END),
    Slip("exponents that a common shift changes",
         "p = tl.exp2((t - row_max_t) * LOG2E - log2_sum_t)",
         "p = tl.exp2(t * LOG2E - (row_max_t * LOG2E + log2_sum_t))",
         test_logits_around_3000_leave_the_gradient_its_digits),
    Slip("no mask in the last block",
         "tl.load(T_ptr + start + cols, inside, lowest)",
         "tl.load(T_ptr + start + cols, inside, 0.0)",
         THREE_BLOCKS),
    Slip("the label one word further",
         "start + cols == label",
         "start + cols == label + 1",
         NUMBERS),
    Slip("labels of the first block only",
         "if start <= label and label < start + BLOCK:",
         "if start == 0:",
         fixed(test_odd_shapes, N=3, V=4097)),
    Slip("the label of the first row",
         "tl.load(label_ptr + row)",
         "tl.load(label_ptr)",
         NUMBERS),
    Slip("hard gradient without a label",
         "w_label = tl.where(has_label, w_hard, 0.0)",
         "w_label = w_hard",
         NUMBERS),
    Slip("a label beyond the vocabulary counts",
         "tl.where(label < V, row_hard, float(\"nan\"))",
         "row_hard",
         BEYOND),
    Slip("labels with a stride",
         "labels.long().contiguous()",
         "labels.long()",
         test_labels_of_any_width_and_stride),
    Slip("rows counted in 32 bits",
         "tl.program_id(0).to(tl.int64)",
         "tl.program_id(0)",
         test_rows_beyond_2_to_the_31),
    Slip("two rounded log-sum-exps",
         "shift = (row_max_s - row_max_t) + tl.log(sum_s / sum_t)",
         "shift = (row_max_s + tl.log(sum_s)) - (row_max_t + tl.log(sum_t))",
         test_logits_around_3000_leave_the_gradient_its_digits),
    Slip("two rounded logit matrices",
         "torch.sub(hs[rows].float(), h_t,",
         "torch.sub(hs[rows].to(W.dtype), both[:n],",
         BFLOAT16),
    Slip("no series for a small delta",
         "tl.where(tl.abs(delta) < 0.125, series, q - p)",
         "q - p",
         FLOAT32_NEAR),
    Slip("the series too short",
         "series = 1 / 2 + delta * (1 / 6 + delta * (1 / 24 + delta * (1 / 120)))",
         "series = 1 / 2 + delta / 6",
         FLOAT32_FAR),
    Slip("the series for a large delta",
         "tl.where(tl.abs(delta) < 0.125, series, q - p)",
         "series",
         NUMBERS),
    Slip("results of the first chunk",
         "labels[rows], losses[rows], tau",
         "labels[rows], losses[:n], tau",
         CHUNKS),
    Slip("labels of the first chunk",
         "(T, D, labels[rows], losses",
         "(T, D, labels[:n], losses",
         CHUNKS),
    Slip("teacher's logits in the place of G",
         "product(D, W)",
         "product(T, W)",
         NUMBERS),
    Slip("n_total of this call in the loss",
         "= sums / n_total",
         "= sums / max(1, len(hs))",
         test_micro_batches_add_up),
    Slip("n_total of this call in the gradient",
         "hard_weight = (1 - lam) / n_total",
         "hard_weight = (1 - lam) / max(1, len(hs))",
         test_micro_batches_add_up),
    Slip("what comes from above is ignored",
         "grad_loss * dhs",
         "grad_loss * 0 + dhs",
         test_the_gradient_scales_with_what_comes_from_above),
    Slip("a slab for all rows",
         "slab = torch.empty(2 * n, len(W)",
         "slab = torch.empty(2 * N, len(W)",
         test_logits_of_one_chunk_only_and_no_waiting_for_the_device),
    Slip("the slab is kept",
         "ctx.save_for_backward(dhs)",
         "ctx.slab = slab; ctx.save_for_backward(dhs)",
         test_logits_of_one_chunk_only_and_no_waiting_for_the_device),
    Slip("Python waits for the device",
         "return loss, fkl, rkl, hard",
         "loss.item(); return loss, fkl, rkl, hard",
         test_logits_of_one_chunk_only_and_no_waiting_for_the_device),
    Slip("a gradient in float32 on top of the slab",
         "dhs = torch.empty(N, H, dtype=W.dtype,",
         "dhs = torch.empty(N, H,",
         test_memory_at_real_shapes),
    Slip("one more launch a chunk",
         "            T = slab[:n]\n",
         "            T = slab[:n].contiguous() + 0\n",
         test_launches_of_a_chunk),
    Slip("a second derivative of 0",
         "    @torch.autograd.function.once_differentiable",
         "    # ",
         test_a_second_derivative_is_an_error),
    Slip("equal forms are not equal",
         "        delta = e - shift",
         "        delta = e + 1e-9 - shift",
         EQUAL),
]


def import_damaged(slip, folder, monkeypatch):
    """A copy of the script with the slip in it, as a module."""
    with open(stage2_kl_align.__file__, encoding="utf-8") as f:
        source = f.read()
    assert slip.right in source, "the text to damage is gone: update this table"
    path = folder / "damaged.py"
    path.write_text(source.replace(slip.right, slip.wrong), encoding="utf-8")
    specification = importlib.util.spec_from_file_location("damaged", path)
    damaged = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "damaged", damaged)
    specification.loader.exec_module(damaged)
    return damaged


def check_slip_is_found(slip, kernel, folder, monkeypatch):
    damaged = import_damaged(slip, folder, monkeypatch)
    monkeypatch.setattr(sys.modules[__name__], "stage2_kl_align", damaged)
    with pytest.raises((AssertionError, pytest.fail.Exception)), np.errstate(all="ignore"):
        slip.found_by(kernel=kernel)


def name_of(slip):
    return slip.what


@pytest.mark.parametrize("slip", TEXTBOOK_SLIPS, ids=name_of)
@only_eager
def test_a_slip_in_the_textbook_is_found(kernel, slip, tmp_path, monkeypatch):
    check_slip_is_found(slip, kernel, tmp_path, monkeypatch)


@pytest.mark.parametrize("slip", KERNEL_SLIPS, ids=name_of)
@only_triton
def test_a_slip_in_the_kernel_is_found(kernel, slip, tmp_path, monkeypatch):
    check_slip_is_found(slip, kernel, tmp_path, monkeypatch)


@only_triton
def test_the_kernel_compiles_to_few_instructions_without_spills(kernel, compiling):
    """At most 56 instructions an element at tau 1 and 72 with tau at most, for each GPU."""
    if compiling is None:
        pytest.skip("this build of Triton has no NVIDIA compiler")
    printed, _ = compiling.communicate()
    assert compiling.returncode == 0
    cases = [json.loads(line) for line in printed.splitlines()]
    training = [case for case in cases if case["train"] and case["slab"] == "bf16"]
    assert len(cases) == 16
    assert len(training) == 10
    for case in cases:
        assert case["loops"] == 2, case  # both visits were found
        assert case["spilled"] == 0, case
        assert case["registers"] <= 128, case  # two programs at once on a multiprocessor
        assert case["barriers"] == 0, case
        assert case["of 128 bits"] == case["loads and stores"] >= 4, case
    for case in training:
        assert case["instructions"] <= (72 if case["has_tau"] else 56), case
        assert case["shuffles"] == 0, case
