"""Stage 3: multimodal instruction tuning. Everything learns, on all versions of the problems.

    python stage3_mm_instruct.py                        # one process, GPU if there is one; about 2 minutes on 2 CPU cores
    torchrun --nproc_per_node 8 stage3_mm_instruct.py   # 8 processes: the same batches, the same parameters afterwards

Reads data/stage3.jsonl and out/stage2 (both made first when missing); writes out/stage3/step-N, metrics.jsonl.
Read it as `diff stage1_text_sft.py stage3_mm_instruct.py`: the loss is stage 1's, what differs is what learns and from what.

Differs from the paper in: the model and the data (tiny/ and data_gen.py, for a laptop); the learning rate, which the paper
reports as 3e-5 for a batch of 256; the number of steps.  The loss and what is trained are the paper's.
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

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data_gen
import eval as evaluation
import stage2_kl_align
from model import IGNORE, load_checkpoint, load_vlm, make_batch, newest_checkpoint, read_rows, save_checkpoint, sha256

TRAINABLE = ("vision_model", "projector", "language_model")  # children of VLM that learn in this stage: all


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--init", default="out/stage2", help="model folder to start from; stage 2 is run first when out/stage2 is missing")
    add("--data", default="data", help="folder of data_gen.py; made with its defaults when missing")
    add("--out", default="out/stage3", help="run folder for checkpoints and metrics")
    add("--steps", type=int, default=250, help="optimizer steps (ours: one pass over the default data)")
    add("--batch", type=int, default=32, help="rows a step, all processes together (paper, reported: 256)")
    add("--micro_batch", type=int, default=32, help="rows a forward pass of one process; fewer rows = less memory, same result")
    add("--lr", type=float, default=3e-4, help="peak learning rate (paper, reported: 3e-5; ours is for a model from scratch)")
    add("--warmup", type=float, default=0.02, help="share of steps with rising learning rate (paper, reported)")
    add("--weight_decay", type=float, default=0.1, help="AdamW, matrices only (paper, reported)")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0 = no clipping (transformers' default)")
    add("--max_length", type=int, default=1024, help="tokens of prompt and answer, image tokens included (script: 2048)")
    add("--seed", type=int, default=3407, help="order of the rows (script)")
    add("--log_every", type=int, default=10, help="steps between log lines")
    add("--save_every", type=int, default=500, help="steps between checkpoints; the last step is always saved")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue a run found in --out, or start over")
    add("--evaluate", action=argparse.BooleanOptionalAction, default=True, help="end with accuracy before and after, by version")
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


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = setup_distributed()
    prepare_data(args, rank)
    if args.init == "out/stage2" and newest_checkpoint(args.init) is None:
        if rank == 0:
            print(f"{args.init} is missing: running stage 2 first, about 4 minutes on 2 CPU cores", flush=True)
        stage2_kl_align.main(["--data", args.data, "--out", args.init, "--no-evaluate"])
        if world > 1:
            dist.barrier()  # rank 0 is still writing the checkpoint
    if args.batch % (world * args.micro_batch):
        sys.exit(f"--batch {args.batch} must be a multiple of {world} processes x --micro_batch {args.micro_batch}")
    data = os.path.join(args.data, "stage3.jsonl")
    rows = read_rows(data)
    vlm, tokenizer = load_vlm(args.init, device)
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
    begun, tokens = time.time(), 0

    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, disable=rank > 0 or not sys.stderr.isatty()):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        mine = rows_of_step(step, len(rows), args)[rank::world]
        batches = [make_batch(vlm, tokenizer, [rows[i] for i in mine[k:k + args.micro_batch]], root=args.data,
                              max_length=args.max_length).to(device) for k in range(0, len(mine), args.micro_batch)]
        # The loss of a step is ONE mean over all answer tokens of the global batch.  So the count comes first, and every
        # micro-batch contributes its sum / that count.  Not a mean of means: short answers would weigh more.
        n_tokens, n_seen = total(sum(int((b.labels != IGNORE).sum()) for b in batches),
                                 sum(int(b.attention_mask.sum()) for b in batches), device=device)
        loss_here = 0.0

        # ==================================== the method: one step of stage 3 ====================================
        for k, batch in enumerate(batches):
            if world > 1:  # gradients travel once a step, with the last micro-batch
                model.require_backward_grad_sync = k == len(batches) - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                hidden = model(batch)  # (N, H)
                logits = F.linear(hidden, vlm.lm_head)  # (N, V)
            loss = F.cross_entropy(logits.float(), batch.labels[batch.labels != IGNORE], reduction="sum") / max(1, n_tokens)
            (loss * world).backward()  # DDP averages over processes; the factor turns that back into a sum
            loss_here += loss.item()
        # ===================================== from here on only bookkeeping =====================================

        assert all((p.grad is not None) == p.requires_grad for p in vlm.parameters())
        norm = torch.nn.utils.clip_grad_norm_(vlm.parameters(), args.clip or math.inf)
        loss_all, = total(loss_here, device=device)
        if not math.isfinite(loss_all) or not math.isfinite(norm):
            sys.exit(f"step {step + 1}: loss {loss_all}, gradient norm {norm:.3g}; rows {mine} on process {rank}; nothing was saved")
        optimizer.step()
        optimizer.zero_grad()
        tokens += n_seen
        done = step + 1
        if rank == 0 and (done % args.log_every == 0 or done == args.steps):
            speed, memory, lr = tokens / (time.time() - begun), gigabytes(device), learning_rate(step, args)
            write_log(args, f"step {done}/{args.steps} | loss {loss_all:.4f} | gnorm {norm:.2f} | lr {lr:.1e} | "
                            f"{speed:,.0f} tok/s | {memory:.1f} GB",
                      {"step": done, "loss": loss_all, "gnorm": norm.item(), "lr": lr, "tok_s": speed, "gb": memory})
        if rank == 0 and (done % args.save_every == 0 or done == args.steps):
            save_checkpoint(args.out, done, vlm, tokenizer, optimizer, {"run": run})
    if rank == 0:
        if start == 0 == args.steps:
            save_checkpoint(args.out, 0, vlm, tokenizer, optimizer, {"run": run})
        print(f"stage 3 done: {newest_checkpoint(args.out)}, {time.time() - begun:.0f} s", flush=True)
        if args.evaluate:
            evaluation.main([args.init, args.out, "--data", args.data])


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
