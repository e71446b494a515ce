"""accelerate on diffusers' own WanTransformer3DModel, small."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import relative

from prfl_engine.errors import UserError
from prfl_engine.patch import accelerate, fp8, report_of, restore

pytest.importorskip("diffusers")
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel, WanVACETransformer3DModel  # noqa: E402
from diffusers.models.attention_dispatch import AttentionBackendName  # noqa: E402
from diffusers_small import FIELDS, assert_close, inputs_of, model_of, outcome  # noqa: E402

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "ffn.net.0.proj", "ffn.net.2"]
IMAGE = pytest.mark.parametrize("image", [False, True])


@IMAGE
def test_values_and_all_gradients_stay_with_checkpointing_too(image):
    model, inputs = model_of(image), inputs_of(image)
    want = outcome(model, inputs)
    report = accelerate(model)
    assert_close(outcome(model, inputs), want)
    model.enable_gradient_checkpointing()
    model.train()
    assert_close(outcome(model, inputs), want)
    assert (report.calls, report.fallbacks.total()) == (6, 0)
    assert "as they were: patch_embedding, condition_embedder, proj_out" in str(report)
    restore(model)
    restored = outcome(model, inputs)
    assert torch.equal(restored[0], want[0]) and report.calls == 6


@pytest.mark.parametrize("recompute", ["attention", "full"])
def test_policies_and_chunks(recompute):
    model, inputs = model_of(True), inputs_of(True)
    want = outcome(model, inputs)
    accelerate(model, recompute, chunk=7)
    assert_close(outcome(model, inputs), want)


def test_no_graph_break():
    """The operations themselves have tests under other backends."""
    model, inputs = model_of(True, num_layers=1), inputs_of(True)
    want = outcome(model, inputs)
    accelerate(model)
    torch.compiler.reset()
    assert_close(outcome(model, inputs, torch.compile(model, fullgraph=True, backend="eager")), want)


@IMAGE
def test_bfloat16_is_as_right_as_the_original(image):
    """Under autocast, and of weights in bfloat16, both against float32."""
    exact = outcome(model_of(image), inputs_of(image))

    def errors(model, inputs, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got, grads = outcome(model, inputs)
        everything = (torch.cat([a.flatten() for a in g.values()]) for g in (grads, exact[1]))
        return relative(got, exact[0]), relative(*everything)

    low = [a if a is None else a.bfloat16() for a in inputs_of(image)]
    low[1] = inputs_of(image)[1]
    for model, inputs, autocast in (
        (model_of(image), inputs_of(image), True),
        (model_of(image).bfloat16(), low, False),
    ):
        original = errors(model, inputs, autocast)
        report = accelerate(model)
        ours = errors(model, inputs, autocast)
        assert report.calls == 2 and all(1e-4 < a < 1.2 * b for a, b in zip(ours, original, strict=True))


def test_timesteps_of_tokens():
    """Wan2.2's: all of a sample equal, or the first frame's at 0, they are ours; else the original code's."""
    model, (x, t, text, _) = model_of(), inputs_of()
    equal, other = t[:, None].expand(2, 24).contiguous(), torch.rand(2, 24) * 1000
    image = equal.clone()
    image[:, :12] = 0
    want = [outcome(model, (x, a, text)) for a in (equal, image, other)]
    report = accelerate(model)
    assert_close(outcome(model, (x, equal, text)), want[0])
    assert_close(outcome(model, (x, image, text)), want[1])
    assert report.calls == 4
    assert torch.equal(outcome(model, (x, other, text))[0], want[2][0])
    assert report.fallbacks == {"modulation that differs from token to token": 2}


def test_other_rotations_are_left_to_the_original_code():
    model, inputs = model_of(), inputs_of()
    report = accelerate(model)
    model.rope.freqs_cos = model.rope.freqs_cos.roll(1, 0)
    with torch.no_grad():
        got = model(*inputs, return_dict=False)[0]
        restore(model)
        want = model(*inputs, return_dict=False)[0]
    assert torch.equal(got, want) and report.calls == 0
    (why,) = report.fallbacks
    assert why.startswith("another table of rotations than Wan's")
    with pytest.raises(UserError, match="WanTransformer3DModel: rope: it has another table of rotations"):
        accelerate(model)


def test_compiled_code_looks_at_the_rotations_when_it_is_made():
    model, inputs = model_of(num_layers=1), inputs_of()
    accelerate(model)
    model.rope.freqs_cos = model.rope.freqs_cos.roll(1, 0)
    torch.compiler.reset()
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="eager")(*inputs, return_dict=False)[0]
        restore(model)
        assert torch.equal(got, model(*inputs, return_dict=False)[0])


def test_what_works_with_blocks_works_on(tmp_path):
    model, inputs = model_of(), inputs_of()
    model.eval()
    copied = copy.deepcopy(model)
    for m in (model, copied):
        m.enable_cache(FirstBlockCacheConfig(threshold=0.1)) if m is copied else accelerate(m)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    found = []
    for m in (model, copied):
        with torch.no_grad(), m.cache_context("cond"):
            found.append(m(*inputs, return_dict=False)[0])
    assert relative(*found) < 1e-5
    model.save_pretrained(tmp_path)
    saved = WanTransformer3DModel.from_pretrained(tmp_path)
    assert_close(outcome(saved, inputs), outcome(model_of(), inputs))
    with pytest.raises(UserError, match="2 of 2 blocks had their forward replaced since; undo"):
        restore(model)


def test_a_pipeline_runs_a_patched_transformer():
    """With guidance, so that both prompts are of one call each."""
    import encoder_cases as cases
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipeline = WanPipeline(
        tokenizer=cases.tokenizer(), text_encoder=cases.text_encoder().eval(), vae=cases.vae(),
        transformer=model_of().eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def latents():
        return pipeline(
            "a cat", "blurry", height=32, width=48, num_frames=5, num_inference_steps=2, guidance_scale=3.0,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    want = latents()
    report = accelerate(pipeline.transformer)
    assert relative(latents(), want) < 1e-5
    assert (report.calls, report.fallbacks.total()) == (8, 0)


@pytest.mark.parametrize("how", ["peft", "checkpointing", "autocast"])
def test_no_graph_break_with(how):
    """What a training has besides."""
    inputs, found = inputs_of(), []
    for patched in (False, True):
        model = model_of(num_layers=1)
        if patched:
            accelerate(model)
        if how == "peft":
            lora(model.requires_grad_(False))
        elif how == "checkpointing":
            model.enable_gradient_checkpointing()
            model.train()
        torch.compiler.reset()
        run = torch.compile(model, fullgraph=True, backend="eager") if patched else None
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            found.append(outcome(model, inputs, run))
    assert_close(found[1], found[0], 0.03 if how == "autocast" else 1e-5)


# Adapters


def lora(model, name="one", **more):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **more), name)
    generator = torch.Generator().manual_seed(len(name))
    for k, p in model.named_parameters():
        if f"lora_A.{name}" in k or f"lora_B.{name}" in k:
            p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return model


@IMAGE
def test_adapters_are_read_in_every_call(image):
    """Added after the patch, two at once, one alone, none, merged."""
    inputs = inputs_of(image)
    changed, plain = model_of(image), model_of(image)
    report, calls = accelerate(changed), 0
    for change in (
        lambda m: m.requires_grad_(False),
        lora,
        lambda m: lora(m, "second"),
        lambda m: m.set_adapters(["one", "second"], [1.0, 0.5]),
        lambda m: m.disable_adapters(),
        lambda m: (m.enable_adapters(), m.set_adapter("second")),
        lambda m: m.fuse_lora(),
    ):
        for m in (changed, plain):
            change(m)
        if not any(p.requires_grad for p in plain.parameters()):
            plain.proj_out.requires_grad_(True)
            changed.proj_out.requires_grad_(True)
        assert_close(outcome(changed, inputs), outcome(plain, inputs))
        calls += 2
        assert report.calls == calls and not report.fallbacks
    assert any("lora_A.second" in k for k in changed.state_dict())


def test_adapters_before_the_patch_and_what_of_them_is_not_known():
    model, inputs = lora(model_of()), inputs_of()
    model.proj_out.requires_grad_(False)
    want = outcome(model, inputs)
    assert all("lora" in k for k in want[1].keys() - {"x"})
    accelerate(model)
    assert_close(outcome(model, inputs), want)
    for more, words in (
        (dict(use_dora=True), r"blocks.0: attn1.to_q: adapter 'one' is another kind of LoRA \(DoRA\)"),
        (dict(lora_dropout=0.1), r"attn1.to_q: adapter 'one' has dropout \(lora_dropout\)"),
        (dict(lora_bias=True), "attn1.to_q: adapter 'one': it has a bias"),
    ):
        with pytest.raises(UserError, match=words):
            accelerate(lora(model_of(), **more))
        model = model_of()
        report = accelerate(model)
        lora(model, **more).eval()
        got = model(*inputs, return_dict=False)[0]
        restore(model)
        assert torch.equal(got, model(*inputs, return_dict=False)[0])
        assert report.calls == 0 and report.fallbacks.total() == 2


# What is refused


def fused(model):
    model.fuse_qkv_projections()


def layerwise(model):
    model.bfloat16().enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)


def offloaded(model):
    pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu"))


def group_offloaded(model):
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def cached(model):
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def processor(model):
    class Other(type(model.blocks[0].attn1.processor)):
        pass

    model.blocks[1].attn2.processor = Other()


def backend(model):
    for block in model.blocks:
        block.attn1.processor._attention_backend = "sage"


def parallel(model):
    for block in model.blocks:
        block.attn1.processor._parallel_config = object()


WORDS = {
    fused: "blocks.0: attn1: its projections are fused",
    layerwise: r"blocks.0: (attn1.to_q: it|norm2|attn1: its forward was replaced)",
    offloaded: "blocks.0: (attn1|its forward).*replaced .offloading",
    group_offloaded: "blocks.0: .*forward was replaced .offloading",
    cached: "blocks.0: its forward was replaced .offloading, caching.; call accelerate before",
    processor: "blocks.1: attn2: its processor is a Other",
    backend: "blocks.0: attn1: its attention is sage, which quantises or leaves out keys",
    parallel: "blocks.0: attn1: it runs context-parallel",
}


@pytest.mark.parametrize("change", WORDS, ids=lambda change: change.__name__)
def test_what_ours_does_not_compute_is_refused_by_name(change):
    model = model_of()
    change(model)
    with pytest.raises(UserError, match=WORDS[change]):
        accelerate(model)


def test_a_backend_of_16_bits_is_no_obstacle():
    """The probe in float32 asks the plain one; afterwards it is there as before."""
    model = model_of()
    flash = AttentionBackendName.FLASH
    for block in model.blocks:
        block.attn1.processor._attention_backend = block.attn2.processor._attention_backend = flash
    accelerate(model)
    assert all(block.attn1.processor._attention_backend is flash for block in model.blocks)


def test_another_model_of_such_blocks_is_refused():
    vace = WanVACETransformer3DModel(**FIELDS, vace_layers=[0], vace_in_channels=16)
    with pytest.raises(UserError, match="WanVACETransformer3DModel: it has vace_blocks, vace_patch"):
        accelerate(vace)
    with pytest.raises(UserError, match="blocks.0: norm2: it is no norm over 48 channels with a weight"):
        accelerate(model_of(cross_attn_norm=False))
    old = model_of()
    del old.rope.freqs_cos
    with pytest.raises(UserError, match="WanTransformer3DModel: rope: it has no freqs_cos and freqs_sin"):
        accelerate(old)


# FSDP2


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ["patch", "shard"])
def test_sharded_blocks(one_process, first):
    model, inputs = model_of(True), inputs_of(True)
    want = outcome(model, inputs)
    report = accelerate(model) if first == "patch" else None
    for m in (*model.blocks, model):
        dist.fsdp.fully_shard(m, mesh=one_process)
    accelerate(model) if first == "shard" else None
    assert_close(outcome(model, inputs), want)
    report = report or report_of(model)
    assert report.calls == 2 and not report.fallbacks
    with pytest.raises(UserError, match="fp8: got sharded weights, want whole ones"), fp8(model):
        pass


def test_units_inside_of_blocks(one_process):
    """Refused; made after the patch, the original code runs."""
    for first in ("patch", "shard"):
        model, inputs = model_of(), inputs_of()
        want = outcome(model, inputs)
        report = accelerate(model) if first == "patch" else None
        for block in model.blocks:
            dist.fsdp.fully_shard(block.attn1, mesh=one_process)
            dist.fsdp.fully_shard(block, mesh=one_process)
        if first == "shard":
            with pytest.raises(UserError, match="blocks.0: attn1: it is an FSDP unit inside of a block"):
                accelerate(model)
            continue
        assert_close(outcome(model, inputs), want, 1e-6)
        assert report.calls == 0 and report.fallbacks.total() == 2
