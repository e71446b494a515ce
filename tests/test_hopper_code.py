"""What nvcc makes of the attention for sm_90a: gates on its machine code. Nothing here needs a GPU."""

import pytest

from prfl_bench.ledger import cuda as ledger_cuda
from prfl_bench.ledger import loop_cycles, sass
from prfl_bench.ledger import nvcc as ledger_nvcc


def missing():
    try:
        sass.tool("cuobjdump"), sass.tool("nvdisasm")
    except ValueError as error:
        return str(error)
    return ledger_nvcc.absence()


pytestmark = pytest.mark.skipif(bool(missing()), reason=f"cannot compile for sm_90a: {missing()}")
KINDS = {"Bf16<176>": "HGMMA", "Bf16<128>": "HGMMA", "Bf16<144>": "HGMMA", "E4m3": "QGMMA"}
FORMATS = pytest.mark.parametrize("kind, product", KINDS.items())


def facts(kind):
    return ledger_nvcc.compiled("attention_hopper")[f"attention_hopper_kernel<{kind}>"]


@FORMATS
def test_instructions(kind, product):
    kernel = facts(kind)
    assert kernel["registers"] == 168 and kernel["warp_groups"] == [24, 240]
    assert kernel["spills"] == kernel["stack"] == 0
    counts = kernel["instructions"]
    assert counts[product] and not {"HGMMA", "QGMMA", "HMMA", "QMMA"} & set(counts) - {product}
    assert counts["UTMALDG"] and counts["UTMASTG"] and counts["USETMAXREG"] == 2
    assert bool(counts.get("UBLKCP")) == (kind == "E4m3")  # the scales of keys


def test_products_are_not_serialized():
    """ptxas says so where it has to wait for every product, C7510 and the like."""
    messages = ledger_nvcc.build("attention_hopper").messages
    assert "registers" in messages
    assert "Potential Performance Loss" not in messages and "(C75" not in messages


@FORMATS
def test_exponentials_run_under_the_second_product(kind, product):
    """Between the wait for the scores and the wait for p v."""
    bodies = ledger_nvcc.build("attention_hopper").bodies
    named = {ledger_nvcc.demangled(name): body for name, body in bodies.items()}
    loop = loop_cycles.hot_loop(named[f"attention_hopper_kernel<{kind}>"])
    first, second = (i for i, text in enumerate(loop) if "DEPBAR.LE gsb0" in text)
    assert "0x1" in loop[first] and "0x0" in loop[second]
    inside = sum("MUFU.EX2" in text for text in loop[first:second])
    assert inside == sum("MUFU" in text for text in loop) >= 64


# Part of the tensor cores' cycles that other pipes may take. In e4m3 the products take half as long and
# the rest, exponentials and additions of float32 for every weight, does not: all pipes are about full.
LIMITS = {
    "Bf16<176>": {"tensor": 1408, "issue": 0.45, "mufu": 0.52, "alu": 0.35},
    "Bf16<144>": {"tensor": 1152, "issue": 0.45, "mufu": 0.52, "alu": 0.35},
    "Bf16<128>": {"tensor": 1024, "issue": 0.46, "mufu": 0.52, "alu": 0.35},
    "E4m3": {"tensor": 512, "issue": 1.12, "mufu": 1.04, "alu": 0.60},
}


@pytest.mark.parametrize("kind", LIMITS)
def test_cycles_of_a_block_of_keys(kind):
    found, limits = dict(facts(kind)["loop"]), dict(LIMITS[kind])
    tensor = found.pop("tensor")
    assert tensor == limits.pop("tensor")
    assert found.keys() == limits.keys()
    assert not {name: n / tensor for name, n in found.items() if n > limits[name] * tensor}


@pytest.mark.parametrize("kind", LIMITS)
def test_products_are_those_of_the_tiles_in_the_ledger(kind):
    keys, _, _, persistent = ledger_cuda.ATTENTION_TILES[kind]
    # Products of a block of keys: scores and p v, also of the first block and the last.
    depth = 32 if kind == "E4m3" else 16
    block = 128 // depth + keys // depth
    assert facts(kind)["instructions"][KINDS[kind]] == block * (3 if persistent else 2)
