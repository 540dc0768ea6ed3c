"""Started by torchrun in tests: runs of stages, one after the other, in one process group."""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch.distributed as dist  # noqa: E402

import stage1_text_sft  # noqa: E402
import stage2_kl_align  # noqa: E402
import stage3_mm_instruct  # noqa: E402

STAGES = {1: stage1_text_sft, 2: stage2_kl_align, 3: stage3_mm_instruct}

if __name__ == "__main__":
    for stage, flags in json.loads(sys.argv[1]):
        STAGES[stage].main(flags)
        if dist.is_initialized():  # not after a table: each process is alone then
            dist.barrier()  # rank 0 may still be writing
