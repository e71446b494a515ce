"""Videos side by side in a page, frame by frame: one slider for all, one picture a prompt with all frames."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence

from PIL import Image
from torch import Tensor

from prfl_engine.media.video import pixels

STYLE = """
.player { margin: 1rem 0 }
.screens { display: grid; gap: .6rem; grid-template-columns: repeat(2, 1fr) }
@media (min-width: 40rem) { .screens { grid-template-columns: repeat(4, 1fr) } }
.screens figure { margin: 0 } .screens canvas { width: 100%; display: block; border-radius: 4px }
.screens figcaption { font-size: .9rem }
.controls { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; margin: .6rem 0 }
.controls input { flex: 1 1 10rem } .controls label, .controls select { max-width: 100% }
.controls button, .controls select { font: inherit } .controls button { min-width: 4.5rem }
"""

_SCRIPT = """
for (const box of document.querySelectorAll(".player")) {
  const { names, frames, prompts } = JSON.parse(box.querySelector("script").textContent);
  const find = (what) => box.querySelector(what), screens = [...box.querySelectorAll("canvas")];
  const slider = find("input"), play = find(".play"), choice = find("select");
  const sheets = [...box.querySelectorAll("img")];
  let timer = null;
  const draw = () => {
    const sheet = sheets[choice.value];
    if (!sheet.complete) { sheet.onload = draw; return; }
    const w = sheet.naturalWidth / frames, h = sheet.naturalHeight / names.length;
    screens.forEach((screen, row) => {
      screen.width = 6 * w; screen.height = 6 * h;
      const at = screen.getContext("2d");
      at.imageSmoothingQuality = "high";
      at.drawImage(sheet, slider.value * w, row * h, w, h, 0, 0, screen.width, screen.height);
    });
    find(".frame").textContent = `frame ${+slider.value + 1} of ${frames}`;
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  const start = () => {
    timer = setInterval(() => { slider.value = (+slider.value + 1) % frames; draw(); }, 125);
    play.textContent = "Pause";
  };
  play.onclick = () => timer ? stop() : start();
  slider.oninput = () => { stop(); draw(); };
  choice.onchange = draw;
  draw(); start();
}
"""


def player(videos: Mapping[str, Tensor], prompts: Sequence[str], chosen: Sequence[int], fallback: str) -> str:
    """HTML that plays the chosen prompts, one at a time, every video of it beside the others.

    Args:
        videos: {name: [N, 3, F, H, W] in [0, 1]}, one shape for all.
        prompts: N prompts.
        chosen: positions in 0..N-1, in the order in which they are offered.
        fallback: HTML for a browser without JavaScript.
    """
    names = list(videos)
    frames = next(iter(videos.values())).shape[2]
    facts = json.dumps({"names": names, "frames": frames, "prompts": [prompts[i] for i in chosen]})
    screens = "".join(
        f"<figure><canvas></canvas><figcaption>{html.escape(name)}</figcaption></figure>" for name in names
    )
    offered = "".join(
        f'<option value="{n}">{html.escape(prompts[i])}, seed {i}</option>' for n, i in enumerate(chosen)
    )
    sheets = "".join(
        f'<img hidden alt="" src="data:image/webp;base64,{_sheet([video[i] for video in videos.values()])}">'
        for i in chosen
    )
    return f"""<div class="player"><div class="screens">{screens}</div>
<div class="controls"><button class="play" type="button">Pause</button>
<input type="range" min="0" max="{frames - 1}" value="0" aria-label="frame"> <span class="frame"></span></div>
<div class="controls"><label>prompt <select>{offered}</select></label></div>
{sheets}<script type="application/json">{facts.replace("<", chr(92) + "u003c")}</script></div>
<script>{_SCRIPT}</script><noscript>{fallback}</noscript>"""


def _sheet(videos: Sequence[Tensor]) -> str:
    """One picture, base64 of a .webp: a row for every video [3, F, H, W], a column for every frame."""
    rows = [pixels(video) for video in videos]
    f, h, w, _ = rows[0].shape
    page = Image.new("RGB", (f * w, len(rows) * h))
    for y, row in enumerate(rows):
        for x, image in enumerate(row.numpy()):
            page.paste(Image.fromarray(image), (x * w, y * h))
    file = io.BytesIO()
    page.save(file, "webp", quality=90, method=4)
    return base64.b64encode(file.getvalue()).decode()
