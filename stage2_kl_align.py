"""Stage 2: progressive upward multimodal alignment, the method of Math-PUMA (arXiv 2408.08640).

    torchrun stage2_kl_align.py                         # makes data, runs stage 1, aligns, compares: about 5 minutes on 2 CPU cores
    torchrun --nproc_per_node 8 stage2_kl_align.py      # 8 processes: the same batches, the same parameters afterwards
    python stage2_kl_align.py --show 0                  # one pair, token by token: what the loss sees, and what it adds up to

Every row is a pair: the same problem text-rich (strong) and vision-rich (weak), with one answer.  The strong form runs
without gradient; the weak form's next-token distribution is pulled up to it at every answer token.  The language model is
frozen, so it is the vision encoder and the projector that learn to say with pixels what the text would have said.

Differs from the paper in: the model and the data; four rungs of the ladder of data_gen.py instead of the paper's (unpublished)
levels; each level is pulled to the text (--pairs top) and not to its neighbour, because that measured better here (README).
Differs from the released code in: everything under "paper vs released code" in the README.
"""
import argparse
import functools
import json
import math
import os
import resource
import shutil
import sys
import time
import weakref

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data_gen
import eval as evaluation
import stage1_text_sft
from model import IGNORE, load_checkpoint, load_vlm, make_batch, newest_checkpoint, read_rows, save_checkpoint, sha256

TRAINABLE = ("vision_model", "projector")  # the language model is frozen and must come out bit-identical


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--init", default="out/stage1", help="model folder to start from; stage 1 is run first when out/stage1 is missing")
    add("--data", default="data", help="folder of data_gen.py; made with its defaults when missing")
    add("--out", default="out/stage2", help="run folder for checkpoints and metrics")
    add("--pairs", default="top", choices=list(data_gen.PAIRS), help="pull each level to the text, or to the level above it")
    add("--alpha", type=float, default=0.5, help="weight of KL(teacher || student), 1 - alpha of the reverse (script .5; paper, reported .2)")
    add("--lam", type=float, default=0.5, help="weight of the KL part, 1 - lam of the hard loss (ours; paper, reported, and script .1)")
    add("--tau", type=float, default=1.0, help="temperature of both softmaxes in the KL (paper and script: 1)")
    add("--standardize", action=argparse.BooleanOptionalAction, default=False, help="divide logits by their std first (script: always)")
    add("--kernel", default="auto", choices=["auto", "eager"], help="how the loss is computed")
    add("--steps", type=int, default=400, help="optimizer steps (ours: one pass over the default data is 375)")
    add("--batch", type=int, default=32, help="pairs a step, all processes together (paper, reported: 64)")
    add("--micro_batch", type=int, default=32, help="pairs a forward pass of one process; fewer pairs = less memory, same result")
    add("--lr", type=float, default=1e-3, help="peak learning rate (paper, reported: 5e-5; ours is for a model from scratch)")
    add("--warmup", type=float, default=0.02, help="share of steps with rising learning rate (paper, reported)")
    add("--weight_decay", type=float, default=0.1, help="AdamW, matrices only (paper, reported)")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0 = no clipping (transformers' default)")
    add("--max_length", type=int, default=1024, help="tokens of prompt and answer, image tokens included (script: 2048)")
    add("--seed", type=int, default=3407, help="order of the rows (script)")
    add("--log_every", type=int, default=10, help="steps between log lines")
    add("--save_every", type=int, default=500, help="steps between checkpoints; the last step is always saved")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue a run found in --out, or start over")
    add("--evaluate", action=argparse.BooleanOptionalAction, default=True, help="end with accuracy before and after, by version")
    add("--show", type=int, default=None, metavar="I", help="print pair I token by token instead of training")
    return parser


# >>> identical in stage1/2/3: flags
def parse_args(argv=None):
    """Flags, printed with a * where they differ from the default."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.batch < 1 or args.micro_batch < 1 or args.steps < 0 or args.log_every < 1 or args.save_every < 1:
        parser.error("--batch, --micro_batch, --log_every and --save_every must be at least 1, --steps at least 0")
    if int(os.environ.get("RANK", 0)) == 0:
        changed = {k: "*" if v != parser.get_default(k) else "" for k, v in vars(args).items()}
        print(os.path.basename(__file__), " ".join(f"{k}={v}{changed[k]}" for k, v in vars(args).items()), flush=True)
    return args
# <<<


# >>> identical in stage1/2/3: distributed
def setup_distributed():
    """-> (rank, world size, device). torchrun tells each process who it is through the environment."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():  # already there when a later stage runs this one first
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def total(*values, device):
    """Sums over all processes, in float64: counts stay exact."""
    t = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(t)
    return t.tolist()


def prepare_data(args, rank):
    """Make the data set with data_gen.py's defaults when there is none; the other processes wait for it."""
    if rank == 0 and not os.path.exists(os.path.join(args.data, "manifest.json")):
        print(f"{args.data}/ is missing: running data_gen.py first, about 15 seconds", flush=True)
        data_gen.main(["--out", args.data])
    if dist.is_initialized():
        dist.barrier()
# <<<


# >>> identical in stage1/2/3: schedule and order
def learning_rate(step, args):
    """Linear warm-up to --lr, then a cosine to 0 that is reached after the last step."""
    warmup = math.ceil(args.warmup * args.steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))


@functools.lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def rows_of_step(step, n, args):
    """Row numbers of a global batch. A function of the step alone, so resuming and world size cannot change the order."""
    places = range(step * args.batch, (step + 1) * args.batch)
    return [int(shuffled(n, args.seed, p // n)[p % n]) for p in places]
# <<<


# >>> identical in stage1/2/3: optimizer and resume
def make_optimizer(vlm, args):
    """AdamW over exactly the trainable parameters; norms and biases are not decayed."""
    trainable = [p for p in vlm.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trainable if p.ndim > 1], "weight_decay": args.weight_decay},
              {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0}]
    assert sum(len(g["params"]) for g in groups) == sum(n.split(".")[0] in TRAINABLE for n, _ in vlm.named_parameters())
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999))  # betas: paper, reported


def start_or_resume(args, vlm, optimizer, run, rank):
    """Step to begin at: 0, or that of the newest complete checkpoint, whose flags and data must be this run's."""
    if rank == 0 and not args.resume and os.path.isdir(args.out):
        shutil.rmtree(args.out)  # --no-resume is how a user asks for that
    if dist.is_initialized():
        dist.barrier()
    found = newest_checkpoint(args.out)
    if found is None:
        if rank == 0:
            os.makedirs(args.out, exist_ok=True)
            open(os.path.join(args.out, "metrics.jsonl"), "w").close()
        return 0
    state = load_checkpoint(found, vlm, optimizer)
    free = ("out", "resume", "log_every", "save_every", "micro_batch")  # these do not change the result
    old, new = ({k: v for k, v in r["flags"].items() if k not in free} | {k: r[f"{k}_sha256"] for k in ("init", "data")}
                for r in (state["run"], run))
    differ = [f"--{k}: {old.get(k)} there, {v} here" for k, v in new.items() if old.get(k) != v]
    if differ:
        sys.exit(f"{found} was made by another run ({'; '.join(differ)}): use its flags, another --out, or --no-resume")
    if rank == 0:
        print(f"resuming {found}", flush=True)
        metrics = os.path.join(args.out, "metrics.jsonl")
        with open(metrics) as f:  # lines after the checkpoint will be written again
            kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
        with open(metrics, "w") as f:
            f.writelines(kept)
    return state["step"]


def write_log(args, line, numbers):
    """The fixed sentence for the reader, the same numbers to metrics.jsonl."""
    tqdm.write(line)
    with open(os.path.join(args.out, "metrics.jsonl"), "a") as f:
        f.write(json.dumps(numbers) + "\n")


def gigabytes(device):
    """Peak memory so far: of the GPU, else of the process (Linux counts KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
# <<<


# ======================================================================================================================
# The loss.  For one answer position, with z_t the teacher's logits (strong form, no gradient), z_s the student's (weak form),
# y the next answer token and tau the temperature:
#
#     p = softmax(z_t / tau)        q = softmax(z_s / tau)
#     L_FKL  = KL(p || q) = sum p (ln p - ln q)      KL(teacher || student), "forward": punishes what the student misses     (1)
#     L_RKL  = KL(q || p) = sum q (ln q - ln p)      KL(student || teacher), "reverse": punishes what the student makes up   (2)
#     L_hard = -ln softmax(z_s)[y]                   cross-entropy with the label                                            (3)
#     L = lam tau^2 (alpha L_FKL + (1 - alpha) L_RKL) + (1 - lam) L_hard                                                     (4)
#
# tau^2: gradients of a softmax at temperature tau shrink by 1 / tau^2 (Hinton et al., arXiv 1503.02531).  Early in training
# L_FKL fits the head of the teacher's distribution first and L_RKL the tail (Wu et al., arXiv 2404.02657).
# L is averaged over all N answer positions of the global batch.
#
# How it is computed.  Teacher and student share the frozen lm_head W, so with hidden rows ht, hs
#
#     T = ht W^T,   D = (hs - ht) W^T,   z_t = T,   z_s = T + D                                                              (5)
#
# not z_s = hs W^T: the gradient of a KL is a difference of two nearly equal distributions.  Rounding both logits separately
# leaves noise that does not shrink as the student gets better; D shrinks with it, and hs == ht gives exactly 0.
#
# Let a_t, a_s be the scales of the two softmaxes (1 / tau; one per row when standardized) and, per row,
#     t = a_t T     e = a_s D + (a_s - a_t) T     s = t + e
#     dL = lse(s) - lse(t) = (max s - max t) + ln(Z_s / Z_t)     with Z = sum exp(. - max)                                   (6)
#     delta = e - dL = ln q - ln p                                                                                           (7)
# (6) never subtracts two rounded log-sum-exps.  Both KLs in Bregman form, every term >= 0, no cancellation in the sum:
#     L_FKL = sum (q - p) - p delta          L_RKL = sum q delta - (q - p)                                                   (8)
# and the gradient w.r.t. s of (4) without its hard part
#     g = lam tau^2 (alpha (q - p) + (1 - alpha) q (delta - L_RKL))                                                          (9)
# so that dL/dz_s = a_s g + (1 - lam) (softmax(z_s) - onehot(y)) =: G and dL/dhs = G W.                                      (10)
#
# Standardized logits, (z - mean) / std over the vocabulary, are a temperature per row: the mean drops out of a softmax, and
#     std^2 = h^T C h,   C = covariance of the rows of W: (H, H), a constant while W is frozen                               (11)
# so a_s = 1 / (tau std) is an ordinary function of hs; the chunks below return dL/da_s = sum g z_s, autograd does the rest.
# ======================================================================================================================
_covariance = [lambda: None, None, None]  # weak reference to W, its version and n_vocab, C of (11)


def row_scale(h, weight, n_vocab, tau, standardize):
    """a of a softmax: 1 / tau for every row, or 1 / (tau * std of the row's logits). -> (N,) float32"""
    if not standardize:
        return torch.full(h.shape[:1], 1 / tau, device=h.device)
    state = (weight._version, n_vocab)
    if _covariance[0]() is weight and _covariance[1] == state and not weight.requires_grad:
        C = _covariance[2]
    else:
        W = weight[:n_vocab].float()
        C = torch.cov(W.T)  # (H, H)
        if not weight.requires_grad:
            _covariance[:] = weakref.ref(weight), state, C
    h = h.float()
    std = ((h @ C) * h).sum(-1).clamp_min(0).sqrt()  # (N,)
    return 1 / (tau * (std + 1e-6))  # 1e-6: the released code's


class ChunkedKLAlign(torch.autograd.Function):
    """Equations (5)-(10) on a few rows at a time, loss and gradient in the same visit: no (N, V) tensor ever exists.

    Everything happens in forward because backward only has to multiply by a scalar.
    """

    @staticmethod
    def forward(ctx, hs, ht, weight, labels, a_s, a_t, alpha, lam, tau, n_vocab, n_total, dtype):
        N, V = hs.shape[0], n_vocab
        W = weight[:V].to(dtype)  # (V, H); rows from n_vocab on are padding and do not exist for any softmax
        need_h, need_w, need_a = hs.requires_grad, weight.requires_grad, a_s.requires_grad
        dhs = torch.zeros_like(hs, dtype=torch.float32) if need_h or need_w else None  # (N, H)
        dW = torch.zeros(weight.shape, device=hs.device) if need_w else None  # (V, H) float32, whatever W is
        da = torch.zeros(N, device=hs.device)
        sums = torch.zeros(3, dtype=torch.float64, device=hs.device)  # FKL, RKL, CE
        w_f, w_r, w_c = lam * tau ** 2 * alpha / n_total, lam * tau ** 2 * (1 - alpha) / n_total, (1 - lam) / n_total
        rescaled = tau != 1 or a_s is not a_t  # then softmax(z_s) of the hard loss is not q
        n = max(1, CHUNK_ELEMENTS // max(1, V))
        for i in range(0, N, n):
            c = slice(i, i + n)
            h_t, h_d = ht[c].float(), hs[c].float() - ht[c].float()  # the difference before any rounding to dtype
            T, D = (h_t.to(dtype) @ W.T).float(), (h_d.to(dtype) @ W.T).float()  # (n, V) each  (5)
            at, as_ = a_t[c, None], a_s[c, None]  # (n, 1)
            z = T + D  # (n, V) student logits
            t, s = at * T, as_ * z
            e = as_ * D + (as_ - at) * T
            m_t, m_s = t.amax(-1, keepdim=True), s.amax(-1, keepdim=True)
            p, q = (t - m_t).exp_(), (s - m_s).exp_()
            Z_t, Z_s = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
            p /= Z_t
            q /= Z_s
            delta = e - ((m_s - m_t) + (Z_s / Z_t).log())  # (6) (7)
            # q - p = p (exp(delta) - 1) keeps all digits when the two are close, but overflows when they are far apart
            diff = torch.where(delta.abs() < 0.5, p * torch.expm1(delta), q - p)  # (n, V)
            q_delta = q * delta
            rkl = (q_delta - diff).sum(-1, keepdim=True)  # (n, 1)  (8)
            sums[0] += (diff - p * delta).sum()
            sums[1] += rkl.sum()
            g = w_f * diff + w_r * (q_delta - q * rkl)  # (n, V)  (9)
            if need_a:
                da[c] = (g * z).sum(-1)
            g *= as_
            y = labels[c]
            known = (y != IGNORE)[:, None]
            lse = torch.logsumexp(z, -1, keepdim=True) if rescaled else m_s + Z_s.log()
            sums[2] += torch.where(known, lse - z.gather(1, y.clamp_min(0)[:, None]), 0.0).sum()  # (3)
            if dhs is not None:
                raw = (z - lse).exp_() if rescaled else q
                g += w_c * known * raw
                g.scatter_add_(1, y.clamp_min(0)[:, None], -w_c * known.float())  # (10)
                dhs[c] = (g.to(dtype) @ W).float()
                if need_w:
                    dW[:V] += g.T @ hs[c].float()
        fkl, rkl, ce = (sums / n_total).float()
        ctx.save_for_backward(dhs, dW, da if need_a else None)
        ctx.dtypes = hs.dtype, weight.dtype
        ctx.mark_non_differentiable(fkl, rkl, ce)
        return lam * tau ** 2 * (alpha * fkl + (1 - alpha) * rkl) + (1 - lam) * ce, fkl, rkl, ce  # (4)

    @staticmethod
    def backward(ctx, scale, *_):
        dhs, dW, da = ctx.saved_tensors
        dh, dw = ctx.dtypes
        return ((scale * dhs).to(dh) if ctx.needs_input_grad[0] else None, None, (scale * dW).to(dw) if dW is not None else None, None,
                scale * da if da is not None else None, *[None] * 7)


CHUNK_ELEMENTS = 2 ** 20  # rows * V of a chunk: 4 MB a tensor stays near the cores' caches


@torch._dynamo.disable  # loops over chunks and does its own gradient: nothing for a compiler to trace
def kl_align_loss(hs, ht, weight, labels, *, alpha, lam, tau=1.0, standardize=False, n_vocab=None, n_total=None, kernel="auto"):
    """The alignment loss (4) from hidden rows.

    hs, ht      (N, H) float32 or bfloat16: student and teacher rows after the final norm, answer positions only; ht gets no gradient
    weight      (V, H) lm_head, shared by both sides
    labels      (N,) int64, the token each row has to predict; -100: no hard loss for that row (its KL counts)
    n_vocab     rows of weight that are real when it is padded (default V)
    n_total     what the sums are divided by: the answer tokens of all processes and micro-batches (default N)
    kernel      "auto" or "eager"
    returns     loss, {"kl_teacher_student", "kl_student_teacher", "ce"}: scalars in nats per answer token
    raises      ValueError for shapes, labels or settings that do not fit
    """
    N, V = hs.shape[0], weight.shape[0] if n_vocab is None else n_vocab
    if hs.shape != ht.shape or labels.shape != (N,) or hs.shape[1] != weight.shape[1] or not 0 < V <= weight.shape[0]:
        raise ValueError(f"shapes do not fit: hs {tuple(hs.shape)}, ht {tuple(ht.shape)}, labels {tuple(labels.shape)}, "
                         f"weight {tuple(weight.shape)}, n_vocab {V}")
    if not (0 <= alpha <= 1 and 0 <= lam <= 1 and tau > 0) or kernel not in ("auto", "eager"):
        raise ValueError(f"alpha and lam must lie in [0, 1] and tau above 0: alpha {alpha}, lam {lam}, tau {tau}; kernel {kernel!r}")
    device = hs.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        ht = ht.detach()
        a_s, a_t = row_scale(hs, weight, V, tau, standardize), row_scale(ht, weight.detach(), V, tau, standardize)
        loss, fkl, rkl, ce = ChunkedKLAlign.apply(hs, ht, weight, labels, a_s, a_t if standardize else a_s, alpha, lam, tau, V,
                                                  max(1, N) if n_total is None else n_total, dtype)
    return loss, {"kl_teacher_student": fkl, "kl_student_teacher": rkl, "ce": ce}


@torch.no_grad()
def same_choice(hs, ht, weight):
    """How many rows have the same most probable token on both sides: the number in the log a reader can feel."""
    return sum(int(((a @ weight.T).argmax(-1) == (b @ weight.T).argmax(-1)).sum())
               for a, b in zip(hs.to(weight.dtype).split(1024), ht.to(weight.dtype).split(1024)))


def pair_of_rows(vlm, model, strong, weak):
    """Teacher rows, student rows and their common labels. -> ht (N, H), hs (N, H), labels (N,)"""
    labels = weak.labels[weak.labels != IGNORE]  # (N,)
    assert torch.equal(labels, strong.labels[strong.labels != IGNORE]), "the two forms of a pair must have one answer"
    with torch.no_grad():  # the live weights, not a frozen copy: for text-only teachers that is the same function anyway
        ht = vlm(strong)  # the bare module: DDP's forward would expect a backward
    return ht, model(weak), labels


def load_pairs(path):
    rows = read_rows(path, ("image_url", "instruction", "output", "image_url_2", "instruction_2", "output_2"))
    for number, row in enumerate(rows, 1):
        if row["output"] != row["output_2"]:
            sys.exit(f"{path}:{number}: the two answers of a pair must be the same text: {row['output']!r}, {row['output_2']!r}")
    return rows


@torch.no_grad()
def show_pair(args, vlm, tokenizer, row):
    """One pair as a table over its answer tokens; the last line is the scalar that training would log for it."""
    strong, weak = (make_batch(vlm, tokenizer, [row], suffix, args.data, args.max_length) for suffix in ("", "_2"))
    ht, hs, labels = pair_of_rows(vlm, vlm, strong, weak)
    setting = dict(alpha=args.alpha, lam=args.lam, tau=args.tau, standardize=args.standardize, kernel=args.kernel)
    print(f"strong ({row['levels'][0]}): {row['instruction']}\nweak   ({row['levels'][1]}): {row['instruction_2']}  [{row['image_url_2']}]")
    print(f"\n{'position':>9} {'next token':>12} | {'teacher':>12} {'prob':>5} | {'student':>12} {'prob':>5} | KL(t||s) KL(s||t)     ce")
    where = [b.labels[0].ne(IGNORE).nonzero().flatten().tolist() for b in (strong, weak)]
    sums = np.zeros(4)
    for k, (a, b) in enumerate(zip(*where)):
        loss, parts = kl_align_loss(hs[k:k + 1], ht[k:k + 1], vlm.lm_head, labels[k:k + 1], **setting)
        numbers = [x.item() for x in (*parts.values(), loss)]
        sums += numbers
        cells = []
        for h in (ht[k], hs[k]):
            prob, token = (vlm.lm_head @ h).softmax(-1).max(-1)
            cells.append(f"{tokenizer.decode([token.item()])!r:>12} {prob:5.2f}")
        print(f"{a:4d} {b:4d} {tokenizer.decode([labels[k].item()])!r:>12} | {cells[0]} | {cells[1]} | "
              + " ".join(f"{x:8.4f}" for x in numbers[:2]) + f" {numbers[2]:6.2f}")
    loss, _ = kl_align_loss(hs, ht, vlm.lm_head, labels, **setting)
    print(f"mean over {len(labels)} tokens: kl_ts {sums[0] / len(labels):.4f} kl_st {sums[1] / len(labels):.4f} ce {sums[2] / len(labels):.4f}"
          f" -> loss {sums[3] / len(labels):.4f} (all rows at once, as in training: {loss:.4f})")


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = setup_distributed()
    prepare_data(args, rank)
    if args.init == "out/stage1" and newest_checkpoint(args.init) is None:
        if rank == 0:
            print(f"{args.init} is missing: running stage 1 first, about 1 minute on 2 CPU cores", flush=True)
        stage1_text_sft.main(["--data", args.data, "--out", args.init])
        if world > 1:
            dist.barrier()  # rank 0 is still writing the checkpoint
    data = os.path.join(args.data, f"stage2_{args.pairs}.jsonl")
    rows = load_pairs(data)
    vlm, tokenizer = load_vlm(args.init, device)
    if args.show is not None:
        return show_pair(args, vlm, tokenizer, rows[args.show])
    if args.batch % (world * args.micro_batch):
        sys.exit(f"--batch {args.batch} must be a multiple of {world} processes x --micro_batch {args.micro_batch}")
    for name, child in vlm.named_children():  # freeze before DDP looks at the parameters
        child.requires_grad_(name in TRAINABLE)
    if rank == 0:
        print(f"{len(rows):,} rows; trained: " + ", ".join(
            f"{n} {sum(p.numel() for p in c.parameters()):,} {'yes' if n in TRAINABLE else 'no'}" for n, c in vlm.named_children()))
    optimizer = make_optimizer(vlm, args)
    run = {"flags": vars(args), "init_sha256": vlm.source_sha256, "data_sha256": sha256(data), "script": open(__file__).read()}
    start = start_or_resume(args, vlm, optimizer, run, rank)
    model = DistributedDataParallel(vlm, device_ids=[device] if device.type == "cuda" else None) if world > 1 else vlm
    vlm.train()
    frozen = vlm.language_model.state_dict()
    before = {k: v.clone() for k, v in frozen.items()}
    begun, tokens = time.time(), 0

    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, disable=rank > 0 or not sys.stderr.isatty()):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        mine = rows_of_step(step, len(rows), args)[rank::world]
        strong, weak = ([make_batch(vlm, tokenizer, [rows[i] for i in mine[k:k + args.micro_batch]], suffix, args.data,
                                    args.max_length).to(device) for k in range(0, len(mine), args.micro_batch)] for suffix in ("", "_2"))
        # The loss of a step is ONE mean over all answer tokens of the global batch.  So the count comes first, and every
        # micro-batch contributes its sum / that count.  Not a mean of means: short answers would weigh more.
        n_tokens, n_seen = total(sum(int((b.labels != IGNORE).sum()) for b in weak),
                                 sum(int(b.attention_mask.sum()) for b in strong + weak), device=device)
        here = np.zeros(5)  # loss, its three parts, rows on whose most probable token both forms agree

        # ==================================== the method: one step of stage 2 ====================================
        for k, pair in enumerate(zip(strong, weak)):
            if world > 1:  # gradients travel once a step, with the last micro-batch
                model.require_backward_grad_sync = k == len(weak) - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                ht, hs, labels = pair_of_rows(vlm, model, *pair)  # (N, H), (N, H), (N,)
                loss, parts = kl_align_loss(hs, ht, vlm.lm_head, labels, alpha=args.alpha, lam=args.lam, tau=args.tau,
                                            standardize=args.standardize, n_total=max(1, n_tokens), kernel=args.kernel)
            (loss * world).backward()  # DDP averages over processes; the factor turns that back into a sum
            here[:4] += [x.item() for x in (loss, *parts.values())]
            here[4] += same_choice(hs, ht, vlm.lm_head) / max(1, n_tokens) if (step + 1) % args.log_every == 0 else 0
        # ===================================== from here on only bookkeeping =====================================

        assert all((p.grad is not None) == p.requires_grad for p in vlm.parameters())
        norm = torch.nn.utils.clip_grad_norm_(vlm.parameters(), args.clip or math.inf)
        loss_all, kl_ts, kl_st, ce, agree = total(*here, device=device)
        if not math.isfinite(loss_all) or not math.isfinite(norm):
            sys.exit(f"step {step + 1}: loss {loss_all}, gradient norm {norm:.3g}; rows {mine} on process {rank}; nothing was saved")
        optimizer.step()
        optimizer.zero_grad()
        tokens += n_seen
        done = step + 1
        if rank == 0 and done % args.log_every == 0:
            speed, memory, lr = tokens / (time.time() - begun), gigabytes(device), learning_rate(step, args)
            write_log(args, f"step {done}/{args.steps} | loss {loss_all:.4f} (kl_ts {kl_ts:.2f} kl_st {kl_st:.2f} ce {ce:.2f}) | "
                            f"agree {agree:.1%} | gnorm {norm:.2f} | lr {lr:.1e} | {speed:,.0f} tok/s | {memory:.1f} GB",
                      {"step": done, "loss": loss_all, "kl_ts": kl_ts, "kl_st": kl_st, "ce": ce, "agree": agree, "gnorm": norm.item(), "lr": lr, "tok_s": speed, "gb": memory})
        if rank == 0 and (done % args.save_every == 0 or done == args.steps):
            save_checkpoint(args.out, done, vlm, tokenizer, optimizer, {"run": run})
    if rank == 0:
        if start == 0 == args.steps:
            save_checkpoint(args.out, 0, vlm, tokenizer, optimizer, {"run": run})
        assert all(torch.equal(before[k], v) for k, v in frozen.items()), "the frozen language model has changed"
        print(f"stage 2 done: {newest_checkpoint(args.out)}, {time.time() - begun:.0f} s", flush=True)
        if args.evaluate:
            evaluation.main([args.init, args.out, "--data", args.data])


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
