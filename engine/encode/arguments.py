"""The options of `prfl encode`, and those of `prfl sample` and `prfl score` for prompts and videos; imports
little."""

from argparse import ArgumentParser, Namespace

from prfl_engine.paths import Place

ENCODE = (
    "models", "size", "frames", "min_frames", "fps", "i2v", "no_clip", "negative", "store", "text_dtype",
    "text_batch", "device",
)  # fmt: skip
SCORE = ("models", "prompt", "encoded", "size", "frames", "min_frames", "fps")
SAMPLE = ("text_encoder", "negative", "size", "frames", "image", "image_encoder", "vae")


def add_encode(parser: ArgumentParser) -> None:
    """Those of `prfl encode`."""
    add = parser.add_argument
    add("source", action=Place, metavar="SOURCE", help="folder of videos and .txt, or .csv, .jsonl, .json")
    models = "Wan's VAE, UMT5, tokenizer and, for I2V, CLIP"
    add("--models", action=Place, required=True, metavar="DIR", help=models)
    add("--out", action=Place, required=True, metavar="DIR", help="new folder, or one to go on with")
    add("--size", default="480p", metavar="SIZE", help="480p, 720p or HxW,HxW,... (default: %(default)s)")
    add("--frames", type=int, default=81, metavar="N", help="4n + 1 (default: %(default)s)")
    add("--min-frames", type=int, metavar="N", help="of shorter videos that are taken, too")
    add("--fps", default="16", metavar="F", help="frames a second (default: %(default)s)")
    add("--i2v", action="store_true", help="also first frames and CLIP features")
    add("--no-clip", action="store_true", help="with --i2v, for Wan2.2, which takes no CLIP features")
    add("--negative", metavar="TEXT", help="negative prompt (default: that of Wan2.1)")
    add("--store", choices=("float32", "float16"), default="float32", help="arrays (default: %(default)s)")
    add("--text-dtype", choices=("bfloat16", "float32"), default="bfloat16", help="UMT5 computes in it")
    add("--text-batch", type=int, default=8, metavar="N", help="prompts at a time (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def add_score(parser: ArgumentParser) -> None:
    """Those of `prfl score`; the sizes are as in `prfl encode`."""
    add = parser.add_argument
    add("--models", action=Place, metavar="DIR", help="encoders as for `prfl encode`: videos are scored, too")
    add("--prompt", metavar="TEXT", help="of videos without a NAME.txt")
    add("--encoded", action=Place, metavar="DIR", help="keep what is encoded there, or go on with it")
    add("--size", metavar="SIZE", help="480p, 720p or HxW,HxW,... (default: 480p)")
    add("--frames", type=int, metavar="N", help="4n + 1 (default: 81)")
    add("--min-frames", type=int, metavar="N", help="of shorter videos that are taken, too")
    add("--fps", metavar="F", help="frames a second (default: 16)")


def add_sample(parser: ArgumentParser) -> None:
    """Those of `prfl sample`."""
    add = parser.add_argument
    add("--vae", action=Place, metavar="DIR", help="the generator's VAE: samples are written as .mp4, too")
    add("--guidance", type=float, metavar="S", help="short for sample.guidance=S")
    add("--prompt", action="append", default=[], metavar="TEXT", help="in place of data.val; may be repeated")
    encoder = "Wan's UMT5 and its tokenizer, for --prompt and guidance"
    add("--text-encoder", action=Place, metavar="DIR", help=encoder)
    add("--negative", metavar="TEXT", help="for guidance (default: data.negative_text, or that of Wan2.1)")
    add("--size", metavar="HxW", help="pixels, with --prompt (default: 480x832)")
    add("--frames", type=int, metavar="N", help="with --prompt (default: 81)")
    add("--image", action=Place, metavar="FILE", help="first frame, with --prompt for I2V and TI2V")
    add("--image-encoder", action=Place, metavar="DIR", help="Wan's CLIP, for --image")


def given(args: Namespace, names: tuple[str, ...]) -> dict[str, object]:
    """Those of some options that are not None."""
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
