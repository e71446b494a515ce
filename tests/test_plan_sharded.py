"""Sharded predictions: FSDP2 on a fake process group, exchanges of a cut sequence on two real ranks."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param as fsdp_param
from helpers import tiny_config
from plan_ranks import SHAPE, exchanged
from ranks import Ranks
from shard_cases import collectives
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from prfl_engine import parallel
from prfl_engine.batch import Batch
from prfl_engine.config import LoraConfig, OptimConfig
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.memory.policy import named
from prfl_engine.memory.recompute import run_under
from prfl_engine.memory.resident import Resident
from prfl_engine.model.lora import attach
from prfl_engine.model.wan import PRESETS, WanTransformer
from prfl_engine.objectives import sft_loss
from prfl_engine.optim.optimizer import make_optimizer
from prfl_engine.planner.dry_run import SCALARS
from prfl_engine.planner.meta import default_dtype
from prfl_engine.planner.plan import make_kind, peaks
from prfl_engine.planner.seconds import Rates
from prfl_engine.planner.setup import ROUND, Setup
from prfl_engine.planner.sharded import Shards, exchange_of, exchanged_bytes, gathered_bytes, units_of
from prfl_engine.planner.standing import models_of, rounded, state_bytes
from prfl_kernels import extension

LATENT = (1, 16, 5, 60, 104)
WIDE = replace(PRESETS["t2v-14b"], num_layers=4)


@pytest.fixture
def world(request):
    """The mesh of a fake process group of (copies, ranks), of which this process is the first."""
    copies, ranks = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=copies * ranks)
    shape, names = ((ranks,), ("shard",)) if copies == 1 else (request.param, ("replicate", "shard"))
    yield init_device_mesh("cpu", shape, mesh_dim_names=names)
    dist.destroy_process_group()


class Real:
    """A sharded step of flow matching at full width, run by FSDP2 on tensors without values."""

    def __init__(self, mesh: DeviceMesh, dtype: torch.dtype):
        with default_dtype(dtype):
            self.model = WanTransformer(WIDE).set_precision(torch.bfloat16)
        parallel.shard(self.model, mesh)
        self.live = LiveBytes(ROUND)
        self.live.add(p.to_local() for p in self.model.parameters())
        self.shards = self.live.now

    def step(self, policy, monkeypatch) -> int:
        """Its peak without shards of weights and gradients, which exist already."""
        for name in ("free_storage", "alloc_storage"):  # they resize storage, which no operation shows
            monkeypatch.setattr(fsdp_param, name, self._seen(getattr(fsdp_param, name)))
        latent, sigma = torch.empty(LATENT), torch.tensor([0.5])
        batch, noise = Batch(latent, torch.empty(1, 512, 4096)), torch.empty(LATENT)
        self.live.add([*batch[:2], noise])
        with self.live:
            for _ in range(2):
                self.live.lap()
                with collectives() as self.calls:
                    sft_loss(self.model, batch, noise, sigma, run_under(policy)).mean().backward()
                peak = self.live.lap()
        gradients = sum(-(-p.grad.to_local().nbytes // ROUND) * ROUND for p in self.model.parameters())
        return peak - self.shards - gradients

    def _seen(self, call):
        def called(a):
            call(a)
            self.live._see(a)
            self.live._lap = max(self.live._lap, self.live.now)

        return called


@pytest.mark.parametrize(
    "world, dtype",
    [
        ((1, 8), torch.float32), ((1, 64), torch.bfloat16), ((1, 512), torch.bfloat16),
        ((2, 8), torch.bfloat16),
    ],
    indirect=["world"],
)  # fmt: skip
def test_a_rank_of_fsdp_has_the_bytes_predicted(world, dtype, monkeypatch):
    """Shards, states of the optimizer, gradients and all collectives to the byte; the peak of a step, of 5 GB
    and more, to 0.1 MB."""
    setup, policy = Setup(WIDE, LATENT, weight_dtype=dtype, reward=None), named("attention")
    shards = Shards(world.size(), world.size() // world.size(-1))
    setup = replace(setup, sharding=shards.sharding())
    models, optim = models_of(setup, shards.shards), OptimConfig()
    kind = make_kind("attention", policy, setup, Rates())
    held = setup.sharding.held * sum(p.values * dtype.itemsize for p in models.trained if "blocks." in p.name)
    told = max(part.bytes for part in peaks([kind] * 4, kind, held)["flow matching"].values())
    with FakeTensorMode(allow_non_fake_inputs=True), extension.dry_run(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real = Real(world, dtype)
        assert sum(p.bytes() for p in models.generator) == real.shards
        got = real.step(policy, monkeypatch)
        moved = exchanged_bytes(setup, models, shards, kind)
        root = units_of(models.generator, shards.shards)["root"]
        share = (shards.shards - 1) / shards.shards  # the context gathers the root once more, both ways
        want = {"gather": 2 * (moved.gather + root * share), "scatter": moved.reduce}
        for name, bytes in want.items():
            seen = sum(call.bytes for call in real.calls if call.name == name)
            assert seen * share == pytest.approx(bytes, rel=1e-9), name
        for p in real.model.parameters():
            p.grad = None
        live = LiveBytes(ROUND)
        with live:
            optimizer = make_optimizer([(real.model, 1e-6)], optim)
        states = sum(-(-a.nbytes // ROUND) * ROUND for s in optimizer.state.values()
                     for a in (s["step"], *(t for b in s["blocks"] for t in b.values())))  # fmt: skip
    counted = state_bytes(models, optim, True).device
    assert 0 <= counted - states <= ROUND * 2 * len(models.trained) * 4
    assert 0 <= told - got <= SCALARS + ROUND * 100  # what small tensors take


def test_what_is_gathered_grows_with_the_padding_alone():
    setup = Setup(WIDE, LATENT, weight_dtype=torch.bfloat16, reward=None)
    parts = {n: gathered_bytes(models_of(setup, n), Shards(n)) for n in (8, 64, 512)}
    assert parts[8].forward < parts[64].forward < parts[512].forward < 1.05 * parts[8].forward
    kind = make_kind("full", named("full"), setup, Rates())
    sums = exchanged_bytes(setup, models_of(setup, 8), Shards(64, 8), kind)
    assert sums.gather == sums.reduce and sums.replicas == pytest.approx(2 * sums.reduce / 8, rel=0.01)
    wide = exchanged_bytes(setup, models_of(setup, 8), Shards(64, 8, reduce=4), kind)
    assert (wide.gather, wide.reduce, wide.replicas) == (sums.gather, 2 * sums.reduce, 2 * sums.replicas)
    forward = parts[8].forward
    parts = (gathered_bytes(models_of(setup, 8), Shards(8, reduce=n)) for n in (None, 4))
    assert 2 * (next(parts).backward - forward) == next(parts).backward - forward
    assert gathered_bytes(models_of(setup), Shards()) == (0,) * 4


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_resident_weights_are_counted_as_they_are(lora):
    config = tiny_config("i2v")
    model = WanTransformer(config).set_precision(torch.bfloat16)
    if lora is not None:
        attach(model, lora)
    setup = Setup(config, (1, 16, 1, 8, 8), weight_dtype=torch.float32, reward=None, lora=lora)
    want = sum(rounded(p.nbytes) for p in Resident(model).model.parameters())
    models = models_of(setup, 2)
    got = gathered_bytes(models, Shards(2, resident=True), torch.bfloat16).resident
    assert got == want < gathered_bytes(models, Shards(2, resident=True)).resident


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    made = Ranks(request.param, ("plan_ranks",))
    yield made
    made.close()


@pytest.mark.parametrize("heads", [4, 1])
@pytest.mark.parametrize("mode", ["none", "full", "attention"])
def test_exchanges_are_those_of_real_ranks(ranks, mode, heads):
    """Of several blocks by those of one and two, forward alone and with backward."""
    config = tiny_config("t2v", dim=64, num_heads=heads)
    setup = Setup(config, (1, *SHAPE), torch.float32, reward=None, sequence=ranks.size)
    for graded, what in ((False, "forward"), (True, "graded")):
        one, more = (exchange_of(setup, what, named(mode), n) for n in (1, 2))
        assert more > one
        assert ranks(exchanged, named(mode), 3, graded, heads) == [one + 2 * (more - one)] * ranks.size
