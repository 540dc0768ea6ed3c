"""Compile the kernel of stage 2 for GPUs that need not be there; print registers and spilled bytes a thread.

    python tests/compile_kernel.py        # sm_80 and sm_90, a few seconds each; one JSON object a line
"""
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does anyway, without its warning
import torch  # noqa: E402

import stage2_kl_align  # noqa: E402


class Recorder:
    """Stands in for the compiled kernel and keeps what align_rows_triton launches it with."""
    def __getitem__(self, grid):
        return lambda *arrays, **named: vars(self).update(named=named)


def report(arch, dtype, rescaled, train):
    """-> dict. What ptxas says about the kernel as align_rows_triton launches it at Qwen2's vocabulary."""
    import triton
    from triton.backends.compiler import GPUTarget
    kernel, launch, compiled = stage2_kl_align.compiled_kernel(), Recorder(), stage2_kl_align.compiled_kernel
    stage2_kl_align.compiled_kernel = lambda: launch
    one = torch.empty(1, device="meta")
    stage2_kl_align.align_rows_triton(torch.empty(2, 151_936, device="meta"), one, one, one, 1., 1., 1.,
                                      rescaled, train)
    stage2_kl_align.compiled_kernel = compiled
    options = {k: v for k, v in launch.named.items() if k in ("num_warps", "maxnreg")}
    constants = {k: v for k, v in launch.named.items() if k not in options}
    types = dict(slab=f"*{dtype}", a_t_of="*fp32", a_s_of="*fp32", label_of="*i64", out="*fp32", n="i32",
                 stride="i32", w_f="fp32", w_r="fp32", w_c="fp32", **dict.fromkeys(constants, "constexpr"))
    aligned = {(list(types).index(k),): [["tt.divisibility", 16]] for k in ("slab", "stride")}  # as at launch
    source = triton.compiler.ASTSource(kernel, types, constants, aligned)
    asm = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    usage = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}  # spills go to the stack
    return dict(arch=f"sm_{arch}", slab=dtype, rescaled=rescaled, train=train, launch=options,
                registers=usage["REG"], spilled=usage["STACK"] + usage["LOCAL"])


if __name__ == "__main__":
    for case in itertools.product((80, 90), ("bf16", "fp32"), (False, True), (False, True)):
        print(json.dumps(report(*case)), flush=True)
