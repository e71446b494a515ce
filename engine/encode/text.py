"""Prompts as Wan's tokenizer gets them."""

import html
import re
from importlib.util import find_spec

from prfl_engine.errors import UserError, show

_SHAKING = "镜头晃动，"
_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


def negative_prompt(image: bool) -> str:
    """The negative prompt that Wan2.1 is published with: of text-to-video, or of image-to-video."""
    return _SHAKING * image + _NEGATIVE


def clean(text: str) -> str:
    """A prompt after ftfy, two rounds of HTML entities, and white space made single spaces, as the official
    code and diffusers clean it. UserError where ftfy could change it and is not installed."""
    if find_spec("ftfy") is not None:
        import ftfy

        text = ftfy.fix_text(text)
    elif not text.isascii() or "&" in text or "\x1b" in text:
        raise UserError(f"prompt {show(text)}: wants ftfy, which Wan cleans it with: pip install ftfy")
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()
