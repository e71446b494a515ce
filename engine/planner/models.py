"""What dry runs run: models with their first blocks, and inputs of their shapes, on the meta device."""

import torch
from torch import Tensor

from prfl_engine.batch import Batch
from prfl_engine.config_method import scales
from prfl_engine.guidance import Guidance, Scales
from prfl_engine.memory.live_bytes import LiveBytes
from prfl_engine.model import lora
from prfl_engine.model.layers import IMAGE_DIM, IMAGE_TOKENS
from prfl_engine.model.reward import QueryPool, RewardModel, freeze_embeddings
from prfl_engine.model.start import Start
from prfl_engine.model.wan import WanConfig, WanTransformer
from prfl_engine.planner import fsdp
from prfl_engine.planner.meta import call, cut, default_dtype, meta_tensors
from prfl_engine.planner.repeated import ballast
from prfl_engine.planner.setup import ROUND, Latent, RewardSetup, Setup


def _transformer(setup: Setup, config: WanConfig, blocks: int, head: bool = True) -> WanTransformer:
    with default_dtype(setup.weight_dtype):
        model = WanTransformer(config, blocks, head)
    return model.set_precision(setup.compute_dtype, setup.residual_dtype).set_chunk(setup.chunk)


def generator(setup: Setup, blocks: int) -> WanTransformer:
    """The generator of a setup, with its first blocks, on the default device; weights as torch draws them."""
    model = _transformer(setup, setup.config, blocks)
    return _placed(model if setup.lora is None else lora.attach(model, setup.lora), setup)


def _placed(model: torch.nn.Module, setup: Setup) -> torch.nn.Module:
    return fsdp.shard(cut(model, setup.sequence), setup.sharding)


def reward_model(setup: Setup, blocks: int, reward: RewardSetup | None = None) -> RewardModel:
    """A frozen reward model of it, likewise; None: the first."""
    r = reward or setup.reward
    config = r.config or setup.config
    pool = QueryPool(config.dim, r.queries, r.heads, add_query=r.add_query)
    made = RewardModel(_transformer(setup, config, blocks, head=False), pool, blocks).freeze()
    return _placed(made, setup)


class _Coming(Start):
    """A start whose blocks come for a forward: `bytes` of them."""

    bytes = 0

    def __call__(self, *given) -> Tensor:
        """As Start's."""
        here = ballast(self.bytes)
        made = super().__call__(*given)
        del here
        return made


def start_of(setup: Setup, model: WanTransformer, blocks: int) -> Start | None:
    """The frozen start of a setup, where there is one, with its first blocks."""
    if setup.anchor == "none":
        return None
    if setup.lora is not None:
        return Start(model)
    start = _Coming(generator(setup, blocks).requires_grad_(False))
    if setup.anchor == "host":
        start.bytes = block_bytes(start.model) * setup.count
    return start


def block_bytes(model: WanTransformer) -> int:
    """Bytes of the parameters of a block, each as the allocator rounds it."""
    return sum(-(-p.nbytes // ROUND) * ROUND for p in model.blocks[0].parameters())


def trained(setup: Setup, blocks: int) -> WanTransformer | RewardModel:
    """The model that is trained, likewise: the generator, or a reward model with gradients."""
    if setup.trains is None:
        return generator(setup, blocks)
    r, trunk = setup.reward, _transformer(setup, setup.config, blocks, head=False)
    if not setup.trains.embeddings:
        freeze_embeddings(trunk)
    if setup.lora is not None:
        lora.attach(trunk, setup.lora)
    pool = QueryPool(setup.config.dim, r.queries, r.heads, setup.trains.dropout, r.add_query)
    return _placed(RewardModel(trunk, pool, blocks).train(), setup)


def inputs(setup: Setup, latent: Latent) -> tuple[Batch, Tensor, Tensor]:
    """A batch, noise of its shape and noise levels [B]."""
    return batch_of(setup, latent), torch.empty(latent), torch.empty(latent[0])


def batch_of(setup: Setup, latent: Latent) -> Batch:
    """As the reader makes it: float32."""
    n, config = latent[0], setup.config
    made = Batch(torch.empty(latent), torch.empty(n, config.text_len, config.text_dim))
    if setup.first_frame:
        return made._replace(condition=torch.empty(n, latent[1], 1, *latent[3:]))
    if not config.image:
        return made
    clip = torch.empty(n, IMAGE_TOKENS, IMAGE_DIM) if config.clip else None
    return made._replace(clip=clip, condition=torch.empty(n, 20, *latent[2:]))


def guidance_of(setup: Setup, at_once: bool, validation: bool | None = None) -> Guidance | None:
    """The guidance of a setup's chains, or of a `validation` that is guided or is not; of two experts as that
    of one that is guided. at_once: as Guidance has it."""
    sections = setup.rollout, setup.chain
    guided = [scales(s.guidance) != (1, 1) if validation is None else validation for s in sections]
    if not any(guided):
        return None
    text = torch.empty(setup.config.text_len, setup.config.text_dim)
    of = (Scales(2, 2, 0) if own else Scales(1, 1, 0) for own in guided)
    return Guidance(text, *of, setup.chain.unconditional == "gradient", at_once)


def batch_bytes(setup: Setup) -> int:
    """Of a micro-batch."""
    with meta_tensors():
        live, batch = LiveBytes(ROUND), batch_of(setup, setup.latent)
        live.add(a for a in batch if a is not None)
        return live.now * setup.sides


def counter(*modules: torch.nn.Module | None) -> LiveBytes:
    """A counter that has seen the parameters of modules, their gradients and nothing else."""
    live = LiveBytes(ROUND, call)
    parameters = [p for m in modules if m is not None for p in m.parameters()]
    live.add([*parameters, *(p.grad for p in parameters if p.grad is not None)])
    return live
