"""LoRA: updates of linear layers in training, and the files of PEFT."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import tiny_config, under
from safetensors.torch import load_file, save_file

from prfl_engine import flow
from prfl_engine.batch import Batch
from prfl_engine.config import ChainConfig, LoraConfig
from prfl_engine.errors import UserError
from prfl_engine.model import lora
from prfl_engine.model.checkpoint import load_transformer, new_reward, save_transformer
from prfl_engine.model.wan import WanTransformer
from prfl_engine.objectives import graded_windows, sft_loss
from prfl_engine.rollout.fp8 import weight_of

CONFIG = LoraConfig(rank=3, alpha=6.0)
SIZE = (1, 16, 2, 6, 4)


def model(config=None, lora_config=CONFIG, trained=True):
    """A tiny model with updates that are not zero, head included."""
    torch.manual_seed(0)
    made = WanTransformer(config or tiny_config()).init_weights()
    torch.nn.init.normal_(made.head.head.weight, std=0.1)
    if lora_config is not None:
        lora.attach(made, lora_config)
        for name, p in lora.parameters(made).items():
            if trained and name.endswith("lora_B"):
                torch.nn.init.normal_(p, std=0.2)
    return made


def inputs(config):
    torch.manual_seed(1)
    image = (torch.randn(1, 257, 1280), torch.randn(1, 20, *SIZE[2:])) if config.image else ()
    return Batch(torch.randn(SIZE), torch.randn(1, 5, config.text_dim), *image)


def velocity(m, batch, t=500.0):
    context = m.embed_context(batch.text, batch.clip)
    return m(batch.latent, torch.tensor([t]), context, batch.condition)


@pytest.fixture(params=["t2v", "i2v"])
def config(request):
    return tiny_config() if request.param == "t2v" else tiny_config("i2v")


def test_an_update_begins_as_nothing(config):
    batch = inputs(config)
    plain, updated = model(config, None), model(config, trained=False)
    assert torch.equal(velocity(plain, batch), velocity(updated, batch))


def test_updates_are_those_of_merged_weights(config, tmp_path):
    batch, trained = inputs(config), model(config)
    lora.save(trained, tmp_path)
    merged = lora.merge(model(config, None), tmp_path)
    before = velocity(model(config, None), batch)
    want, got = velocity(merged, batch), velocity(trained, batch)
    assert (got - before).norm() > 0.05 * before.norm()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for name, m in lora.linears(trained, CONFIG.targets[:4]).items():
        torch.testing.assert_close(weight_of(m), merged.get_submodule(name).weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute, chunk", [("none", None), ("full", None), ("attention", 5)])
def test_gradients_are_the_chain_rule_s_on_merged_weights(config, recompute, chunk):
    """dA = s B^T dW and dB = s dW A^T of the gradient dW of a merged weight, in float64."""
    batch = Batch(*(None if a is None else a.double() for a in inputs(config)))
    trained = model(config).double()
    merged = model(config, None).double().requires_grad_()
    layers = {n: m for n, m in trained.named_modules() if getattr(m, "low", None) is not None}
    with torch.no_grad():
        for name, m in layers.items():
            merged.get_submodule(name).weight.addmm_(m.lora_B, m.lora_A, alpha=m.lora_scale)
    trained.set_chunk(chunk)
    for m, run in ((trained, under(recompute)), (merged, under())):
        noise, sigma = torch.ones(SIZE).double(), torch.tensor([0.4]).double()
        sft_loss(m, batch, noise, sigma, run).sum().backward()
    for name, m in layers.items():
        dw = merged.get_submodule(name).weight.grad
        torch.testing.assert_close(m.lora_A.grad, m.lora_scale * m.lora_B.T @ dw, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(m.lora_B.grad, m.lora_scale * dw @ m.lora_A.T, rtol=1e-9, atol=1e-12)
    assert {n for n, p in trained.named_parameters() if p.grad is not None} == set(lora.parameters(trained))


def test_a_graded_step_trains_updates_alone(config):
    batch, trained = inputs(config), model(config)
    reward = new_reward(model(config, None), 2, num_heads=2, feature_layer=2).freeze()
    schedule = flow.make_schedule("unipc", 4, 5.0)
    given = trained, reward, schedule, batch, torch.randn(SIZE), torch.tensor([[1], [2]]), ChainConfig(2)
    for window in graded_windows(*given):
        window.backward(window.logit.sum())
    grads = {k: p.grad for k, p in trained.named_parameters()}
    held = lora.parameters(trained)
    assert all(grads[k] is not None and grads[k].any() for k in held)
    assert all(g is None for k, g in grads.items() if k not in held)


def test_the_base_is_saved_and_loaded_without_updates(tmp_path):
    plain = model(lora_config=None)
    save_transformer(plain, tmp_path / "base")
    read = lora.attach(load_transformer(tmp_path / "base"), CONFIG)
    assert set(plain.state_dict()) == {k for k in read.state_dict() if "lora_" not in k}


def test_adapters_round_trip_and_have_the_keys_of_peft(config, tmp_path):
    trained = model(config)
    lora.save(trained, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert keys["base_model.model.blocks.0.self_attn.q.lora_A.weight"].shape == (3, config.dim)
    assert keys["base_model.model.blocks.1.ffn.2.lora_B.weight"].shape == (config.dim, 3)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (values["peft_type"], values["r"], values["lora_alpha"]) == ("LORA", 3, 6.0)
    fresh = lora.load(model(config, trained=False), tmp_path)
    for (name, a), b in zip(lora.parameters(fresh).items(), lora.parameters(trained).values(), strict=True):
        assert torch.equal(a, b), name
    other = lora.apply(model(config, None), tmp_path)
    assert torch.equal(velocity(other, inputs(config)), velocity(trained, inputs(config)))


def edited(change):
    def run(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        values = json.loads((folder / "adapter_config.json").read_text())
        change(tensors, values)
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(values))

    return run


PATTERNS = {"rank_pattern": {"ffn.0": 5, "blocks.1.*attn.q": 2}, "alpha_pattern": {"^blocks.0.*": 4.5}}


def mixed(folder, config, root=False):
    """An adapter as PEFT writes one whose layers differ in rank and alpha; {module: (rank, scale)}."""
    plain, tensors, want = model(config, None), {}, {}
    for i, (name, m) in enumerate(lora.linears(plain, CONFIG.targets[:4] + CONFIG.targets[6:]).items()):
        rank = 5 if name.endswith("ffn.0") else 2 if "blocks.1" in name and name.endswith("attn.q") else 3
        alpha = 4.5 if name.startswith("blocks.0.") else 6.0
        want[name] = rank, alpha / (rank**0.5 if root else rank)
        g = torch.Generator().manual_seed(i)
        for part, shape in (("A", (rank, m.in_features)), ("B", (m.out_features, rank))):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = 0.2 * torch.randn(shape, generator=g)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"r": 3, "lora_alpha": 6.0, "use_rslora": root, "init_lora_weights": "gaussian", **PATTERNS}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return want


@pytest.mark.parametrize("root", [False, True])
def test_layers_may_have_ranks_and_alphas_of_their_own(config, tmp_path, root):
    want, batch = mixed(tmp_path, config, root), inputs(config)
    updates, own = lora.read(tmp_path)
    assert {k: len(low.down) for k, low in updates.items()} == {k: rank for k, (rank, _) in want.items()}
    assert {k: low.scale for k, low in updates.items()} == pytest.approx({k: s for k, (_, s) in want.items()})
    assert own == {k for k, (rank, _) in want.items() if rank != 3 or k.startswith("blocks.0.")}
    merged, applied = (f(model(config, None), tmp_path) for f in (lora.merge, lora.apply))
    torch.testing.assert_close(velocity(applied, batch), velocity(merged, batch), rtol=1e-4, atol=1e-5)
    again = tmp_path / "again"
    lora.save(applied, again)
    before = velocity(applied, batch)
    assert torch.equal(velocity(lora.apply(model(config, None), again), batch), before)


def test_training_goes_on_from_layers_of_their_own_ranks(config, tmp_path):
    want, targets = mixed(tmp_path, config), ("q", "k", "v", "o", "ffn.0", "ffn.2")
    trained = model(config, replace(CONFIG, targets=targets), trained=False)
    attached = lora.linears(trained, targets)
    if config.image:
        assert "blocks.0.cross_attn.k" in attached and not any("img" in k for k in attached)
    lora.load(trained, tmp_path)
    sft_loss(trained, inputs(config), torch.ones(SIZE), torch.tensor([0.4])).sum().backward()
    for name, m in attached.items():
        rank, scale = want[name]
        assert m.lora_A.grad.any() and m.lora_B.grad.any() and m.lora_scale == pytest.approx(scale)
        assert m.lora_A.grad.shape == (rank, m.in_features) and m.lora_B.grad.shape == (m.out_features, rank)
    other = model(config, replace(CONFIG, targets=targets, rank=4, alpha=8.0))
    with pytest.raises(UserError, match=r"has A \(3, \d+\) and B .* want \(4,"):
        lora.load(other, tmp_path)  # layers that no pattern names are of lora.rank


def test_patterns_that_make_all_layers_alike_are_no_exception(tmp_path):
    """Such an adapter is saved with one rank, which lora.rank has to be when a run is resumed."""
    lora.save(model(), tmp_path)
    patterns = {"rank_pattern": {".*": 3}, "alpha_pattern": {".*": 6}}
    edited(lambda t, v: v.update(r=8, lora_alpha=1, **patterns))(tmp_path)
    updates, own = lora.read(tmp_path)
    assert {low.scale for low in updates.values()} == {2.0} and not own
    with pytest.raises(UserError, match=r"has A \(3, \d+\) and B .* want \(8,"):
        lora.load(model(lora_config=replace(CONFIG, rank=8)), tmp_path)


@pytest.mark.parametrize("prefix", ["base_model.model.", "diffusion_model.", ""])
def test_the_bare_file_of_the_official_script_is_read(tmp_path, prefix):
    trained = model(lora_config=replace(CONFIG, alpha=None))
    lora.save(trained, tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    file = tmp_path / "bare" / "pytorch_lora_transformers_weights.safetensors"
    file.parent.mkdir()
    save_file({k.replace("base_model.model.", prefix): a for k, a in held.items()}, file)
    for place in (file, file.parent):
        fresh = lora.load(model(lora_config=replace(CONFIG, alpha=None), trained=False), place)
        assert torch.equal(velocity(fresh, inputs(fresh.config)), velocity(trained, inputs(fresh.config)))


KEY = "base_model.model.blocks.0.self_attn.q.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, v: t.pop(KEY), "blocks.0.self_attn.q has .*lora_B.*, want lora_A"),
        (lambda t, v: t.update({KEY: torch.ones(3, 7)}), r"has A \(3, 7\) and B"),
        (lambda t, v: t.update({KEY: torch.ones(2, 32)}), "want lora_A"),
        (lambda t, v: t.update({"blocks.0.norm": torch.ones(2)}), r"blocks.0.norm \[2\], want MODULE"),
        (lambda t, v: [t.pop(k) for k in list(t) if "blocks.1.ffn.2" in k], "blocks.1.ffn.2 has no update"),
        (lambda t, v: v.update(lora_alpha=3), "alpha / r is 1, want 2"),
        (lambda t, v: v.update(use_dora=True), "use_dora: got True, want False"),
        (lambda t, v: v.pop("lora_alpha"), "lora_alpha: got None, want a positive number"),
        (lambda t, v: [t.pop(k) for k in list(t)], "got no updates, want one"),
        (lambda t, v: v.update(r=4), r"blocks\.\S+ has rank 3, want 4"),
        (lambda t, v: v.update(rank_pattern={"q": 2}), r"attn.q has rank 3, want 2"),
        (lambda t, v: v.update(alpha_pattern={"q(": 2}), r"alpha_pattern: got 'q\(', want a name"),
        (lambda t, v: v.update(alpha_pattern={"q": "two"}), "alpha_pattern 'q': got 'two', want a positive"),
        (lambda t, v: v.update(init_lora_weights="pissa"), "init_lora_weights: got 'pissa', want True"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(tmp_path, change, message):
    trained = model()
    lora.save(trained, tmp_path)
    edited(change)(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        lora.load(trained, tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_files_that_are_not_adapters_are_refused(tmp_path):
    with pytest.raises(UserError, match="no adapter there"):
        lora.read(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a safetensors file"):
        lora.read(tmp_path)
    with pytest.raises(UserError, match="lora.targets: got 'nowhere'"):
        lora.attach(model(lora_config=None), replace(CONFIG, targets=("q", "nowhere")))


def test_merging_an_adapter_for_another_model_is_refused(tmp_path):
    lora.save(model(), tmp_path)
    with pytest.raises(UserError, match=r"updates \[.*\], want \["):
        lora.merge(model(tiny_config(dim=64), None), tmp_path)


def test_folders_are_merged_in_float32(tmp_path):
    trained = model()
    plain = model(lora_config=None).to(torch.bfloat16)
    save_transformer(plain, tmp_path / "base")
    lora.save(trained, tmp_path / "adapter")
    lora.merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_transformer(tmp_path / "out")
    want = lora.merge(plain.float(), tmp_path / "adapter")
    for k, a in want.state_dict().items():
        assert a.dtype == torch.float32 and torch.equal(merged.state_dict()[k], a)
    with pytest.raises(UserError, match="--out: .* exists"):
        lora.merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
