"""Everything that needs a CUDA GPU, in one call of under ten minutes.

    python tests/on_gpu.py    # the kernel's tests, both benchmarks; JSON in tests/results/

Each command has a limit of seconds, so that one that hangs leaves time for the others.  What was
run, on which GPU and with which versions, is in tests/results/on_gpu.json; the benchmarks write
their own files.
"""
import json
import os
import subprocess
import sys
import time

import torch
import transformers
import triton

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COMMANDS = {  # arguments of python: seconds at most
    "-m pytest -q tests/test_loss.py -k triton": 120,
    "tests/bench_kl.py --rounds 20": 210,
    "tests/bench_train.py --system 1.5b --rounds 5": 120,
    "tests/bench_train.py --system 7b --rounds 3": 120,
}


def run(arguments, limit):
    """-> {"command", "seconds", "returncode": None: it ran past the limit, "end" of its output}"""
    print("+ python", arguments, flush=True)
    began = time.time()
    process = subprocess.Popen(
        [sys.executable, *arguments.split()],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    returncode = None
    try:
        printed, _ = process.communicate(timeout=limit)
        returncode = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
    print(printed, flush=True)
    return {
        "command": f"python {arguments}",
        "seconds": round(time.time() - began),
        "returncode": returncode,
        "end": printed.splitlines()[-5:],
    }


def main():
    if not torch.cuda.is_available():
        sys.exit("tests/on_gpu.py needs a CUDA GPU and a CUDA build of torch")
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "runs": [],
    }
    for arguments, limit in COMMANDS.items():
        result["runs"].append(run(arguments, limit))
        with open(os.path.join(ROOT, "tests", "results", "on_gpu.json"), "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
