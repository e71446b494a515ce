"""A sharded checkpoint holds everything to the bit, for any number of ranks, or is not there at all."""

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import sharded_checkpoint_cases as cases
import torch
from helpers import tiny_config, tiny_model, tiny_reward
from ranks import Ranks
from safetensors.torch import load_file, save_file

from prfl_engine.config import LoraConfig
from prfl_engine.model import checkpoint, lora
from prfl_engine.model.checkpoint import save_reward, save_transformer
from prfl_engine.tensor_files import in_order, write_tensors

NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def ranks():
    """Ranks by their number."""
    made = {size: Ranks(size, ("sharded_checkpoint_cases",)) for size in (1, 2, 3, 4)}
    yield made
    for some in made.values():
        some.close()


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("saved") / "made"
    ranks[2](cases.write, folder, "plain")
    return folder


@pytest.mark.parametrize("mode, copies, readers", [
    ("plain", 2, [(3, 1), (1, 1)]), ("bits", 1, [(2, 1), (1, 1), (3, 1), (4, 2)]),
])  # fmt: skip
def test_any_number_of_ranks_reads_what_any_other_wrote(ranks, mode, copies, readers, tmp_path):
    """Four ranks write, and then the readers, (ranks, copies of the weights), one after the other."""
    want = ranks[4](cases.write, tmp_path / "0", mode, copies)
    for i, (size, replicate) in enumerate(readers):
        for got in ranks[size](cases.pass_on, tmp_path / f"{i}", tmp_path / f"{i + 1}", mode, replicate):
            assert got == want[0]
    assert len(want[0]) > 100


def test_steps_go_on_after_a_load_as_they_would_have(ranks, tmp_path):
    assert all(ranks[2](cases.same_steps, tmp_path / "made", "bits"))


def test_a_save_in_the_background_is_of_the_moment_of_its_call(ranks, tmp_path):
    for early, after, want, got in ranks[2](cases.in_background, tmp_path / "made", "bits"):
        assert (early, after) == (False, True)
        assert got == want


@pytest.mark.parametrize("background", [False, True])
def test_a_save_that_breaks_on_one_rank_leaves_nothing(ranks, tmp_path, background):
    said = ranks[3](cases.broken_save, tmp_path, True, background)
    assert [left for _, left in said] == [[]] * 3
    full = f"[Errno 28] No space left on device: '{tmp_path}/.made.tmp/shard-00002.safetensors'"
    assert [line for line, _ in said] == [f"TrainingError: rank 2: {full}"] * 2 + [f"OSError: {full}"]
    assert ranks[3](cases.broken_save, tmp_path, False, background) == [("saved", ["made"])] * 3


def test_ranks_wait_for_a_slow_disk_longer_than_the_time_out(ranks):
    """Since they ask for each other again and again, each time with all of it."""
    first, last = ranks[2](cases.slow_work, 5)
    assert (first, last) == (["worked", "TrainingError: rank 1: full"], ["waited", "OSError: full"])


def _cut(folder: Path) -> None:
    """Drop one piece."""
    path = folder / "shard-00001.safetensors"
    held = load_file(path)
    del held[max(k for k in held if k.startswith("ema/blocks.0.ffn.0.weight@"))]
    save_file(held, path)


def _change_index(change) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "shards.json"
        held = json.loads(path.read_text())
        change(held)
        path.write_text(json.dumps(held))

    return damage


@pytest.mark.parametrize(
    "damage, mode, words",
    [
        (lambda folder: (folder / "shards.json").unlink(), "plain", "shards.json: no such file"),
        (
            lambda folder: (folder / "shard-00001.safetensors").unlink(),
            "plain",
            "shard-00001.safetensors: no",
        ),
        (_cut, "plain", "ema/blocks.0.ffn.0.weight: value 32768 is in no file"),
        (lambda folder: None, "bits", "misses 84 tensors"),
        (_change_index(lambda held: held.update(files=["../shard-0.safetensors"])), "plain", "files"),
        (_change_index(lambda held: held.update(updates=[2, 2])), "plain", "groups of the optimizer"),
        (_change_index(lambda held: held["tensors"].popitem()), "plain", "misses 1 tensors"),
        (
            _change_index(lambda held: held["tensors"].update({"model/x": ["float32", [1]]})),
            "plain",
            "such as model/x",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(ranks, saved, tmp_path, damage, mode, words):
    shutil.copytree(saved, tmp_path / "made")
    damage(tmp_path / "made")
    for said, same in ranks[1](cases.refused_read, tmp_path / "made", mode):
        assert words in said
        assert same


def test_a_state_that_is_not_finite_is_refused_on_all_ranks(ranks, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "made")
    path = tmp_path / "made/shard-00001.safetensors"
    held = load_file(path)
    key = max(k for k in held if k.startswith("optimizer/blocks.0.ffn.0.weight/exp_avg@"))
    held[key][-1] = torch.nan
    save_file(held, path)
    said = [line for line, _ in ranks[2](cases.refused_read, tmp_path / "made", "plain")]
    where = r"made: optimizer/blocks\.0\.ffn\.0\.weight: blocks: \d+: exp_avg: holds NaN"
    assert said[0].startswith("rank 1: ") and all(re.search(where, line) for line in said)


@pytest.mark.parametrize("kind, dtype", [("t2v", None), ("i2v", torch.bfloat16), ("reward", torch.bfloat16)])
def test_every_rank_reads_its_own_rows(ranks, tmp_path, kind, dtype):
    if kind == "reward":
        save_reward(tiny_reward(blocks=2), tmp_path, 3)
    else:
        save_transformer(tiny_model(tiny_config(kind)).half(), tmp_path)
    held = sum(a.nbytes for a in load_file(tmp_path / NAME).values())
    found = ranks[2](cases.load, kind, tmp_path, dtype)
    assert all(same for same, _ in found)
    assert sum(read for _, read in found) == held
    assert max(read for _, read in found) < 0.52 * held


def test_files_that_do_not_fit_are_refused_on_all_ranks(ranks, tmp_path):
    """Keys and shapes before anything is read; what is not finite by the rank that reads it."""
    save_transformer(tiny_model(), tmp_path)
    held, name = load_file(tmp_path / NAME), "blocks.1.ffn.0.weight"
    for change, words in (
        ({name: held[name].T.contiguous()}, f"{name} is [32, 48], want [48, 32]"),
        ({"blocks.0.extra": torch.zeros(1)}, "has unknown 1"),
    ):
        save_file(held | change, tmp_path / NAME)
        for said, read in ranks[2](cases.refused_load, tmp_path):
            assert words in said
            assert read == 0
    held[name][-1, 0] = torch.nan
    save_file(held, tmp_path / NAME)
    said = [line for line, _ in ranks[2](cases.refused_load, tmp_path)]
    assert all(f"{name} holds NaN" in line for line in said)
    assert said[0].startswith("rank 1: ")


@pytest.mark.parametrize("kind, size", [("t2v", 2**30), ("i2v", 20_000), ("reward", 2**30)])
def test_a_sharded_model_is_written_as_a_whole_one(ranks, tmp_path, monkeypatch, kind, size):
    ranks[3](cases.export, kind, tmp_path / "sharded", size)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", size)
    model = tiny_reward(blocks=2) if kind == "reward" else tiny_model(tiny_config(kind))
    for name in ("now", "ema"):
        if kind == "reward":
            save_reward(model, tmp_path / "whole", 7)
        else:
            save_transformer(model, tmp_path / "whole")
        files = sorted(path.name for path in (tmp_path / "whole").iterdir())
        assert files == sorted(path.name for path in (tmp_path / "sharded" / name).iterdir())
        for file in files:
            got, want = ((tmp_path / of / file) for of in (f"sharded/{name}", "whole"))
            if file.endswith(".ckpt"):
                got, want = (torch.load(a, weights_only=True) for a in (got, want))
                assert got.keys() == want.keys()
                assert all(torch.equal(got[k], want[k]) for k in want)
            else:
                assert got.read_bytes() == want.read_bytes()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)


def test_an_adapter_is_loaded_and_written_as_on_a_whole_model(ranks, tmp_path):
    """And `trained` leaves out the frozen weights."""
    model = tiny_model()
    save_transformer(model, tmp_path / "base")
    lora.start(model, LoraConfig(rank=2), 0, None)
    for i, p in enumerate(lora.parameters(model).values()):
        p.data.normal_(generator=torch.Generator().manual_seed(i))
    lora.save(model, tmp_path / "given")
    names = lora.parameters(model)
    want = {f"{kind}/{name}" for name in names for kind in ("model", "optimizer")}
    for found in ranks[3](cases.adapter, tmp_path / "base", tmp_path, tmp_path / "given"):
        assert {"/".join(name.split("/")[:2]) for name in found} == want
    for file in (tmp_path / "given").iterdir():
        for made in ("made", "again"):
            assert (tmp_path / made / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", ["t2v", "reward"])
def test_an_export_that_breaks_leaves_nothing(ranks, tmp_path, kind):
    full = f"[Errno 28] No space left on device: '{tmp_path}/.made.tmp/{NAME}'"
    first, second = ranks[2](cases.broken_export, tmp_path, kind)
    assert (first, second) == (f"OSError: {full}", f"TrainingError: rank 0: {full}")
    assert list(tmp_path.iterdir()) == []


def test_files_of_tensors_are_those_of_safetensors(tmp_path):
    dtypes = (torch.float32, torch.bfloat16, torch.uint8, torch.int16, torch.float8_e4m3fn, torch.float64)
    held = {f"é{i}": torch.randn(i, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    held["scalar"] = torch.tensor(2.0)
    layout = {name: (a.dtype, tuple(a.shape)) for name, a in held.items()}
    write_tensors(tmp_path / "got", layout, (held[name] for name in in_order(layout)), {"format": "pt"})
    save_file(held, tmp_path / "want", {"format": "pt"})
    assert (tmp_path / "got").read_bytes() == (tmp_path / "want").read_bytes()
    with pytest.raises(ValueError, match="got"):
        write_tensors(tmp_path / "got", layout, reversed([held[name] for name in in_order(layout)]))
    with pytest.raises(ValueError, match="too few"):
        write_tensors(tmp_path / "got", layout, ())


def test_a_rank_that_does_not_come_is_named_with_its_host(ranks):
    host = socket.gethostname()
    first, second, _ = ranks[3](cases.stalled, 1.0)
    ended = f"on {host} ended or gave no answer within 1 s (parallel.timeout)"
    late, lost = f"rank 2 {ended}", f"rank 0 {ended}"
    assert first[0].endswith(late)  # on a busy machine the other one may be late, too
    assert second[0].startswith(lost) and second[1].startswith(lost)
