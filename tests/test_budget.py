"""What auto:GB predicts against what real runs have at most, over random small configurations."""

import math
import random

import pytest
import torch
import yaml
from helpers import tiny_config, tiny_model, tiny_reward, write_data
from torch.utils._pytree import tree_iter

from prfl_engine import loop, train
from prfl_engine.config import load_config
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.model.checkpoint import save_reward, save_transformer
from prfl_engine.model.reward import RewardModel
from prfl_engine.optim import updates
from prfl_engine.planner import plan as plan
from prfl_engine.planner.dry_run import SCALARS
from prfl_engine.planner.setup import ROUND
from prfl_kernels import extension

built = pytest.mark.skipif(extension.absence("cpu", "cpu") is not None, reason="the kernels are not built")


def size(tensors) -> int:
    live = LiveBytes(ROUND)
    live.add(a for a in tree_iter(list(tensors)) if isinstance(a, torch.Tensor))
    return live.now


def random_run(tmp_path, draw: random.Random) -> tuple[dict, tuple[int, ...]]:
    """The values of a configuration, with the folders it names, and the shape of its latents."""
    heads, few = draw.choice((2, 4)), draw.random() < 0.3
    width = 16 * heads
    config = tiny_config(
        "i2v" if draw.random() < 0.2 else "t2v", dim=width, ffn_dim=draw.choice((48, 3 * width)),
        num_heads=heads, num_layers=draw.randint(2, 3), text_len=draw.choice((6, 70)),
    )  # fmt: skip
    shape, blocks = (16, draw.choice((1, 3)), 8, draw.choice((8, 12))), draw.randint(1, 2)
    save_transformer(tiny_model(config), tmp_path / "policy")
    save_reward(tiny_reward(config, blocks=blocks, num_heads=heads), tmp_path / "reward", 0)
    data = [
        write_data(tmp_path / name, config, count, [shape], text=config.text_len)
        for name, count in (("data", 3), ("val", 5))
    ]
    steps = draw.choice((3, 4, 4))  # with 4 a sampler's whole history is there
    values = {
        "model": {
            "path": str(tmp_path / "policy"), "recompute": "auto:1",
            "chunk": draw.choice((None, None, 5 / 12)),
            "weights_dtype": draw.choice(("float32", "bfloat16")),
            "compute_dtype": draw.choice(("float32", "bfloat16")),
            "residual_dtype": draw.choice(("float32", "float32", "bfloat16")),
            "keep": draw.choice(("all", "nothing", "attention", "projections")),
        },
        "lora": {"rank": draw.choice((0, 0, 4))},
        "reward": {
            "path": str(tmp_path / "reward"), "blocks": blocks, "feature_layer": blocks, "num_heads": heads,
        },
        "data": {
            "train": [str(data[0])], "val": [str(data[1])], "num_workers": 0, "text_dropout": 0.0,
            "long_caption": 1.0, "batch_size": draw.choice((1, 1, 2, 3)),
        },
        "rollout": {
            "steps": steps, "samples": 1 if few else draw.choice((1, 2)),
            "range": [steps - 2, steps - 2] if few else "all",
        },
        "chain": {"window": draw.choice((1, 1, 2, "all")), "detach_input": draw.random() < 0.3},
        "optim": {"clip": None},
        "train": {"out": str(tmp_path / "run"), "device": "cpu", "tensorboard": False, "steps": 2},
        "eval": {
            "every": 2, "samples": draw.choice((2, 5)), "batch_size": draw.randint(1, 3),
            "timesteps": [201, 1000], "videos": draw.choice((0, 4)),
        },
    }  # fmt: skip
    if part := values["model"]["chunk"]:  # two pieces of a sample and the rest
        values["model"]["chunk"] = values["data"]["batch_size"] * int(part * math.prod(shape[1:]) / 4)
    return values, shape


@built
@pytest.mark.parametrize("seed", range(24))
def test_no_run_has_more_than_its_plan_says(seed, tmp_path, monkeypatch):
    """Bytes in addition to weights, gradients and optimizer states: of training in the second step, of the
    validations. Where all that is drawn is the most there can be, the plan is right to a hundredth."""
    draw, found = random.Random(seed), {"training": 0, "validation": 0}
    values, shape = random_run(tmp_path, draw)
    if seed >= 20:
        values["rollout"] |= {"mode": "persistent", "pool_place": ("device", "host")[seed % 2]}
    kind = draw.choice(sorted(plan.KINDS))
    monkeypatch.setattr(plan, "KINDS", {kind: plan.KINDS[kind]})
    fit, fit_memory, make_optimizer = train.fit, train.fit_memory, loop.make_optimizer
    update = updates.update
    live, optimizers, models = LiveBytes(ROUND), [], []

    def planned(*given):
        models[:] = [given[1], *given[2]]
        live.add(p for m in models for p in m.parameters())
        found["plan"] = fit_memory(*given)
        return found["plan"]

    def watched(c, resume, policy, groups, stream, losses, validate, *rest):
        def validated(step):
            if step == 0:  # the same as at the end, with the states of the optimizer still to come
                return {"score": 0.0}
            live.lap()
            made = validate(step)
            found["validation"] = max(found["validation"], live.lap() - size(optimizers[0].state.values()))
            return made

        with live:
            fit(c, resume, policy, groups, stream, losses, validated, *rest)

    def updated(*given):
        found["training"] = live.lap()  # without the update, whose blocks in passing are not in a plan
        norm = update(*given)
        live.lap()
        return norm

    monkeypatch.setattr(updates, "update", updated)
    monkeypatch.setattr(train, "fit_memory", planned)
    monkeypatch.setattr(train, "fit", watched)
    monkeypatch.setattr(
        loop, "make_optimizer", lambda *a: optimizers.append(make_optimizer(*a)) or optimizers[0]
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    train.train(load_config(path))
    assert any(isinstance(m, RewardModel) for m in models)

    weights = size(p for m in models for p in m.parameters())
    gradients = size(p for p in models[0].parameters() if p.requires_grad)
    training = found["training"] - weights - gradients - size(optimizers[0].state.values())
    validation = found["validation"] - weights
    told, b = found["plan"], values["data"]["batch_size"]
    assert training <= told.bytes and validation <= told.validation
    assert ("of both, there in every pass" in str(told)) == (values["rollout"].get("mode") == "persistent")
    latent = 4 * b * math.prod(shape)
    if values["rollout"]["range"] != "all":
        persists = values["rollout"].get("mode") == "persistent"  # a chain's noise may live or not
        assert told.bytes <= 1.01 * training + SCALARS + latent * (b > 1 or persists)
