"""Stage 2: progressive upward multimodal alignment, the method of Math-PUMA (arXiv 2408.08640).

    torchrun stage2_kl_align.py                       # data, stage 1, stage 2, table: 5 minutes on 2 cores
    torchrun --nproc_per_node 8 stage2_kl_align.py    # 8 processes: same batches, same parameters afterwards
    python stage2_kl_align.py --show 1                # one pair, token by token, as the loss sees it

Every row is a pair: one problem text-rich (strong) and vision-rich (weak), with one answer.  The strong form
runs without gradient; the weak form's next-token distribution is pulled up to it at every answer token.  The
language model is frozen: it is the vision encoder and the projector that learn to say with pixels what the
text would have said.

Differs from the paper in: the model and the data; four rungs of data_gen.py's ladder instead of the paper's
levels; every level is pulled to the text (--pairs top), not to its neighbour; --lam is 0.5.
Differs from the released code in: the README's section "Paper, released code, this code".
"""
from __future__ import annotations  # tl.constexpr is but a name until Triton is imported

import argparse
import functools
import importlib.util
import json
import math
import os
import sys
import time
import weakref

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data_gen
import eval as evaluation
import stage1_text_sft
from model import (IGNORE, PAIR, backbone_flags, finished, make_batch, open_data, peak_gigabytes,
                   save_checkpoint, start_or_resume, start_vlm)

TRAINABLE = ("vision_model", "projector")  # the language model is frozen and must come out bit-identical
SIDES = "", "_2"  # of a pair: strong = teacher, weak = student

def make_parser():
    """script = default of the released training script, reported = the paper's value, quoted from memory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--init", default="out/stage1", help="model folder to start from; out/stage1 is made when missing")
    backbone_flags(add)
    add("--data", nargs="+", default=["data"], help="data_gen.py's folder (made if missing) or files")
    add("--image_root", help="folder that pictures are in (default: the folder of each file)")
    add("--check_data", action="store_true", help="list all rows that cannot be used and stop")
    add("--max_bad", type=int, default=0, help="leave out up to so many rows that cannot be used")
    add("--out", default="out/stage2", help="run folder for checkpoints and metrics")
    add("--pairs", default="top", choices=list(data_gen.PAIRS), help="teacher: the text, or one level up")
    add("--alpha", type=float, default=0.5, help="share of KL(teacher || student) (reported .2, script .5)")
    add("--lam", type=float, default=0.5, help="share of the KL; the rest: hard loss (reported, script .1)")
    add("--tau", type=float, default=1.0, help="temperature of both softmaxes in KL (reported, script: 1)")
    add("--standardize", action=argparse.BooleanOptionalAction, default=False, help="z / std (script: on)")
    add("--kernel", default="auto", choices=["auto", "triton", "eager"], help="auto: triton on CUDA")
    add("--steps", type=int, default=200, help="optimizer steps (ours: half a pass over the default data)")
    add("--batch", type=int, default=32, help="pairs a step, all processes together (reported: 64)")
    add("--micro_batch", type=int, default=16, help="pairs a forward pass at most; not the result")
    add("--lr", type=float, default=1e-3, help="peak learning rate (reported: 5e-5; tiny/ needs more)")
    add("--warmup", type=float, default=0.02, help="share of the steps while it rises (reported)")
    add("--weight_decay", type=float, default=0.1, help="AdamW's, on matrices only (reported, script: .1)")
    add("--clip", type=float, default=1.0, help="largest gradient norm, 0 = no limit (transformers' default)")
    add("--max_length", type=int, default=1024, help="tokens of prompt, image and answer (script: 2048)")
    add("--seed", type=int, default=3407, help="decides the order of the rows (script: 3407)")
    add("--log_every", type=int, default=10, help="steps between log lines")
    add("--save_every", type=int, default=500, help="steps between checkpoints; the last is always saved")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from --out")
    add("--evaluate", action=argparse.BooleanOptionalAction, default=True, help="end with the table")
    add("--show", type=int, default=None, metavar="I", help="print pair I token by token instead of training")
    return parser

# >>> identical in stage1/2/3: flags
def parse_args(argv=None):
    """The flags, printed with a * behind those that are not the default: a log then says what was run."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if min(args.batch, args.micro_batch, args.log_every, args.save_every) < 1 or args.steps < 0:
        parser.error("--batch, --micro_batch, --log_every, --save_every must be 1 or more, --steps 0 or more")
    if bool(args.llm) != bool(args.vision) or args.llm and args.init != parser.get_default("init"):
        parser.error("--llm and --vision go together, and stand instead of --init")
    args.init = None if args.llm else args.init
    if int(os.environ.get("RANK", 0)) == 0:
        values = (f"{k}={v}" + "*" * (v != parser.get_default(k)) for k, v in vars(args).items())
        print(os.path.basename(__file__), *values, flush=True)
    return args
# <<<

# >>> identical in stage1/2/3: distributed
def setup_distributed():
    """-> (rank, world size, device). torchrun starts the processes and tells each who it is."""
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():  # it is when a later stage has to run this one first
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device

def total(*values, device):
    """Sums over all processes. float64, so that counts of tokens stay exact."""
    t = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(t)
    return t.tolist()
# <<<

# >>> identical in stage1/2/3: schedule and order
def learning_rate(step, args):
    """Linear warm-up to --lr, then a cosine that would reach 0 one step after the last."""
    warmup = math.ceil(args.warmup * args.steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))

@functools.lru_cache(maxsize=2)  # a batch can reach from one epoch into the next
def shuffled(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)

def rows_of_step(step, rows, args, rank, world, suffix=""):
    """This process's rows of a global batch, a list for each micro-batch: a function of the step alone.

    Not a DataLoader with a sampler: there is no state to save, so a resumed run and a run on other processes
    see the same batches.  The end of an epoch does not cut a batch short.  Inside a batch the order is free,
    since its loss is one sum: rows alike in length share a micro-batch, and less of it is padding.
    """
    n, places = len(rows), range(step * args.batch, (step + 1) * args.batch)
    batch = [rows[int(shuffled(n, args.seed, place // n)[place % n])] for place in places]
    batch.sort(key=lambda row: (row[f"image_url{suffix}"] != "",
                                len(row[f"instruction{suffix}"]) + len(row[f"output{suffix}"])))
    mine = batch[rank::world]  # every world-th: nothing to agree upon, and all have about as much to do
    return [mine[k:k + args.micro_batch] for k in range(0, len(mine), args.micro_batch)]
# <<<

# >>> identical in stage1/2/3: optimizer and log
def make_optimizer(vlm, args):
    """AdamW over exactly the trainable parameters. Norms and biases are not decayed: they only set scales."""
    trainable = [p for p in vlm.parameters() if p.requires_grad]
    assert len(trainable) == sum(name.split(".")[0] in TRAINABLE for name, _ in vlm.named_parameters())
    groups = [{"params": [p for p in trainable if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999))  # betas: reported

def write_log(args, line, numbers, lost):
    """One fixed sentence for the reader, the same numbers for a plot. lost: since the last line."""
    if any(lost):  # too long for --max_length: never silent
        line += f" | too long: {lost[0]} rows dropped, {lost[1]} answers cut"
    numbers |= {"dropped": int(lost[0]), "cut": int(lost[1])}
    lost[:] = 0
    tqdm.write(line)  # not print: it would tear the progress bar
    with open(os.path.join(args.out, "metrics.jsonl"), "a") as f:
        f.write(json.dumps(numbers) + "\n")
# <<<

# ============================================================================================================
# The loss.  At one answer position: z_t the teacher's logits (strong form, no gradient), z_s the student's
# (weak form), y the next answer token, tau the temperature.
#
#     p = softmax(z_t / tau)      q = softmax(z_s / tau)
#     L_FKL  = KL(p || q) = sum p (ln p - ln q)    KL(teacher || student): what does the student miss?    (1)
#     L_RKL  = KL(q || p) = sum q (ln q - ln p)    KL(student || teacher): what does the student make up? (2)
#     L_hard = -ln softmax(z_s)[y]                 cross-entropy with the label                           (3)
#     L = lam tau^2 (alpha L_FKL + (1 - alpha) L_RKL) + (1 - lam) L_hard                                  (4)
#
# tau^2: a softmax at temperature tau has gradients smaller by 1 / tau^2 (Hinton et al., arXiv 1503.02531).
# Early in training L_FKL fits the head of the teacher's distribution and L_RKL its tail (Wu et al., arXiv
# 2404.02657).  L is averaged over all N answer positions of the global batch.
#
# How to compute it.  Teacher and student share the frozen lm_head W (V, H); ht, hs (N, H) are their rows.
#     T = ht W^T      D = (hs - ht) W^T      z_t = T      z_s = T + D                                     (5)
# and not z_s = hs W^T: a KL's gradient is a difference of two nearly equal distributions.  Rounding both
# leaves noise that stays when the student gets better; D shrinks with it, and hs == ht gives exactly 0.
#
# With a_t, a_s the scales of the two softmaxes (1 / tau; one per row when standardized), for each row
#     t = a_t T      e = a_s D + (a_s - a_t) T      s = t + e
#     dL = lse(s) - lse(t) = (max s - max t) + ln(Z_s / Z_t),   Z = sum exp(. - max)                      (6)
#     delta = e - dL = ln q - ln p                                                                        (7)
# (6) never subtracts two rounded log-sum-exps.  Both KLs in Bregman form, where every term is >= 0:
#     L_FKL = sum (q - p) - p delta      L_RKL = sum q delta - (q - p)                                    (8)
#     g = lam tau^2 (alpha (q - p) + (1 - alpha) q (delta - L_RKL))    gradient of the KL part, w.r.t. s  (9)
#     G = a_s g + (1 - lam) (softmax(z_s) - onehot(y))                    gradient w.r.t. z_s             (10)
#     dL/dhs = G W                                                                                        (11)
#
# Standardized logits, (z - mean) / std over the vocabulary, are a temperature a row: the mean drops out, and
#     std^2 = h^T C h,   C = covariance of the rows of W: (H, H), a constant while W is frozen            (12)
# so a_s = 1 / (tau std) is an ordinary function of hs.  The chunks below return dL/da_s = sum g z_s.
#
# Memory traffic.  A chunk of n rows in bfloat16: the product (5) writes T and D, 4 n V bytes; visit 1 of the
# kernel reads both (4), visit 2 reads both and writes G over D (6), the product (11) reads G (2).  Together
# 16 n V bytes, 10 of them the kernel's, for which align_rows, one operation at a time in float32, moves about
# 170 (count its operations).  What remains is arithmetic: three products of 2 N H V operations.  So: the
# products to cuBLAS, all that stands between them into ONE kernel, and no third visit.
#
# Why two visits are enough: (9) needs L_RKL of the whole row, and by (7)
#     L_RKL = sum q delta = sum q e - dL = B / Z_s - dL,   B = sum exp(s - max s) e                      (13)
# B and both Z can be summed in one visit with a running maximum M: when a larger one comes, what was summed
# so far is multiplied by exp(M_old - M_new).  Not flash style, which never stores logits: it has to make them
# twice, 10 N H V operations instead of 6.
# When not to use it: teacher and student have different W (no D then), or N V logits fit into a cache anyway.
# ============================================================================================================
CHUNK_ELEMENTS = 2 ** 19  # eager: rows x V of a chunk; 2 MB a tensor stays in the caches (2 ** 20: 1.4 x)
MIN_ROWS = 128  # of an eager chunk: each reads all of W.  At V 151,936 64 took 1.15 x as long, 6 took 4 x
CHUNK_ROWS = 2048  # kernel: T and D of V 151,936 in bfloat16 are 1.2 GB (exact: a quarter of the rows)
_covariance = [lambda: None, None, None]  # for (12): weak reference to W, what else C depends on, C

def row_scales(hs, ht, weight, n_vocab, tau, standardize, dtype):
    """a_s and a_t: 1 / tau for every row, or 1 / (tau * std of the row's logits). -> (N,), (N,) float32"""
    if not standardize:
        return (torch.full(hs.shape[:1], 1 / tau, device=hs.device),) * 2
    state = weight._version, n_vocab, dtype, torch.is_inference_mode_enabled()  # _version: changes in place
    if _covariance[0]() is not weight or _covariance[1] != state or weight.requires_grad:
        mean = weight[:n_vocab].mean(0, dtype=torch.float32)  # (H,)
        parts = (W.float() - mean for W in weight[:n_vocab].split(2 ** 14))  # not a float32 copy of all of W
        C = sum(W.T @ W for W in parts) / max(1, n_vocab - 1)
        _covariance[:] = weakref.ref(weight), state, C.to(dtype)
    C, ht, d = _covariance[2], ht.float(), hs.float() - ht.float()  # (H, H), (N, H), (N, H)
    var_t = ((ht.to(dtype) @ C) * ht).sum(-1)  # (N,)  (12)
    var_s = var_t + ((d.to(dtype) @ C) * (hs + ht)).sum(-1)  # not hs^T C hs: for the reason of (5)
    # 1e-6: the released code's.  1e-20: below it the gradient is 0, not that of a square root at 0
    return tuple(1 / (tau * (var.clamp_min(1e-20).sqrt() + 1e-6)) for var in (var_s, var_t.detach()))

def align_rows(slab, a_t, a_s, labels, w_f, w_r, w_c, rescaled, train):
    """Equations (6)-(10) for n rows, one operation after the other: the reference for the kernel below.

    slab            (2n, V) T above D of (5), any float dtype.  D is lost: if train, G (10) takes its place
    a_t, a_s        (n,) float32, scales of the two softmaxes;  labels (n,) int64, negative: no hard loss
    w_f, w_r, w_c   weights of L_FKL, L_RKL, L_hard in the gradient
    rescaled        whether any scale is not 1: then softmax(z_s) of the hard loss is not q
    returns         (n, 4) float32: L_FKL, L_RKL, L_hard and dL/da_s of each row
    """
    T, D = slab.float().chunk(2)  # (n, V) each
    z, at, as_ = T + D, a_t[:, None], a_s[:, None]  # (n, V), (n, 1), (n, 1)
    t, e = (at * T, as_ * D + (as_ - at) * T) if rescaled else (T, D)  # (n, V)
    s = t + e if rescaled else z  # (n, V)
    p, q = t.softmax(-1), s.softmax(-1)  # (n, V)
    top = [x.amax(-1, keepdim=True) for x in (t, s, p, q)]  # (n, 1) each; the largest probability is 1 / Z
    y, known = labels[:, None].clamp_min(0), labels[:, None] >= 0  # (n, 1)
    lse = torch.logsumexp(z, -1, keepdim=True) if rescaled else top[1] - top[3].log()  # (n, 1)
    hard = (lse - z.gather(1, y)) * known  # (n, 1)  (3)
    delta = e.sub_((top[1] - top[0]) + (top[2] / top[3]).log())  # (n, V)  (6) (7)
    diff = torch.expm1(delta).mul_(p)  # (n, V) q - p, with all its digits when both are close
    if max(x.abs() for x in delta.aminmax()) > 30:  # far apart: exp(delta) can overflow and p be 0
        diff = torch.where(delta.abs() < 0.5, diff, q - p)
    q_delta = q * delta  # (n, V)
    fkl, rkl = torch.addcmul(diff, p, delta, value=-1).sum(-1), (q_delta - diff).sum(-1)  # (n,)  (8)
    da = torch.zeros_like(fkl)  # (n,)
    if train:
        g = diff.mul_(w_f).add_(q_delta, alpha=w_r)  # (n, V)
        if rescaled:
            g.addcmul_(q, rkl[:, None], value=-w_r)  # (9)
            da = (g * z).sum(-1)  # (n,)
            g.mul_(as_).addcmul_((z - lse).exp_(), w_c * known)  # chain rule of s = a_s z_s; softmax(z_s)
        else:  # the same in one visit
            g.addcmul_(q, w_c * known - w_r * rkl[:, None])
        slab[len(T):] = g.scatter_add_(1, y, -w_c * known.float())  # (10)
    return torch.stack([fkl, rkl, hard[:, 0], da], 1)

def align_row_kernel(slab, a_t_of, a_s_of, label_of, out, n, stride, w_f, w_r, w_c, V: tl.constexpr,
                     BLOCK: tl.constexpr, RESCALED: tl.constexpr, TRAIN: tl.constexpr):
    """align_rows for Triton, in float32: a program a row, which visits it twice, BLOCK columns at a time."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row * stride goes beyond 2^31
    T, D, cols = slab + row * stride, slab + (row + n) * stride, tl.arange(0, BLOCK)
    a_t, a_s, y = tl.load(a_t_of + row), tl.load(a_s_of + row), tl.load(label_of + row).to(tl.int32)
    known, low, none = y >= 0, -float("inf"), tl.zeros([BLOCK], tl.float32)  # a negative label: no hard loss
    z_y = tl.load(T + y, known, 0.0).to(tl.float32) + tl.load(D + y, known, 0.0).to(tl.float32)
    m_t, m_s, m_z, Z_t, Z_s, Z_z, B = low, low, low, none, none, none, none  # sums (BLOCK,): added up last
    for i in range(0, V, BLOCK):  # visit 1: maxima, sums and B of (13), all rescaled when a maximum grows
        inside = i + cols < V
        x = tl.load(T + i + cols, inside, 0.0).to(tl.float32)  # (BLOCK,) teacher's logits
        d = tl.load(D + i + cols, inside, 0.0).to(tl.float32)  # (BLOCK,) student's minus teacher's
        t, e = (a_t * x, a_s * d + (a_s - a_t) * x) if RESCALED else (x, d)
        t = tl.where(inside, t, low)
        s = t + e  # (BLOCK,) = a_s z_s: the student's from the teacher's
        M = tl.maximum(m_t, tl.max(t, 0))
        Z_t, m_t = Z_t * tl.exp(m_t - M) + tl.exp(t - M), M  # exp(-inf) = 0: nothing was summed before
        M = tl.maximum(m_s, tl.max(s, 0))
        old, q = tl.exp(m_s - M), tl.exp(s - M)  # scalar, (BLOCK,); q not divided by Z_s yet
        Z_s, B, m_s = Z_s * old + q, B * old + q * e, M
        if RESCALED:
            z = tl.where(inside, x + d, low)  # z_s itself: the hard loss knows no temperature
            M = tl.maximum(m_z, tl.max(z, 0))
            Z_z, m_z = Z_z * tl.exp(m_z - M) + tl.exp(z - M), M
    Z_t, Z_s, Z_z, B = tl.sum(Z_t, 0), tl.sum(Z_s, 0), tl.sum(Z_z, 0), tl.sum(B, 0)  # scalars
    dL = (m_s - m_t) + tl.log(Z_s / Z_t)  # (6)
    center = B / Z_s - dL  # (13)
    lse = m_z + tl.log(Z_z) if RESCALED else m_s + tl.log(Z_s)  # ln sum exp z_s, of (3)
    over_t, over_s, fkl, rkl, da = 1 / Z_t, 1 / Z_s, none, none, none  # one division a row, not one a column
    for i in range(0, V, BLOCK):  # visit 2: every term, and G over D
        inside = i + cols < V
        x = tl.load(T + i + cols, inside, 0.0).to(tl.float32)
        d = tl.load(D + i + cols, inside, 0.0).to(tl.float32)
        t, e = (a_t * x, a_s * d + (a_s - a_t) * x) if RESCALED else (x, d)
        t = tl.where(inside, t, low)
        p, q, delta = tl.exp(t - m_t) * over_t, tl.exp(t + e - m_s) * over_s, e - dL  # (7)
        # exp(delta) - 1 for |delta| < 1/8 by its series: the first term left out is below 2^-24 of the sum
        near = delta * (1 + delta * (1 / 2 + delta * (1 / 6 + delta * (1 / 24 + delta * (1 / 120)))))
        diff = tl.where(tl.abs(delta) < 0.125, p * near, q - p)
        fkl += diff - p * delta  # (8)
        rkl += q * delta - diff
        if TRAIN:
            g = w_f * diff + w_r * q * (delta - center)  # (9)
            if RESCALED:
                da += g * (x + d)  # dL/da_s, a sum of g z_s
            q_raw = tl.exp(x + d - lse) if RESCALED else q  # softmax(z_s)
            G = a_s * g + tl.where(known, w_c, 0.0) * (q_raw - tl.where(i + cols == y, 1.0, 0.0))  # (10)
            tl.store(D + i + cols, G.to(slab.dtype.element_ty), inside)
    tl.store(out + 4 * row, tl.sum(fkl, 0))  # a row of (n, 4)
    tl.store(out + 4 * row + 1, tl.sum(rkl, 0))
    tl.store(out + 4 * row + 2, tl.where(known, lse - z_y, 0.0))
    tl.store(out + 4 * row + 3, tl.sum(da, 0))

@functools.cache
def compiled_kernel():
    """The kernel, by Triton. Imported here and not above: reading or running on a CPU needs no Triton."""
    global tl
    import triton
    import triton.language as tl
    return triton.jit(align_row_kernel, do_not_specialize=["n"])  # else another compilation for n = 1 or 16 k

def align_rows_triton(slab, a_t, a_s, labels, w_f, w_r, w_c, rescaled, train):
    """align_rows in one kernel."""
    n, V, out = len(a_t), slab.shape[1], torch.empty(len(a_t), 4, device=slab.device)  # out (n, 4) float32
    block = min(2048, 1 << (V - 1).bit_length())  # 8 columns a thread: one 16-byte load
    # maxnreg: the compiler alone aims at 64 registers a thread and spills (tests/compile_kernel.py)
    compiled_kernel()[(n,)](slab, a_t, a_s, labels, out, n, slab.stride(0), w_f, w_r, w_c, V=V, BLOCK=block,
                            RESCALED=rescaled, TRAIN=train, num_warps=8, maxnreg=96 if rescaled else 80)
    return out

def product(a, b, out):
    """out = a @ b in float32. Not bfloat16, then a cast: dX is a sum over all of V, its digits are wanted."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)  # read in bfloat16, summed in float32
    out.zero_()
    for x, y in zip(a.split(2 ** 14, 1), b.split(2 ** 14)):  # not all of V in one sum: 2e-5 off at H 8
        out += x.float() @ y.float()  # (n, H)
    return out

class FusedKLAlign(torch.autograd.Function):
    """(5)-(11), logits of one chunk of rows at a time. Forward makes the gradient too, backward scales it."""
    @staticmethod
    def forward(ctx, hs, ht, weight, labels, a_s, a_t, alpha, lam, tau, n_vocab, n_total, dtype, fused, exact,
                train):
        N, W = hs.shape[0], weight[:n_vocab].to(dtype)  # the rows after n_vocab are padding
        train_head, rescaled = train and weight.requires_grad, tau != 1 or a_s is not a_t
        dhs = torch.zeros(hs.shape, device=hs.device) if train else None  # (N, H) float32
        dW = torch.zeros(weight.shape, device=hs.device) if train_head else None  # (V, H) float32
        sums, da = torch.zeros(3, dtype=torch.float64, device=hs.device), torch.zeros(N, device=hs.device)
        weights = [w / n_total for w in (lam * tau ** 2 * alpha, lam * tau ** 2 * (1 - alpha), 1 - lam)]
        n = min(CHUNK_ROWS // (1 + 3 * exact) if fused else max(MIN_ROWS, CHUNK_ELEMENTS // n_vocab), N)
        # One slab for all chunks.  Rows of a multiple of 16 elements: cuBLAS and Triton load 16 bytes at once
        room = hs.new_empty(2 * n, -(-n_vocab // 16) * 16, dtype=torch.float32 if exact else dtype)
        for c in (slice(i, min(i + n, N)) for i in range(0, N, max(1, n))):
            h_t, h_d = ht[c].float(), hs[c].float() - ht[c].float()  # subtract first, round to dtype after
            h = torch.cat([h_t, h_d]).to(dtype)  # (2n, H)
            slab = (product if exact else torch.mm)(h, W.T, out=room[:len(h), :n_vocab])  # (2n, V)  (5)
            rows = (align_rows_triton if fused else align_rows)(
                slab, a_t[c], a_s[c], labels[c], *weights, rescaled, train)  # (n, 4)  (6)-(10)
            sums += rows[:, :3].sum(0, dtype=torch.float64)  # L_FKL, L_RKL, L_hard
            if train:
                G, da[c] = slab[len(h_t):].to(dtype), rows[:, 3]  # (n, V), (n,)
                product(G, W, out=dhs[c])  # (11)
                if train_head:
                    dW[:n_vocab] += product(G.T, hs[c].to(dtype), out=torch.empty_like(dW[:n_vocab]))
        fkl, rkl, ce = (sums / n_total).float()  # summed in float64: a million terms of 1e-7
        ctx.save_for_backward(dhs, dW, da if a_s.requires_grad else None)  # no logits: they are not needed
        ctx.dtypes = hs.dtype, weight.dtype  # a gradient has the dtype of what it is of
        ctx.mark_non_differentiable(fkl, rkl, ce)
        return lam * tau ** 2 * (alpha * fkl + (1 - alpha) * rkl) + (1 - lam) * ce, fkl, rkl, ce  # (4)
    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative is an error, not silently 0
    def backward(ctx, scale, *_):
        dhs, dW, da = ctx.saved_tensors  # (N, H), (V, H), (N,) float32
        dW, da = None if dW is None else (scale * dW).to(ctx.dtypes[1]), None if da is None else scale * da
        return (scale * dhs).to(ctx.dtypes[0]), None, dW, None, da, *[None] * 10

@torch._dynamo.disable  # a loop over chunks that makes its own gradient: nothing for a compiler to trace
def kl_align_loss(hs, ht, weight, labels, *, alpha, lam, tau=1.0, standardize=False, n_vocab=None,
                  n_total=None, kernel="auto", exact=False):
    """The alignment loss (4) from hidden rows, without the logits of the batch.

    hs, ht      (N, H) float32 or bfloat16: student and teacher rows after the final norm; ht is a constant
    weight      (V, H) lm_head of both sides; gets a gradient if it asks for one
    labels      (N,) int64, the token each row has to predict; negative: no hard loss there, its KL counts
    n_vocab     how many rows of weight are real, when it is padded (default: all)
    n_total     what the sums are divided by: answer tokens of all processes and micro-batches (default: N)
    kernel      "eager" (PyTorch), "triton" (CUDA, or any CPU with TRITON_INTERPRET=1, slowly) or "auto"
    exact       keep T and D in float32 when weight is bfloat16: more digits for more time
    returns     loss, {"kl_teacher_student", "kl_student_teacher", "ce"}: scalars, nats per answer token
    raises      ValueError for shapes or settings that do not fit, RuntimeError for a label not below n_vocab
    """
    N, V = hs.shape[0], weight.shape[0] if n_vocab is None else n_vocab
    if not (hs.shape == ht.shape == (N, weight.shape[1]) and labels.shape == (N,) and 0 < V <= len(weight)):
        shapes = *(tuple(x.shape) for x in (hs, ht, weight, labels)), V
        raise ValueError(f"shapes of hs, ht, weight, labels and n_vocab do not fit: {shapes}")
    good = 0 <= alpha <= 1 and 0 <= lam <= 1 and 0 < tau < math.inf
    if not good or kernel not in ("auto", "triton", "eager"):
        raise ValueError("want alpha and lam in [0, 1], tau above 0, kernel auto, triton or eager, "
                         f"not {alpha}, {lam}, {tau}, {kernel!r}")
    if kernel == "triton" and not hs.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("kernel triton needs a CUDA device; for a CPU set TRITON_INTERPRET=1 beforehand")
    fused = kernel == "triton" or kernel == "auto" and hs.is_cuda and bool(importlib.util.find_spec("triton"))
    torch._assert_async((labels < V).all(), "a label is not below n_vocab")  # on CUDA nothing waits for it
    device, ht = hs.device.type, ht.detach()  # the teacher is a constant
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):  # the matrix products run in dtype, all else in float32
        a_s, a_t = row_scales(hs, ht, weight, V, tau, standardize, dtype)  # (N,), (N,)
        loss, fkl, rkl, ce = FusedKLAlign.apply(
            hs, ht, weight, labels, a_s, a_t, alpha, lam, tau, V, max(1, N) if n_total is None else n_total,
            dtype, fused, exact and dtype != torch.float32,
            torch.is_grad_enabled() and (hs.requires_grad or weight.requires_grad))
    return loss, {"kl_teacher_student": fkl, "kl_student_teacher": rkl, "ce": ce}

@torch.no_grad()
def same_choice(hs, ht, weight):
    """Rows whose most probable token is the same on both sides: the number in the log one can feel."""
    pick = lambda h: torch.cat([(part.to(weight.dtype) @ weight.T).argmax(-1) for part in h.split(1024)])
    return int((pick(hs) == pick(ht)).sum())

def pair_of_rows(vlm, model, strong, weak):
    """Both forms of a batch of pairs -> ht (N, H), hs (N, H), labels (N,): a row is the same answer token."""
    labels = weak.labels[weak.labels != IGNORE]  # (N,), row-major as in VLM.forward
    assert torch.equal(labels, strong.labels[strong.labels != IGNORE]), "a pair has two answers"
    with torch.no_grad():
        ht = vlm(strong)  # the bare module with its live weights: DDP's forward would wait for a backward
    return ht, model(weak), labels

@torch.no_grad()
def show_pair(args, vlm, tokenizer, row, device):
    """One pair as a table over its answer tokens. The last line is what training would log for it."""
    strong, weak = (make_batch(vlm, tokenizer, [row], side, max_length=args.max_length, forms=SIDES)
                    .to(device) for side in SIDES)
    ht, hs, labels = pair_of_rows(vlm, vlm, strong, weak)
    loss_of = functools.partial(kl_align_loss, weight=vlm.lm_head, alpha=args.alpha, lam=args.lam,
                                tau=args.tau, standardize=args.standardize, kernel=args.kernel)
    word = lambda token: repr(tokenizer.decode([int(token)]))
    print(f"strong: {row['instruction']}  [{row['image_url'] or 'no picture'}]")
    print(f"weak:   {row['instruction_2']}  [{row['image_url_2'] or 'no picture'}]\n")
    print(f"{'position':>9} {'next token':>12} | {'teacher':>12} prob | {'student':>12} prob | "
          f"{'KL(t||s)':>9} {'KL(s||t)':>9} {'ce':>6}")
    rows, places = [], [b.labels[0].ne(IGNORE).nonzero().flatten().tolist() for b in (strong, weak)]
    for k, (a, b) in enumerate(zip(*places)):
        loss, parts = loss_of(hs=hs[k:k + 1], ht=ht[k:k + 1], labels=labels[k:k + 1])
        rows.append([x.item() for x in (*parts.values(), loss)])
        (p_t, top_t), (p_s, top_s) = ((vlm.lm_head @ h[k]).softmax(-1).max(-1) for h in (ht, hs))
        print(f"{a:4d} {b:4d} {word(labels[k]):>12} | {word(top_t):>12} {p_t:.2f} | {word(top_s):>12} "
              f"{p_s:.2f} | {rows[-1][0]:9.4f} {rows[-1][1]:9.4f} {rows[-1][2]:6.2f}")
    kl_ts, kl_st, ce, mean = np.mean(rows, axis=0)
    print(f"mean of {len(rows)} tokens: kl_ts {kl_ts:.4f} kl_st {kl_st:.4f} ce {ce:.4f} -> loss {mean:.4f}; "
          f"all at once, as in training: {loss_of(hs=hs, ht=ht, labels=labels)[0]:.4f}")

def main(argv=None):
    args = parse_args(argv)
    rank, world, device = setup_distributed()
    if args.batch < world:
        sys.exit(f"--batch {args.batch} leaves some of the {world} processes without a row: raise it")
    rows, folder = open_data(args, rank, f"stage2_{args.pairs}.jsonl", PAIR)
    if args.init == "out/stage1" and not finished(args.init):
        if rank == 0:
            print(f"{args.init} is missing or unfinished: stage 1 first, a minute on 2 CPU cores", flush=True)
        stage1_text_sft.main(["--data", folder or "data", "--out", args.init])
        if world > 1:
            dist.barrier()  # rank 0 may still be writing
    vlm, tokenizer = start_vlm(args, device, TRAINABLE)
    if args.show is not None:
        if not 0 <= args.show < len(rows):
            sys.exit(f"--show {args.show}: there are pairs 0 to {len(rows) - 1}")
        return show_pair(args, vlm, tokenizer, rows[args.show], device)
    for name, child in vlm.named_children():  # before DDP, which looks once at what needs a gradient
        child.requires_grad_(name in TRAINABLE)
        if rank == 0:
            size = sum(p.numel() for p in child.parameters())
            print(f"{name}: {size:,} parameters, {'trained' if name in TRAINABLE else 'frozen'}")
    optimizer = make_optimizer(vlm, args)
    with open(__file__, encoding="utf-8") as f:  # a run explains itself: all this goes into every checkpoint
        run = {"flags": vars(args), "init_sha256": vlm.source_sha256, "data_sha256": rows.sha256(),
               "script": f.read()}
    start = start_or_resume(args, vlm, optimizer, run, rank)
    model = DistributedDataParallel(vlm) if world > 1 else vlm
    vlm.train()
    fingerprint = lambda: {k: torch.hash_tensor(v).item() for k, v in vlm.language_model.state_dict().items()}
    begun, tokens, lost = time.time(), 0, np.zeros(2, int)
    before = fingerprint()  # not a copy: it would be as large as the model
    quiet = rank > 0 or not sys.stderr.isatty()  # one bar, and none in a log file
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, disable=quiet):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        parts = rows_of_step(step, rows, args, rank, world, "_2")
        strong, weak = ([make_batch(vlm, tokenizer, part, side, max_length=args.max_length, forms=SIDES)
                         .to(device) for part in parts] for side in SIDES)
        # The loss of a step is ONE mean over all answer tokens of the global batch.  So they are counted
        # first, and a micro-batch adds (its sum) / (that count).  Not a mean of means: it would weigh short
        # answers more.
        n_tokens, n_seen, *n_lost = total(sum(int((b.labels != IGNORE).sum()) for b in weak),
                                          sum(int(b.attention_mask.sum()) for b in strong + weak),
                                          *sum(b.lost for b in weak).tolist(), device=device)
        here, logging = np.zeros(5), (step + 1) % args.log_every == 0 or step + 1 == args.steps
        # ================================= the method: one step of stage 2 ==================================
        for k, pair in enumerate(zip(strong, weak)):
            if world > 1:  # processes exchange gradients once a step, with the last micro-batch
                model.require_backward_grad_sync = k == len(weak) - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                ht, hs, labels = pair_of_rows(vlm, model, *pair)  # (N, H), (N, H), (N,)
                loss, parts_of_loss = kl_align_loss(
                    hs, ht, vlm.lm_head, labels, alpha=args.alpha, lam=args.lam, tau=args.tau,
                    standardize=args.standardize, n_total=max(1, n_tokens), kernel=args.kernel)
            (loss * world).backward()  # DDP takes the mean over processes; x world makes it the sum we want
            agree = same_choice(hs, ht, vlm.lm_head) / max(1, n_tokens) if logging else 0.0
            here += [*torch.stack([loss, *parts_of_loss.values()]).tolist(), agree]  # one wait for the device
        # ================================== from here on only bookkeeping ===================================
        assert all((p.grad is not None) == p.requires_grad for p in vlm.parameters())
        norm = torch.nn.utils.clip_grad_norm_(vlm.parameters(), args.clip or math.inf).item()
        loss_all, kl_ts, kl_st, ce, agree = total(*here, device=device)
        if not math.isfinite(loss_all + norm):  # the same sums on all processes, so all of them stop here
            sys.exit(f"step {step + 1}: loss {loss_all}, gradient norm {norm}: stopped before the step, not "
                     "saved; a lower --lr may help; rows here: "
                     f"{[row['id'] for part in parts for row in part]}")
        optimizer.step()
        optimizer.zero_grad()
        done, tokens, lost = step + 1, tokens + n_seen, lost + np.array(n_lost, int)
        if rank == 0 and logging:
            lr, speed, gb = group["lr"], tokens / (time.time() - begun), peak_gigabytes(device)
            write_log(args, f"step {done}/{args.steps} | loss {loss_all:.4f} (kl_ts {kl_ts:.2f} kl_st "
                      f"{kl_st:.2f} ce {ce:.2f}) | agree {agree:.1%} | gnorm {norm:.2f} | lr {lr:.1e} | "
                      f"{speed:,.0f} tok/s | {gb:.1f} GB", dict(step=done, loss=loss_all, kl_ts=kl_ts, ce=ce,
                      kl_st=kl_st, agree=agree, gnorm=norm, lr=lr, tok_s=speed, gb=gb), lost)
        if rank == 0 and (done % args.save_every == 0 or done == args.steps):
            save_checkpoint(args.out, done, vlm, tokenizer, optimizer, {"run": run})
    if rank == 0:
        if args.steps == 0:  # nothing to train, but whoever asked wants a model there
            save_checkpoint(args.out, 0, vlm, tokenizer, optimizer, {"run": run})
        assert fingerprint() == before, "the frozen LLM has changed"
        print(f"stage 2 done in {time.time() - begun:.0f} s: {args.out}/step-{args.steps}", flush=True)
        if args.evaluate and folder:  # the table is of data_gen.py's test problems
            evaluation.main([*filter(None, [args.init]), args.out, "--data", folder])

if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.barrier()  # rank 0 may still be writing
        dist.destroy_process_group()
