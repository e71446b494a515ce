"""What tests of whole runs need: the command line on tiny models, and what a run leaves behind."""

import json
import shutil
from pathlib import Path

import torch
from helpers import tiny_config, write_data, write_run
from safetensors.torch import load_file

from prfl_engine import checksums
from prfl_engine.cli import main
from prfl_engine.metrics import FILE, read_metrics

NAME = "diffusion_pytorch_model.safetensors"
STATE = "training_state.pt"


def run(command, config, *overrides, code=0):
    assert main([command, str(config), *overrides]) == code


def values(out, prefix="train"):
    """{step: {name: value}} of the metrics of a run; no step comes twice."""
    found = {}
    for record in read_metrics(out):
        part = {k: v for k, v in record["values"].items() if k.startswith(prefix)}
        if part:
            assert record["step"] not in found, record
            found[record["step"]] = part
    return found


def assert_equal(a, b, where=""):
    """The same tensors and numbers to the bit, through dicts and lists."""
    assert type(a) is type(b), where
    if torch.is_tensor(a):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_equal(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def content(folder):
    """Everything of a checkpoint that training goes on from."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = load_file(path)
        elif path.suffix in (".ckpt", ".pt"):
            found[name] = torch.load(path, weights_only=True)
    found[STATE].pop("rng")
    return found


def killed(out: Path, step: int, copy: Path) -> Path:
    """A copy of the folder of a finished run as a kill after its checkpoint of that step would have left it:
    metrics of later steps are there, later checkpoints are not. No later number is that of the finished run,
    so that a resumed run has its metrics only where it writes them anew."""
    shutil.copytree(out, copy)
    records = [json.loads(line) for line in (out / FILE).read_text().splitlines()]
    for record in records:
        if record["step"] > step:
            record["values"] = dict.fromkeys(record["values"], -1234.5)
    (copy / FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    for path in copy.glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(path)
    return copy


def goes_on(config, *overrides, command="train"):
    """A run of four steps in run/, and in cut/ its second half once more after a kill: the last checkpoint is
    the same to the bit, and so are all metrics."""
    whole, cut = config.parent / "run", config.parent / "cut"
    given = *overrides, "train.steps=4", "train.save_every=2"
    run(command, config, *given)
    killed(whole, 2, cut)
    run(command, config, *given, f"train.out={cut}", "train.resume=true")
    assert_equal(content(cut / "checkpoint-4"), content(whole / "checkpoint-4"))
    for prefix in ("train", "eval"):
        assert values(cut, prefix) == values(whole, prefix)


def flip(path, at=0.7):
    """Flip the lowest bit of a byte, at a part of the file's length."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)


def unchecked(folder):
    """The folder as one that was written without checksums, so that what it holds is looked at."""
    for path in list(folder.rglob(checksums.FILE)):
        path.unlink()
    return folder


def interrupt(monkeypatch, module, name, call):
    """The function `name` of a module is interrupted at its call-th call, as by Ctrl-C."""
    original, calls = getattr(module, name), []

    def function(*args, **kwargs):
        calls.append(0)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, function)


def reward_run(tmp_path, loss, model_type="t2v", **sections):
    """A configuration of reward training; good latents are brighter than poor ones, by as much as the noise
    varies."""

    def latents(good):
        return lambda i, a: 0.3 * a + (1.5 if good(i) else -1.5)

    def labels(good):
        return lambda i: dict.fromkeys(("physics_quality", "human_quality"), int(good(i)))

    kinds = {"mixed": lambda i: i % 2, "win": lambda i: 1, "lose": lambda i: 0}
    lists = {}
    for n, (name, good) in enumerate(kinds.items()):
        made = write_data(
            tmp_path / name, tiny_config(model_type), 12, seed=n, latents=latents(good), labels=labels(good)
        )
        lists[name] = [str(made)]
    return write_run(
        tmp_path, model_type,
        reward={"path": None, "loss": loss} | sections.pop("reward", {}),
        data={
            "train": lists["mixed" if loss == "ce" else "win"], "lose": lists["lose"], "val": lists["mixed"],
            "batch_size": 4, "null_text": str(tmp_path / "mixed/null.npy"),
        },
        eval={"timesteps": [201, 400, 600, 800, 1000], "batch_size": 5},
        **sections,
    )  # fmt: skip
