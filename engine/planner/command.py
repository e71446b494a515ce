"""`prfl plan`: what a configuration takes, without data, weights or a GPU."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from prfl_engine.checks import check_prfl, check_stored
from prfl_engine.config import Config, read_config
from prfl_engine.errors import check
from prfl_engine.parallel import check_layout, check_many, check_readers, copies
from prfl_engine.planner import rates
from prfl_engine.planner.machine import Machine, machine
from prfl_engine.planner.predict import memory
from prfl_engine.planner.report import Prediction
from prfl_engine.planner.sharded import Shards, exchanged_bytes
from prfl_engine.planner.standing import models_of
from prfl_engine.planner.subject import Subject, find
from prfl_engine.planner.timing import times


class Options(NamedTuple):
    """The options of the command."""

    gpu: str = "h100-80"
    gpus: int | None = None  # of a prediction 1, the most that a search tries
    nodes: int | None = None
    budget: float | None = None  # 10^9 bytes
    latent: str | None = None
    model: str | None = None
    price: float | None = None
    train_reward: bool = False
    rates: str | None = None  # file of measured rates


def predict(path: str, overrides: Sequence[str] = (), options: Options = Options()) -> Prediction:  # noqa: B008
    """The prediction for the configuration in a file. UserError for what cannot be."""
    gpu, count = machine_of(options)
    config, _ = read_config(path, overrides, count)
    return of_subject(config, subject_of(config, path, count, options), gpu, count, options)


def subject_of(config: Config, path: str, count: int, options: Options) -> Subject:
    """What the configuration in the file `path` trains on so many GPUs."""
    readers = max(1, count // config.parallel.sequence)
    return find(
        config, path, options.latent, options.model, readers=readers, train_reward=options.train_reward
    )


def machine_of(options: Options) -> tuple[Machine, int]:
    """The machine and the number of its GPUs."""
    gpu, count = machine(options.gpu), 1 if options.gpus is None else options.gpus
    check(count >= 1, "--gpus", count, "a number from 1 on")
    if options.price is not None:
        check(options.price > 0, "--price", options.price, "more than 0")
    if options.budget is not None:
        check(options.budget > 0, "--budget", options.budget, "more than 0 GB")
    if options.rates is not None:
        gpu = rates.read(options.rates).on(gpu)
    if options.nodes is not None:
        check(
            options.nodes >= 1 and count % options.nodes == 0, "--nodes", options.nodes,
            f"a divisor of --gpus = {count}",
        )  # fmt: skip
        gpu = gpu._replace(per_node=count // options.nodes)
    return gpu, count


def of_subject(
    config: Config, subject: Subject, gpu: Machine, count: int, options: Options = Options()  # noqa: B008
) -> Prediction:
    """The prediction for what has been found."""
    shards = layout(config, gpu, count, options.train_reward)
    subject = replace(subject, config=config)
    setup, limit = subject.setup, 1e9 * options.budget if options.budget else gpu.memory
    made = memory(config, setup, gpu, shards)
    models = models_of(setup, shards.shards)
    moved = exchanged_bytes(setup, models, shards, made.reward)
    took = times(config, setup, made.kinds, made.reward, models, gpu, shards, moved)
    measured = None if options.rates is None else rates.read(options.rates)
    return Prediction(subject, gpu, shards, limit, made, took, moved, options.price, measured)


def layout(config: Config, gpu: Machine, count: int, train_reward: bool = False) -> Shards:
    """How so many GPUs share the work. UserError for settings that they, or the training, cannot have."""
    if train_reward:
        check_stored(config, "in reward training")
    else:
        check_prfl(config)
    p, precision = config.parallel, config.rollout.precision
    fits = precision != "fp8" or gpu.rates.products_fp8 is not None
    check(fits, "rollout.precision", precision, f"same: {gpu.name} has no fp8")
    if count == 1:
        for name in ("replicate", "sequence"):
            given = getattr(p, name)
            check(given in (None, 1), f"parallel.{name}", given, "1 with one GPU, see --gpus")
        check_readers(config, 1)
        return Shards(resident=p.resident)
    here = min(count, gpu.per_node)
    replicate = copies(p, count, here, count // here)
    check_layout(p, replicate, count)
    check_readers(config, count // p.sequence)
    check_many(config, count // p.sequence)
    reduce = 4 if config.optim.grad_dtype == "float32" else None
    return Shards(count, replicate, p.sequence, p.resident, reduce)
