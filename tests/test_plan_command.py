"""`prfl plan`: hand counts of 14B, what it prints, and one line for a mistake."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import one_line, tiny_config, tiny_model, write_run

from prfl_engine import cli
from prfl_engine.config import ChainConfig, OptimConfig, RolloutConfig, load_config
from prfl_engine.errors import UserError
from prfl_engine.memory.policy import named
from prfl_engine.model.flops import forward_work
from prfl_engine.model.wan import PRESETS
from prfl_engine.objectives import index_range, stratified_indices
from prfl_engine.planner import plan
from prfl_engine.planner.command import Options, predict
from prfl_engine.planner.flops import graded_passes, rollout_forwards, step_flops
from prfl_engine.planner.machine import MACHINES
from prfl_engine.planner.picture import moments
from prfl_engine.planner.plan import make_kind
from prfl_engine.planner.seconds import Rates
from prfl_engine.planner.setup import RewardSetup, Setup
from prfl_engine.planner.standing import fp8_bytes, gradient_bytes, models_of, state_bytes, update_bytes
from prfl_engine.planner.subject import find
from prfl_engine.rollout.fp8 import Fp8Blocks

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LORA, EIGHT = CONFIGS / "prfl_t2v_14b_480p_lora.yaml", CONFIGS / "prfl_t2v_14b_480p_8gpu.yaml"
BIG = Setup(PRESETS["t2v-14b"], (1, 16, 21, 90, 160), weight_dtype=torch.bfloat16)
ONE = ("eval.batch_size=1",)
L, C, F, H = 75_600, 5120, 13_824, 40


@pytest.mark.parametrize(
    "mode, per_token",
    [
        ("full", 4 * C),
        ("attention", 6 * C + 4 * H),
        # Three residual streams, what cross-attention reads; q, k, v twice but for v, outputs of the norm and
        # of attention; queries twice and output of cross-attention; what the FFN reads, its hidden layer.
        ("none", 12 * C + 2 * C + (6 + 4 + 2 + 2) * C + (4 + 2) * C + 2 * C + 2 * F + 8 * H),
    ],
)
def test_what_a_block_of_14b_saves_is_the_hand_count(mode, per_token):
    kind = make_kind(mode, named(mode), replace(BIG, reward=None), Rates())
    assert kind.numbers["flow matching"].saved == pytest.approx(L * per_token, rel=1e-3)


def test_an_update_of_shards_decodes_what_is_in_8_bits_alone():
    """Rows of 96 values of a sharded weight are in no groups of 256, so that their moments are float32."""
    narrow = tiny_config("t2v", dim=96, num_heads=2, ffn_dim=192, text_dim=32)
    wide = tiny_config("t2v", dim=256, num_heads=4, ffn_dim=512, text_dim=256)
    few, whole = (models_of(Setup(config, BIG.latent), 2) for config in (narrow, wide))
    eight = OptimConfig(name="adamw8bit")

    def temporaries(models, sharded):
        return update_bytes(models, eight, sharded).temporaries

    assert temporaries(few, True) < temporaries(few, False) / 10
    assert temporaries(whole, True) == temporaries(whole, False) > 8 * 256 * 256


def test_what_stands_of_14b_is_the_hand_count():
    values = 40 * (2 * 4 * C * C + 2 * C * F + 8 * C + F + C + 4 * C + 2 * C + 6 * C)  # blocks
    values += 64 * C + C + 4096 * C + C + C * C + C + 256 * C + C + C * C + C + 6 * C * C + 6 * C
    values += 64 * C + 64 + 2 * C  # embeddings above, the head
    models = models_of(BIG)
    assert sum(p.count * torch.Size(p.shape).numel() for p in models.generator) == values
    wants = {
        OptimConfig(): (2 * values, 10 * values, 0),
        OptimConfig(rounding="stochastic"): (2 * values, 8 * values, 0),
        OptimConfig(grad_dtype="float32"): (4 * values, 10 * values, 0),
        OptimConfig(name="adamw8bit", rounding="stochastic"): (2 * values, 2.03 * values, 0),
        OptimConfig(in_backward=True, clip=None, rounding="stochastic"): (0, 8 * values, 0),
        OptimConfig(offload="states", rounding="stochastic"): (2 * values, 0, 8 * values),
        OptimConfig(offload="all", rounding="stochastic"): (0, 0, 10 * values),
    }
    for optim, (gradients, device, host) in wants.items():
        states = state_bytes(models, optim)
        assert gradient_bytes(models, optim) == pytest.approx(gradients, rel=1e-3, abs=1e6)
        assert states.device == pytest.approx(device, rel=2e-3, abs=1e6)
        assert states.host + states.host_gradients == pytest.approx(host, rel=0.02)
    moving = update_bytes(models, OptimConfig(offload="all", rounding="stochastic"))
    assert moving.slots == 2 * 4 * 2**20 * (4 + 4 + 2)


def test_the_e4m3_copy_is_that_of_a_rollout():
    config = tiny_config(dim=128, ffn_dim=256, num_heads=2)
    setup = Setup(config, (1, 16, 1, 4, 4), torch.float32, reward=None)
    copied = Fp8Blocks(tiny_model(config))
    copied.follow()
    assert fp8_bytes(models_of(setup)) == pytest.approx(copied.nbytes(), rel=0.03)


def test_flops_are_the_hand_count():
    """6.52 PFLOP a forward of 14B at 75,600 tokens, 28 forwards and more of a step."""
    block = 2 * L * (6 * C * C + 2 * C * F) + 4 * L * C * (L + 512) + 2 * 2 * 512 * C * C
    assert forward_work(BIG.config, 40, L).forward == pytest.approx(40 * block, rel=1e-3)
    step = step_flops(BIG)
    assert step["flow matching"] == step["graded step"] == pytest.approx(3 * 40 * block, rel=1e-3)
    assert step["rollout"] == pytest.approx(19 * 40 * block, rel=1e-3)
    assert step_flops(BIG, forwards=2)["rollout"] == pytest.approx(2 * 40 * block, rel=1e-3)
    assert step["reward"] < 8 * 3 * block < 1.2 * step["reward"]
    assert list(step_flops(replace(BIG, graded=False))) == ["flow matching"]


@pytest.mark.parametrize(
    "rollout, window", [(RolloutConfig(steps=9, samples=3), 2), (RolloutConfig(steps=7), 1)]
)
def test_forwards_of_a_rollout_are_the_mean_over_draws(rollout, window):
    """Against every draw of a fine grid, by the indices that training draws."""
    setup = replace(BIG, rollout=rollout, chain=ChainConfig(window=window))
    n = 400
    uniform = ((torch.arange(n) + 0.5) / n).expand(rollout.samples, n).double()
    drawn = stratified_indices(*index_range(rollout), uniform)
    forwards = (drawn[-1] + 1.0).mean().item() - rollout.samples
    assert rollout_forwards(setup) == pytest.approx(forwards, abs=0.02)
    passes = (drawn + 1).clamp(max=window).sum(0).double().mean().item()
    assert graded_passes(setup) == pytest.approx(passes, abs=0.02)


def test_a_plan_needs_no_data_and_no_weights_and_fits_a_terminal(capsys):
    assert cli.main(["plan", str(LORA), "--gpu", "h200", "--price", "3", "eval.batch_size=1"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 100 for line in out.splitlines())
    for text in ("14b", "32,760 tokens", "worst index 38", "optimizer", "fits", "LoRA", "an hour", "price"):
        assert text in out, text


@pytest.fixture(scope="module")
def eight():
    return predict(str(EIGHT), ONE, Options(gpus=8))


def test_the_text_and_the_json_are_one_prediction(eight, capsys):
    found = eight
    assert cli.main(["plan", str(EIGHT), *ONE, "--gpus", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(json.dumps(found.values()))
    assert {"counted", "predicted", "estimated"} == {e["how"] for p in told["phases"] for e in p["entries"]}
    for phase in told["phases"]:
        assert phase["bytes"] == sum(e["bytes"] for e in phase["entries"])
        assert all(e["bytes"] > 0 for e in phase["entries"])
    assert told["fits"] and all(len(line) <= 100 for line in found.text().splitlines())
    assert told["graded"] == 8 and told["per_sample"] == pytest.approx(told["step"] / 8)


def test_less_room_and_slower_links(eight):
    assert eight.fits and eight.memory.peak.bytes < eight.limit == MACHINES["h100-80"].memory
    tight = predict(str(EIGHT), (*ONE, "parallel.replicate=1"), Options(gpus=8, nodes=4, budget=30))
    assert not tight.fits and "DOES NOT FIT" in tight.text()
    assert tight.memory == eight.memory
    assert tight.times.seconds > eight.times.seconds  # gathers between nodes


def test_groups_wait_for_the_longest_rollout(tmp_path):
    """Unless all have the same graded step, or resident weights and pairs of samples with the same work."""
    path = str(write_run(tmp_path, train={"accumulate": 4}, eval={"every": 0}, rollout={"steps": 9}))

    def seconds(*overrides: str) -> float:
        found = predict(path, overrides, Options(gpus=4))
        return next(row.seconds for row in found.times.rows if row.phase == "rollout")

    setup = replace(BIG, rollout=RolloutConfig(steps=9))
    ratio = rollout_forwards(setup, 4, padded=True) / rollout_forwards(setup)
    assert ratio > 1.5 and seconds() == pytest.approx(ratio * seconds("rollout.one_index=4"))
    assert seconds("rollout.one_index=4") < seconds("rollout.one_index=2") < seconds()
    two = "data.batch_size=2", "parallel.resident=true"
    assert seconds(*two) == pytest.approx(seconds(*two, "rollout.one_index=4"))


def test_auto_plans_as_training_does(monkeypatch):
    """The same policies as `fit_memory`, by fewer kinds."""
    monkeypatch.setattr(plan, "KINDS", {k: plan.KINDS[k] for k in ("attention", "offload attention, input")})
    found = predict(str(LORA), ("model.recompute=auto:20", *ONE))
    made = plan.plan(found.subject.setup, 20e9)
    assert found.memory.plan.policies == made.policies and made.bytes <= 20e9
    names = {kind.name for kind in found.memory.kinds}
    assert "offload attention, input" in names and "40 x attention" not in found.text()


def test_a_plan_of_several_gpus_counts_what_they_gather(monkeypatch):
    """Within the budget are the activations of a part of the tokens, and whole blocks."""
    monkeypatch.setattr(plan, "KINDS", {k: plan.KINDS[k] for k in ("attention", "full")})
    found = predict(str(EIGHT), ("model.recompute=auto:11", *ONE), Options(gpus=8))
    names = {kind.name for kind in found.memory.kinds}
    assert names == {"attention", "full"}
    for phase in found.memory.phases:
        stands = ["weights", "reward", "gradients", "optimizer", "allocator", "CUDA", "NCCL", "attention"]
        passing = sum(e.bytes for e in phase.entries if not e.category.startswith((*stands,)))
        assert phase.name in ("load", "optimizer") or passing <= 11e9
    graded = next(p for p in found.memory.phases if p.name == "graded step")
    whole = next(e.bytes for e in graded.entries if e.category == "gathered blocks")
    assert whole > 0 and found.memory.plan.pool == 0
    want = r"model.recompute: got auto:13, want at least auto:31.*parallel.resident=false"
    with pytest.raises(UserError, match=want):
        predict(str(EIGHT), ("model.recompute=auto:13", "parallel.resident=true", *ONE), Options(gpus=8))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpu", "h10"], "--gpu: got 'h10', want one of h100-80, h200"),
        (["--gpus", "0"], "--gpus: got 0, want a number from 1 on"),
        (["--gpus", "6", "--nodes", "4"], "--nodes: got 4, want a divisor of --gpus = 6"),
        (
            ["--gpu", "a100-80", "rollout.precision=fp8"],
            "rollout.precision: got 'fp8', want same: a100-80 has no fp8",
        ),
        (["--budget", "-1"], "--budget: got -1.0, want more than 0 GB"),
        (["--latent", "21x61x104"], "--latent: got '21x61x104', want 480p, 720p, or TxHxW"),
        (["--model", "t2v-15b"], "--model: got 't2v-15b', want one of t2v-1.3b"),
        (["model.path=weights/none"], "model.path: got 'weights/none', want a folder or file that is here"),
        (["parallel.sequence=8"], "parallel.sequence: got 8, want 1 with one GPU"),
        (["--gpus", "8", "parallel.sequence=3"], "parallel.sequence: got 3, want a divisor of the 8"),
        (["--gpus", "3"], "train.accumulate: got 1, want a multiple of 3"),
        (["rollout.guidance=5"], "data.negative_text: got null, want a .npy (rollout.guidance is not 1)"),
        (["eval.guidance=5"], "data.negative_text: got null, want a .npy (eval.guidance is not 1)"),
        (
            ["--model", "ti2v-5b", "--latent", "1x4x4", "data.first_frame=true"],
            "a latent: got [48, 1, 4, 4], want 2 frames or more (data.first_frame keeps the first)",
        ),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert cli.main(["plan", str(LORA), *arguments]) == 2
    assert message in one_line(capsys)


def test_the_picture_has_the_peaks_of_the_phases(tmp_path):
    path = write_run(tmp_path, eval={"every": 0})
    found = predict(str(path), ("model.recompute=attention",))
    most: dict[str, int] = {}
    for moment in moments(found):
        name = moment.phase.split(", forward")[0].split(", backward")[0]
        most[name] = max(most.get(name, 0), sum(moment.bytes.values()))
    phases = {phase.name: phase.bytes for phase in found.memory.phases}
    assert {"flow matching", "graded step", "reward", "optimizer"} < set(most)
    for name in ("graded step", "reward", "optimizer"):
        assert most[name] == phases[name], name


def test_what_is_here_is_read(tmp_path, capsys):
    """The sizes of folders and data, where they exist."""
    path = write_run(tmp_path, reward={"path": str(tmp_path / "reward")})
    config = load_config(path)
    subject = find(config, str(path))
    assert not subject.assumed
    assert subject.setup.config.dim == 32 and isinstance(subject.setup.reward, RewardSetup)
    assert cli.main(["plan", str(path)]) == 0
    assert "assumed: model.path" not in capsys.readouterr().out
