"""Steps of a rollout launched one by one, and replayed as a CUDA graph: the same bits, and the time."""

import time
from functools import partial

import torch
from torch import nn

from prfl_bench.accept.costs import RATES
from prfl_bench.accept.row import FAILED, RAN, Context, Outcome, Row
from prfl_bench.accept.steps import batch_of, config_of, latent_of
from prfl_engine import chain, flow
from prfl_engine.config import RolloutConfig
from prfl_engine.model.wan import WanTransformer
from prfl_engine.rollout.accelerated import Rollout
from prfl_engine.rollout.cuda_graphs import CudaRecorder

STEPS = 4


def rerun(call):
    """A recorder without a GPU: a replay calls again, into the same memory."""
    output = call()
    return output, lambda: output.copy_(call())


@torch.no_grad()
def graphs(context: Context, frames: int) -> Outcome:
    config, latent = config_of(context, "t2v-1.3b"), latent_of(context, frames)
    torch.manual_seed(0)
    with torch.device(context.device):
        model = WanTransformer(config).set_precision(torch.bfloat16, torch.float32)
        nn.init.normal_(model.head.head.weight, std=0.02)
    batch, noise = batch_of(config, latent, context.device)
    schedule = flow.make_schedule("unipc", STEPS + 1, 5.0)
    embedded, index = model.embed_context(batch.text), torch.tensor([STEPS])
    recorder = CudaRecorder() if context.device == "cuda" else rerun
    ways = {"launched": None, "replayed": recorder}
    seconds, ends = {}, {}
    for way, record in ways.items():
        rollout = Rollout(model, RolloutConfig(cuda_graph=record is not None), schedule, record)
        for _ in range(2):  # the second counts: the first compiles and records
            synchronize(context.device)
            start = time.perf_counter()
            ends[way] = chain.rollout(rollout.stretches(batch, embedded)(), schedule, noise, index).x
            synchronize(context.device)
            seconds[way] = (time.perf_counter() - start) / STEPS
    same = torch.equal(ends["launched"], ends["replayed"])
    gain = seconds["launched"] / seconds["replayed"]
    tokens = latent[2] * latent[3] * latent[4] // 4
    each = ", ".join(f"{1e3 * time:.1f} ms {way}" for way, time in seconds.items())
    told = f"{tokens} tokens, a step {each}"
    values = {"tokens": tokens, "gain": gain, "same": same} | {f"ms {k}": 1e3 * v for k, v in seconds.items()}
    return Outcome(
        RAN if same else FAILED, f"{told}, {'the same bits' if same else 'another result'}", values
    )


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def row(frames: int) -> Row:
    tokens = frames * 1560
    forward = 30 * (5.6e7 * tokens * 1.5 / RATES.products + 4 * tokens**2 * 1536 / RATES.attention)
    name = f"graphs/1.3B/{tokens}"
    return Row(name, partial(graphs, frames=frames), 10 + 5 * STEPS * forward, 1.5)
