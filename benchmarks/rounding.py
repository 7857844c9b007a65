"""Rounding in directions where nothing was tuned: other shapes, spectra, ranks and changes than those of the tests.

    python benchmarks/rounding.py --shapes 256x256,1000x3000 --kinds bfloat16,fp8,nvfp4 --seeds 1,2 --worst 20

For each case: the share of the update that arrives, the error within its directions (both in float64, from the numbers that
are written), those of rounding to nearest, how often all rows were rounded, and the milliseconds of one thread. With ``--model
FILE`` the weights are the matrices of a float32 safetensors file instead of random ones. ``--train core`` adds cores C in
place of scales g: ``C - I`` is random with the Frobenius norm that ``g - 1`` has.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from surgery.lossless.directions import Directions
from surgery.lossless.factors import Factors, between, inner_change
from surgery.lossless.grids import DtypeGrid, Grid
from surgery.lossless.update import Written, rescale
from surgery.quantized.codec import Codec, Role
from surgery.quantized.elements import E2M1, E4M3, Integers

#: Rows that were rounded, by all passes.
ROUNDED = [0]
_CHANGES = ("0.001", "0.003", "0.01", "0.03", "0.1", "one")


#: Quantized formats, and the dtypes of their scales.
FORMATS = {
    "fp8": (Codec(E4M3, (128, 128), "fp8"), torch.float32),
    "mxfp8": (Codec(E4M3, (1, 32), "mxfp8"), torch.float8_e8m0fnu),
    "int8": (Codec(Integers(8, packed=False), (1, 1 << 30), "int8"), torch.bfloat16),
    "int4": (Codec(Integers(4, packed=True), (1, 128), "int4"), torch.bfloat16),
    "mxfp4": (Codec(E2M1(), (1, 32), "mxfp4"), torch.float8_e8m0fnu),
    "nvfp4": (Codec(E2M1(), (1, 16), "nvfp4", divides=True), torch.float8_e4m3fn),
}


def count_passes() -> None:
    """Let each pass tell how many rows it rounds."""
    original = Directions._pass

    def counted(self: Directions, core: torch.Tensor, foreseen: float, rows: Any, *others: Any) -> Any:
        ROUNDED[0] += len(self.weight[rows]) if isinstance(rows, slice) else len(rows)
        return original(self, core, foreseen, rows, *others)

    Directions._pass = counted  # type: ignore[method-assign, assignment]


def spectrum(kind: str, m: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """A random float32 weight (m, n) with a standard deviation of about 0.02."""
    bulk = torch.randn(m, n, generator=generator)
    k = min(256, m, n)
    left, right = (torch.randn(size, k, generator=generator) / size**0.5 for size in (m, n))
    if kind == "heavy":  # rows and columns of very different sizes
        bulk = bulk + (left * (3 * m**0.5 * torch.arange(1, k + 1) ** -0.7)) @ right.T
        bulk *= torch.exp(1.2 * torch.randn(m, 1, generator=generator)) * torch.exp(torch.randn(1, n, generator=generator))
    elif kind == "huge":  # one direction is most of the weight
        bulk += 60 * max(m, n) ** 0.5 * torch.outer(left[:, 0], right[:, 0])
    elif kind == "llm":
        bulk += (left * (8 * m**0.5 * torch.arange(1, k + 1) ** -0.5)) @ right.T
    return bulk * (0.02 / bulk.std())


def stored(kind: str, weight: torch.Tensor) -> tuple[torch.Tensor, dict[Role, torch.Tensor]]:
    """A weight in a format, and what belongs to its numbers."""
    if kind not in FORMATS:
        return weight.to(getattr(torch, kind)), {}
    (m, n), (codec, dtype) = weight.shape, FORMATS[kind]
    parts: dict[Role, torch.Tensor] = {"scale": torch.full(codec.grid_of((m, n)), 2.0**-30).to(dtype)}  # holds next to nothing
    if codec.divides:
        parts["global_scale"] = (448 * 6 / weight.abs().max()).view(1)
    parts = codec.parts_that_hold(codec.extremes(weight, parts), parts)
    return codec.dequantize(codec.quantize(weight, parts), parts, (m, n)), parts


def measured(result: torch.Tensor, weight: torch.Tensor, factors: Factors, core: torch.Tensor) -> tuple[float, float]:
    arrived = factors.U.double().T @ (result.double() - weight.double()) @ factors.V.double()
    asked = torch.diag(core) if core.ndim == 1 else core
    return float((arrived * asked).sum() / asked.square().sum()), float((arrived - asked).norm() / asked.norm())


def scales_of(change: str, k: int, generator: torch.Generator) -> torch.Tensor:
    signs = torch.randint(0, 2, (k,), generator=generator) * 2 - 1
    if change == "one":
        g = 0.001 * signs * (1 + 0.3 * torch.randn(k, generator=generator))
        g[int(torch.randint(k, (1,), generator=generator))] = 0.1
        return 1 + g
    return 1 + float(change) * signs * (1 + 0.3 * torch.randn(k, generator=generator))


def core_of(change: str, k: int, generator: torch.Generator) -> torch.Tensor:
    """A core that is as far from the identity as these scales, in all directions or nearly all in one entry."""
    distance = torch.linalg.vector_norm(scales_of(change, k, generator) - 1)
    core = torch.randn(k, k, generator=generator)
    if change == "one":
        core.flatten()[int(torch.randint(k * k, (1,), generator=generator))] += 100 * k
    return torch.eye(k) + core * (distance / torch.linalg.vector_norm(core))


def weights(args: argparse.Namespace) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Names, weights and seeds."""
    if args.model is not None:
        with safe_open(args.model, "pt") as file:
            names = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 2]  # noqa: SIM118
            for name in names[:: args.every]:
                yield name, file.get_tensor(name).float(), 0
        return
    for seed, shape, kind in itertools.product(args.seeds.split(","), args.shapes.split(","), args.spectra.split(",")):
        m, n = map(int, shape.split("x"))
        generator = torch.Generator().manual_seed(1000 + int(seed))
        yield f"{kind} {shape} seed {seed}", spectrum(kind, m, n, generator), int(seed)


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name, exact, seed in weights(args):
        for kind in args.kinds.split(","):
            weight, stored_parts = stored(kind, exact)
            for k in map(int, args.ranks.split(",")):
                torch.manual_seed(seed)
                u, s, v = torch.svd_lowrank(weight.float(), k + 8, niter=4)
                factors = Factors(u[:, :k].contiguous(), s[:k].clone(), v[:, :k].contiguous())
                for change in args.changes.split(","):
                    trained = (scales_of if args.train == "scales" else core_of)(change, k, torch.Generator().manual_seed(seed))
                    core = inner_change(factors, trained)
                    exactly = weight.double() + between(factors, core).left @ factors.V.double().T
                    grid: Grid = DtypeGrid(weight.dtype)
                    if kind in FORMATS:
                        codec, _ = FORMATS[kind]
                        parts = codec.parts_that_hold(codec.extremes(exactly.float(), stored_parts), stored_parts)
                        grid = codec.grid(parts, (len(weight), weight.shape[1]))
                    nearest = grid.nearest(exactly.float(), slice(0, len(weight)))
                    ROUNDED[0], out = 0, weight.clone()
                    start = time.perf_counter()
                    result, kept = rescale(
                        out, factors, trained, None, Written(out, args.rounding, grid if kind in FORMATS else None)
                    )
                    took = time.perf_counter() - start
                    share, error = measured(result, weight, factors, core)
                    of_nearest = measured(nearest, weight, factors, core)
                    yield {
                        "what": f"{name} {kind} k={k} {change}",
                        "share": share,
                        "error": error,
                        "nearest": of_nearest,
                        "told": (kept.share, kept.error),
                        "passes": ROUNDED[0] / len(weight),
                        "ms": 1e3 * took,
                        "distance": float((result.double() - exactly).norm() / (nearest.double() - exactly).norm()),
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="256x256,1000x3000,2048x2048,4096x1024")
    parser.add_argument("--spectra", default="llm,flat,heavy,huge")
    parser.add_argument("--kinds", default="bfloat16,fp8")
    parser.add_argument("--ranks", default="4,16,64")
    parser.add_argument("--changes", default=",".join(_CHANGES))
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--train", default="scales", choices=["scales", "core"])
    parser.add_argument("--rounding", default="directions", type=lambda text: None if text == "default" else text)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--all", action="store_true", help="print every case")
    parser.add_argument("--worst", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    count_passes()
    found = []
    for case in cases(args):
        found.append(case)
        if args.all:
            print(line(case), flush=True)
    bad = [case for case in found if abs(case["share"] - 1) > 0.01 or case["error"] >= 0.01]
    worse = [case for case in found if case["error"] > 1.001 * case["nearest"][1]]
    passes = sorted(case["passes"] for case in found)
    print(f"{len(found)} cases; {len(bad)} beyond 1 %; {len(worse)} with a larger error than nearest")
    print(f"passes: median {passes[len(passes) // 2]:.2f}, mean {sum(passes) / len(passes):.2f}, most {passes[-1]:.2f}")
    for case in sorted(bad, key=lambda case: -case["error"])[: args.worst]:
        print(line(case))


def line(case: dict[str, Any]) -> str:
    share, error = case["nearest"]
    return (
        f"{case['what']:52} share {case['share']:7.4f} error {case['error']:7.4f} | nearest {share:7.4f} {error:7.4f} | "
        f"passes {case['passes']:5.2f} | distance {case['distance']:5.2f} | {case['ms']:6.0f} ms"
    )


if __name__ == "__main__":
    main()
