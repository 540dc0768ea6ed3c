"""Compile the kernel of stage 2 for GPUs that need not be there, and read the machine code.

    python tests/compile_kernel.py    # five GPU generations, half a minute; JSON lines

`registers` a thread; `spilled` bytes a thread; `instructions` an element: those in the two loops
over V, divided by the columns that a thread takes in a turn.  At 83 they would take longer than
the memory traffic, at 55 they do not: see "How fast it can be" in stage2_kl_align.py.
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
ARCHITECTURES = (80, 89, 90, 100, 120)  # A100, RTX 40, H100, B200, RTX 50
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
    out = torch.empty(1, 3, device="meta")
    weights = (1.0, 1.0, 1.0)
    stage2_kl_align.align_rows_triton(row, row, label, out, tau, weights, train)
    stage2_kl_align.compiled_kernel = original

    constants = {}
    options = {}
    for name, value in recorder.named.items():
        target = options if name in ("num_warps", "maxnreg") else constants
        target[name] = value
    return constants, options


def compile_case(arch, slab, has_tau, train):
    """-> cubin as bytes, columns a thread takes in a turn. slab: the type of T and D"""
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
    return compiled.asm["cubin"], constants["BLOCK"] / (32 * options["num_warps"])


def printed_by(tool, option, cubin):
    """What one of NVIDIA's tools, which come with Triton, prints of a compiled kernel."""
    import triton
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / tool, option, path]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loops(assembly):
    """The innermost loops of nvdisasm's text, each as a list of instructions like "FADD R1, R2".

    A branch to a label further up ends a loop, which begins at that label.
    """
    instructions = []
    label_places = {}
    found = []
    for line in assembly.splitlines():
        label = re.match(r"(\.L_x_\d+):", line.strip())
        if label:
            label_places[label[1]] = len(instructions)
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if instruction:
            text = instruction[1].strip()
            instructions.append(re.sub(r"^@!?U?P\w+\s+", "", text))  # without "only if P0"
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
            if target and target[1] in label_places:
                found.append(instructions[label_places[target[1]]:])
    # The last line of a program branches to itself, for ever: no loop of the source.
    return [body for body in found if len(body) > 1]


def count(bodies, *starts):
    """How many instructions of these loops begin so."""
    return sum(text.startswith(starts) for body in bodies for text in body)


def report(arch, slab, has_tau, train):
    """One case -> dict"""
    cubin, columns = compile_case(arch, slab, has_tau, train)
    usage = printed_by("cuobjdump", "-res-usage", cubin)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    bodies = loops(printed_by("nvdisasm", "-c", cubin))
    loads_and_stores = [text for body in bodies for text in body if re.match("LDG|STG", text)]
    return {
        "arch": f"sm_{arch}",
        "slab": slab,
        "has_tau": has_tau,
        "train": train,
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],  # spilled registers go to the stack
        "loops": len(bodies),
        "instructions": round(sum(len(body) for body in bodies) / columns, 1),
        "barriers": count(bodies, "BAR", "WARPSYNC"),
        "shuffles": count(bodies, "SHFL"),
        "loads and stores": len(loads_and_stores),
        "of 128 bits": sum(".128" in text for text in loads_and_stores),
    }


def cases():
    """What trains, on every generation; on one of them also the other variants."""
    training = itertools.product(ARCHITECTURES, ["bf16"], [False, True], [True])
    others = itertools.product([90], ["bf16", "fp32"], [False, True], [False, True])
    return sorted({*training, *others})


if __name__ == "__main__":
    for case in cases():
        print(json.dumps(report(*case)), flush=True)
