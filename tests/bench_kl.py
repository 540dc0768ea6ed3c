"""Time the alignment loss, forward and backward, against its floor and other ways to compute it.

    python tests/bench_kl.py               # CUDA: four shapes of Qwen2's vocabulary; else two small
    python tests/bench_kl.py --rounds 3    # quicker and noisier

Every round runs every competitor once, one after the other on the same random rows, so a slow
moment of the machine hits all of them; the table has medians over the rounds.  Compilation and the
first call are not counted.  Peers that are not installed are named and left out.  Writes
tests/results/bench_kl_<device>.json.
"""
import argparse
import contextlib
import functools
import json
import os
import platform
import resource
import statistics
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import stage2_kl_align as stage2  # noqa: E402

ALPHA = 0.5
LAM = 0.5
CUDA = torch.cuda.is_available()
SHAPES_CUDA = [  # (N, H, V)
    (1024, 1536, 151_936),
    (4096, 1536, 151_936),
    (4096, 3584, 152_064),
    (16384, 3584, 152_064),
]
SHAPES_CPU = [(2048, 128, 528), (256, 1536, 151_936)]  # tiny/'s; a small batch at a real head
LONG_ROUNDS = 7  # at most, where a call takes seconds


# --------------------------------------------------------------------------------------------------
# The competitors: functions of (hs, ht, W, labels) that return the loss

def ours(hs, ht, W, labels, **setting):
    loss, _ = stage2.kl_align_loss(hs, ht, W, labels, alpha=ALPHA, lam=LAM, **setting)
    return loss


def loss_of_logits(z_s, s, t, labels):
    """Equations (1)-(4) as PyTorch's own functions have them. s, t: what the two softmaxes see."""
    ln_q = s.log_softmax(-1)
    ln_p = t.log_softmax(-1)
    fkl = F.kl_div(ln_q, ln_p, log_target=True, reduction="sum")
    rkl = F.kl_div(ln_p, ln_q, log_target=True, reduction="sum")
    hard = F.cross_entropy(z_s, labels, reduction="sum")
    kl = ALPHA * fkl + (1 - ALPHA) * rkl
    return (LAM * kl + (1 - LAM) * hard) / len(labels)


def full_logits(hs, ht, W, labels):
    """Both logit matrices of all rows at once."""
    z_s = (hs.to(W.dtype) @ W.T).float()
    z_t = (ht.to(W.dtype) @ W.T).float()
    return loss_of_logits(z_s, z_s, z_t, labels)


def standardized(z):
    centred = z - z.mean(-1, keepdim=True)
    return centred / (z.std(-1, keepdim=True) + 1e-6)


def released_formula(hs, ht, W, labels):
    """The same with the released code's standardization."""
    z_s = (hs.to(W.dtype) @ W.T).float()
    z_t = (ht.to(W.dtype) @ W.T).float()
    return loss_of_logits(z_s, standardized(z_s), standardized(z_t), labels)


def liger(hs, ht, W, labels):
    """liger-kernel's kernels: two divergences and a cross-entropy, each with its own products."""
    from liger_kernel.transformers import functional
    student = hs.to(W.dtype)
    teacher = ht.to(W.dtype)
    fkl = functional.liger_fused_linear_jsd(student, W, teacher, W, jsd_beta=0.0)
    rkl = functional.liger_fused_linear_jsd(student, W, teacher, W, jsd_beta=1.0)
    hard = functional.liger_fused_linear_cross_entropy(student, W, labels)
    return LAM * (ALPHA * fkl + (1 - ALPHA) * rkl) + (1 - LAM) * hard


def liger_chunked(hs, ht, W, labels, compiled=True):
    """liger-kernel's losses in PyTorch, by chunks. They make a gradient of W, wanted or not."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    student = hs.to(W.dtype)
    teacher = ht.to(W.dtype)
    # weight of the hard loss, weight of the divergence, which divergence
    forward = LigerFusedLinearJSDLoss(1 - LAM, LAM * ALPHA, 0.0, compiled=compiled)
    reverse = LigerFusedLinearJSDLoss(0.0, LAM * (1 - ALPHA), 1.0, compiled=compiled)
    loss = forward(student, W, teacher, W, labels)
    return loss + reverse(student, W, teacher, W, labels)


def competitors():
    """-> {name: function}, and a line for every peer that is missing"""
    functions = {
        "this code": ours,
        "full logits": full_logits,
        "released formula": released_formula,
        "standardized": functools.partial(ours, standardize=True),
    }
    if not CUDA:
        return functions, ["torch.compile, liger-kernel and the Triton kernel: only timed on CUDA"]

    functions["textbook"] = functools.partial(ours, kernel="eager")
    functions["torch.compile"] = torch.compile(full_logits, dynamic=False)
    try:
        import liger_kernel  # noqa: F401
    except ImportError:
        return functions, ["liger-kernel: not installed"]
    functions["liger"] = liger
    functions["liger chunked"] = liger_chunked
    return functions, []


def three_products(hs, ht, W, chunk):
    """The floor: products (5) and (11) alone, chunk by chunk into the same memory."""
    slab = torch.empty(2 * chunk, len(W), dtype=W.dtype, device=W.device)
    dhs = torch.empty(hs.shape, device=W.device)
    for start in range(0, len(hs), chunk):
        rows = slice(start, start + chunk)
        both = torch.cat([ht[rows], hs[rows]]).to(W.dtype)
        torch.mm(both, W.T, out=slab[:len(both)])
        dhs[rows] = stage2.product(slab[:len(both) // 2], W)


# --------------------------------------------------------------------------------------------------
# Clocks

def seconds(run):
    """One call, timed with CUDA events or a clock."""
    if not CUDA:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    started = torch.cuda.Event(enable_timing=True)
    ended = torch.cuda.Event(enable_timing=True)
    started.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return started.elapsed_time(ended) / 1e3


def time_in_turn(calls, rounds):
    """calls: {name: function} -> {name: seconds of each round}"""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def forward_and_backward(function, hs, ht, W, labels):
    torch.autograd.grad(function(hs, ht, W, labels), hs)


def first_call(call):
    """Compiles and allocates. -> highest memory beyond the inputs in GB, None on a CPU"""
    if not CUDA:
        call()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def floors(hs, ht, W):
    """-> {name: three_products in chunks of some size}"""
    N = len(hs)
    V = len(W)
    if not CUDA:
        chunk = max(stage2.MIN_ROWS, stage2.CHUNK_ELEMENTS // V)
        return {"floor": functools.partial(three_products, hs, ht, W, min(N, chunk))}
    found = {}
    for chunk in (1024, 2048, N):
        if chunk <= N and 4 * chunk * V < 40e9:
            found[f"floor, chunks of {chunk}"] = functools.partial(
                three_products, hs, ht, W, chunk)
    return found


def random_rows(N, H, V):
    """-> hs, ht (N, H) float32, W (V, H) in the type of the device, labels (N,)"""
    device = "cuda" if CUDA else "cpu"
    dtype = torch.bfloat16 if CUDA else torch.float32
    torch.manual_seed(0)
    ht = torch.randn(N, H, device=device)
    hs = (ht + 0.3 * torch.randn_like(ht)).requires_grad_()
    W = (torch.randn(V, H, device=device) * 3 / H ** 0.5).to(dtype)
    labels = torch.randint(0, V, (N,), device=device)
    return hs, ht, W, labels


def time_shape(N, H, V, rounds):
    """-> table, missing peers, ms of the floor

    table: {name: {"ms": median, "spread": highest / lowest, "gb": highest memory}}
    """
    hs, ht, W, labels = random_rows(N, H, V)
    functions, missing = competitors()
    calls = {}
    for name, function in functions.items():
        calls[name] = functools.partial(forward_and_backward, function, hs, ht, W, labels)
    calls |= floors(hs.detach(), ht, W)

    memory = {}
    for name in list(calls):
        try:
            memory[name] = first_call(calls[name])
        except RuntimeError as error:  # a peer's, out of memory above all, must not end the run
            if name == "this code":
                raise
            missing.append(f"{name}: {type(error).__name__} {str(error)[:100]}")
            del calls[name]

    takes_seconds = not CUDA and N * H * V >= 1e10
    if takes_seconds:
        rounds = min(rounds, LONG_ROUNDS)
    table = {}
    for name, times in time_in_turn(calls, rounds).items():
        table[name] = {
            "ms": 1e3 * statistics.median(times),
            "spread": max(times) / min(times),
            "gb": memory[name],
        }
    floor = min(table[name]["ms"] for name in table if name.startswith("floor"))
    return table, missing, floor


# --------------------------------------------------------------------------------------------------
# Parts of the loss, on CUDA only

def row_kernel(N, V, rounds):
    """The kernel alone, against its 10 bytes an element at the speed of a copy."""
    n = min(N, stage2.KERNEL_ROWS)
    slab = torch.randn(2 * n, V, device="cuda").bfloat16()
    other = torch.empty_like(slab)
    T, D = slab.chunk(2)
    labels = torch.zeros(n, dtype=torch.int64, device="cuda")
    out = torch.empty(n, 3, device="cuda")
    weights = (0.1, 0.1, 0.1)
    calls = {
        "kernel": functools.partial(
            stage2.align_rows_triton, T, D, labels, out, 1.0, weights, True),
        "copy": functools.partial(other.copy_, slab),
    }
    for call in calls.values():
        call()
    times = time_in_turn(calls, rounds)
    kernel_seconds = statistics.median(times["kernel"])
    bytes_copied = 2 * slab.numel() * 2  # each is read and written
    rate = bytes_copied / statistics.median(times["copy"])
    return {
        "rows": n,
        "ms": 1e3 * kernel_seconds,
        "copy_tb_s": rate / 1e12,
        "over_traffic": kernel_seconds / (10 * n * V / rate),
    }


def product_of_slices(G, W, n_slices):
    """G W as a sum over slices of V."""
    n = len(G)
    H = W.shape[1]
    left = G.view(n, n_slices, -1).transpose(0, 1)  # (n_slices, n, V / n_slices)
    right = W.view(n_slices, -1, H)
    return torch.bmm(left, right, out_dtype=torch.float32).sum(0)


def dx_product(N, H, V, rounds):
    """ms for all N rows of (11), in chunks of some size, plain and by slices of V.

    A chunk of few rows has fewer tiles than the GPU has multiprocessors: which should product() be?
    """
    W = torch.randn(V, H, device="cuda").bfloat16()
    results = {}
    for n in (512, 1536, 2048):
        if n > N:
            continue
        G = torch.randn(n, V, device="cuda").bfloat16()
        calls = {"mm": functools.partial(stage2.product, G, W)}
        for n_slices in (4, 8):
            calls[f"bmm of {n_slices} slices"] = functools.partial(
                product_of_slices, G, W, n_slices)
        for call in calls.values():
            call()
        for name, times in time_in_turn(calls, rounds).items():
            results[f"{name}, {n} rows"] = 1e3 * statistics.median(times) * N / n
    return results


@contextlib.contextmanager
def launched_with(warps, rows):
    """The loss with other settings of its kernel."""
    before = stage2.NUM_WARPS, stage2.KERNEL_ROWS
    stage2.NUM_WARPS = warps
    stage2.KERNEL_ROWS = rows
    yield
    stage2.NUM_WARPS, stage2.KERNEL_ROWS = before


def sweep(N, H, V, rounds):
    """ms of the whole loss, forward and backward, for warps a row x rows a chunk."""
    hs, ht, W, labels = random_rows(N, H, V)
    results = {}
    for warps in (4, 8, 16):
        for rows in (1024, 1536, 2048):
            with launched_with(warps, rows):
                call = functools.partial(forward_and_backward, ours, hs, ht, W, labels)
                call()
                times = [seconds(call) for _ in range(rounds)]
            results[f"{warps} warps, {rows} rows"] = 1e3 * statistics.median(times)
    return results


# --------------------------------------------------------------------------------------------------
# Accuracy

def both_kls(ln_q, ln_p):
    """Half of the one and half of the other, a token."""
    fkl = (ln_p.exp() * (ln_p - ln_q)).sum()
    rkl = (ln_q.exp() * (ln_q - ln_p)).sum()
    return 0.5 * (fkl + rkl) / len(ln_q)


def ln_softmax(h, W):
    """In the type of W; the softmax at least in float32."""
    z = h.to(W.dtype) @ W.T
    if z.dtype == torch.bfloat16:
        z = z.float()
    return z.log_softmax(-1)


def gradient_of_two_logit_matrices(hs, ht, W):
    """dL/dhs where both logit matrices are made in the type of W."""
    hs = hs.detach().to(torch.promote_types(W.dtype, torch.float32)).requires_grad_()
    loss = both_kls(ln_softmax(hs, W), ln_softmax(ht, W).detach())
    [gradient] = torch.autograd.grad(loss, hs)
    return gradient


def our_gradient(hs, ht, W):
    hs = hs.detach().requires_grad_()
    no_labels = torch.full((len(hs),), -100, device=hs.device)
    loss, _ = stage2.kl_align_loss(hs, ht, W, no_labels, alpha=0.5, lam=1)
    [gradient] = torch.autograd.grad(loss, hs)
    return gradient


def accuracy(N=64, H=1536, V=20_000):
    """Relative errors of dL/dhs against float64 while the student arrives. -> rows of a table"""
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    W = (torch.randn(V, H, device=device) * 3 / H ** 0.5).bfloat16()
    ht = torch.randn(N, H, device=device).bfloat16()
    noise = torch.randn(N, H, device=device)
    W64 = W.double()
    ln_p = ln_softmax(ht, W64)

    rows = []
    for scale in (0.3, 0.1, 0.03, 0.01, 0.003, 0.001):
        hs = (ht.float() + scale * noise).bfloat16().float()
        ln_q = ln_softmax(hs, W64)
        wanted = gradient_of_two_logit_matrices(hs, ht, W64)
        gradients = {
            "S, T in bfloat16": gradient_of_two_logit_matrices(hs, ht, W),
            "T, D in bfloat16": our_gradient(hs, ht, W),
            "T, D in float32": our_gradient(hs, ht.float(), W.float()),
        }
        row = {"kl": (ln_p.exp() * (ln_p - ln_q)).sum(-1).mean().item()}
        for name, gradient in gradients.items():
            row[name] = ((gradient.double() - wanted).norm() / wanted.norm()).item()
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------
# Tables

def accuracy_table(rows):
    """The README's table of what accuracy() found."""
    names = [name for name in rows[0] if name != "kl"]
    lines = ["| KL, nats a token | " + " | ".join(names) + " |"]
    lines.append("|--:|" + "--:|" * len(names))
    for row in rows:
        cells = " | ".join(f"{100 * row[name]:.2g} %" for name in names)
        lines.append(f"| {row['kl']:.0e} | {cells} |")
    return "\n".join(lines)


def time_table(shapes):
    """The README's table of a run on a CPU."""
    names = [name for name in shapes[0]["table"] if name != "floor"]
    lines = ["| N | H | V | three products | " + " | ".join(names) + " |"]
    lines.append("|--:" * (4 + len(names)) + "|")
    for shape in shapes:
        line = f"| {shape['N']:,} | {shape['H']:,} | {shape['V']:,} | {shape['floor_ms']:,.0f} ms |"
        cells = " | ".join(f"{shape['table'][name]['ms']:,.0f} ms" for name in names)
        lines.append(f"{line} {cells} |")
    return "\n".join(lines)


def print_times(table, floor):
    own = table["this code"]["ms"]
    for name in sorted(table, key=lambda name: table[name]["ms"]):
        row = table[name]
        line = f"  {name:24s} {row['ms']:9.2f} ms  {row['ms'] / floor:6.2f} x floor"
        line += f"  {row['ms'] / own:6.2f} x this code  spread {row['spread']:.2f}"
        if row["gb"] is not None:
            line += f" {row['gb']:7.2f} GB"
        print(line)


def measure_shape(N, H, V, rounds):
    """Time a shape, print what was found. -> an entry of the JSON file"""
    table, missing, floor = time_shape(N, H, V, rounds)
    print(f"\nN {N}, H {H}, V {V:,}: floor (three products) {floor:.2f} ms")
    for line in missing:
        print(f"  {line}")
    print_times(table, floor)
    entry = {"N": N, "H": H, "V": V, "floor_ms": floor, "table": table, "missing": missing}
    if CUDA:
        entry["row_kernel"] = row_kernel(N, V, rounds)
        entry["dx_product_ms"] = dx_product(N, H, V, rounds)
        entry["sweep_ms"] = sweep(N, H, V, min(rounds, LONG_ROUNDS))
        print("  row kernel", entry["row_kernel"])
        print("  warps x rows of a chunk, ms", entry["sweep_ms"])
        print("  dX product, ms", entry["dx_product_ms"])
    return entry


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20 if CUDA else 41)
    args = parser.parse_args()
    device = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    note = "(no CUDA device: small shapes, float32, PyTorch only)"
    if CUDA:
        device = torch.cuda.get_device_name()
        note = ""
    print(device, note, "torch", torch.__version__)

    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "torch": torch.__version__,
        "rounds": args.rounds,
        "command": " ".join(["python", *sys.argv]),
        "shapes": [],
    }
    for N, H, V in SHAPES_CUDA if CUDA else SHAPES_CPU:
        result["shapes"].append(measure_shape(N, H, V, args.rounds))

    print("\nrelative error of the gradient against float64 (bfloat16 head)")
    result["accuracy"] = accuracy()
    print(accuracy_table(result["accuracy"]))
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
    path = os.path.join(folder, "bench_kl_cuda.json" if CUDA else "bench_kl_cpu.json")
    with open(path, "w") as f:
        json.dump(result, f, indent=1)
    print(f"\nwrote {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
