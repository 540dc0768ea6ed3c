"""The alignment loss against a float64 textbook formula, its limits, and its directions, on both kernels.

Without a GPU the Triton kernel runs in Triton's interpreter (conftest.py); without Triton its tests skip.
"""
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import bench_kl
import stage2_kl_align

WITHOUT_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None,
                                    reason="Triton is not installed")
KERNEL = None  # "eager" or "triton": what the tests below run on


@pytest.fixture(params=["eager", pytest.param("triton", marks=WITHOUT_TRITON)], autouse=True)
def both_kernels(request):
    global KERNEL
    KERNEL = request.param
    torch.manual_seed(0)
    torch.set_default_device("cuda" if KERNEL == "triton" and torch.cuda.is_available() else "cpu")
    yield
    torch.set_default_device(None)


ONLY_TRITON = pytest.mark.parametrize("both_kernels", [pytest.param("triton", marks=WITHOUT_TRITON)],
                                      indirect=True)


def kl_align_loss(*tensors, **setting):
    return stage2_kl_align.kl_align_loss(*tensors, **{"kernel": KERNEL} | setting)


def textbook(hs, ht, W, labels, *, alpha, lam, tau=1.0, standardize=False, n_vocab=None, n_total=None):
    """Equations (1)-(4) as written, in the dtype of the inputs, full logits, no tricks."""
    W = W[:n_vocab]
    z_s, z_t = hs @ W.T, (ht @ W.T).detach()
    scaled = lambda z: z / (tau * (z.std(-1, keepdim=True) + 1e-6) if standardize else tau)
    log_q, log_p = scaled(z_s).log_softmax(-1), scaled(z_t).log_softmax(-1)
    fkl = (log_p.exp() * (log_p - log_q)).sum()
    rkl = (log_q.exp() * (log_q - log_p)).sum()
    ce = F.cross_entropy(z_s, labels, reduction="sum", ignore_index=-100)
    return (lam * tau ** 2 * (alpha * fkl + (1 - alpha) * rkl) + (1 - lam) * ce) / (
        n_total or max(1, len(labels)))


def example(N=11, H=32, V=101, scale=0.5, pad=0):
    ht, noise, labels = torch.randn(N, H), torch.randn(N, H), torch.randint(0, V, (N,))
    labels[::5] = -100
    return (ht + scale * noise).requires_grad_(), ht, torch.randn(V + pad, H) * 0.5, labels


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def run(hs, ht, W, labels, **setting):
    loss, parts = kl_align_loss(hs, ht, W, labels, **setting)
    return loss, parts, torch.autograd.grad(loss, hs)[0]


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("tau", [1, 2])
@pytest.mark.parametrize("lam", [0, 0.1, 1])
@pytest.mark.parametrize("alpha", [0, 0.2, 0.5, 1])
def test_equals_the_textbook_in_float64(alpha, lam, tau, standardize):
    hs, ht, W, labels = example(pad=5)
    setting = dict(alpha=alpha, lam=lam, tau=tau, standardize=standardize, n_vocab=101)
    loss, _, grad = run(hs, ht, W, labels, **setting)
    hs64 = hs.detach().double().requires_grad_()
    want = textbook(hs64, ht.double(), W.double(), labels, **setting)
    assert error(loss.detach(), want.detach()) <= 1e-5
    assert error(grad, torch.autograd.grad(want, hs64)[0]) <= 1e-5


def test_the_reference_itself():
    hs, ht, W, labels = (x.double() if x.is_floating_point() else x for x in example(N=3, H=4, V=5))
    setting = dict(alpha=.3, lam=.6, tau=2, standardize=True)
    assert torch.autograd.gradcheck(lambda h: textbook(h, ht, W, labels, **setting),
                                    hs.detach().requires_grad_())


def test_three_words_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): every number can be done on paper."""
    log = lambda *p: torch.tensor([p]).log()
    hs, ht, W = log(.25, .25, .5).requires_grad_(), log(.5, .25, .25), torch.eye(3)
    loss, parts, grad = run(hs, ht, W, torch.tensor([0]), alpha=.25, lam=.5)
    kl = .25 * math.log(2)  # both ways: 1/2 ln 2 + 1/4 ln 1 - 1/4 ln 2
    assert parts["kl_teacher_student"].item() == pytest.approx(kl, rel=1e-5)
    assert parts["kl_student_teacher"].item() == pytest.approx(kl, rel=1e-5)
    assert parts["ce"].item() == pytest.approx(math.log(4), rel=1e-5)
    assert loss.item() == pytest.approx(.5 * kl + .5 * math.log(4), rel=1e-5)
    forward = [.25 - .5, 0, .5 - .25]  # q - p
    reverse = [.25 * (-math.log(2) - kl), .25 * (0 - kl), .5 * (math.log(2) - kl)]  # q (ln q/p - RKL)
    hard = [.25 - 1, .25, .5]
    want = [.5 * (.25 * f + .75 * r) + .5 * h for f, r, h in zip(forward, reverse, hard)]
    assert grad[0].tolist() == pytest.approx(want, abs=1e-6)


def test_directions_and_alpha_are_not_swapped():
    """Teacher sure of one word, student torn between two: KL(t || s) is ln 2, the reverse is far larger."""
    hs, ht = torch.tensor([[0., 0., -30.]]).requires_grad_(), torch.tensor([[0., -20., -30.]])
    W = torch.eye(3)
    _, parts, _ = run(hs, ht, W, torch.tensor([0]), alpha=1, lam=1)
    assert parts["kl_teacher_student"].item() == pytest.approx(math.log(2), rel=1e-4)
    assert parts["kl_student_teacher"].item() == pytest.approx(10 - math.log(2), rel=1e-4)
    for alpha, name in ((1, "kl_teacher_student"), (0, "kl_student_teacher")):
        loss = run(hs, ht, W, torch.tensor([0]), alpha=alpha, lam=1)[0]
        assert loss.item() == pytest.approx(parts[name].item())


@pytest.mark.parametrize("scale,standardize", [(s, False) for s in (1, .1, .03, .01, .003, .001)]
                         + [(s, True) for s in (1, .03, .001)])
def test_bfloat16_gradient_keeps_its_accuracy_as_the_student_arrives(scale, standardize):
    """KL from about 1 to 1e-6 nats. With two rounded logit matrices, not T and D, this grows beyond 100 %."""
    W = (torch.randn(2000, 256) / 16 * 3).bfloat16()
    ht = torch.randn(16, 256).bfloat16()
    hs = (ht.float() + scale * torch.randn(16, 256)).requires_grad_()  # subtract ht first, round after
    labels = torch.full((16,), -100)
    hs64 = hs.detach().double().requires_grad_()
    settings = [dict(alpha=alpha, lam=1, standardize=standardize) for alpha in (1, 0, .5)]
    fkl, rkl, both = (textbook(hs64, ht.double(), W.double(), labels, **setting) for setting in settings)
    want = torch.autograd.grad(both, hs64)[0]
    for exact, limit in ((False, 4e-2), (True, 6e-3)):
        _, parts, grad = run(hs, ht, W, labels, exact=exact, **settings[2])
        assert error(grad, want) <= limit, f"at KL {fkl:.1e}, exact {exact}"
        values = torch.stack(list(parts.values())[:2])  # KL of 1e-6, a sum of 2,000 terms of either sign
        assert error(values, torch.stack([fkl, rkl]).detach()) <= limit, f"at KL {fkl:.1e}, exact {exact}"


def test_both_kls_keep_their_digits_when_the_student_has_arrived():
    """KL of 4e-8 nats in float32: exp(delta) - 1 in the place of expm1 or its series is 3 % off."""
    W, ht = torch.randn(2000, 256) / 16 * 3, torch.randn(16, 256)
    hs, labels = ht + 1e-4 * torch.randn(16, 256), torch.full((16,), -100)
    _, parts, _ = run(hs.requires_grad_(), ht, W, labels, alpha=.5, lam=1)
    for part, alpha in zip(parts.values(), (1, 0)):
        want = textbook(hs.detach().double(), ht.double(), W.double(), labels, alpha=alpha, lam=1)
        assert part.item() == pytest.approx(want.item(), rel=2e-3)


def test_equal_inputs_give_exactly_zero_kl():
    hs, ht, W, labels = example()
    _, parts, grad = run(ht.clone().requires_grad_(), ht, W, labels, alpha=.5, lam=1)
    assert parts["kl_teacher_student"] == 0 and parts["kl_student_teacher"] == 0 and not grad.any()
    same = ht.clone().requires_grad_()
    _, _, grad = run(same, ht, W, labels, alpha=.5, lam=.3)
    ce = F.cross_entropy(same @ W.T, labels, reduction="sum") * .7 / len(labels)
    assert error(grad, torch.autograd.grad(ce, same)[0]) < 1e-5


def test_huge_logits_and_a_one_hot_teacher_stay_finite():
    hs, ht, W, labels = example()
    loss, _, grad = run((hs * 3000).detach().requires_grad_(), ht * -3000, W, labels, alpha=.5, lam=.5)
    assert loss.isfinite() and grad.isfinite().all()
    V = 11
    W, labels = torch.eye(V), torch.arange(V)
    one_hot = torch.full((V, V), -60.).fill_diagonal_(60.)  # exp(-120) is 0 in float32
    student = torch.randn(V, V).requires_grad_()
    _, parts, _ = run(student, one_hot, W, labels, alpha=1, lam=1)
    assert parts["kl_teacher_student"].item() == pytest.approx(parts["ce"].item(), rel=1e-5)


@pytest.mark.parametrize("loud", [slice(0, 100), slice(4000, 4097)])
def test_the_running_maximum_over_blocks_may_grow_or_stay(loud):
    """4,097 words are three blocks of the kernel. exp() of the loud ones' distance overflows or is 0."""
    hs, ht, W, labels = example(N=3, V=4097, H=8)
    W[loud] *= 60
    for setting in (dict(), dict(tau=2.), dict(standardize=True)):
        loss, _, grad = run(hs, ht, W, labels, alpha=.5, lam=.5, **setting)
        hs64 = hs.detach().double().requires_grad_()
        want = textbook(hs64, ht.double(), W.double(), labels, alpha=.5, lam=.5, **setting)
        assert error(loss.detach(), want.detach()) < 1e-4
        assert error(grad, torch.autograd.grad(want, hs64)[0]) < 1e-4


def test_not_a_number_is_passed_on_and_a_deviation_of_zero_is_not_one():
    hs, ht, W, labels = example()
    broken = hs.detach().clone()
    broken[3, 2] = float("nan")
    for setting in (dict(), dict(standardize=True, tau=2)):
        for student, teacher in ((broken, ht), (ht, broken)):
            assert kl_align_loss(student, teacher, W, labels, alpha=.5, lam=.5, **setting)[0].isnan()
    for student, teacher in ((hs * 0, ht), (hs, ht * 0)):  # all logits alike
        student = student.detach().requires_grad_()
        loss, _, grad = run(student, teacher, W, labels, alpha=.5, lam=.5, standardize=True)
        assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a failed assertion on a GPU ends the process")
def test_a_label_beyond_the_vocabulary_is_an_error():
    hs, ht, W, labels = example(pad=5)
    for wrong in (101, 105, 10 ** 6):
        labels[1] = wrong
        with pytest.raises(RuntimeError, match="not below n_vocab"):
            kl_align_loss(hs, ht, W, labels, alpha=.5, lam=.5, n_vocab=101)


class Watch(TorchDispatchMode):
    """Notes what makes Python wait for a device, and the elements of the largest tensor."""
    def __init__(self):
        super().__init__()
        self.waits, self.largest = [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if str(op).split(".")[1] in ("_local_scalar_dense", "nonzero", "equal", "masked_select"):
            self.waits.append(str(op))
        out = op(*args, **kwargs or {})
        self.largest = max([self.largest] + [x.numel() for x in pytree.tree_leaves(out)
                                             if isinstance(x, torch.Tensor)])
        return out


@pytest.mark.parametrize("standardize", [False, True])
def test_logits_of_one_chunk_only_and_no_waiting_for_the_device(standardize, monkeypatch):
    hs, ht, W, labels = example(N=64, V=4096, H=4)
    for name, value in (("CHUNK_ROWS", 8), ("MIN_ROWS", 8), ("CHUNK_ELEMENTS", 1)):
        monkeypatch.setattr(stage2_kl_align, name, value)
    if KERNEL == "triton":  # the interpreter itself looks at every value
        monkeypatch.setattr(stage2_kl_align, "align_rows_triton", lambda slab, a, *_: torch.zeros(len(a), 4))
    with Watch() as seen:
        kl_align_loss(hs, ht, W, labels, alpha=.5, lam=.5, standardize=standardize)[0].backward()
    assert seen.largest == 2 * 8 * 4096  # T and D of 8 rows; the logits of all rows would be 262,144
    assert KERNEL == "eager" or not seen.waits  # the eager rows look whether an exp could overflow


def test_the_benchmark_compares_equal_functions():
    hs, ht, W, labels = example()
    labels = labels.clamp_min(0)  # the peers' means are over rows with a label
    setting = dict(alpha=bench_kl.ALPHA, lam=bench_kl.LAM)
    peers = [(bench_kl.full_logits, {}),
             (functools.partial(bench_kl.full_logits, released=True), dict(standardize=True))]
    if importlib.util.find_spec("liger_kernel"):
        peers.append((functools.partial(bench_kl.liger_chunked, compiled=False), {}))
    for peer, extra in peers:
        loss, _, grad = run(hs, ht, W, labels, **setting, **extra)
        theirs = peer(hs, ht, W, labels)
        assert error(theirs.detach(), loss.detach()) < 1e-5
        assert error(torch.autograd.grad(theirs, hs)[0], grad) < 1e-5
    bench_kl.three_products(hs.detach(), ht, W, 4)


def test_the_teacher_is_a_constant_even_if_it_asks_for_a_gradient():
    hs, ht, W, labels = example()
    ht.requires_grad_()
    for standardize in (False, True):
        loss, _ = kl_align_loss(hs, ht, W, labels, alpha=.5, lam=.5, standardize=standardize)
        assert torch.autograd.grad(loss, (hs, ht), allow_unused=True)[1] is None


def test_a_second_derivative_is_an_error():
    hs, ht, W, labels = example()
    loss, _ = kl_align_loss(hs, ht, W, labels, alpha=.5, lam=.5)
    grad, = torch.autograd.grad(loss ** 2, hs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_compiler_goes_around_it():
    hs, ht, W, labels = example()
    doubled = lambda h: 2 * kl_align_loss(1 * h, ht, W, labels, alpha=.5, lam=.5)[0]
    loss, _, grad = run(hs, ht, W, labels, alpha=.5, lam=.5)
    twice = torch.compile(doubled, backend="eager")(hs)
    assert torch.equal(twice, 2 * loss) and torch.equal(torch.autograd.grad(twice, hs)[0], 2 * grad)


def test_a_constant_added_to_all_logits_of_one_side_changes_nothing():
    hs, ht, W, labels = example()
    W = torch.cat([W, torch.ones(len(W), 1)], 1)  # one more hidden unit that shifts every logit
    pad = lambda h, shift: torch.cat([h.detach(), torch.full((len(h), 1), shift)], 1).requires_grad_()
    a, b = (run(pad(hs, s), pad(ht, 0.), W, labels, alpha=.3, lam=.5)[0] for s in (0., 20.))
    assert error(b.detach(), a.detach()) < 1e-5


def test_padding_rows_of_the_vocabulary_do_not_exist():
    hs, ht, W, labels = example(pad=7)
    W[101:] = float("nan")
    loss, _, grad = run(hs, ht, W, labels, alpha=.5, lam=.5, n_vocab=101, standardize=True)
    clean, _, clean_grad = run(hs, ht, W[:101].clone(), labels, alpha=.5, lam=.5, standardize=True)
    assert torch.equal(loss, clean) and torch.equal(grad, clean_grad)
    W = W.nan_to_num(1e4).requires_grad_()
    dW = torch.autograd.grad(kl_align_loss(hs, ht, W, labels, alpha=.5, lam=.5, n_vocab=101)[0], W)[0]
    assert not dW[101:].any() and dW[:101].any()


@pytest.mark.parametrize("N,V", [(0, 101), (1, 101), (5, 3), (3, 4097), (4, 151_936), (4, 152_064)])
def test_odd_shapes(N, V):
    hs, ht, W, labels = example(N=N, V=V, H=8)
    loss, _, grad = run(hs, ht, W, labels, alpha=.5, lam=.5)
    if N == 0:
        assert loss == 0 and grad.shape == (0, 8)
    else:
        hs64 = hs.detach().double().requires_grad_()
        want = textbook(hs64, ht.double(), W.double(), labels, alpha=.5, lam=.5)
        assert error(loss.detach(), want.detach()) < 1e-5
        assert error(grad, torch.autograd.grad(want, hs64)[0]) < 1e-5


def test_rows_without_a_label_still_have_their_kl():
    hs, ht, W, labels = example()
    _, parts, grad = run(hs, ht, W, torch.full_like(labels, -100), alpha=.5, lam=.5)
    assert parts["ce"] == 0 and parts["kl_teacher_student"] > 0 and grad.isfinite().all()


def test_chunks_scaling_accumulation_and_repetition(monkeypatch):
    hs, ht, W, labels = example()
    setting = dict(alpha=.3, lam=.4, tau=2., standardize=True)
    loss, _, grad = run(hs, ht, W, labels, **setting)
    again = run(hs, ht, W, labels, **setting)
    assert torch.equal(loss, again[0]) and torch.equal(grad, again[2])  # bitwise
    tripled = torch.autograd.grad(3 * kl_align_loss(hs, ht, W, labels, **setting)[0], hs)[0]
    assert torch.allclose(tripled, 3 * grad, rtol=1e-6)
    halves = [torch.autograd.grad(kl_align_loss(hs[c], ht[c], W, labels[c], n_total=11, **setting)[0], hs)[0]
              for c in (slice(0, 7), slice(7, 11))]
    assert torch.allclose(sum(halves), grad, rtol=1e-5, atol=1e-9)
    for name in ("CHUNK_ELEMENTS", "MIN_ROWS", "CHUNK_ROWS"):
        monkeypatch.setattr(stage2_kl_align, name, 1)  # one row at a time
    row_wise = run(hs, ht, W, labels, **setting)
    assert error(row_wise[0].detach(), loss.detach()) < 1e-6 and error(row_wise[2], grad) < 1e-6
    with torch.no_grad():
        value, _ = kl_align_loss(hs, ht, W, labels, **setting)
    assert not value.requires_grad and error(value, loss.detach()) < 1e-6


def test_trainable_head(monkeypatch):
    """When lm_head learns too, its gradient is the student's alone: the teacher is a constant."""
    for name, value in (("CHUNK_ROWS", 4), ("MIN_ROWS", 4), ("CHUNK_ELEMENTS", 1)):
        monkeypatch.setattr(stage2_kl_align, name, value)
    for standardize in (False, True):
        hs, ht, W, labels = example()
        W.requires_grad_()
        loss, _ = kl_align_loss(hs, ht, W, labels, alpha=.3, lam=.5, standardize=standardize)
        hs64, W64 = hs.detach().double().requires_grad_(), W.detach().double().requires_grad_()
        want = textbook(hs64, ht.double(), W64, labels, alpha=.3, lam=.5, standardize=standardize)
        for got, expected in zip(torch.autograd.grad(3 * loss, (hs, W)),
                                 torch.autograd.grad(3 * want, (hs64, W64))):
            assert error(got, expected) < 1e-5


def test_the_covariance_is_computed_again_when_the_head_changes():
    hs, ht, W, labels = example()
    first = run(hs, ht, W, labels, alpha=.5, lam=1, standardize=True)[0]
    W.mul_(3)  # in place: same storage, new content. Standardized logits do not depend on the scale of W
    assert error(run(hs, ht, W, labels, alpha=.5, lam=1, standardize=True)[0].detach(), first.detach()) < 1e-5


def test_the_covariance_of_a_frozen_head_is_computed_once():
    """It costs V H^2 operations, and nothing about it changes from step to step."""
    hs, ht, W, labels = example()
    run(hs, ht, W, labels, alpha=.5, lam=1, standardize=True)
    first = stage2_kl_align._covariance[2]
    run(hs, ht, W, labels, alpha=.5, lam=1, standardize=True)
    assert stage2_kl_align._covariance[2] is first


def test_autocast_and_float32_agree_to_bfloat16_precision():
    hs, ht, W, labels = example()
    loss, _, grad = run(hs, ht, W, labels, alpha=.5, lam=.5)
    with torch.autocast(hs.device.type, torch.bfloat16):
        rounded, _, rounded_grad = run(hs, ht, W, labels, alpha=.5, lam=.5)
    assert rounded.dtype == torch.float32
    assert error(rounded.detach(), loss.detach()) < 2e-2 and 1e-5 < error(rounded_grad, grad) < 2e-2
    W = W.bfloat16()  # then autocast has nothing to do, and must not round float32 products
    for setting in (dict(exact=True), dict(standardize=True)):
        loss, _, grad = run(hs, ht, W, labels, alpha=.5, lam=.5, **setting)
        with torch.autocast(hs.device.type, torch.bfloat16):
            same, _, same_grad = run(hs, ht, W, labels, alpha=.5, lam=.5, **setting)
        assert torch.equal(loss, same) and torch.equal(grad, same_grad)


@pytest.mark.parametrize("change", [dict(alpha=2), dict(lam=-1), dict(tau=0), dict(tau=math.inf),
                                    dict(n_vocab=0),
                                    dict(n_vocab=999), dict(kernel="no")])
def test_bad_settings_are_refused(change):
    hs, ht, W, labels = example()
    with pytest.raises(ValueError):
        kl_align_loss(hs, ht, W, labels, **dict(alpha=.5, lam=.5) | change)
    with pytest.raises(ValueError):
        kl_align_loss(hs, ht[:-1], W, labels, alpha=.5, lam=.5)


def test_the_kernels_are_what_they_say(monkeypatch):
    """"auto" must not run the slow interpreter on a CPU, and "triton" must not quietly be something else."""
    seen, hs, ht, W, labels = [], *example()
    for name in ("align_rows", "align_rows_triton"):
        original = getattr(stage2_kl_align, name)
        monkeypatch.setattr(stage2_kl_align, name, lambda *a, f=original, n=name: seen.append(n) or f(*a))
    run(hs, ht, W, labels, alpha=.5, lam=.5)
    assert seen == [{"eager": "align_rows", "triton": "align_rows_triton"}[KERNEL]]
    run(hs, ht, W, labels, alpha=.5, lam=.5, kernel="auto")
    assert seen[1] == ("align_rows_triton" if hs.is_cuda else "align_rows")
    if not hs.is_cuda:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            run(hs, ht, W, labels, alpha=.5, lam=.5, kernel="triton")


@ONLY_TRITON
def test_rows_beyond_2_to_the_31():
    """Elements of a slab are counted in 64 bits: 16,384 rows of a real vocabulary are 2.5e9."""
    n, V, stride = 2, 50, 2 ** 30  # untouched memory costs nothing; one row in front for offsets that wrap
    slab = torch.empty(4 * stride + V, dtype=torch.int8).as_strided(
        (2 * n, V), (stride, 1), storage_offset=stride)
    slab.copy_(torch.randint(-9, 9, (2 * n, V)))
    small, one, labels = slab.clone().contiguous(), torch.ones(n), torch.tensor([3, 4])
    far, near = (stage2_kl_align.align_rows_triton(x, one, one, labels, 99., 99., 99., False, True)
                 for x in (slab, small))
    assert torch.equal(far, near) and torch.equal(slab, small)


PLANTED = [  # what a slip of the pen would look like, in the eager rows, the kernel or around them
    ("direction", "diff.mul_(w_f).add_(q_delta, alpha=w_r)", "diff.mul_(w_r).add_(q_delta, alpha=w_f)"),
    ("direction", "g = w_f * diff + w_r * q * (delta - center)",
     "g = w_r * diff + w_f * q * (delta - center)"),
    ("sign", "z, at, as_ = T + D,", "z, at, as_ = T - D,"),
    ("sign", "t + e - m_s) * over_s, e - dL", "t + e - m_s) * over_s, dL - e"),
    ("tau^2 in the gradient", "(lam * tau ** 2 * alpha, lam * tau ** 2 * (1 - alpha), 1 - lam)",
     "(lam * alpha, lam * (1 - alpha), 1 - lam)"),
    ("tau^2 in the loss", "return lam * tau ** 2 * (alpha", "return lam * (alpha"),
    ("alpha swapped", "(alpha * fkl + (1 - alpha) * rkl)", "(alpha * rkl + (1 - alpha) * fkl)"),
    ("D dropped", "hs[c].float() - ht[c].float()", "hs[c].float() - hs[c].float()"),
    ("scale", "e = (at * T, as_ * D + (as_ - at) * T)", "e = (at * T, as_ * D)"),
    ("scale", "(a_t * x, a_s * d + (a_s - a_t) * x)", "(a_t * x, a_s * d)"),
    ("gradient of the scale", "da = (g * z).sum(-1)", "da = da"),
    ("gradient of the scale", "da += g * (x + d)", "da += 0.0 * g"),
    ("hard loss of q", "q_raw = tl.exp(x + d - lse) if RESCALED else q", "q_raw = q"),
    ("hard loss of q", "addcmul_((z - lse).exp_(), w_c", "addcmul_(q, w_c"),
    ("running maximum", "B * old + q * e", "B + q * e"),
    ("mask of the last block", "t = tl.where(inside, t, low)\n        s = t + e",
     "s = t + e"),
    ("label of a row", "tl.where(i + cols == y, 1.0, 0.0)", "tl.where(i + cols == y + 1, 1.0, 0.0)"),
    ("32-bit rows", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    ("padding", "weight[:n_vocab].to(dtype)", "weight.to(dtype)"),
    ("n_total", "fkl, rkl, ce = (sums / n_total).float()", "fkl, rkl, ce = (sums / max(1, N)).float()"),
    ("scale of the gradient", "return (scale * dhs)",
     "return dhs, None, dW, None, da, *[None] * 10\n        return (dhs)"),
    ("head", "dW[:n_vocab] += product(G.T, hs[c].to(dtype)", "dW[:n_vocab] += product(G.T, ht[c].to(dtype)"),
    ("chunk", "a_t[c], a_s[c], labels[c]", "a_t[c], a_s[c], labels[:len(h_t)]"),
    ("difference of the variances", "* (hs + ht)).sum(-1)", "* (2 * ht)).sum(-1)"),
    ("scale of the head's gradient", "(scale * dW)", "(dW)"),
    ("centre of the gradient", "* (delta - center)", "* delta"),
    ("two logit matrices", "torch.cat([h_t, h_d]).to(dtype)  # (2n, H)\n",
     "torch.cat([h_t, h_d]).to(dtype)\n"
     "            h[len(h_t):] = (hs[c].to(dtype) - ht[c].to(dtype)) * 1.02\n"),
]


@pytest.mark.parametrize("name,right,wrong", PLANTED)
@ONLY_TRITON
def test_planted_errors_are_found(name, right, wrong, tmp_path, monkeypatch):
    """The tests above are worth something only if they fail when the loss is wrong."""
    source = open(stage2_kl_align.__file__, encoding="utf-8").read()
    assert source.count(right) >= 1, f"{name}: the text to damage is gone, update this table"
    path = tmp_path / "damaged.py"
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("damaged", path)
    damaged = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(damaged)
    monkeypatch.setattr(sys.modules[__name__], "stage2_kl_align", damaged)
    with pytest.raises(AssertionError):
        for kernel in ("eager", "triton"):
            monkeypatch.setattr(sys.modules[__name__], "KERNEL", kernel)
            if kernel == "triton":
                monkeypatch.setattr(damaged, "CHUNK_ROWS", 7)
            test_equals_the_textbook_in_float64(.2, .4, 2, True)
            test_equals_the_textbook_in_float64(.2, .4, 1, False)
            test_trainable_head(monkeypatch)
            test_padding_rows_of_the_vocabulary_do_not_exist()
            test_chunks_scaling_accumulation_and_repetition(monkeypatch)
            test_bfloat16_gradient_keeps_its_accuracy_as_the_student_arrives(.01, False)
        test_rows_beyond_2_to_the_31()


@ONLY_TRITON
def test_the_kernel_compiles_without_spills():
    """Too few registers mean swapping to memory, and the kernel's whole point is to save memory traffic."""
    if importlib.util.find_spec("triton.backends.nvidia") is None:
        pytest.skip("this build of Triton has no NVIDIA compiler")
    script = os.path.join(os.path.dirname(__file__), "compile_kernel.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, script], env=environment, check=True,
                          capture_output=True, text=True).stdout
    cases = [json.loads(line) for line in said.splitlines()]
    assert len(cases) == 16 and {c["arch"] for c in cases} == {"sm_80", "sm_90"}
    assert all(c["spilled"] == 0 and c["registers"] <= 128 for c in cases), said
