"""Stage 2: progressive upward multimodal alignment, the method of Math-PUMA (arXiv 2408.08640).

    torchrun stage2_kl_align.py                       # data, stage 1, stage 2, table: 5 minutes
    torchrun --nproc_per_node 8 stage2_kl_align.py    # 8 processes: same batches, same parameters
    python stage2_kl_align.py --show 1                # one pair, token by token

Every row is a pair: one problem text-rich (strong) and vision-rich (weak), with one answer.  The
strong form runs without gradient; the weak form's next-token distribution is pulled up to it at
every answer token.  The language model is frozen: it is the vision encoder and the projector that
learn to say with pixels what the text would have said.

Differs from the paper in: the model and the data; four rungs of data_gen.py's ladder instead of the
paper's levels; every level is pulled to the text (--pairs top), not to its neighbour; --alpha,
--lam, --lr, --batch and --steps are ours.
Differs from the released code in: the README's section "Paper, released code, this code".

In this order: flags; the blocks that all stages share; the loss (equations, textbook, how to make
it fast, kernel); the two forms of a pair; --on_policy; --show; main.

To fork it, change first: align_rows, the loss as a textbook has it (with --kernel eager it runs on
a GPU too); or TRAINABLE; or what stands between the two banners in main.
"""
from __future__ import annotations  # tl.constexpr is but a name where Triton is not installed

import argparse
import functools
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import data_gen
import eval as evaluation
import stage1_text_sft
from model import (IGNORE, PAIR, PROJECTORS, JsonLines, is_finished, load_optimizer, make_batches,
                   on_main_process, open_data, save_checkpoint, says_it_in_one_line, start_run,
                   start_vlm, try_to_save)

try:
    import triton
    import triton.language as tl
except ImportError:  # reading, or running on a CPU, needs no Triton
    triton = None

TRAINABLE = ("vision_model", "projector")  # the language model must come out bit-identical
FORMS = ("", "_2")  # of a pair, as suffixes of its fields: strong = teacher, weak = student
LOG_EVERY = 10  # steps between log lines
LOG_LINE = ("step {step}/{steps} | loss {loss:.4f} (kl_ts {kl_ts:.2f} kl_st {kl_st:.2f} "
            "ce {ce:.2f}) | agree {agree:.1%} | gnorm {gnorm:.2f} | lr {lr:.1e} | "
            "{rows_s:,.1f} pairs/s | {dropped:.1%} too long | {writing:.0%} writing")


def make_parser():
    """script = default of the released training script, reported = the paper's, from memory."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--init", default="out/stage1", help="model to start from")
    add("--llm", help="Qwen2 or Llama, folder (hf download)")
    add("--vision", help="SigLIP or its tower, folder")
    add("--projector", choices=list(PROJECTORS), help="a new one (None: mlp)")
    add("--data", nargs="+", default=["data"], help="folder of data_gen.py or .jsonl files")
    add("--out", default="out/stage2", help="folder of checkpoints, metrics")
    add("--pairs", default="top", choices=list(data_gen.PAIRS), help="teacher: text, or a level up")
    add("--alpha", type=float, default=0.5, help="of KL(teacher||student) (reported .2, script .5)")
    add("--lam", type=float, default=0.5, help="share of the KLs in the loss (reported, script .1)")
    add("--tau", type=float, default=1.0, help="temperature in the KLs (reported, script: 1)")
    add("--standardize", action="store_true", help="in the KLs: logits / deviation (script)")
    add("--kernel", default="auto", choices=["auto", "triton", "eager"], help="auto: by device")
    add("--on_policy", type=float, default=0.0, help="share of pairs it answers itself")
    add("--on_policy_tokens", type=int, default=64, help="of such an answer, at most")
    add("--steps", type=int, default=200, help="optimizer steps (ours: half a pass)")
    add("--batch", type=int, default=32, help="pairs a step, all processes (reported: 64)")
    add("--micro_batch", type=int, default=16, help="pairs a forward pass at most")
    add("--lr", type=float, default=1e-3, help="highest learning rate (reported: 5e-5)")
    add("--warmup", type=float, default=0.02, help="share of rising steps (reported)")
    add("--weight_decay", type=float, default=0.1, help="of matrices (reported, script)")
    add("--clip", type=float, default=1.0, help="highest gradient norm, 0: no limit")
    add("--max_length", type=int, default=1024, help="tokens of a form (script: 2048)")
    add("--seed", type=int, default=3407, help="of row order, projector (script: 3407)")
    add("--recompute", action="store_true", help="LLM layers again in backward")
    add("--workers", type=int, default=4 if torch.cuda.is_available() else 0,
        help="processes that make batches")
    add("--save_every", type=int, default=50, help="steps between checkpoints")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from --out")
    add("--evaluate", action=argparse.BooleanOptionalAction, default=True, help="end with a table")
    add("--show", type=int, metavar="I", help="print pair I token by token")
    return parser


# >>> identical in stage1/2/3: flags
# All other numbers: at least 0, at most a billion.
AT_LEAST_1 = ("batch", "micro_batch", "max_length", "save_every", "on_policy_tokens")
AT_MOST_1 = ("warmup", "alpha", "lam", "on_policy")


def parse_args(argv=None):
    """The flags, checked before anything runs. What is not the default is printed, with a *."""
    parser = make_parser()
    args = parser.parse_args(argv)
    line = os.path.basename(__file__)
    for flag, value in vars(args).items():
        lowest = 1 if flag in AT_LEAST_1 else 0
        highest = 1 if flag in AT_MOST_1 else 10 ** 9
        # Refuses nan as well: every comparison with it is false.
        if isinstance(value, (int, float)) and not lowest <= value <= highest:
            parser.error(f"--{flag} {value}: give a value from {lowest} to {highest}")
        if value != parser.get_default(flag):
            line += f" {flag}={value}*"

    if args.llm:
        fits = args.vision and args.init == parser.get_default("init")
        args.init = None
    else:
        fits = not (args.vision or args.projector)
    if not fits:
        parser.error("give --init, or --llm and --vision (and --projector), not both")
    if os.environ.get("RANK", "0") == "0":
        print(line)
    return args
# <<<


# >>> identical in stage1/2/3: distributed
def setup_distributed():
    """-> (rank, world size, device). torchrun starts the processes and tells each who it is."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            sys.exit("more processes than GPUs: lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # Already done when one stage starts another in this process.
    if world > 1 and not dist.is_initialized():
        # NCCL between GPUs, gloo between CPUs.  A day: all wait while rank 0 writes 100 GB; when a
        # process dies, torchrun ends the others at once.
        dist.init_process_group(timeout=timedelta(days=1))
    return rank, world, device


def leave_processes():
    """Waits for all processes, rank 0 may still be writing; from here on each is alone."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def sum_over_processes(values, device):
    """A list of numbers, each summed over all processes. float64: counts of tokens stay exact."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()
# <<<


# >>> identical in stage1/2/3: schedule and order
def learning_rate(step, args):
    """Linear warm-up to --lr, then a cosine that would reach 0 one step after the last."""
    warmup_steps = math.ceil(args.warmup * args.steps)
    if step < warmup_steps:
        return args.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (args.steps - warmup_steps)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


@functools.cache  # 8 bytes for each row that the run reads
def shuffled(n_rows, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n_rows)


def rows_of_step(step, rows, args, rank, world):
    """This process's rows of the global batch of a step, as a list of micro-batches.

    The rows are a function of the step alone, so there is no state to save, and a resumed run and a
    run on more processes see the same batches.  An epoch is a permutation of all rows; its end does
    not cut a batch short, the next epoch fills it up.
    """
    # All of them are read, since sorting needs their lengths; pictures are opened for ours only.
    batch = []
    for position in range(step * args.batch, (step + 1) * args.batch):
        epoch, place = divmod(position, len(rows))
        index = shuffled(len(rows), args.seed, epoch)[place]
        batch.append(rows[index] | {"position": position})

    # Inside a batch the order is free, since its loss is one sum.  Rows alike in length, with or
    # without a picture, share a micro-batch: less of it is padding.
    form = FORMS[-1]
    batch.sort(key=lambda row: (
        row[f"image_url{form}"] != "", len(row[f"instruction{form}"]) + len(row[f"output{form}"])))
    mine = batch[rank::world]  # rows rank, rank + world, ...: short and long ones for everyone
    return [mine[k:k + args.micro_batch] for k in range(0, len(mine), args.micro_batch)]
# <<<


# >>> identical in stage1/2/3: batches
@dataclass
class StepBatches:
    """Item `step`: this process's micro-batches of that step, their answer tokens, rows dropped.

    A micro-batch is a list with one Batch for each of FORMS.  A DataLoader's workers get a copy of
    this object: it holds line numbers and a tokenizer, never the model.
    """
    rows: JsonLines
    tokenizer: PreTrainedTokenizerFast
    config: dict  # of the VLM
    args: argparse.Namespace
    rank: int
    world: int

    def __getitem__(self, step):
        micro_batches = []
        n_answer_tokens = 0
        n_dropped = 0
        for rows in rows_of_step(step, self.rows, self.args, self.rank, self.world):
            batches, dropped = make_batches(
                self.tokenizer, self.config, rows, FORMS, self.args.max_length)
            micro_batches.append(batches)
            n_answer_tokens += int(batches[0].is_answer.sum())
            n_dropped += dropped
        return micro_batches, n_answer_tokens, n_dropped


def batches_of_steps(dataset, first_step):
    """Yields (step, item of StepBatches) for the rest of the run, under a progress bar."""
    args = dataset.args
    # A worker is two steps ahead, in shared memory (/dev/shm; Docker gives 64 MB: --shm-size).  By
    # the default strategy each tensor there holds an open file, and those run out.
    torch.multiprocessing.set_sharing_strategy("file_system")
    steps = range(first_step, args.steps)
    loader = DataLoader(dataset, batch_size=None, sampler=steps, num_workers=args.workers)
    # One bar: rank 0's.  None: on a terminal only, not in a log file.
    bar = tqdm(steps, disable=dataset.rank > 0 or None)
    yield from zip(bar, loader)
# <<<


# >>> identical in stage1/2/3: optimizer and log
def make_optimizer(vlm, args):
    """AdamW over exactly what learns. Norms and biases, the vectors, are not decayed, as usual."""
    learning = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in learning if parameter.ndim > 1]
    vectors = [parameter for parameter in learning if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups)  # its betas are those reported; main sets lr in each step


def write_log(args, device, numbers):
    """LOG_LINE for the reader, the same numbers in metrics.jsonl for a plot.

    Only ever appended to: after a resume a step may stand there twice, the last line counts.
    """
    line = LOG_LINE.format(**numbers)
    if device.type == "cuda":
        line += f" | {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
    tqdm.write(line)  # not print: it would tear the progress bar
    with open(f"{args.out}/metrics.jsonl", "a") as f:
        f.write(json.dumps(numbers) + "\n")
# <<<


# ==================================================================================================
# The loss.  At one answer position: z_t the teacher's logits (strong form, no gradient), z_s the
# student's (weak form), y the next answer token, tau the temperature.
#
#     p = softmax(z_t / tau)      q = softmax(z_s / tau)
#     L_FKL  = KL(p || q) = sum p (ln p - ln q)    KL(teacher || student): what it misses      (1)
#     L_RKL  = KL(q || p) = sum q (ln q - ln p)    KL(student || teacher): what it makes up    (2)
#     L_hard = -ln softmax(z_s)[y]                 cross-entropy with the label                (3)
#     L = lam tau^2 (alpha L_FKL + (1 - alpha) L_RKL) + (1 - lam) L_hard                       (4)
#
# tau^2: a softmax at temperature tau has gradients smaller by 1 / tau^2 (Hinton et al., arXiv
# 1503.02531).  Early in training L_FKL fits the head of the teacher's distribution and L_RKL its
# tail (Wu et al., arXiv 2404.02657).  L is averaged over all answer positions of the global batch.
#
# To compute by hand, tau 1: three words, p = (1/2, 1/4, 1/4), q = (1/8, 3/8, 1/2), y the first.
#     L_FKL  = 1/2 ln 4 + 1/4 ln 2/3 + 1/4 ln 1/2 = 0.4185
#     L_RKL  = 1/8 ln 1/4 + 3/8 ln 3/2 + 1/2 ln 2 = 0.3253
#     L_hard = ln 8                               = 2.0794
# and what pulls each logit of the student down (gradient > 0) or up (< 0), derived further below:
#     L_FKL   q - p                   = (-0.3750, 0.1250, 0.2500)
#     L_RKL   q (ln q - ln p - L_RKL) = (-0.2140, 0.0300, 0.1839)
#     L_hard  q - (1, 0, 0)           = (-0.8750, 0.3750, 0.5000)
# The teacher's first word is lifted less by L_RKL: there each word is weighted by q, which is 1/8.
# ==================================================================================================

# --------------------------------------------------------------------------------------------------
# The textbook: the equations as they stand, but for z_s, which comes from a difference, see (5);
# the gradient by autograd.  It is what runs on a CPU, and what the kernel further down has to
# equal.  Its values lose 1e-7 nats a token to rounding, so a KL of that size is noise in the log;
# the gradient keeps three digits even there.

CHUNK_ELEMENTS = 2 ** 19  # rows x V of a chunk: 2 MB a tensor, which stays in a CPU's caches
MIN_ROWS = 128  # of a chunk: each reads all of W


def align_rows(hs, ht, W, labels, tau, standardize):
    """L_FKL, L_RKL and L_hard, each summed over n answer positions. -> (3,) float32, in nats

    hs, ht  (n, H) hidden rows of student and teacher
    W       (V, H) the lm_head of both
    labels  (n,) integer: the token each position has to predict; negative: no hard loss there
    """
    z_t = (ht.to(W.dtype) @ W.T).float()  # (n, V)
    # Not hs @ W.T: when both forms nearly agree, two rounded logits differ by their rounding alone.
    z_s = z_t + ((hs - ht).to(W.dtype) @ W.T).float()  # (n, V)
    z_t = z_t.detach()  # the teacher is a constant, also where W learns

    t = z_t / tau
    s = z_s / tau
    if standardize:  # the released code's; it removes the mean too, which a softmax does not notice
        t = t / (z_t.std(-1, keepdim=True) + 1e-6)
        s = s / (z_s.std(-1, keepdim=True) + 1e-6)
    ln_p = F.log_softmax(t, dim=-1)  # (n, V) teacher
    ln_q = F.log_softmax(s, dim=-1)  # (n, V) student
    p = ln_p.exp()
    q = ln_q.exp()

    fkl = (p * (ln_p - ln_q)).sum()  # (1)
    rkl = (q * (ln_q - ln_p)).sum()  # (2)
    labels = labels.long().masked_fill(labels < 0, IGNORE)
    hard = F.cross_entropy(z_s, labels, ignore_index=IGNORE, reduction="sum")  # (3)
    return torch.stack([fkl, rkl, hard])


def align_all_rows(hs, ht, W, labels, tau, standardize):
    """align_rows over N rows, a chunk at a time: the logits of all may not fit in memory."""
    n = max(MIN_ROWS, CHUNK_ELEMENTS // len(W))
    sums = torch.zeros(3, dtype=torch.float64, device=hs.device)
    for start in range(0, max(1, len(hs)), n):  # 1: the loss hangs on hs also when it has no row
        rows = slice(start, start + n)
        # checkpoint: keeps no (n, V) tensor for the backward pass, makes the chunk again there
        sums = sums + checkpoint(
            align_rows, hs[rows], ht[rows], W, labels[rows], tau, standardize, use_reentrant=False)
    return sums


# --------------------------------------------------------------------------------------------------
# How to make it fast on a GPU.
#
# Why T and D.  Teacher and student share the frozen lm_head W (V, H); ht, hs (N, H) are their rows.
#     T = ht W^T      D = (hs - ht) W^T      z_t = T      z_s = T + D                        (5)
# and not z_s = hs W^T: a KL's gradient is a difference of two nearly equal distributions.  Rounding
# both to bfloat16 leaves noise that stays when the student gets better; D shrinks with it, and
# hs == ht gives exactly 0.
#
# Memory traffic.  One slab of memory serves every chunk of n rows:
#                      product (5)          kernel                product (11)
#     rows 0 .. n-1    T   (n, V)           T                     -
#     rows n .. 2n-1   D   (n, V)           G, written over D     dL/dhs = G W
# In bfloat16 (5) writes both, 4 n V bytes; visit 1 of the kernel reads both (4), visit 2 reads both
# and writes G (6), (11) reads G (2).  Together 16 n V bytes, 10 of them the kernel's.  align_rows,
# one operation at a time and mostly in float32, moves 404 n V bytes (a test counts them):
#     140 forward     2 products 4, to float32 12, z_s 12, / tau 16, 3 log_softmax 24, 2 exp 16,
#                     2 differences 24, 2 products with p and q 24, 2 sums 8
#     140             all of it again in the backward pass, which is what the checkpoint costs
#     124 backward    2 log_softmax 24, 3 sums of gradients 36, 4 products 36, a sign 8, rest 20
# What remains is arithmetic: three products of 2 N H V operations.  So: the products to cuBLAS, all
# that stands between them into ONE kernel, and no third visit.  Not flash style, which never stores
# logits: it has to make them twice, 10 N H V operations instead of 6.
#
# Derivation.  For each row
#     t = T / tau      e = D / tau      s = t + e
#     lse(x) = ln sum exp(x_k) = max x + ln Z,   Z = sum exp(x_k - max x)     ln p = t - lse(t)
#     shift = lse(s) - lse(t) = (max s - max t) + ln(Z_s / Z_t)                              (6)
#     delta = e - shift = ln q - ln p                                                        (7)
# (6) never subtracts two rounded log-sum-exps.  By (7) the KLs are sum -p delta and sum q delta.
# Since p and q both sum to 1, 0 = sum (q - p) may be added to the one and taken from the other:
#     L_FKL = sum (q - p) - p delta      L_RKL = sum q delta - (q - p)                       (8)
# Now every term is >= 0 (it is p or q times x - 1 - ln x), and none cancels another.
# By one logit of the student, d q_k / d s_j = q_k ([k = j] - q_j).  L_FKL contains ln q only:
#     d L_FKL / d s_j = -sum p_k ([k = j] - q_j) = q_j - p_j
#     d L_RKL / d s_j = sum (d q_k / d s_j) (delta_k + 1)
#                     = q_j (delta_j + 1) - q_j sum q_k (delta_k + 1) = q_j (delta_j - L_RKL)
# Both together, with their weights, and the hard loss, for L of one row (of N: all / n_total):
#     g = lam tau^2 (alpha (q - p) + (1 - alpha) q (delta - L_RKL))    gradient of the KLs by s  (9)
#     G = g / tau + (1 - lam) (softmax(z_s) - onehot(y))               gradient by z_s      (10)
#     dL/dhs = G W                                                                          (11)
# Why two visits are enough: (9) needs L_RKL of the whole row, and by (7)
#     L_RKL = sum q delta = sum q e - shift = B / Z_s - shift,  B = sum exp(s - max s) e    (12)
# B and both Z can be summed in one visit with a running maximum: when a larger one comes, what was
# summed so far is multiplied by exp(old - new).
#
# When not to use it: teacher and student have different W (then there is no D); W learns; logits
# are standardized, whose gradient needs more sums; or N x V logits fit into a cache anyway.
#
# How fast it can be.  4,096 rows of V 151,936 need, by count, on an H200: 1.45 ms for the kernel's
# bytes (at 4.3 TB/s), and 1.0 ms for its instructions (132 x 128 lanes at 1.98 GHz), 55 an element
# in both visits, 70 with a tau (tests/compile_kernel.py counts them in the machine code).  With 83,
# before columns came 8 by 8 and exp2 for exp, the instructions would have taken longer.

NUM_WARPS = 8  # 256 threads a row: 8 columns each, a turn
KERNEL_ROWS = 2048  # of a chunk: T and D of V 151,936 in bfloat16 are 1.2 GB, all together 1.4


def align_row_kernel(
    T_ptr,  # (n, V) teacher's logits
    D_ptr,  # (n, V) in: student's minus teacher's logits; out: G (10)
    label_ptr,  # (n,) int64; negative: no hard loss
    out_ptr,  # (n, 3) float32, out: L_FKL, L_RKL, L_hard of the row
    stride,  # elements from one row of T or D to the next
    inv_tau,  # 1 / tau
    w_fkl,  # weight of L_FKL in the gradient: lam tau^2 alpha / n_total
    w_rkl,  # of L_RKL: lam tau^2 (1 - alpha) / n_total
    w_hard,  # of L_hard: (1 - lam) / n_total
    V: tl.constexpr,
    BLOCK: tl.constexpr,  # columns a turn
    HAS_TAU: tl.constexpr,  # tau is not 1: then softmax(z_s) of the hard loss is not q
    TRAIN: tl.constexpr,  # whether D becomes G
):
    """align_rows for one row, which this program visits twice, BLOCK columns at a time."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row * stride goes beyond 2^31
    T_ptr += row * stride
    D_ptr += row * stride
    # (BLOCK / 8, 8): thread i holds columns 8i .. 8i+7, which it loads at once, 16 bytes, and whose
    # maximum or sum, along dimension 1, needs no other thread.
    cols = 8 * tl.arange(0, BLOCK // 8)[:, None] + tl.arange(0, 8)[None, :]
    lowest = -1e30  # stands where there is no column; not -inf, since -inf - -inf is no number
    LOG2E = 1.4426950408889634  # exp(x) = 2^(x log2 e): the hardware has 2^x, tl.exp is longer

    # The label's logit, now: visit 2 writes over it.
    label = tl.load(label_ptr + row)
    has_label = label >= 0
    is_word = has_label & (label < V)
    z_label = tl.load(T_ptr + label, is_word, 0.0).to(tl.float32)
    z_label += tl.load(D_ptr + label, is_word, 0.0).to(tl.float32)

    # Visit 1: each thread's maxima, and its sums relative to them.
    none = tl.zeros([BLOCK // 8], tl.float32)
    max_t = none + lowest
    max_s = none + lowest
    max_z = none + lowest
    Z_t = none  # of exp(t - max_t)
    Z_s = none  # of exp(s - max_s)
    Z_z = none  # of exp(z_s - max_z): the hard loss knows no temperature
    B = none  # of exp(s - max_s) e, for (12)
    for start in range(0, V, BLOCK):
        inside = start + cols < V
        T = tl.load(T_ptr + start + cols, inside, lowest).to(tl.float32)
        D = tl.load(D_ptr + start + cols, inside, 0.0).to(tl.float32)
        t = T
        e = D
        if HAS_TAU:
            t = T * inv_tau
            e = D * inv_tau
        s = t + e

        new_max = tl.maximum(max_t, tl.max(t, 1))
        exp_t = tl.exp2((t - new_max[:, None]) * LOG2E)
        Z_t = Z_t * tl.exp2((max_t - new_max) * LOG2E) + tl.sum(exp_t, 1)
        max_t = new_max

        new_max = tl.maximum(max_s, tl.max(s, 1))
        old_scale = tl.exp2((max_s - new_max) * LOG2E)
        exp_s = tl.exp2((s - new_max[:, None]) * LOG2E)
        Z_s = Z_s * old_scale + tl.sum(exp_s, 1)
        B = B * old_scale + tl.sum(exp_s * e, 1)
        max_s = new_max

        if HAS_TAU:
            z = T + D
            new_max = tl.maximum(max_z, tl.max(z, 1))
            exp_z = tl.exp2((z - new_max[:, None]) * LOG2E)
            Z_z = Z_z * tl.exp2((max_z - new_max) * LOG2E) + tl.sum(exp_z, 1)
            max_z = new_max

    # All threads together: one maximum, and every sum relative to it.
    row_max_t = tl.max(max_t, 0)
    row_max_s = tl.max(max_s, 0)
    thread_scale = tl.exp2((max_s - row_max_s) * LOG2E)
    sum_t = tl.sum(Z_t * tl.exp2((max_t - row_max_t) * LOG2E), 0)
    sum_s = tl.sum(Z_s * thread_scale, 0)
    shift = (row_max_s - row_max_t) + tl.log(sum_s / sum_t)  # (6)
    row_rkl = tl.sum(B * thread_scale, 0) / sum_s - shift  # (12)
    lse_z = row_max_s + tl.log(sum_s)
    if HAS_TAU:
        row_max_z = tl.max(max_z, 0)
        lse_z = row_max_z + tl.log(tl.sum(Z_z * tl.exp2((max_z - row_max_z) * LOG2E), 0))
    log2_sum_t = tl.log2(sum_t)
    log2_sum_s = tl.log2(sum_s)

    # Visit 2: every term of the sums, and G over D.
    w_label = tl.where(has_label, w_hard, 0.0)
    fkl = tl.zeros([BLOCK // 8, 8], tl.float32)
    rkl = tl.zeros([BLOCK // 8, 8], tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + cols < V
        T = tl.load(T_ptr + start + cols, inside, lowest).to(tl.float32)
        D = tl.load(D_ptr + start + cols, inside, 0.0).to(tl.float32)
        t = T
        e = D
        if HAS_TAU:
            t = T * inv_tau
            e = D * inv_tau
        p = tl.exp2((t - row_max_t) * LOG2E - log2_sum_t)
        q = tl.exp2((t + e - row_max_s) * LOG2E - log2_sum_s)
        delta = e - shift  # (7)
        p_delta = p * delta
        q_delta = q * delta

        # q - p = p (exp(delta) - 1), for a small delta by the series of exp: else all digits would
        # cancel.  Below 1/8 the first term left out is less than 2^-24 of the sum.
        series = 1 / 2 + delta * (1 / 6 + delta * (1 / 24 + delta * (1 / 120)))
        series = p_delta + p_delta * delta * series
        q_minus_p = tl.where(tl.abs(delta) < 0.125, series, q - p)
        fkl += q_minus_p - p_delta  # (8)
        rkl += q_delta - q_minus_p

        if TRAIN:
            # (9) and (10), the factors of q collected; at the label's column 1 is taken from q
            g = w_fkl * q_minus_p + w_rkl * q_delta
            if HAS_TAU:
                g = (g - w_rkl * row_rkl * q) * inv_tau
                g += w_label * tl.exp2((T + D - lse_z) * LOG2E)
            else:
                g += (w_label - w_rkl * row_rkl) * q
            if start <= label and label < start + BLOCK:
                g = tl.where(start + cols == label, g - w_label, g)
            tl.store(D_ptr + start + cols, g.to(D_ptr.dtype.element_ty), inside)

    row_hard = lse_z - z_label
    row_hard = tl.where(label < V, row_hard, float("nan"))  # no such word: an error must show
    tl.store(out_ptr + 3 * row, tl.sum(tl.sum(fkl, 1), 0))
    tl.store(out_ptr + 3 * row + 1, tl.sum(tl.sum(rkl, 1), 0))
    tl.store(out_ptr + 3 * row + 2, tl.where(has_label, row_hard, 0.0))


@functools.cache
def compiled_kernel():
    return triton.jit(align_row_kernel)


def align_rows_triton(T, D, labels, out, tau, weights, train):
    """The kernel over n rows: L_FKL, L_RKL and L_hard into out (n, 3). If train, D becomes G."""
    n, V = T.shape
    block = min(2048, max(8, triton.next_power_of_2(V)))  # 8 columns a thread: a load of 16 bytes
    with torch.cuda.device_of(T):  # Triton launches on the current device; T may be on another
        compiled_kernel()[(n,)](
            T, D, labels, out, T.stride(0), 1 / tau, *weights, V=V, BLOCK=block, HAS_TAU=tau != 1,
            TRAIN=train, num_warps=NUM_WARPS)


def product(G, W):
    """G W in float32, (n, V) x (V, H) -> (n, H): a sum over all of V, whose digits are wanted."""
    if G.is_cuda and G.dtype != torch.float32:
        return torch.mm(G, W, out_dtype=torch.float32)  # bfloat16 is read, float32 summed and kept
    return G.float() @ W.float()


class FusedKLAlign(torch.autograd.Function):
    """A chunk of rows at a time: product (5), kernel, product (11).

    Forward makes the gradient too, while all that it needs is at hand; backward only scales it.
    """

    @staticmethod
    def forward(ctx, hs, ht, W, labels, alpha, lam, tau, n_total):
        train = ctx.needs_input_grad[0]
        kl_weight = lam * tau ** 2 / n_total
        hard_weight = (1 - lam) / n_total
        weights = (kl_weight * alpha, kl_weight * (1 - alpha), hard_weight)

        # Memory for one chunk, used by all, and for the results.
        N, H = hs.shape
        n = min(KERNEL_ROWS, N)
        rows_of_both = torch.empty(2 * n, H, dtype=W.dtype, device=hs.device)
        slab = torch.empty(2 * n, len(W), dtype=W.dtype, device=hs.device)
        losses = torch.empty(N, 3, device=hs.device)  # of each row
        dhs = torch.empty(N, H, dtype=W.dtype, device=hs.device)

        for start in range(0, N, KERNEL_ROWS):
            rows = slice(start, start + KERNEL_ROWS)
            h_t = ht[rows].float()
            n = len(h_t)  # the last chunk may have fewer
            both = rows_of_both[:2 * n]
            both[:n] = h_t
            torch.sub(hs[rows].float(), h_t, out=both[n:])  # rounded to W's dtype AFTER the minus
            torch.mm(both, W.T, out=slab[:2 * n])  # (2n, V); W is read once for both  (5)
            T = slab[:n]
            D = slab[n:2 * n]
            align_rows_triton(T, D, labels[rows], losses[rows], tau, weights, train)
            if train:
                dhs[rows] = product(D, W)  # (11): D is G now

        ctx.save_for_backward(dhs)  # no logits: they are not needed any more
        sums = losses.sum(0, dtype=torch.float64)  # float64: a million terms of 1e-7
        fkl, rkl, hard = sums / n_total
        ctx.mark_non_differentiable(fkl, rkl, hard)
        loss = lam * tau ** 2 * (alpha * fkl + (1 - alpha) * rkl) + (1 - lam) * hard  # (4)
        return loss, fkl, rkl, hard

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative is an error, not silently 0
    def backward(ctx, grad_loss, *_):
        [dhs] = ctx.saved_tensors
        return grad_loss * dhs.float(), None, None, None, None, None, None, None


@torch.compiler.disable  # a loop over chunks that makes its own gradient: nothing to trace
def kl_align_loss(hs, ht, W, labels, *, alpha, lam, tau=1.0, standardize=False, n_total=None,
                  kernel="auto"):
    """The alignment loss (4) from hidden rows, without the logits of the batch.

    hs, ht   (N, H) float32 or bfloat16: student and teacher rows after the final norm
    W        (V, H) lm_head of both, frozen; the teacher is a constant too
    labels   (N,) integer, the token each row has to predict; negative: only its KL counts
    n_total  what the sums are divided by: answer tokens of all processes and micro-batches
    kernel   "eager" (the textbook), "triton" (CUDA, or with TRITON_INTERPRET=1 a CPU, slowly) or
             "auto": triton on CUDA
    returns  loss, {"kl_teacher_student", "kl_student_teacher", "ce"}: nats per answer token
    raises   ValueError for shapes or a kernel that do not fit; a label >= V is an IndexError of the
             textbook on a CPU, and makes the kernel's loss NaN
    """
    if hs.shape != ht.shape or len(hs) != len(labels):
        raise ValueError(f"hs {hs.shape}, ht {ht.shape} and labels {labels.shape} do not fit")
    fits_kernel = not standardize and not (W.requires_grad and torch.is_grad_enabled())
    if kernel == "auto":
        kernel = "triton" if hs.is_cuda and triton and fits_kernel else "eager"
    can_run = hs.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if kernel == "triton" and not (fits_kernel and can_run):
        raise ValueError("kernel triton needs a frozen W, no standardize, and a CUDA device or "
                         "TRITON_INTERPRET=1 from the start (or eager)")

    ht = ht.detach()
    n_total = n_total or max(1, len(hs))
    if kernel == "triton":
        labels = labels.long().contiguous()
        loss, fkl, rkl, hard = FusedKLAlign.apply(hs, ht, W, labels, alpha, lam, tau, n_total)
    else:
        fkl, rkl, hard = align_all_rows(hs, ht, W, labels, tau, standardize) / n_total
        loss = lam * tau ** 2 * (alpha * fkl + (1 - alpha) * rkl) + (1 - lam) * hard  # (4)
    parts = {
        "kl_teacher_student": fkl.detach().float(),
        "kl_student_teacher": rkl.detach().float(),
        "ce": hard.detach().float(),
    }
    return loss.float(), parts


# --------------------------------------------------------------------------------------------------
# The two forms of a pair

def pair_of_rows(vlm, model, strong, weak):
    """Both forms of a batch of pairs -> ht (N, H), hs (N, H), labels (N,): one token a row."""
    labels = weak.labels[weak.is_answer]
    assert torch.equal(labels, strong.labels[strong.is_answer]), "a pair has two answers"
    with torch.no_grad():
        ht = vlm(strong)  # the bare module: DDP's forward would wait for a backward
    # The language model is frozen, but NOT under no_grad: the gradient has to flow THROUGH all its
    # layers to reach the projector and the vision encoder below it.  Its weights get none, since
    # they ask for none.
    hs = model(weak)
    return ht, hs, labels


@torch.no_grad()
def first_choice(h, W):
    """The most probable token of each hidden row. (N, H) -> (N,)"""
    return torch.cat([(rows.to(W.dtype) @ W.T).argmax(-1) for rows in h.split(1024)])


# --------------------------------------------------------------------------------------------------
# --on_policy: the student's own words.  On given answers it learns what to say after words that it
# might never say; on its own, what the text-rich form would go on with where IT gets to.  That form
# reads the problem and the student's words so far: the teacher of each token is still at hand, a
# label is not.  So both KLs count there, and no hard loss.

@torch.no_grad()
def answered_by_student(vlm, tokenizer, rows, args, device):
    """Pairs with the student's reply to the weak form, as it is now, for the answer of both forms.

    Greedy.  They are encoded anew, pictures too, which takes milliseconds where writing takes
    seconds.  A reply that reaches --on_policy_tokens just ends there.
    """
    [prompts], _ = make_batches(tokenizer, vlm.config, rows, FORMS[1:], answer=False)
    replies = vlm.generate(
        prompts.to(device), args.on_policy_tokens, tokenizer.eos_token_id, tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(replies, skip_special_tokens=True)
    return [row | {"output": answer, "output_2": answer} for row, answer in zip(rows, answers)]


def with_own_words(vlm, step, dataset, device):
    """Item `step` of dataset, its first --on_policy pairs answered by the student.

    First in the order of the epoch: the same ones for any number of processes.
    """
    args = dataset.args
    end = step * args.batch + round(args.on_policy * args.batch)
    micro_batches = []
    n_answer_tokens = 0
    n_dropped = 0
    for rows in rows_of_step(step, dataset.rows, args, dataset.rank, dataset.world):
        own = [row for row in rows if row["position"] < end]
        given = [row for row in rows if row not in own]
        if own:
            own = answered_by_student(vlm, dataset.tokenizer, own, args, device)
        batches, dropped = make_batches(
            dataset.tokenizer, vlm.config, own + given, FORMS, args.max_length)
        for batch in batches:
            batch.labels[:len(own)] = IGNORE  # no hard loss; is_answer still says where the KLs are
        micro_batches.append(batches)
        n_answer_tokens += int(batches[0].is_answer.sum())
        n_dropped += dropped
    return micro_batches, n_answer_tokens, n_dropped


@torch.no_grad()
def show_pair(args, vlm, tokenizer, row, device):
    """One pair as a table over its answer tokens. The last line: what a batch of it would log.

    With --on_policy the tokens are the student's own.  "for t." is what the next token's
    probability is for the teacher: near 0 where the student goes astray.

    Reading it: 46 and 98 can be the same token, since the weak form has 81 image tokens more and
    29 text tokens fewer.  A teacher that prefers 'angle' to '7' knows that solutions begin in three
    wordings.  And a student can be sure of an answer before it has learnt to see: it is given all
    tokens before this one, the right sums among them (teacher forcing).
    """
    if args.on_policy:
        [row] = answered_by_student(vlm, tokenizer, [row], args, device)
    (strong, weak), _ = make_batches(tokenizer, vlm.config, [row], FORMS, args.max_length)
    ht, hs, tokens = pair_of_rows(vlm, vlm, strong.to(device), weak.to(device))
    labels = tokens
    if args.on_policy:
        labels = torch.full_like(tokens, IGNORE)  # no hard loss on own words
    W = vlm.lm_head

    def loss_of(rows):
        return kl_align_loss(
            hs[rows], ht[rows], W, labels[rows], alpha=args.alpha, lam=args.lam, tau=args.tau,
            standardize=args.standardize, kernel=args.kernel)

    def word(token):
        return repr(tokenizer.decode([int(token)]))

    print(f"strong: {row['instruction']}  [{row['image_url'] or 'no picture'}]")
    print(f"weak:   {row['instruction_2']}  [{row['image_url_2'] or 'no picture'}]\n")
    print(" position   next token  for t. |  teacher's choice |  student's choice |  KL(t||s)  "
          "KL(s||t)     ce")
    strong_positions = strong.is_answer[0].nonzero().flatten().tolist()
    weak_positions = weak.is_answer[0].nonzero().flatten().tolist()
    for k, (strong_position, weak_position) in enumerate(zip(strong_positions, weak_positions)):
        _, parts = loss_of(slice(k, k + 1))
        p = (W @ ht[k].to(W.dtype)).softmax(-1)  # (V,)
        q = (W @ hs[k].to(W.dtype)).softmax(-1)
        print(f"{strong_position:4d} {weak_position:4d} "
              f"{word(tokens[k]):>12}    {p[tokens[k]]:.2f} | "
              f"{word(p.argmax()):>12} {p.max():.2f} | {word(q.argmax()):>12} {q.max():.2f} | "
              f"{parts['kl_teacher_student']:9.4f} {parts['kl_student_teacher']:9.4f} "
              f"{parts['ce']:6.2f}")
    loss, parts = loss_of(slice(None))
    print(f"mean of {len(tokens)} tokens: kl_ts {parts['kl_teacher_student']:.4f} "
          f"kl_st {parts['kl_student_teacher']:.4f} ce {parts['ce']:.4f} -> loss {loss:.4f}")


@says_it_in_one_line
def main(argv=None):
    args = parse_args(argv)
    rank, world, device = setup_distributed()
    if args.batch % world:
        sys.exit(f"--batch {args.batch} is no multiple of the {world} processes")
    if args.tau == 0:
        sys.exit("--tau must be above 0")
    rows, folder = open_data(args.data, f"stage2_{args.pairs}.jsonl", PAIR)
    if args.init == "out/stage1" and not on_main_process(is_finished, args.init):
        stage1_text_sft.main(["--data", folder or "data", "--out", args.init])
    if args.show is not None:
        if args.show >= len(rows):
            sys.exit(f"--show {args.show}: there are pairs 0 to {len(rows) - 1}")
        vlm, tokenizer = start_vlm(args, None, device, TRAINABLE)
        return show_pair(args, vlm, tokenizer, rows[args.show], device)

    # A run explains itself: flags, hashes of parent and data, the texts of this script and of
    # model.py are in every checkpoint.  Only rank 0 looks for one: to trust it, it has to read all
    # of its bytes.
    run, checkpoint = on_main_process(start_run, args, rows, __file__)
    vlm, tokenizer = start_vlm(args, checkpoint, device, TRAINABLE)

    # Freeze before DDP, which looks once at what needs a gradient and would wait for the rest for
    # ever; and before make_optimizer, which takes what needs one.
    for name, child in vlm.named_children():
        child.requires_grad_(name in TRAINABLE)
        n_parameters = sum(parameter.numel() for parameter in child.parameters())
        if rank == 0:
            print(f"{name}: {n_parameters:,} parameters, "
                  f"{'trained' if name in TRAINABLE else 'frozen'}")
    on_main_process(try_to_save, args.out, vlm, tokenizer)
    optimizer = make_optimizer(vlm, args)
    first_step = load_optimizer(checkpoint, vlm, optimizer) if checkpoint else 0

    # DDP: every process holds the whole model and sees a part of each batch; gradients are averaged
    # while backward runs.  `model` is for the pass that is trained; vlm stays the module itself,
    # for weights, checkpoints and passes without a gradient.
    model = DistributedDataParallel(vlm) if world > 1 else vlm
    dataset = StepBatches(rows, tokenizer, vlm.config, args, rank, world)
    started = time.perf_counter()
    rows_seen = 0
    rows_dropped = 0
    seconds_writing = 0.0

    for step, batches in batches_of_steps(dataset, first_step):
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        if args.on_policy:
            began = time.perf_counter()
            batches = with_own_words(vlm, step, dataset, device)
            seconds_writing += time.perf_counter() - began

        # The loss of a step is ONE mean over all answer tokens of the global batch.  So they are
        # counted first, and a micro-batch adds (its sum) / (that count).  Not a mean of means: it
        # would weigh short answers more.
        micro_batches, n_answer_tokens, n_dropped = batches
        n_answer_tokens, n_dropped = sum_over_processes([n_answer_tokens, n_dropped], device)
        is_logged = (step + 1) % LOG_EVERY == 0 or step + 1 == args.steps
        sums = torch.zeros(4, device=device)  # loss and its parts
        n_agree_here = n_seen_here = 0

        # ========================= the method: one step of stage 2 ==========================
        for k, (strong, weak) in enumerate(micro_batches):
            if world > 1:  # processes exchange gradients once a step, with the last micro-batch
                model.require_backward_grad_sync = (k == len(micro_batches) - 1)
            # autocast runs the matrix products in bfloat16 and keeps weights and sums in float32.
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                ht, hs, labels = pair_of_rows(vlm, model, strong.to(device), weak.to(device))
                loss, parts = kl_align_loss(
                    hs, ht, vlm.lm_head, labels, alpha=args.alpha, lam=args.lam, tau=args.tau,
                    standardize=args.standardize, n_total=max(1, n_answer_tokens),
                    kernel=args.kernel)
            (loss * world).backward()  # DDP takes the mean over processes: x world, the sum
            sums += torch.stack([loss.detach(), *parts.values()])
            if is_logged:
                agrees = first_choice(hs, vlm.lm_head) == first_choice(ht, vlm.lm_head)
                if args.on_policy:  # then `agree` is of the student's own words only
                    agrees = agrees[labels == IGNORE]
                n_agree_here += agrees.sum()
                n_seen_here += len(agrees)
        # ========================== from here on only bookkeeping ===========================

        # What we believe: each weight that learns got a gradient in this step, and no frozen one.
        for parameter in vlm.parameters():
            assert (parameter.grad is not None) == parameter.requires_grad
        # Clip the gradient of the whole step, after the last micro-batch: clipped parts have
        # another sum.
        norm = torch.nn.utils.clip_grad_norm_(vlm.parameters(), args.clip or math.inf).item()
        loss, kl_ts, kl_st, ce, n_agree, n_seen = sum_over_processes(
            [*sums, n_agree_here, n_seen_here], device)
        if not math.isfinite(loss + norm):  # the same on all processes, so all of them stop here
            sys.exit(f"step {step + 1}: loss {loss}, gnorm {norm}. Try --no-resume and a lower "
                     "--lr; or delete the newest step-N, which may be bad")
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        rows_seen += args.batch
        rows_dropped += n_dropped
        seconds = time.perf_counter() - started
        if rank == 0 and is_logged:
            write_log(args, device, {
                "step": done,
                "steps": args.steps,
                "loss": loss,
                "kl_ts": kl_ts,
                "kl_st": kl_st,
                "ce": ce,
                "agree": n_agree / max(1, n_seen),
                "gnorm": norm,
                "lr": lr,
                "rows_s": rows_seen / seconds,
                "dropped": rows_dropped / rows_seen,
                "writing": seconds_writing / seconds,
            })
        if done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args.out, done, vlm, tokenizer, optimizer, run)

    if args.steps == 0:  # nothing to train, but whoever asked wants a model there
        save_checkpoint(args.out, 0, vlm, tokenizer, optimizer, run)
    if args.evaluate:  # by rank 0 alone, for as long as it takes
        leave_processes()
    if rank > 0:
        return
    evaluation.draw_losses(args.out)
    print(f"stage 2 done in {time.perf_counter() - started:.0f} s: {args.out}/step-{args.steps}")
    if args.evaluate and folder:  # the table is of data_gen.py's test problems
        evaluation.main([args.init or args.out, args.out, "--data", folder])


if __name__ == "__main__":
    main()
    leave_processes()
