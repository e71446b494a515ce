"""The kernel ledger as text: its columns are explained in docs/kernels.md."""

import textwrap

from prfl_bench.shapes import MODELS


def render(found: dict) -> str:
    """The ledger as text for a terminal of 150 columns."""
    lines, shape = [], None
    for language, rows in (("Triton", found["operations"]), ("CUDA C++", found.get("cuda", ()))):
        for row in rows:
            here = language, row["length"], row["model"]
            if here != shape:
                model = MODELS[row["model"]]
                title = f"{language}: Wan {model.name} (C {model.width}, {model.heads} heads), "
                title += f"{row['length']} tokens"
                lines += ["", title, _TRAFFIC + _CODE]
                shape = here
            lines += _operation(row)
    if found.get("cuda_absent"):
        lines += ["", f"The CUDA C++ kernels are left out: {found['cuda_absent']}."]
    for title, kernels in found.get("peers", {}).items():
        lines += ["", title, "kernel, tile".ljust(58) + _CODE.removesuffix("  scalars")]
        for k in kernels:
            tile = " x ".join(str(side) for side in k["tile"].values())
            lines.append(f"{k['kernel']} {tile}, {k['stages']} stages".ljust(58) + _code(k))
    return "\n".join([*lines[1:], "", *textwrap.wrap(found["assumptions"], 110)])


def _cells(name, stream, moved, ratio, reread, flops, predicted, bound) -> str:
    return f"{name:28} {stream:>4} {moved:>7} {ratio:>6} {reread:>7} {flops:>8} {predicted:>8} {bound:8}"


_TRAFFIC = _cells("operation, kernel", "res.", "GB", "/min", "reread", "TFLOP", "pred. ms", "by")
_CODE = (
    f"  {'thr.':>4} {'regs':>4} {'spills':>6} {'smem':>6} {'blocks by':>13} {'MMA':>10} {'TMA':>3} "
    f"{'wide':>5}  scalars"
)


def _tera(flops: int) -> str:
    return f"{flops / 1e12:.3g}" if flops else ""


def _operation(row: dict) -> list[str]:
    stream = {"float32": "f32", "bfloat16": "bf16", None: ""}[row["stream"]]
    traffic = _cells(
        row["op"], stream, f"{row['bytes'] / 1e9:.3f}", f"{row['ratio']:.3f}",
        f"{row['reread_bytes'] / 1e9:.3f}", _tera(row["flops"]),
        f"{row['predicted_seconds'] * 1e3:.3f}", row["bound"],
    )  # fmt: skip
    if len(row["kernels"]) == 1:
        return [traffic + _code(row["kernels"][0]), *_pipes(row["kernels"][0])]
    lines = [traffic.rstrip()]
    for k in row["kernels"]:
        cells = _cells(
            f"  {k['kernel']}", "", f"{k['bytes'] / 1e9:.3f}", "", f"{k['reread_bytes'] / 1e9:.3f}",
            _tera(k["flops"]), f"{max(k['seconds'].values()) * 1e3:.3f}", k["bound"],
        )  # fmt: skip
        lines += [cells + _code(k), *_pipes(k)]
    return lines


def _pipes(k: dict) -> list[str]:
    """The hot loop of a kernel with warp-group products, on a line of its own."""
    if "loop" not in k:
        return []
    tensor = k["loop"]["tensor"]
    parts = ", ".join(f"{name} {n / tensor:.2f}" for name, n in k["loop"].items() if name != "tensor")
    line = f"    hot loop: {tensor:.0f} cycles of the tensor cores; of that {parts}; "
    line += f"simulated, busy {k['cycles']['tensor'] / k['cycles']['trip']:.2f} of the time"
    if groups := k.get("warp_groups"):
        line += f"; warp groups of {' and '.join(map(str, groups))} registers, clusters of {k['cluster']}"
    return [line]


_PRODUCTS = {"HGMMA": "HG", "QGMMA": "QG", "HMMA": "H", "QMMA": "Q"}


def _code(k: dict) -> str:
    found = k["instructions"]
    products = [f"{found[name]} {short}" for name, short in _PRODUCTS.items() if name in found]
    short = {"registers": "regs", "shared": "smem"}
    limit = f"{k['blocks']} {'+'.join(short.get(name, name) for name in k['limited_by'])}"
    tma = sum(found.get(name, 0) for name in ("UTMALDG", "UTMASTG", "UBLKCP"))
    wide = f"{100 * k['wide_share']:.0f}%" if k["wide_share"] is not None else ""
    return (
        f"  {k['threads']:4} {k['registers']:4} {k['spills']:6} {k['shared']:6} {limit:>13} "
        f"{' '.join(products):>10} {tma or '':>3} {wide:>5}  "
        + " ".join(name.removesuffix("_ptr") for name in k.get("scalars", ()))
    ).rstrip()
