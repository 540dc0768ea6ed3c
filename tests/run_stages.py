"""Started by torchrun in tests: runs of stages, one after the other, in one process group.

    run_stages.py '[[1, ["--out", "a"]], ["copy", ["a/step-1", "b/step-1"]], [1, ["--out", "b"]]]'

["differ", [[1, [...]], [1, [...]]]] gives each process a stage and a command line of its own, and
prints with what message each of them stops.

At every save it prints in how many units the model is split, if it is, and how many bytes of
weights and AdamW's moments this process holds.
"""
import json
import os
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch.distributed as dist  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import model  # noqa: E402
import stage1_text_sft  # noqa: E402
import stage2_kl_align  # noqa: E402
import stage3_mm_instruct  # noqa: E402

STAGES = {1: stage1_text_sft, 2: stage2_kl_align, 3: stage3_mm_instruct}


def bytes_here(tensors):
    total = 0
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        total += tensor.numel() * tensor.element_size()
    return total


def save_checkpoint(out, step, vlm, tokenizer, optimizer, run):
    tensors = []
    for parameter in vlm.parameters():
        if parameter.requires_grad:
            tensors.append(parameter)
        else:
            assert not isinstance(parameter, DTensor), "a frozen part was split"
    tensors += model.optimizer_tensors(vlm, optimizer).values()
    n_units = sum(isinstance(module, FSDPModule) for module in vlm.modules())
    print(f"HOLDS {os.path.basename(out)} {n_units} {bytes_here(tensors)}", flush=True)
    model.save_checkpoint(out, step, vlm, tokenizer, optimizer, run)


if __name__ == "__main__":
    for module in STAGES.values():
        module.save_checkpoint = save_checkpoint
    for stage, line in json.loads(sys.argv[1]):
        if stage == "copy":
            if dist.get_rank() == 0:
                shutil.copytree(*line)
        elif stage == "differ":
            rank = dist.get_rank()
            mine, line = line[rank]
            try:
                STAGES[mine].main(line)
            except SystemExit as stopped:
                print(f"STOPPED {rank}: {stopped.code}\n", end="", flush=True)
        else:
            STAGES[stage].main(line)
        if dist.is_initialized():  # not after a table: each process is alone then
            dist.barrier()  # rank 0 may still be writing
