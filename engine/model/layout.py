"""Telling apart generators that the engine does not run, by the native names and shapes of their tensors."""

import re
from collections.abc import Mapping

_NATIVE = "the native files of Wan2.1 or Wan2.2 A14B"
# (a pattern found in a key, the layout, what to do), the more special first.
_LAYOUTS = (
    (r"lora_|\.alpha$", "an adapter (LoRA)", "give it as lora.path, and its generator as model.path"),
    (r"scale_weight|scale_input|scaled_fp8|weight_scale|input_scale|comfy_quant|\.absmax|quant_state",
     "scaled fp8 or otherwise quantised weights", "use the bfloat16, float16 or unscaled fp8 file"),
    (r"^(_orig_mod|module|_fsdp_wrapped_module|model|transformer|dit|generator)\.",
     "keys with the prefix of a wrapper", "remove it from all keys"),
    (r"^vace_", "Wan VACE", f"use {_NATIVE}, T2V or I2V"),
    (r"emb_pos", "Wan FLF2V (first and last frame)", f"use {_NATIVE}, T2V or I2V"),
    (r"^(control_adapter|ref_conv|face_adapter|motion_encoder|audio_|casual_audio|pose_patch|camera)",
     "a Wan model with other conditions (Fun, S2V or Animate)", f"use {_NATIVE}, T2V or I2V"),
    (r"^double_blocks\.|^transformer_blocks\.|^joint_blocks\.", "not a Wan model", f"use {_NATIVE}"),
)  # fmt: skip


def name_layout(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a generator is and what to do about it, in one line; None for one that it runs or does
    not know.

    shapes: {key, native where it is one of Wan: shape of the tensor}.
    """
    for pattern, layout, advice in _LAYOUTS:
        key = next((k for k in shapes if re.search(pattern, k)), None)
        if key is not None:
            return f"got {layout}, such as {key}; {advice}"
    return None
