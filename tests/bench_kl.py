"""Time the alignment loss, forward and backward, against its arithmetic floor and other ways to compute it.

    python tests/bench_kl.py               # CUDA: the four shapes of Qwen2's vocabulary; else two on the CPU
    python tests/bench_kl.py --rounds 3    # quicker and noisier

Every round runs every competitor once, one after the other on the same random rows, so a slow moment of the
machine hits all of them; the table has medians over the rounds.  Compilation and the first call are not
counted.  Peers that are not installed are named and left out.  Writes tests/results/bench_kl_<device>.json.
"""
import argparse
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

ALPHA, LAM = .5, .5
CUDA = torch.cuda.is_available()
SHAPES = (  # (N, H, V); the CPU's: tiny/, and one small batch at the real head
    [(1024, 1536, 151_936), (4096, 1536, 151_936), (4096, 3584, 152_064), (16384, 3584, 152_064)] if CUDA else
    [(2048, 128, 528), (256, 1536, 151_936)])


def full_logits(hs, ht, W, labels, released=False):
    """Equations (1)-(4) on whole logit matrices.

    released: with the released code's standardization and float32 log-softmaxes.
    """
    z_s, z_t = (hs.to(W.dtype) @ W.T).float(), (ht.to(W.dtype) @ W.T).float()
    s, t = ((z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-6) if released else z
            for z in (z_s, z_t))
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    fkl = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    rkl = F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    kl = ALPHA * fkl + (1 - ALPHA) * rkl
    return (LAM * kl + (1 - LAM) * F.cross_entropy(z_s, labels, reduction="sum")) / len(labels)


def ours(hs, ht, W, labels, **setting):
    return stage2.kl_align_loss(hs, ht, W, labels, alpha=ALPHA, lam=LAM, **setting)[0]


def three_products(hs, ht, W, chunk):
    """The floor: (5) and (11) alone, chunk by chunk into the same memory."""
    slab, dX = W.new_empty(2 * chunk, len(W)), torch.empty(hs.shape, device=W.device)
    for i in range(0, len(hs), chunk):
        h = torch.cat([ht[i:i + chunk], hs[i:i + chunk]]).to(W.dtype)
        torch.mm(h, W.T, out=slab[:len(h)])
        stage2.product(slab[:len(h) // 2], W, out=dX[i:i + chunk])


def liger(hs, ht, W, labels):
    """The same by liger-kernel's kernels: two divergences and a cross-entropy, each with its own products."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy, liger_fused_linear_jsd
    h, no_grad = hs.to(W.dtype), ht.to(W.dtype)
    fkl, rkl = (liger_fused_linear_jsd(h, W, no_grad, W, jsd_beta=beta) for beta in (0., 1.))
    return (LAM * (ALPHA * fkl + (1 - ALPHA) * rkl)
            + (1 - LAM) * liger_fused_linear_cross_entropy(h, W, labels))


def liger_chunked(hs, ht, W, labels, compiled=True):
    """liger-kernel's PyTorch losses, chunk by chunk, compiled. They make a gradient of W, wanted or not."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    parts = (0., LAM * ALPHA, 1 - LAM), (1., LAM * (1 - ALPHA), 0.)  # beta, share of the KL, of the hard loss
    return sum(LigerFusedLinearJSDLoss(hard, soft, beta, compiled=compiled)(
        hs.to(W.dtype), W, ht.to(W.dtype), W, labels) for beta, soft, hard in parts)


def competitors():
    """-> {name: function of (hs, ht, W, labels)}, and a line for every peer that is missing."""
    runs, missing = {"this code": ours, "full logits": full_logits}, []
    runs["released formula"] = functools.partial(full_logits, released=True)
    runs["standardized"] = functools.partial(ours, standardize=True)
    if CUDA:
        runs["exact"] = functools.partial(ours, exact=True)
        runs["torch.compile"] = torch.compile(full_logits, dynamic=False)
        try:
            import liger_kernel  # noqa: F401
            runs |= {"liger": liger, "liger chunked": liger_chunked}
        except ImportError:
            missing.append("liger-kernel: not installed")
    else:
        missing.append("torch.compile, liger-kernel and the Triton kernel: only timed on CUDA")
    return runs, missing


def seconds(run):
    """One call, timed with CUDA events or a clock."""
    if not CUDA:
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    begun, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begun.elapsed_time(end) / 1e3


def time_shape(N, H, V, rounds):
    """-> table, missing peers, ms of the floor

    table: {name: {"ms": median, "spread": highest / lowest, "gb": peak beyond the inputs}}
    """
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    torch.manual_seed(0)
    ht = torch.randn(N, H, device=device)
    hs = (ht + .3 * torch.randn_like(ht)).requires_grad_()
    W = (torch.randn(V, H, device=device) * 3 / H ** .5).to(dtype)
    labels = torch.randint(0, V, (N,), device=device)
    runs, missing = competitors()
    calls = {name: functools.partial(lambda f: torch.autograd.grad(f(hs, ht, W, labels), hs), f)
             for name, f in runs.items()}
    if CUDA:
        calls |= {f"floor, chunks of {n}": functools.partial(three_products, hs.detach(), ht, W, n)
                  for n in (1024, 2048, N) if n <= N and 4 * n * V < 40e9}
    else:
        calls["floor"] = functools.partial(three_products, hs.detach(), ht, W,
                                           min(N, max(stage2.MIN_ROWS, stage2.CHUNK_ELEMENTS // V)))
    found, memory = {name: [] for name in calls}, {}
    rounds = rounds if CUDA or N * H * V < 1e10 else min(rounds, 7)  # seconds a call
    for name, call in list(calls.items()):
        try:
            if CUDA:
                torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            call()  # compiles, allocates
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 1e9 if CUDA else None
        except RuntimeError as error:  # a peer's trouble, out of memory above all, must not end the run
            if name == "this code":
                raise
            missing.append(f"{name}: {type(error).__name__} {str(error)[:100]}")
            del calls[name], found[name]
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(seconds(call))
    table = {name: {"ms": 1e3 * statistics.median(t), "spread": max(t) / min(t), "gb": memory[name]}
             for name, t in found.items()}
    return table, missing, min(row["ms"] for name, row in table.items() if name.startswith("floor"))


def row_kernel(N, V, rounds):
    """The row kernel alone against the time of its 10 bytes an element at the speed of a copy. CUDA only."""
    n = min(N, stage2.CHUNK_ROWS)
    slab, one = torch.randn(2 * n, V, device="cuda").bfloat16(), torch.ones(n, device="cuda")
    labels, other = torch.zeros(n, dtype=torch.int64, device="cuda"), torch.empty_like(slab)
    kernel = functools.partial(stage2.align_rows_triton, slab, one, one, labels, .1, .1, .1, False, True)
    copy = functools.partial(other.copy_, slab)
    kernel(), copy()
    times = [(seconds(kernel), seconds(copy)) for _ in range(rounds)]
    own, moved = (statistics.median(t) for t in zip(*times))
    rate = 2 * slab.numel() * 2 / moved  # read and written
    return {"rows": n, "ms": 1e3 * own, "copy_tb_s": rate / 1e12, "over_traffic": own / (10 * n * V / rate)}


def dx_product(N, H, V, rounds):
    """ms of (11) for a chunk, plain and as a sum over S slices of V: which should product() be? CUDA only."""
    n = min(N, stage2.CHUNK_ROWS)
    G, W = (torch.randn(rows, width, device="cuda").bfloat16() for rows, width in ((n, V), (V, H)))
    out = torch.empty(n, H, device="cuda")

    def sliced(S):
        return torch.bmm(G.view(n, S, -1).transpose(0, 1), W.view(S, -1, H), out_dtype=torch.float32).sum(0)
    ways = {"mm": functools.partial(stage2.product, G, W, out=out)}
    ways |= {f"bmm of {S} slices": functools.partial(sliced, S) for S in (4, 8)}
    for way in ways.values():
        way()
    times = [[seconds(way) for way in ways.values()] for _ in range(rounds)]
    return {name: 1e3 * statistics.median(t) for name, t in zip(ways, zip(*times))}


def accuracy(N=64, H=1536, V=20_000):
    """Relative error of dL/dhs against float64 as the student approaches the teacher. -> rows of a table"""
    device, rows = "cuda" if CUDA else "cpu", []
    torch.manual_seed(0)
    W = (torch.randn(V, H, device=device) * 3 / H ** .5).bfloat16()
    ht, noise = torch.randn(N, H, device=device).bfloat16(), torch.randn(N, H, device=device)
    ignored = torch.full((N,), -100, device=device)

    def gradient(hs, loss):
        return torch.autograd.grad(loss(hs), hs)[0].double()

    for scale in (.3, .1, .03, .01, .003, .001):
        hs = (ht.float() + scale * noise).bfloat16().float().requires_grad_()
        log_p = (ht.double() @ W.double().T).log_softmax(-1)

        def both(log_q, log_p):
            return .5 * ((log_p.exp() * (log_p - log_q)).sum() + (log_q.exp() * (log_q - log_p)).sum()) / N
        hs64 = hs.detach().double().requires_grad_()
        want = gradient(hs64, lambda h: both((h @ W.double().T).log_softmax(-1), log_p))
        kl = (log_p.exp() * (log_p - (hs64.detach() @ W.double().T).log_softmax(-1))).sum(-1).mean().item()
        rounded = lambda h: (h.bfloat16() @ W.T).float().log_softmax(-1)  # both logit matrices in bfloat16
        one = functools.partial(stage2.kl_align_loss, ht=ht, weight=W, labels=ignored, alpha=.5, lam=1)
        got = {"S, T in bfloat16": gradient(hs, lambda h: both(rounded(h), rounded(ht))),
               "T, D in bfloat16": gradient(hs, lambda h: one(h)[0]),
               "T, D in float32 (exact)": gradient(hs, lambda h: one(h, exact=True)[0])}
        rows.append({"kl": kl} | {k: ((g - want).norm() / want.norm()).item() for k, g in got.items()})
    return rows


def accuracy_table(rows):
    """The README's table of what accuracy() found."""
    heads = [key for key in rows[0] if key != "kl"]
    lines = ["| KL, nats a token | " + " | ".join(heads) + " |", "|--:|" + "--:|" * len(heads)]
    cells = lambda row: " | ".join(f"{100 * row[k]:.2g} %" for k in heads)
    return "\n".join(lines + [f"| {row['kl']:.0e} | {cells(row)} |" for row in rows])


def time_table(shapes):
    """The README's table of a run on a CPU."""
    names = [name for name in shapes[0]["table"] if name != "floor"]
    lines = ["| N | H | V | three products | " + " | ".join(names) + " |", "|--:" * (4 + len(names)) + "|"]
    cells = lambda s: " | ".join(f"{s['table'][name]['ms']:,.0f} ms" for name in names)
    shape = lambda s: f"| {s['N']:,} | {s['H']:,} | {s['V']:,} | {s['floor_ms']:,.0f} ms |"
    return "\n".join(lines + [f"{shape(s)} {cells(s)} |" for s in shapes])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20 if CUDA else 41)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if CUDA else f"{os.cpu_count()} CPU cores, {platform.machine()}"
    print(name, "" if CUDA else "(no CUDA device: small shapes, float32, PyTorch only)",
          "torch", torch.__version__)
    result = {"date": time.strftime("%Y-%m-%d"), "device": name, "torch": torch.__version__,
              "rounds": args.rounds, "command": " ".join(["python", *sys.argv]), "shapes": []}
    for N, H, V in SHAPES:
        table, missing, floor = time_shape(N, H, V, args.rounds)
        print(f"\nN {N}, H {H}, V {V:,}: floor (three products) {floor:.2f} ms" +
              "".join(f"\n  {line}" for line in missing))
        for key, row in sorted(table.items(), key=lambda item: item[1]["ms"]):
            gb = "" if row["gb"] is None else f" {row['gb']:7.2f} GB"
            print(f"  {key:24s} {row['ms']:9.2f} ms  {row['ms'] / floor:6.2f} x floor  "
                  f"{row['ms'] / table['this code']['ms']:6.2f} x this code  spread {row['spread']:.2f}{gb}")
        entry = {"N": N, "H": H, "V": V, "floor_ms": floor, "table": table, "missing": missing}
        if CUDA:
            entry["row_kernel"] = row_kernel(N, V, args.rounds)
            entry["dx_product_ms"] = dx_product(N, H, V, args.rounds)
            print("  row kernel", entry["row_kernel"], "\n  dX product, ms", entry["dx_product_ms"])
        result["shapes"].append(entry)
    print("\nrelative error of the gradient against float64 (bfloat16 head)")
    result["accuracy"] = accuracy()
    for row in result["accuracy"]:
        print("  " + "  ".join(f"{k} {v:.1e}" if k == "kl" else f"{k} {100 * v:.2f} %"
                               for k, v in row.items()))
    result["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results",
                        f"bench_kl_{'cuda' if CUDA else 'cpu'}.json")
    with open(path, "w") as f:
        json.dump(result, f, indent=1)
    print(f"\nwrote {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
