"""Stage 3: multimodal instruction tuning. Everything learns, on all versions of the problems.

    python stage3_mm_instruct.py                       # one process; 4 minutes on 2 CPU cores
    torchrun --nproc_per_node 8 stage3_mm_instruct.py  # 8 processes: same batches, same parameters afterwards

Reads data/stage3.jsonl and out/stage2 (made first when missing); writes out/stage3/step-N and metrics.jsonl.
Read it as `diff stage1_text_sft.py stage3_mm_instruct.py`: what learns and from what differs, not the loss.

What is new against stage 1:
    TRAINABLE    all three parts.  Stage 2 taught the eyes to speak the language model's language while that
                 stood still; now both may move towards each other.
    the rows     all six versions of the problems, the two hardest twice as often, so the model keeps what it
                 can do with text and learns the rungs that stage 2 never paired.
    the loss     nothing: plain cross-entropy with the label again, as in the paper.  The teacher is gone: its
                 language model, which stage 2 could trust to stand still, is now itself being changed.
    the order    nothing either: by the seed, with all versions mixed in a batch.

The table at the end compares the model before and after.  text_only may move here, since the language
model is no longer frozen; versions with a picture should rise.  `caption loss` says what reading for its own
sake, which these rows do not ask for, costs afterwards.

Differs from the paper in: the model and the data (tiny/ and data_gen.py, made for a laptop), the number of
steps, and the learning rate, reported as 3e-5 at a batch of 256.  The loss and what learns are the paper's.
"""
import argparse
import functools
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import eval as evaluation
import stage2_kl_align
from model import (IGNORE, backbone_flags, caption_loss, finished, make_batch, open_data, peak_gigabytes,
                   save_checkpoint, start_or_resume, start_vlm)

TRAINABLE = ("vision_model", "projector", "language_model")  # children of VLM that learn in this stage: all

def make_parser():
    """script = default of the released training script, reported = the paper's value, quoted from memory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--init", default="out/stage2", help="model folder to start from; out/stage2 is made when missing")
    backbone_flags(add)
    add("--data", nargs="+", default=["data"], help="data_gen.py's folder (made if missing) or files")
    add("--image_root", help="folder that pictures are in (default: the folder of each file)")
    add("--check_data", action="store_true", help="list all rows that cannot be used and stop")
    add("--max_bad", type=int, default=0, help="leave out up to so many rows that cannot be used")
    add("--out", default="out/stage3", help="run folder for checkpoints and metrics")
    add("--steps", type=int, default=200, help="optimizer steps (ours: 0.8 passes over the default data)")
    add("--batch", type=int, default=32, help="rows a step, all processes together (reported: 256)")
    add("--micro_batch", type=int, default=16, help="rows a forward pass at most; not the result")
    add("--lr", type=float, default=3e-4, help="peak learning rate (reported: 3e-5; tiny/ needs more)")
    add("--warmup", type=float, default=0.02, help="share of the steps while it rises (reported)")
    add("--weight_decay", type=float, default=0.1, help="AdamW's, on matrices only (reported, script: .1)")
    add("--clip", type=float, default=1.0, help="largest gradient norm, 0 = no limit (transformers' default)")
    add("--max_length", type=int, default=1024, help="tokens of prompt, image and answer (script: 2048)")
    add("--seed", type=int, default=3407, help="decides the order of the rows (script: 3407)")
    add("--log_every", type=int, default=10, help="steps between log lines")
    add("--save_every", type=int, default=500, help="steps between checkpoints; the last is always saved")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from --out")
    add("--evaluate", action=argparse.BooleanOptionalAction, default=True, help="end with the table")
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

def main(argv=None):
    args = parse_args(argv)
    rank, world, device = setup_distributed()
    if args.batch < world:
        sys.exit(f"--batch {args.batch} leaves some of the {world} processes without a row: raise it")
    rows, folder = open_data(args, rank, "stage3.jsonl")
    if args.init == "out/stage2" and not finished(args.init):
        if rank == 0:
            print(f"{args.init} is missing or unfinished: stage 2 first, 5 minutes on 2 cores", flush=True)
        stage2_kl_align.main(["--data", folder or "data", "--out", args.init, "--no-evaluate"])
        if world > 1:
            dist.barrier()  # rank 0 may still be writing
    vlm, tokenizer = start_vlm(args, device, TRAINABLE)
    # Freeze before DDP, which looks once at what needs a gradient and would wait for the rest for ever; and
    # before the optimizer, which would decay even a weight that never gets a gradient.
    for name, child in vlm.named_children():
        child.requires_grad_(name in TRAINABLE)
        if rank == 0:
            size = sum(p.numel() for p in child.parameters())
            print(f"{name}: {size:,} parameters, {'trained' if name in TRAINABLE else 'frozen'}")
    optimizer = make_optimizer(vlm, args)
    # A run explains itself: flags, parent, data and the text of this very script go into every checkpoint.
    with open(__file__, encoding="utf-8") as f:
        run = {"flags": vars(args), "init_sha256": vlm.source_sha256, "data_sha256": rows.sha256(),
               "script": f.read()}
    start = start_or_resume(args, vlm, optimizer, run, rank)
    # DDP: every process holds the whole model and sees a part of each batch; gradients are averaged while
    # backward runs.  vlm stays the bare module: whatever is not trained through is asked of it.
    model = DistributedDataParallel(vlm) if world > 1 else vlm
    vlm.train()
    begun, tokens, lost = time.time(), 0, np.zeros(2, int)
    reading = caption_loss(vlm, tokenizer, folder, device) if rank == 0 and folder else None

    quiet = rank > 0 or not sys.stderr.isatty()  # one bar, and none in a log file
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, disable=quiet):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        parts = rows_of_step(step, rows, args, rank, world)
        batches = [make_batch(vlm, tokenizer, part, max_length=args.max_length).to(device)
                   for part in parts]
        # The loss of a step is ONE mean over all answer tokens of the global batch.  So they are counted
        # first, and a micro-batch adds (its sum) / (that count).  Not a mean of means: it would weigh short
        # answers more.
        n_tokens, n_seen, *n_lost = total(sum(int((b.labels != IGNORE).sum()) for b in batches),
                                          sum(int(b.attention_mask.sum()) for b in batches),
                                          *sum(b.lost for b in batches).tolist(), device=device)
        loss_here = 0.0

        # ================================= the method: one step of stage 3 ==================================
        for k, batch in enumerate(batches):
            if world > 1:  # processes exchange gradients once a step, with the last micro-batch
                model.require_backward_grad_sync = k == len(batches) - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                # Only rows that predict an answer token come back, N of B x L: a prompt is given, not learnt,
                # and with a real vocabulary its logits would be most of the memory of a step.
                hidden = model(batch)  # (N, H)
                logits = F.linear(hidden, vlm.lm_head)  # (N, V)
            labels = batch.labels[batch.labels != IGNORE]  # (N,)
            # .float(): a log-softmax in bfloat16 has two digits.  No GradScaler: that is for float16, whose
            # small gradients become 0; bfloat16 has float32's range.
            loss = F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, n_tokens)
            (loss * world).backward()  # DDP takes the mean over processes; x world makes it the sum we want
            loss_here += loss.item()
        # ================================== from here on only bookkeeping ===================================

        # What we believe: each weight that learns got a gradient in this step, and no frozen one did.
        assert all((p.grad is not None) == p.requires_grad for p in vlm.parameters())
        # Clip the gradient of the whole step, after the last micro-batch: clipped parts have another sum.
        norm = torch.nn.utils.clip_grad_norm_(vlm.parameters(), args.clip or math.inf).item()
        loss_all, = total(loss_here, device=device)
        if not math.isfinite(loss_all + norm):  # the same sums on all processes, so all of them stop here
            sys.exit(f"step {step + 1}: loss {loss_all}, gradient norm {norm}: stopped before the step, not "
                     "saved; a lower --lr may help; rows here: "
                     f"{[row['id'] for part in parts for row in part]}")
        optimizer.step()
        optimizer.zero_grad()
        done, tokens, lost = step + 1, tokens + n_seen, lost + np.array(n_lost, int)
        if rank == 0 and (done % args.log_every == 0 or done == args.steps):
            lr, speed = optimizer.param_groups[0]["lr"], tokens / (time.time() - begun)
            gb = peak_gigabytes(device)
            line = f"step {done}/{args.steps} | loss {loss_all:.4f}"
            write_log(args, f"{line} | gnorm {norm:.2f} | lr {lr:.1e} | {speed:,.0f} tok/s | {gb:.1f} GB",
                      {"step": done, "loss": loss_all, "gnorm": norm, "lr": lr, "tok_s": speed, "gb": gb},
                      lost)
        if rank == 0 and (done % args.save_every == 0 or done == args.steps):
            save_checkpoint(args.out, done, vlm, tokenizer, optimizer, {"run": run})
    if rank == 0:
        if args.steps == 0:  # nothing to train, but whoever asked wants a model there
            save_checkpoint(args.out, 0, vlm, tokenizer, optimizer, {"run": run})
        if reading is not None:  # a model that only ever gets text may unlearn to look: watch this number
            now = caption_loss(vlm, tokenizer, folder, device)
            print(f"caption loss: {reading:.3f} before, {now:.3f} after, nats a token")
        print(f"stage 3 done in {time.time() - begun:.0f} s: {args.out}/step-{args.steps}", flush=True)
        if args.evaluate and folder:  # the table is of data_gen.py's test problems
            evaluation.main([*filter(None, [args.init]), args.out, "--data", folder])

if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.barrier()  # rank 0 may still be writing
        dist.destroy_process_group()
