"""Compile the kernel of stage 2 for GPUs that need not be there: registers, spilled bytes a thread.

    python tests/compile_kernel.py    # sm_80 and sm_90: 16 cases, half a minute; JSON lines
"""
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's own, without its warning
import torch  # noqa: E402

import stage2_kl_align  # noqa: E402

VOCABULARY = 151_936  # Qwen2's
TYPES = {"label_ptr": "*i64", "out_ptr": "*fp32", "stride": "i32"}  # T, D: the case's; others: fp32
ALIGNED = ("T_ptr", "D_ptr", "label_ptr", "out_ptr", "stride")  # by 16, as at a real launch


class Recorder:
    """Stands in for the compiled kernel and keeps the named arguments that it is launched with."""

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arrays, **named):
        self.named = named


def launch_arguments(tau, train):
    """Constants and compiler options that align_rows_triton chooses, each as a dict."""
    recorder = Recorder()
    original = stage2_kl_align.compiled_kernel

    def stand_in():
        return recorder

    stage2_kl_align.compiled_kernel = stand_in
    row = torch.empty(1, VOCABULARY, device="meta")  # has a shape and no memory
    label = torch.empty(1, device="meta")
    weights = (1.0, 1.0, 1.0)
    stage2_kl_align.align_rows_triton(row, row, label, tau, weights, train)
    stage2_kl_align.compiled_kernel = original

    constants = {}
    options = {}
    for name, value in recorder.named.items():
        target = options if name in ("num_warps", "maxnreg") else constants
        target[name] = value
    return constants, options


def resources(cubin):
    """What the assembler noted down for a compiled kernel, as {"REG": 80, "STACK": 0, ...}."""
    import triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "-res-usage", path]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}


def report(arch, slab, has_tau, train):
    """One case -> dict. slab: the type of T and D."""
    import triton
    from triton.backends.compiler import GPUTarget
    tau = 2.0 if has_tau else 1.0
    constants, options = launch_arguments(tau, train)

    signature = {}
    for name in inspect.signature(stage2_kl_align.align_row_kernel).parameters:
        signature[name] = TYPES.get(name, "fp32")
        if name in ("T_ptr", "D_ptr"):
            signature[name] = f"*{slab}"
        if name in constants:
            signature[name] = "constexpr"
    attributes = {}
    for place, name in enumerate(signature):
        if name in ALIGNED:
            attributes[place,] = [["tt.divisibility", 16]]

    kernel = stage2_kl_align.compiled_kernel()
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=options)
    used = resources(compiled.asm["cubin"])
    return {
        "arch": f"sm_{arch}",
        "slab": slab,
        "has_tau": has_tau,
        "train": train,
        "launch": options,
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],  # bytes: spilled registers go to the stack
    }


if __name__ == "__main__":
    for case in itertools.product((80, 90), ("bf16", "fp32"), (False, True), (False, True)):
        print(json.dumps(report(*case)), flush=True)
