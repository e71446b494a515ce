"""Tiny models, data in the official format, and a sampler by the letter of its formulas."""

import json
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import yaml

from prfl_engine.batch import Batch
from prfl_engine.memory.policy import BlockPolicy, named
from prfl_engine.memory.recompute import run_under
from prfl_engine.model.checkpoint import new_reward, save_reward, save_transformer
from prfl_engine.model.layers import IMAGE_DIM, IMAGE_TOKENS, Linear
from prfl_engine.model.lora_files import write_peft
from prfl_engine.model.wan import RunBlocks, WanConfig, WanTransformer
from prfl_kernels.sublayers.products import LowRank

SHAPE = (16, 1, 4, 4)  # channels, frames, rows, columns of a latent: 4 tokens


def tiny_config(model_type="t2v", **fields) -> WanConfig:
    """Of t2v, ti2v, i2v, or i2v-a14b, which has no CLIP branch."""
    values = dict(
        dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=12, text_len=6, freq_dim=16,
        in_dim=16 if model_type in ("t2v", "ti2v") else 36, clip=model_type == "i2v",
    )  # fmt: skip
    return WanConfig(model_type.removesuffix("-a14b"), **values | fields)


@lru_cache(16)
def spread_noise(shapes: tuple[torch.Size, ...], seed: int) -> list[torch.Tensor]:
    """Drawn once: the head of a tiny reward model alone has half a million values."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [a * (0.2 if a.dim() == 1 else a.flatten(1).shape[1] ** -0.5) for a in drawn]


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values in every parameter, zero-initialised ones too, so that each one matters."""
    parameters = list(module.parameters())
    noise = spread_noise(tuple(p.shape for p in parameters), seed)
    for p, values in zip(parameters, noise, strict=True):
        center = 1.0 if p.dim() == 1 and (p.detach() == 1).all() else 0.0
        p.data = (center + values).to(p.dtype)
    return module


def tiny_model(config: WanConfig | None = None, seed: int = 0, **arguments) -> WanTransformer:
    model = WanTransformer(config or tiny_config(), **arguments).init_weights()
    return randomize(model, seed)


def tiny_reward(config: WanConfig | None = None, seed: int = 1, blocks: int = 1, **arguments):
    """A reward model on the first blocks of another tiny model than the policy."""
    arguments = {"feature_layer": blocks} | arguments
    return randomize(new_reward(tiny_model(config, seed), blocks, **arguments), seed)


def under(policy: str | BlockPolicy = "none", keep: str = "all") -> RunBlocks:
    """Blocks under a policy or the mode of that name."""
    return run_under(named(policy, keep) if isinstance(policy, str) else policy)


def write_adapter(folder: Path, config: WanConfig, rank: int = 2, seed: int = 3, scale: float = 2.0) -> Path:
    """An adapter of all linear layers of a model, those outside of blocks included; returns its folder."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for name, m in WanTransformer(config).named_modules():
        if isinstance(m, Linear):
            n, k = m.weight.shape
            down, up = (torch.randn(s, generator=generator) for s in ((rank, k), (n, rank)))
            updates[name] = LowRank(down / k**0.5, 0.1 * up, scale)
    write_peft(updates, folder)
    return folder


def random_batch(
    config: WanConfig, size: int = 2, shape=SHAPE, tokens: int = 4, dtype=torch.float32
):
    text = torch.randn(size, tokens, config.text_dim)
    clip = condition = None
    if config.image:
        clip = torch.randn(size, IMAGE_TOKENS, IMAGE_DIM).to(dtype) if config.clip else None
        condition = torch.randn(size, 20, *shape[1:]).to(dtype)
    return Batch(torch.randn(size, *shape).to(dtype), text.to(dtype), clip, condition)


def model_and_batch(
    model_type="t2v", size: int = 2, shape=SHAPE, tokens: int = 4, dtype=torch.float32, **fields
) -> tuple[WanTransformer, Batch]:
    """A tiny model with these hyper-parameters, and a random batch for it."""
    model = tiny_model(tiny_config(model_type, **fields)).to(dtype)
    return model, random_batch(model.config, size, shape, tokens, dtype)


def rows(batch: Batch, index) -> Batch:
    return Batch(*(None if a is None else a[index] for a in batch))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """L2 norm of the difference over that of `want`."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm()).item()


def write_data(
    folder: Path,
    config: WanConfig,
    count: int = 4,
    shapes=(SHAPE,),
    labels=None,
    seed=0,
    latents=None,
    text=5,
) -> Path:
    """`count` samples in the official format, and all.list; returns its path.

    shapes are taken in turn; labels(i) returns label fields; latents(i, array) replaces a latent; text is
    the tokens of a long caption.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)

    def save(name: str, *shape: int) -> str:
        np.save(folder / name, rng.standard_normal(shape).astype(np.float32))
        return str(folder / name)

    metas = []
    for i in range(count):
        shape = shapes[i % len(shapes)]
        meta = {"source_id": str(i), "vae_latent_path": save(f"latent-{i}.npy", 1, *shape)}
        if latents is not None:
            np.save(meta["vae_latent_path"], latents(i, np.load(meta["vae_latent_path"])))
        meta["textshort_path"] = save(f"short-{i}.npy", 1, 2, config.text_dim)
        meta["textlong_path"] = save(f"long-{i}.npy", 1, text, config.text_dim)
        if config.image:
            meta["f1_black_path"] = save(f"first-{i}.npy", 1, *shape)
        if config.clip:
            meta["imgclip_path"] = save(f"clip-{i}.npy", 1, IMAGE_TOKENS, IMAGE_DIM)
        meta |= labels(i) if labels else {}
        (folder / f"{i}.json").write_text(json.dumps(meta))
        metas.append(str(folder / f"{i}.json"))
    np.save(folder / "null.npy", rng.standard_normal((1, 1, config.text_dim)).astype(np.float32))
    (folder / "all.list").write_text("\n".join(metas) + "\n")
    return folder / "all.list"


def move_data(folder: Path, to: Path) -> Path:
    """Data of `write_data` in another folder, which is returned."""
    folder.rename(to)
    for path in [*to.glob("*.json"), *to.glob("*.list")]:
        path.write_text(path.read_text().replace(f"{folder}/", f"{to}/"))
    return to


def write_run(tmp: Path, model_type: str = "t2v", samples: int = 4, shape=SHAPE, **sections) -> Path:
    """A generator, a reward model, data and a configuration of PRFL on them; returns its path.

    sections such as train={"steps": 2} replace single fields of the configuration.
    """
    config = tiny_config(model_type)
    save_transformer(tiny_model(config), tmp / "policy")
    save_reward(tiny_reward(config), tmp / "reward", 0)

    def labels(i):
        return dict.fromkeys(("physics_quality", "human_quality"), i % 2)

    data = write_data(tmp / "data", config, samples, [shape], labels=labels)
    held_out = write_data(tmp / "val", config, 3, [shape], labels=labels, seed=1)
    values = {
        "model": {"path": str(tmp / "policy"), "compute_dtype": "float32"},
        "reward": {"path": str(tmp / "reward"), "blocks": 1, "feature_layer": 1},
        "data": {
            "train": [str(data)],
            "val": [str(held_out)],
            "null_text": str(tmp / "data/null.npy"),
            "num_workers": 0,
        },
        "rollout": {"steps": 3},
        "optim": {"lr": 1e-3, "lr_head": 1e-3},
        "train": {"out": str(tmp / "run"), "device": "cpu", "tensorboard": False, "steps": 2},
        "eval": {"samples": 2, "batch_size": 2, "timesteps": [201, 1000], "videos": 1},
        "sample": {"count": 2},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    path = tmp / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def one_line(capsys) -> str:
    """What stderr holds besides progress bars: exactly one line, and no traceback."""
    lines = capsys.readouterr().err.splitlines()
    lines = [s for s in lines if s.strip() and not s.endswith(("it/s]", "s/it]"))]
    assert len(lines) == 1, lines
    assert lines[0].startswith("prfl: ")
    return lines[0]


class LiteralUniPC:
    """UniPC (order 2, bh2, x_0 prediction) with a history, as the formulas stand on paper."""

    def __init__(self, sigmas: list[float]):
        self.sigmas, self.steps, self.i = sigmas, len(sigmas) - 1, 0
        self.m: list[torch.Tensor] = []  # x_0 predictions so far
        self.orders: list[int] = []  # the order of every predictor step so far
        self.x_last: torch.Tensor | None = None

    def lam(self, i: int) -> float:
        s = self.sigmas[i]
        return math.log((1 - s) / s) if s else math.inf

    def step(self, x: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        i, s = self.i, self.sigmas
        m_t = x - s[i] * velocity
        if i >= 1:
            x = self._correct(m_t)
        order = 1 if i == 0 or i == self.steps - 1 else 2
        h = self.lam(i + 1) - self.lam(i)
        phi, alpha = math.expm1(-h), 1 - s[i + 1]
        x_next = s[i + 1] / s[i] * x - alpha * phi * m_t
        if order == 2:
            r = (self.lam(i - 1) - self.lam(i)) / h
            x_next = x_next - 0.5 * alpha * phi * ((self.m[-1] - m_t) / r)
        self.m.append(m_t)
        self.orders.append(order)
        self.x_last, self.i = x, i + 1
        return x_next

    def _correct(self, m_t: torch.Tensor) -> torch.Tensor:
        i, s, m0 = self.i, self.sigmas, self.m[-1]
        h = self.lam(i) - self.lam(i - 1)
        phi, alpha = math.expm1(-h), 1 - s[i]
        if self.orders[-1] == 1:
            rest = (m_t - m0) / 2
        else:
            r = (self.lam(i - 2) - self.lam(i - 1)) / h
            b0 = (phi / (-h) - 1) / phi
            b1 = 2 * ((phi / (-h) - 1) / (-h) - 0.5) / phi
            rho0, rho1 = np.linalg.solve([[1, 1], [r, 1]], [b0, b1])
            rest = rho0 * (self.m[-2] - m0) / r + rho1 * (m_t - m0)
        return s[i] / s[i - 1] * self.x_last - alpha * phi * m0 - alpha * phi * rest
