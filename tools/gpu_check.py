"""Steps of gpu_check.sh: python gpu_check.py ceilings|exact|quantized|full|windows|stages|kernels|races. See there."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from batches import planned, solves
from checkpoints import llm_like, write_checkpoint

REHEARSAL = os.environ.get("REHEARSE") == "1"  # a pretended device, which does all as late as it may, stands for the real one
DEVICE, TINY = os.environ.get("DEVICE", "cuda"), os.environ.get("SIZE") == "tiny"
OUT, WORK = Path(os.environ.get("OUT", "gpu-out")), Path(os.environ.get("WORK", "gpu-work"))
ROOT = Path.cwd()
CUDA = DEVICE.startswith("cuda")
GB = 1e9


def sync():
    if CUDA:
        torch.cuda.synchronize()


def best(call, repeats=5):
    call()
    times = []
    for _ in range(repeats):
        sync()
        start = time.perf_counter()
        call()
        sync()
        times.append(time.perf_counter() - start)
    return min(times)


def cli(*arguments, ok=True):
    """Run a command as a user gives it, and return what it prints.

    In this process: a start of torch and CUDA each time would take most of the time.
    """
    from click.testing import CliRunner

    from surgery.cli.main import main

    done = CliRunner().invoke(main, list(map(str, arguments)))
    if ok and done.exit_code:
        raise SystemExit(
            f"surgery {' '.join(map(str, arguments))}: exit {done.exit_code} {done.exception!r}\n{done.output[-4000:]}"
        )
    return done.output


def hashes(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def weights_of(folder):
    return {
        name: value
        for name, value in hashes(folder).items()
        if name.endswith(".safetensors") and not name.startswith("surgery/")
    }


def ceilings():
    """What the machine can do: the denominators of everything else."""
    if CUDA and not REHEARSAL:
        print(
            subprocess.run(
                [
                    "nvidia-smi",
                    "--query-gpu=name,memory.total,driver_version,clocks.sm,pcie.link.gen.current,pcie.link.width.current",
                    "--format=csv",
                ],
                capture_output=True,
                text=True,
            ).stdout
        )
    print(
        f"python {sys.version.split()[0]}, torch {torch.__version__}, cuda {torch.version.cuda}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads"
    )
    import surgery

    print(
        "surgery",
        surgery.__version__,
        "imports without the hub client:",
        not {"huggingface_hub", "httpx2"} & sys.modules.keys(),
    )
    n = 1 << (22 if TINY else 28)
    rows = {}
    host, pinned = torch.ones(n, dtype=torch.uint8), torch.ones(n, dtype=torch.uint8, pin_memory=CUDA)
    if CUDA:
        start = time.perf_counter()
        torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
        rows["pinning 1 GiB, s"] = time.perf_counter() - start
    there, other = torch.ones(n, dtype=torch.uint8, device=DEVICE), torch.empty(n, dtype=torch.uint8, device=DEVICE)
    rows["device copy, GB/s read + written"] = 2 * n / best(lambda: other.copy_(there)) / GB
    rows["host to device, pinned, GB/s"] = n / best(lambda: there.copy_(pinned, non_blocking=True)) / GB
    rows["host to device, pageable"] = n / best(lambda: there.copy_(host)) / GB
    rows["device to host, pinned"] = n / best(lambda: pinned.copy_(there, non_blocking=True)) / GB
    rows["device to host, pageable"] = n / best(lambda: host.copy_(there)) / GB
    rows["device to host, fresh pages (.cpu())"] = n / best(lambda: there.cpu()) / GB
    side = 256 if TINY else 4096
    A = torch.randn(2, side, side, device=DEVICE)
    x = torch.randn(2, 24, side, device=DEVICE)
    for name, B in (("x A", A), ("x A^T", A.mT)):
        t = best(lambda B=B: torch.bmm(x, B), 20)
        rows[f"24 rows {name}, float32, TFLOP/s"] = 2 * 2 * 24 * side * side / t / 1e12
        rows[f"24 rows {name}, float32, GB/s"] = A.nbytes / t / GB
    W, y = A[0].double(), torch.randn(16, side, device=DEVICE, dtype=torch.float64)
    rows["16 rows x A, float64, TFLOP/s"] = 2 * 16 * side * side / best(lambda: y @ W, 20) / 1e12
    G = torch.randn(16, 192, 192, dtype=torch.float64)
    G = G @ G.mT
    rows["eigh 16 x 192 float64 on the host, ms"] = 1e3 * best(lambda: torch.linalg.eigh(G))
    if CUDA:
        H = G.cuda()
        rows["eigh 16 x 192 float64 on the device, ms"] = 1e3 * best(lambda: torch.linalg.eigh(H))
        g = torch.randn(3, 24, 24, dtype=torch.float64, device=DEVICE)
        g = g @ g.mT + torch.eye(24, device=DEVICE, dtype=torch.float64)
        rows["cholesky_ex 3 x 24, us"] = 1e6 * best(lambda: torch.linalg.cholesky_ex(g), 20)
        L = torch.linalg.cholesky(g)
        rows["solve_triangular 3 x 24, us"] = 1e6 * best(lambda: torch.linalg.solve_triangular(L, g, upper=False), 20)
        z = torch.zeros(1, device=DEVICE)
        rows["one launch, us"] = 1e6 * best(lambda: [z.add_(1) for _ in range(1000)]) / 1000
        rows["launch and .item(), us"] = 1e6 * best(lambda: [z.add_(1).item() for _ in range(200)]) / 200
        exponents = torch.arange(-126, 128, device=DEVICE)
        exact = torch.ldexp(torch.ones(254, dtype=torch.float64, device=DEVICE), exponents).cpu() == 2.0 ** torch.arange(
            -126, 128, dtype=torch.float64
        )
        power = torch.pow(2.0, exponents).cpu().double() == 2.0 ** torch.arange(-126, 128, dtype=torch.float64)
        rows["ldexp(1, e) exact, of 254 (must be 254)"] = int(exact.sum())
        rows["pow(2.0, e) float32 exact, of 254 (what ldexp was before torch 2.11)"] = int(power.sum())
    data = os.urandom(n // 4)
    rows["sha256, one core, GB/s"] = len(data) / best(lambda: hashlib.sha256(data).digest(), 3) / GB
    path = WORK / "probe"
    block = os.urandom(1 << 22)
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(4 if TINY else 512):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    rows["disk, written and synced, GB/s"] = path.stat().st_size / (time.perf_counter() - start) / GB
    path.unlink()
    for name, value in rows.items():
        print(f"{name:72} {value:10.3f}" if isinstance(value, float) else f"{name:72} {value:10d}")
    (OUT / "ceilings.json").write_text(json.dumps(rows, indent=1))


def exact():
    """Same seed, same bytes; whatever is recovered is the source, on either device."""
    from safetensors.torch import load_file, save_file

    bad = []

    def expect(holds, what):
        print(("ok    " if holds else "WRONG ") + what, flush=True)
        if not holds:
            bad.append(what)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        model = WORK / f"model-{name}"
        write_checkpoint(
            model, (4e6 if TINY else 3e8) * dtype.itemsize / 2, 256 if TINY else 1536, dtype, shard_bytes=2e6 if TINY else 1e8
        )
        source = weights_of(model)
        f = {which: WORK / f"f-{name}-{which}" for which in ("device", "again", "cpu", "small")}
        cli("factorize", model, "-o", f["device"], "--device", DEVICE, "--quiet")
        cli("factorize", model, "-o", f["again"], "--device", DEVICE, "--quiet")
        cli("factorize", model, "-o", f["cpu"], "--device", "cpu", "--quiet")
        one, two = hashes(f["device"]), hashes(f["again"])
        expect(
            one == two,
            f"{name}: the same run twice on {DEVICE} gives the same bytes "
            f"({sum(one[k] != two.get(k) for k in one)} of {len(one)} files differ)",
        )
        for where in (DEVICE, "cpu"):
            out = cli("verify", f["device"], "--device", where, ok=False)
            expect(
                "all is as the manifest says" in out,
                f"{name}: verified on {where}, made on {DEVICE} {'' if 'all is' in out else out[-300:]}",
            )
            back = WORK / "back"
            cli(
                "fold",
                f["device"],
                f["device"] / "surgery/scales.safetensors",
                "-o",
                back,
                "--device",
                where,
                "--overwrite",
                "--quiet",
            )
            expect(
                weights_of(back) == source,
                f"{name}: untouched fold on {where} of what {DEVICE} made is the source, byte for byte",
            )
        cli(
            "fold",
            f["cpu"],
            f["cpu"] / "surgery/scales.safetensors",
            "-o",
            WORK / "back",
            "--device",
            DEVICE,
            "--overwrite",
            "--quiet",
        )
        expect(
            weights_of(WORK / "back") == source,
            f"{name}: untouched fold on {DEVICE} of what the CPU made is the source, byte for byte",
        )
        scales = load_file(f["device"] / "surgery/scales.safetensors")
        from safetensors import safe_open

        with safe_open(f["device"] / "surgery/scales.safetensors", "pt") as file:
            metadata = file.metadata()
        generator = torch.Generator().manual_seed(1)
        changed = WORK / "changed.safetensors"
        # Large changes are rounded to nearest, small ones in their directions (float32 always to nearest).
        for size, how in ((0.002, "in directions"), (0.2, "to nearest")):
            save_file(
                {key: 1 + size * torch.randn(value.shape, generator=generator) for key, value in scales.items()},
                changed,
                metadata=metadata,
            )
            for where, out in ((DEVICE, WORK / "there"), ("cpu", WORK / "here")):
                cli("fold", f["device"], changed, "-o", out, "--device", where, "--overwrite", "--quiet")
            differing = entries = 0
            for file in sorted(WORK.glob("here/*.safetensors")):
                a, b = load_file(file), load_file(WORK / "there" / file.name)
                for key in a:
                    bits = torch.int32 if a[key].dtype == torch.float32 else torch.int16
                    differing += int((a[key].view(bits) != b[key].view(bits)).sum())
                    entries += a[key].numel()
            expect(
                differing == 0,
                f"{name}: fold rounded {how} on {DEVICE} and on the CPU: {differing} of {entries} weights differ",
            )
        for which in ("device", "cpu"):
            cli(
                "project",
                f[which],
                WORK / "here",
                "-o",
                WORK / f"projected-{which}.safetensors",
                "--device",
                DEVICE if which == "device" else "cpu",
                "--overwrite",
                "--quiet",
            )
        a, b = (load_file(WORK / f"projected-{which}.safetensors") for which in ("device", "cpu"))
        worst = max((a[key].double() - b[key].double()).abs().median().item() for key in a)
        print(f"      {name}: projected scales on {DEVICE} and CPU: largest median difference {worst:.1e}")
        for where, out in ((DEVICE, WORK / "pairs-there"), ("cpu", WORK / "pairs-here")):
            cli("extract", model, WORK / "here", "-o", out, "--rank", "16", "--device", where, "--overwrite", "--quiet")
        a, b = (json.loads((WORK / out / "extraction.json").read_text()) for out in ("pairs-there", "pairs-here"))
        worst = max(abs(x["error"] - y["error"]) for x, y in zip(a["targets"], b["targets"], strict=True))
        left = max(abs(x["merged_error"] - y["merged_error"]) for x, y in zip(a["targets"], b["targets"], strict=True))
        rules = [sorted({x["rule"] for x in one["targets"]}) for one in (a, b)]
        expect(
            worst <= 2e-5,
            f"{name}: extract on {DEVICE} and on the CPU leave the same of each change: {worst:.1e} apart at most "
            f"({left:.1e} after a merge; ended by {rules[0]} and {rules[1]})",
        )
        if CUDA:
            cli("factorize", model, "-o", f["small"], "--device", DEVICE, "--max-device-memory", "5GB", "--quiet")
            expect(
                "all is as" in cli("verify", f["small"], "--device", "cpu", ok=False), f"{name}: with --max-device-memory 5GB"
            )
    raise SystemExit(f"{len(bad)} wrong" if bad else 0)


def full():
    """Another process has taken the device's memory: the run ends, with a warning, and is right."""
    if not CUDA or REHEARSAL:
        print("nothing to fill without a GPU")
        return
    model, out = WORK / "model-full", WORK / "f-full"
    write_checkpoint(model, 3e8, 2048, shard_bytes=3e8)
    hog = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import torch, time; free, _ = torch.cuda.mem_get_info(); "
            "x = torch.empty(free - (1100 << 20), dtype=torch.uint8, device='cuda'); print('full', flush=True); time.sleep(50)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        print(hog.stdout.readline())
        print(cli("factorize", model, "-o", out, "--device", DEVICE, "--quiet", ok=False)[-1500:])
    finally:
        hog.kill()
        hog.wait()
    text = cli("verify", out, "--device", "cpu", ok=False)
    print(text[-500:])
    raise SystemExit(0 if "all is as" in text else 1)


def windows():
    """The 224 SVDs of an 8B model in the batches that factorize plans: one thread, then four with a stream each."""
    import surgery
    from surgery.engine.resources import Resources

    total = torch.cuda.get_device_properties(DEVICE).total_memory * 4 // 5 if CUDA else None
    with planned("8B", Resources("cuda" if CUDA else "cpu", device_memory=total)) as plan:
        calls = solves(plan, "cuda" if CUDA else "cpu")
    if TINY:
        calls = [(min(count, 2), m // 32, n // 32) for count, m, n in calls[:8]]
    base = {
        shape: llm_like(*shape, torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
        for shape in {call[1:] for call in calls}
    }

    def solve(call):
        count, *shape = call
        result = surgery.truncated_svd(base[tuple(shape)].expand(count, *shape).contiguous(), 16)
        assert bool(result.certificate.converged.all())
        return result.certificate.residual.max().item()

    for call in dict.fromkeys(calls):
        solve(call)
    for threads in (1, 4):
        work, lock, worst = iter(calls), threading.Lock(), []

        def run(work=work, lock=lock, worst=worst):
            torch.set_num_threads(1)
            stream = torch.cuda.Stream() if CUDA else None
            while True:
                with lock:
                    call = next(work, None)
                if call is None:
                    return
                with torch.cuda.stream(stream) if CUDA else nullcontext():
                    worst.append(solve(call))
                    if CUDA:
                        stream.synchronize()

        sync()
        start = time.perf_counter()
        several = [threading.Thread(target=run) for _ in range(threads)]
        for thread in several:
            thread.start()
        for thread in several:
            thread.join()
        sync()
        print(
            f"{sum(call[0] for call in calls)} SVDs in {len(calls)} calls, {threads} threads: "
            f"{time.perf_counter() - start:.2f} s, residual {max(worst):.0e}",
            flush=True,
        )


def quantized():
    """FP8 weights are decoded on the device: --layout overlay there and on the CPU, folds of them, and proofs."""
    from safetensors.torch import load_file, save_file

    from tests.fp8_models import quantize_model

    write_checkpoint(WORK / "dense", 4e6 if TINY else 2e8, 256 if TINY else 1024, shard_bytes=2e6 if TINY else 1e8)
    model, block = WORK / "fp8", (16, 16) if TINY else (128, 128)
    quantize_model(WORK / "dense", model, block=block)
    bad = []
    for where, name in ((DEVICE, "there"), ("cpu", "here")):
        f, device = WORK / f"q-{name}", ("--device", where)
        cli("factorize", model, "-o", f, *device, "--prove", "--quiet")
        said = cli("verify", f, "--base", model, "--prove", *device, ok=False)
        print(f"--- factorized with --prove on {where}:\n{said[-600:]}")
        if "all is as the manifest says" not in said:
            bad.append(f"verify --prove on {where}")
    f = WORK / "q-there"
    scales = load_file(f / "surgery/scales.safetensors")
    from safetensors import safe_open

    with safe_open(f / "surgery/scales.safetensors", "pt") as file:
        metadata = file.metadata()
    generator = torch.Generator().manual_seed(1)
    changed = {key: 1 + 0.05 * torch.randn(value.shape, generator=generator) for key, value in scales.items()}
    save_file(changed, WORK / "changed.safetensors", metadata=metadata)
    for options in ((), ("--rounding", "nearest"), ("--dequantize",)):
        for where, name in ((DEVICE, "fold-there"), ("cpu", "fold-here")):
            out = WORK / name
            cli(
                "fold", f, WORK / "changed.safetensors", "--base", model, "-o", out, *options,
                "--device", where, "--overwrite", "--quiet",
            )  # fmt: skip
        same = weights_of(WORK / "fold-there") == weights_of(WORK / "fold-here")
        print(("ok    " if same else "WRONG ") + f"FP8 fold {' '.join(options) or 'in directions'}: {DEVICE} and CPU")
        if not same:
            bad.append(f"fold {options}")
    raise SystemExit(f"wrong: {bad}" if bad else 0)


def stages():
    """surgery --profile for factorize and fold, residual and overlay, beside the CPU."""
    model = WORK / "model"
    write_checkpoint(model, 2e7 if TINY else 6e9, 256 if TINY else 4096)
    found = {}
    for device in dict.fromkeys((DEVICE, "cpu")):
        for name, arguments in {
            "factorize": ("factorize", model, "-o", WORK / f"p-{device.replace(':', '')}"),
            "overlay": ("factorize", model, "-o", WORK / "overlay", "--layout", "overlay"),
            "fold": (
                "fold",
                WORK / f"p-{device.replace(':', '')}",
                WORK / f"p-{device.replace(':', '')}" / "surgery/scales.safetensors",
                "-o",
                WORK / "folded",
            ),
        }.items():
            start = time.perf_counter()
            text = cli(*arguments, "--device", device, "--profile", "--overwrite", "--quiet")
            found[f"{name} {device}"] = text
            print(f"--- {name} on {device}: {time.perf_counter() - start:.1f} s with the start\n{text}", flush=True)
    (OUT / "stages.json").write_text(json.dumps(found, indent=1))


def kernels():
    """Where a solver call, a split and a join spend their time: operators and kernels, launches, syncs."""
    import surgery
    from surgery.lossless.factors import Factors
    from surgery.lossless.join import join
    from surgery.lossless.split import split

    shape = (300, 256) if TINY else (4096, 4096)
    A = llm_like(*shape, torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    batch = A.expand(2, *shape).contiguous()
    small = llm_like(*((64, 96) if TINY else (768, 2048)), torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    small = small.expand(4 if TINY else 57, *small.shape).contiguous()
    svd = surgery.truncated_svd(A, 16)
    factors = Factors(svd.U, svd.s, svd.V)
    parts = split(A, factors)
    g = torch.full((16,), 1.1)
    activities = [torch.profiler.ProfilerActivity.CPU] + (
        [torch.profiler.ProfilerActivity.CUDA] if CUDA and not REHEARSAL else []
    )
    for name, call in {
        "truncated_svd, 2 matrices, k=16": lambda: surgery.truncated_svd(batch, 16),
        "truncated_svd, 2 matrices, k=64": lambda: surgery.truncated_svd(batch, 64),
        "truncated_svd, 57 of 768x2048, k=16": lambda: surgery.truncated_svd(small, 16),
        "split": lambda: split(A, factors),
        "join, changed": lambda: join(parts.residual, factors, parts.correction, g),
    }.items():
        t = best(call, 3)
        with torch.profiler.profile(activities=activities) as profile:
            call()
            sync()
        averages = profile.key_averages()
        launches = sum(
            e.count
            for e in averages
            if e.key in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
        )
        waits = {
            e.key: e.count
            for e in averages
            if e.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpyAsync", "cudaMemcpy")
        }
        device = sum(e.self_device_time_total for e in averages) / 1e3
        print(f"--- {name}: {1e3 * t:.1f} ms, on the device {device:.1f} ms, launches {launches}, {waits}")
        table = averages.table(
            sort_by="self_device_time_total" if CUDA and not REHEARSAL else "self_cpu_time_total",
            row_limit=14,
            max_name_column_width=60,
        )
        with open(OUT / "kernels.txt", "a") as file:
            file.write(f"\n{name}: {1e3 * t:.2f} ms\n{table}\n")
    print(f"tables: {OUT / 'kernels.txt'}")


def races():
    """Run torch's own race detector for streams, in every thread, over a factorize and a fold.

    It knows Python's operations only.
    """
    import surgery

    model = WORK / "model-races"
    write_checkpoint(model, 4e6 if TINY else 2e8, 256 if TINY else 1024, shard_bytes=2e6 if TINY else 5e7)
    if CUDA and not REHEARSAL:
        import torch.cuda._sanitizer as sanitizer

        sanitizer.enable_cuda_sanitizer()
        run = threading.Thread.run

        def run_watched(thread):
            with sanitizer.CUDASanitizerDispatchMode():
                run(thread)

        threading.Thread.run = run_watched
    surgery.factorize(model, WORK / "races", rank=16, device=DEVICE)
    surgery.fold(WORK / "races", WORK / "races/surgery/scales.safetensors", WORK / "races-back", device=DEVICE)
    assert weights_of(WORK / "races-back") == weights_of(model)
    print("no race was seen")


STEPS = {step.__name__: step for step in (ceilings, exact, quantized, full, windows, stages, kernels, races)}


def run(step):
    """One step, on the pretended device in a rehearsal of one."""
    if not REHEARSAL:
        STEPS[step]()
        return
    from tests.late_gpu import late_gpu

    with late_gpu():
        STEPS[step]()


if __name__ == "__main__":
    run(sys.argv[1])
