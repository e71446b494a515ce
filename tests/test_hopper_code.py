"""What nvcc makes of the attention for sm_90a: gates on its machine code. Nothing here needs a GPU."""

import shutil
import subprocess

import pytest
from cuda_sim import CSRC

from prfl_kernels import loop_cycles, sass


def missing():
    if shutil.which("nvcc") is None:
        return "no nvcc"
    try:
        sass.tool("cuobjdump"), sass.tool("nvdisasm")
    except ValueError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=f"cannot compile for sm_90a: {missing()}")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(the kernels by format, what ptxas said)"""
    target = tmp_path_factory.mktemp("cubin") / "attention.cubin"
    flags = ["-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", f"-I{CSRC}"]
    command = ["nvcc", *flags, "-cubin", "-o", target, CSRC / "cuda/attention_hopper.cu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kernels = loop_cycles.read(target).items()
    kinds = ("Bf16", "E4m3")
    return {kind: kernel for name, kernel in kernels for kind in kinds if kind in name}, done.stderr


FORMATS = pytest.mark.parametrize("kind, product", [("Bf16", "HGMMA"), ("E4m3", "QGMMA")])


@FORMATS
def test_instructions(compiled, kind, product):
    kernel = compiled[0][kind]
    assert kernel.registers == 168 and kernel.stack == 0
    counts = kernel.instructions
    assert counts["LDL"] + counts["STL"] == 0
    assert counts[product] and not counts["HMMA"] + counts["QMMA"]
    assert counts["UTMALDG"] and counts["UTMASTG"] == 1 and counts["USETMAXREG"] == 2


def test_products_are_not_serialized(compiled):
    """ptxas says so where it has to wait for every product, C7510 and the like."""
    assert "Potential Performance Loss" not in compiled[1] and "(C75" not in compiled[1]


@FORMATS
def test_exponentials_run_under_the_second_product(compiled, kind, product):
    """Between the wait for the scores and the wait for p v."""
    loop = compiled[0][kind].loop
    first, second = (i for i, text in enumerate(loop) if "DEPBAR.LE gsb0" in text)
    assert "0x1" in loop[first] and "0x0" in loop[second]
    inside = sum("MUFU.EX2" in text for text in loop[first:second])
    assert inside == sum("MUFU" in text for text in loop) >= 64


# Part of the tensor cores' cycles that other pipes may take. In e4m3 the products take half as long and
# the rest, exponentials and additions of float32 for every weight, does not: all pipes are about full.
LIMITS = {
    "Bf16": {"issue": 0.45, "mufu": 0.52, "alu": 0.35},
    "E4m3": {"issue": 1.12, "mufu": 1.04, "alu": 0.60},
}


@pytest.mark.parametrize("kind", LIMITS)
def test_cycles_of_a_block_of_keys(compiled, kind):
    found = loop_cycles.cycles(compiled[0][kind].loop)
    tensor = found.pop("tensor")
    assert tensor == {"Bf16": 1408, "E4m3": 512}[kind]
    assert not {name: n / tensor for name, n in found.items() if n > LIMITS[kind][name] * tensor}
