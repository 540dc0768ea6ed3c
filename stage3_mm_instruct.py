"""Stage 3: multimodal instruction tuning. Everything learns, on all versions of the problems.

    python stage3_mm_instruct.py                       # one process; 3 minutes on 2 CPU cores
    torchrun --nproc_per_node 8 stage3_mm_instruct.py  # 8 processes: same batches, same parameters

Reads data/stage3.jsonl and out/stage2 (made first when missing); writes out/stage3/step-N,
metrics.jsonl and loss.png.  Read it as `diff stage1_text_sft.py stage3_mm_instruct.py`: what learns
and from what differs, not the loss.

What is new against stage 1:
    TRAINABLE    all three parts.  Stage 2 taught the eyes to speak the language model's language
                 while that stood still; now both may move towards each other.
    the rows     all six versions of the problems, the two hardest twice as often, so the model
                 keeps what it can do with text and learns the rungs that stage 2 never paired.
    the loss     nothing: plain cross-entropy with the label again, as in the paper.  The teacher is
                 gone: its language model, which stage 2 could trust to stand still, now changes.
    the order    nothing either: by the seed, with all versions mixed in a batch.

The table at the end compares the model before and after.  text_only may move here, since the
language model is no longer frozen; versions with a picture should rise.  `caption loss` says what
reading for its own sake, which these rows do not ask for, costs afterwards.

Differs from the paper in: the model and the data (tiny/ and data_gen.py, made for a laptop), the
number of steps, and the learning rate, reported as 3e-5 at a batch of 256.  The loss and what
learns are the paper's.

To fork it, change first: TRAINABLE, who learns; and the loss between the two banners in main.
"""
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
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

import eval as evaluation
import stage2_kl_align
from model import (PROJECTORS, ROW, JsonLines, is_finished, load_optimizer, make_batches,
                   on_main_process, open_data, save_checkpoint, says_it_in_one_line, shard,
                   start_run, start_vlm, try_to_save)

TRAINABLE = ("vision_model", "projector", "language_model")  # children of VLM that learn: all
FORMS = ("",)  # suffixes of a row's fields: here a row is one problem, in stage 2 a pair
LOG_EVERY = 10  # steps between log lines
LOG_LINE = ("step {step}/{steps} | loss {loss:.4f} | gnorm {gnorm:.2f} | lr {lr:.1e} | "
            "{rows_s:,.1f} rows/s | {dropped:.1%} too long")


def make_parser():
    """script = default of the released training script, reported = the paper's, from memory."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--init", default="out/stage2", help="model to start from")
    add("--llm", help="Qwen2 or Llama, folder (hf download)")
    add("--vision", help="SigLIP or its tower, folder")
    add("--projector", choices=list(PROJECTORS), help="a new one (None: mlp)")
    add("--data", nargs="+", default=["data"], help="data_gen.py's folder, JSONL files")
    add("--out", default="out/stage3", help="folder of checkpoints, metrics")
    add("--steps", type=int, default=200, help="optimizer steps (0.8 of a pass)")
    add("--batch", type=int, default=32, help="rows a step, all processes (reported: 256)")
    add("--micro_batch", type=int, default=16, help="rows a forward pass")
    add("--lr", type=float, default=3e-4, help="highest learning rate (reported: 3e-5)")
    add("--warmup", type=float, default=0.02, help="share of rising steps (reported)")
    add("--weight_decay", type=float, default=0.1, help="of matrices (reported, script)")
    add("--clip", type=float, default=1.0, help="highest gradient norm, 0: none")
    add("--max_length", type=int, default=1024, help="tokens of a row (script: 2048)")
    add("--seed", type=int, default=3407, help="of row order, projector (script)")
    add("--shard", action="store_true", help="split what learns (FSDP)")
    add("--recompute", action="store_true", help="LLM layers again in backward")
    add("--workers", type=int, default=4 if torch.cuda.is_available() else 0,
        help="processes that make batches")
    add("--save_every", type=int, default=50, help="steps between checkpoints")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on from --out")
    add("--evaluate", action=argparse.BooleanOptionalAction, default=True, help="end with a table")
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


@says_it_in_one_line
def main(argv=None):
    args = parse_args(argv)
    rank, world, device = setup_distributed()
    if args.batch % world:  # as many rows for each: with --shard one would wait for ever
        sys.exit(f"--batch {args.batch} is no multiple of the {world} processes")
    rows, folder = open_data(args.data, "stage3.jsonl", ROW)
    if args.init == "out/stage2" and not on_main_process(is_finished, args.init):
        stage2_kl_align.main(["--data", folder or "data", "--out", args.init, "--no-evaluate"])

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
    if args.shard and world > 1:
        shard(vlm)
    optimizer = make_optimizer(vlm, args)
    first_step = load_optimizer(checkpoint, vlm, optimizer) if checkpoint else 0

    # DDP: every process holds the whole model and sees a part of each batch; gradients are averaged
    # while backward runs.  `model` is for the pass that is trained; vlm stays the module itself,
    # for weights, checkpoints and passes without a gradient.  With --shard it is in parts already.
    model = DistributedDataParallel(vlm) if world > 1 and not args.shard else vlm
    evaluation.print_caption_loss(vlm, tokenizer, folder, device, "before")
    dataset = StepBatches(rows, tokenizer, vlm.config, args, rank, world)
    started = time.perf_counter()
    rows_seen = 0
    rows_dropped = 0

    for step, (micro_batches, n_answer_tokens, n_dropped) in batches_of_steps(dataset, first_step):
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The loss of a step is ONE mean over all answer tokens of the global batch.  So they are
        # counted first, and a micro-batch adds (its sum) / (that count).  Not a mean of means: it
        # would weigh short answers more.
        n_answer_tokens, n_dropped = sum_over_processes([n_answer_tokens, n_dropped], device)
        loss_here = 0.0

        # ========================= the method: one step of stage 3 ==========================
        for k, [batch] in enumerate(micro_batches):  # FORMS has one entry, and so has this list
            batch = batch.to(device)
            if world > 1:  # DDP exchanges gradients once a step, with the last micro-batch
                model.require_backward_grad_sync = (k == len(micro_batches) - 1)
            # autocast runs the matrix products in bfloat16 and keeps weights and sums in float32.
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                # Only rows that predict an answer token come back, N of B x L: a prompt is given,
                # not learnt, and with a real vocabulary its logits would fill most of the memory.
                hidden = model(batch)  # (N, H)
                logits = F.linear(hidden, vlm.lm_head)  # (N, V)
            labels = batch.labels[batch.is_answer]  # (N,)
            # .float(): a log-softmax in bfloat16 has two digits.  No GradScaler: that is for
            # float16, whose small gradients become 0; bfloat16 has float32's range.
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            loss = loss / max(1, n_answer_tokens)
            (loss * world).backward()  # DDP takes the mean over processes: x world, the sum
            loss_here += loss.detach()
        # ========================== from here on only bookkeeping ===========================

        # What we believe: each weight that learns got a gradient in this step, and no frozen one.
        for parameter in vlm.parameters():
            assert (parameter.grad is not None) == parameter.requires_grad
        # Clip the gradient of the whole step, after the last micro-batch: clipped parts have
        # another sum.
        norm = torch.nn.utils.clip_grad_norm_(vlm.parameters(), args.clip or math.inf).item()
        [loss] = sum_over_processes([loss_here], device)
        if not math.isfinite(loss + norm):  # the same on all processes, so all of them stop here
            sys.exit(f"step {step + 1}: loss {loss}, gnorm {norm}. Try --no-resume and a lower "
                     "--lr; or delete the newest step-N, which may be bad")
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        is_last = done == args.steps
        rows_seen += args.batch
        rows_dropped += n_dropped
        if rank == 0 and (done % LOG_EVERY == 0 or is_last):
            write_log(args, device, {
                "step": done,
                "steps": args.steps,
                "loss": loss,
                "gnorm": norm,
                "lr": lr,
                "rows_s": rows_seen / (time.perf_counter() - started),
                "dropped": rows_dropped / rows_seen,
            })
        if done % args.save_every == 0 or is_last:
            save_checkpoint(args.out, done, vlm, tokenizer, optimizer, run)

    if args.steps == 0:  # nothing to train, but whoever asked wants a model there
        save_checkpoint(args.out, 0, vlm, tokenizer, optimizer, run)
    evaluation.print_caption_loss(vlm, tokenizer, folder, device, "after")
    if args.evaluate:  # by rank 0 alone, for as long as it takes
        leave_processes()
    if rank > 0:
        return
    evaluation.draw_losses(args.out)
    print(f"stage 3 done in {time.perf_counter() - started:.0f} s: {args.out}/step-{args.steps}")
    if args.evaluate and folder:  # the table is of data_gen.py's test problems
        evaluation.main([args.init or args.out, args.out, "--data", folder])


if __name__ == "__main__":
    main()
    leave_processes()
