"""The command `prfl`.

A mistake in what was given is one line on stderr and exit code 2; a run that cannot go on, one line and 1. A
training that SIGTERM or Ctrl-C ends saves its step and exits with 0, or 143 and 130 if a second one comes.
`prfl encode` and `prfl score` exit with 3 where they had to leave rows or videos out.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from prfl_engine import __version__
from prfl_engine.config import load_config
from prfl_engine.encode.arguments import ENCODE, SAMPLE, SCORE, add_encode, add_sample, add_score, given
from prfl_engine.errors import TrainingError, UserError, refusing
from prfl_engine.inputs import check_new_file, make_folder
from prfl_engine.interrupt import Stopped, interrupts
from prfl_engine.paths import Place


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        args = _parse(argv)
        _read_environment()
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"prfl: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"prfl: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"prfl: {stopped}", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print("prfl: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads what is printed has enough of it
        _drop_unprinted()
        return 1
    except _failures() as error:
        _drop_unprinted()
        from prfl_engine.failures import reason

        if (line := reason(error)) is None:
            raise
        print(f"prfl: {line}", file=sys.stderr)
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # Before Python 3.13 argparse does not accept overrides after an option.
    if any(a.startswith("-") for a in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _drop_unprinted() -> None:
    """Where what is printed cannot be written, drop it: the interpreter would try again as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failures() -> tuple[type[Exception], ...]:
    from prfl_engine.failures import KINDS  # imports torch, which most mistakes do without

    return KINDS


def _read_environment() -> None:
    from prfl_kernels import dispatch, extension

    with refusing("PRFL_KERNELS"):
        dispatch.configure(dispatch.configured())
    with refusing():
        extension.absence("cpu", "cpu")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prfl", description="Process reward feedback learning for video diffusion transformers."
    )
    parser.add_argument("--version", action="version", version=f"prfl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str, config: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if config:
            sub.add_argument("config", action=Place, metavar="CONFIG", help="YAML file")
            sub.add_argument(
                "overrides", nargs="*", metavar="SECTION.FIELD=VALUE", help="e.g. train.steps=100"
            )
        return sub

    demo = command("demo", _demo, "The whole job on real video, on this machine.", config=False)
    demo.add_argument("--out", action=Place, default="runs/demo", help="folder (default: %(default)s)")
    command("train", _train, "PRFL training of a generator.")
    plan = command("plan", _plan, "What a training takes: memory, seconds, which GPUs. Needs none.")
    plan.add_argument("--gpu", default="h100-80", metavar="NAME", help="see docs/planner.md")
    plan.add_argument("--gpus", type=int, metavar="N", help="default: 1; the most of a search: 64")
    plan.add_argument("--nodes", type=int, metavar="M", help="of how many nodes (default: 8 GPUs each)")
    plan.add_argument("--budget", type=float, metavar="GB", help="10^9 bytes (default: those of the GPU)")
    plan.add_argument("--latent", metavar="SIZE", help="480p, 720p or TxHxW (default: of the data)")
    plan.add_argument("--model", metavar="PRESET", help="the generator where its folder is not here")
    plan.add_argument("--price", type=float, metavar="X", help="of a GPU hour")
    plan.add_argument("--train-reward", action="store_true", help="of prfl train-reward, not prfl train")
    plan.add_argument("--search", action="store_true", help="the fastest settings on up to N GPUs")
    plan.add_argument("--rates", action=Place, metavar="FILE", help="rates.json of prfl accept: as measured")
    plan.add_argument("--picture", action=Place, metavar="FILE", help="also memory over a step, as PNG")
    plan.add_argument("--html", action=Place, metavar="FILE", help="also all of it as a page")
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.add_argument("--no-cache", action="store_true", help="count anew, and store nothing")
    command("train-reward", _train_reward, "Train a latent reward model.")
    command("eval-reward", _eval_reward, "Accuracy of a reward model at every timestep.")
    score = command("score", _score, "Rank latents, samples or videos by a reward model.", config=False)
    score.add_argument(
        "model", action=Place, metavar="CONFIG|DIR", help="YAML file, or folder of a reward model"
    )
    score.add_argument(
        "overrides", nargs="*", metavar="SAMPLES|SECTION.FIELD=VALUE",
        help=".list files, folders of latents or of samples, .npy latents; with --models videos, their "
        "folders and tables (default: data.val)",
    )  # fmt: skip
    score.add_argument(
        "--timesteps", nargs="+", type=float, metavar="T", help="default: eval.timesteps below 1000"
    )
    score.add_argument("--draws", type=int, default=4, metavar="N", help="of noise (default: %(default)s)")
    score.add_argument(
        "--text", action=Place, metavar="FILE", help="text of latents NAME.npy without a NAME.text.npy"
    )
    add_score(score)
    score.add_argument("--json", action="store_true", help="as JSON, with the score at every timestep")
    score.add_argument("--out", action=Place, metavar="FILE", help="also as CSV, a new file")
    sample = command("sample", _sample, "Sample videos from a generator.")
    sample.add_argument(
        "--out", action=Place, default="runs/samples", help="new folder (default: %(default)s)"
    )
    sample.add_argument(
        "--best-of", type=int, default=1, metavar="N", help="seeds a prompt, the best one by reward.path"
    )
    sample.add_argument("--judge-at", type=int, metavar="STEP", help="steps after which one of N is kept")
    sample.add_argument(
        "--finish", type=int, default=1, metavar="K", help="finish the best K of N (default: %(default)s)"
    )
    add_sample(sample)
    add_encode(command("encode", _encode, "Videos, images and prompts to training data.", config=False))
    merge = command("merge-lora", _merge_lora, "Add an adapter to a generator's weights.", config=False)
    merge.add_argument("base", action=Place, metavar="BASE", help="folder or file of the generator")
    merge.add_argument(
        "adapter", action=Place, metavar="ADAPTER", help="folder or safetensors file of the adapter"
    )
    merge.add_argument("--out", action=Place, required=True, metavar="DIR", help="new folder")
    convert = command("convert", _convert, "A generator or an adapter in another layout.", config=False)
    convert.add_argument("source", action=Place, metavar="SOURCE", help="folder or file, in any layout")
    convert.add_argument("--out", action=Place, required=True, metavar="DIR", help="new folder")
    convert.add_argument(
        "--to", required=True, metavar="LAYOUT",
        help="native, diffusers or comfyui; of an adapter peft, diffusers, comfyui or kohya",
    )  # fmt: skip
    convert.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of each tensor"
    )
    convert.add_argument("--shard", type=float, metavar="GB", help="10^9 bytes of a file (default: 5)")
    doctor = command("doctor", _doctor, "What is here, and what will run.", config=False)
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.add_argument(
        "--selftest", action="store_true", help="also run every kernel that is here against plain torch"
    )
    kernels = command("kernels", _kernels, "What the GPU kernels compile to and move.", config=False)
    kernels.add_argument("--json", action="store_true", help="as JSON, with every argument")
    kernels.add_argument("--quick", action="store_true", help="at 32,760 tokens alone")
    kernels.add_argument(
        "--peers", nargs="?", action=Place, const=True, metavar="FILE",
        help="also peers: liger-kernel if installed, and the Triton tutorial's attention in FILE",
    )  # fmt: skip
    tune = command("tune", _tune, "Measure the kernels' tile choices on this GPU.", config=False)
    tune.add_argument("--model", nargs="+", metavar="NAME", help="1.3B, 5B, 14B (default: all)")
    tune.add_argument("--tokens", nargs="+", type=int, metavar="N", help="default: 32760 75600")
    tune.add_argument("--sp", type=int, default=1, metavar="N", help="GPUs of a sequence (default: 1)")
    tune.add_argument("--list", action="store_true", help="print the choices, measure nothing")
    accept = command("accept", _accept, "First contact with a GPU: what works, and how fast.", config=False)
    accept.add_argument("--minutes", type=float, default=8, help="default: %(default)s; 0: the report alone")
    accept.add_argument(
        "--out", action=Place, default="runs/accept", metavar="DIR", help="default: %(default)s"
    )
    accept.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows or stages, patterns too")
    accept.add_argument("--list", action="store_true", help="print rows and predicted seconds, run nothing")
    golden = command("golden", _golden, "Compute the values of a golden folder.", config=False)
    golden.add_argument("folder", action=Place, metavar="DIR")
    golden.add_argument("--out", action=Place, required=True, metavar="FILE", help=".safetensors to write")
    return parser


def _load(args, job=None):
    return load_config(args.config, args.overrides, job)


def _demo(args) -> None:
    from prfl_engine.demo.run import demo

    demo(make_folder(args.out, "--out"), command=f"prfl demo --out {shlex.quote(args.out)}")


def _train(args) -> None:
    with interrupts():  # imports and models take a while
        from prfl_engine.train import train

        train(_load(args, "train"))


def _plan(args) -> None:
    from prfl_engine.planner.command import Options
    from prfl_engine.planner.outputs import Outputs, check_name

    options = Options(
        args.gpu, args.gpus, args.nodes, args.budget, args.latent, args.model, args.price,
        args.train_reward, args.rates,
    )  # fmt: skip
    files = {}
    for option in ("picture", "html"):
        if (name := getattr(args, option)) is not None:
            files[option] = check_name(option, name)
    outputs = Outputs(args.config, args.overrides, options, args.search, not args.no_cache)
    for option, path in files.items():
        path.write_bytes(outputs(option))
    print(outputs("json" if args.json else "text").decode())


def _train_reward(args) -> None:
    with interrupts():
        from prfl_engine.train_reward import train_reward

        train_reward(_load(args, "train-reward"))


def _eval_reward(args) -> None:
    from prfl_engine.train_reward import eval_reward, score

    config = _load(args, "eval-reward")
    found = eval_reward(config)
    for t, values in found.items():
        print(f"t = {t:4g}   " + "   ".join(f"{name} {value:.4f}" for name, value in values.items()))
    print(f"mean of t < 1000: accuracy {score(config, found):.4f}")


def _score(args) -> int:
    import json

    from prfl_engine.tools import score
    from prfl_engine.tools.score_videos import Videos

    options = score.Options(args.timesteps and tuple(args.timesteps), args.draws, args.text)
    videos = Videos(**given(args, SCORE))
    config, found, code = score.run(args.model, args.overrides, options, args.out, videos)
    if args.json:
        print(json.dumps(score.as_values(config, found, args.draws), indent=2))
    else:
        print("\n".join(score.table(found)))
    return code


def _sample(args) -> None:
    from prfl_engine.sample import sample

    if args.guidance is not None:
        args.overrides.append(f"sample.guidance={args.guidance}")
    config = _load(args)
    words = given(args, SAMPLE)
    if args.prompt or words:
        from prfl_engine.encode.prompts import Prompts, sample_prompts

        prompts = Prompts(tuple(args.prompt), **words)
        files = sample_prompts(config, args.out, args.best_of, args.judge_at, prompts, args.finish)
    else:
        files = sample(config, args.out, args.best_of, args.judge_at, finish=args.finish)
    for path in files:
        print(path)


def _encode(args) -> int:
    from prfl_engine.encode.command import Options, encode

    found = encode(args.source, args.out, Options(**given(args, ENCODE)))
    print("\n".join(found.lines))
    return found.code


def _merge_lora(args) -> None:
    from prfl_engine.model.lora import merge_folders

    merge_folders(args.base, args.adapter, args.out)


def _convert(args) -> None:
    import torch

    from prfl_engine.convert import convert

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    print(convert(args.source, args.out, args.to, dtype, args.shard))


def _doctor(args) -> int:
    import json

    from prfl_engine.tools.doctor import columns, render, report

    found = report()
    if not args.selftest:
        print(json.dumps(found, indent=2) if args.json else render(found))
        return 0
    from prfl_bench import selftest

    rows = list(selftest.selftest())
    if args.json:
        print(json.dumps(found | {"selftest": [row._asdict() for row in rows]}, indent=2))
    else:
        print("\n".join([render(found), "", "Self-test", *columns(selftest.summary(rows))]))
    return int(any(row.state == selftest.FAILED for row in rows))


def _kernels(args) -> None:
    import json

    from prfl_bench.ledger.collect import collect
    from prfl_bench.ledger.text import render

    with refusing():
        found = collect(args.quick, "" if args.peers is True else args.peers)
    print(json.dumps(found, indent=2) if args.json else render(found))


def _tune(args) -> None:
    from prfl_bench import tune
    from prfl_bench.shapes import DEFAULT, MODELS

    models, lengths = args.model or list(MODELS), args.tokens or list(DEFAULT)
    unknown = set(models) - set(MODELS)
    if unknown:
        raise UserError(f"--model: got {unknown.pop()}, want one of {', '.join(MODELS)}")
    if min(args.sp, *lengths) < 1 or any(n % args.sp for n in lengths):
        raise UserError(f"--tokens, --sp: got {lengths}, {args.sp}, want multiples of a number from 1 on")
    work = tune.listing if args.list else tune.tune
    with refusing():
        for line in work(models, lengths, args.sp):
            print(line, flush=True)


def _accept(args) -> int:
    from prfl_bench.accept import listing
    from prfl_bench.accept.command import accept
    from prfl_bench.accept.run import chosen

    if args.list:
        print(listing.text(chosen(listing.rows("cuda"), args.only)))
        return 0
    return accept(Path(args.out), args.minutes, args.only)


def _golden(args) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from prfl_engine.tools.golden import compute

    out = check_new_file(args.out, "--out")
    try:
        save_file(compute(args.folder), out)
    except (SafetensorError, OSError) as error:
        out.unlink(missing_ok=True)
        raise TrainingError(f"--out: {out}: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
