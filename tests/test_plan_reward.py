"""`prfl plan --train-reward`: its bytes against real runs, hand counts of 14B, and what it refuses."""

from pathlib import Path

import pytest
import yaml
from helpers import one_line, tiny_config, tiny_model, write_data
from plan_runs import Measured

from prfl_engine import cli, train_reward
from prfl_engine.config import load_config
from prfl_engine.model.checkpoint import save_transformer
from prfl_engine.optim import updates
from prfl_engine.planner.command import Options, predict
from prfl_engine.planner.dry_run import REWARD_TRAINING
from prfl_engine.planner.predict import memory
from prfl_engine.planner.subject import find
from prfl_kernels import extension

CONFIG = Path(__file__).resolve().parents[1] / "configs/reward_t2v_14b_480p.yaml"
built = pytest.mark.skipif(extension.absence("cpu", "cpu") is not None, reason="the kernels are not built")

RUNS = [
    dict(model={"recompute": "attention"}, reward={"blocks": 2}),
    dict(model={"recompute": "none", "weights_dtype": "bfloat16"}, reward={"blocks": 3, "loss": "bt"}),
    dict(model={"recompute": "full"}, reward={"blocks": 2, "loss": "bt", "train_embeddings": True},
         train={"ema": 0.9}),
    dict(model={"recompute": "attention"}, reward={"blocks": 3, "loss": "bt", "pairs_at_once": True},
         data={"batch_size": 2}),
    dict(model={"recompute": {"keep": [], "offload": ["attention", "input"]}, "chunk": 24},
         reward={"blocks": 4, "loss": "bt"}, lora={"rank": 4}),
    dict(reward={"blocks": 1, "dropout": 0.1}, optim={"offload": "states"}, data={"batch_size": 2}),
]  # fmt: skip


def written(folder: Path, **sections) -> Path:
    """A generator, samples with labels and a configuration of reward training."""
    config = tiny_config("t2v", dim=128, ffn_dim=384, num_heads=4, num_layers=4, text_len=70, text_dim=32)
    save_transformer(tiny_model(config), folder / "policy")

    def data(name: str) -> list[str]:
        grades = [dict.fromkeys(("physics_quality", "human_quality"), i % 2) for i in range(4)]
        where = write_data(folder / name, config, 4, [(16, 3, 16, 16)], text=70, labels=grades.__getitem__)
        return [str(where)]

    values = {
        "model": {"path": str(folder / "policy"), "compute_dtype": "float32"},
        "data": {"train": data("a"), "lose": data("b"), "val": data("c"), "val_lose": data("d"),
                 "num_workers": 0},
        "optim": {"lr": 1e-4, "lr_head": 1e-4, "clip": None},
        "train": {"out": str(folder / "run"), "device": "cpu", "tensorboard": False, "steps": 3,
                  "accumulate": 2},
        "eval": {"every": 2, "batch_size": 2, "timesteps": [201, 1000]},
    }  # fmt: skip
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def measured(path: Path, monkeypatch) -> Measured:
    """Train the reward model of a configuration and count all that is alive."""
    found = Measured()
    live, fit, update, make = found.live, train_reward.fit, updates.update, train_reward.make_reward

    def made(*given, **named):
        model = make(*given, **named)
        live.add(model.parameters())
        return model

    def watched(c, begin, model, groups, batches, losses, validate, *rest, **named):
        def validated(step):
            live.lap()
            values = validate(step)
            found.validation = max(found.validation, live.lap())
            return values

        with live:
            fit(c, begin, model, groups, batches, losses, validated, *rest, **named)

    def updated(*given):
        found.training = max(found.training, live.lap())
        norm = update(*given)
        found.optimizer = max(found.optimizer, live.lap())
        return norm

    monkeypatch.setattr(train_reward, "make_reward", made)
    monkeypatch.setattr(train_reward, "fit", watched)
    monkeypatch.setattr(updates, "update", updated)
    train_reward.train_reward(load_config(path))
    found.host = live.host_peak
    return found


@built
@pytest.mark.parametrize("sections", RUNS)
def test_reward_training_has_the_bytes_predicted(sections, tmp_path, monkeypatch):
    """Everything that is alive on the device: at most 1 % above, never more than 0.5 % below."""
    path = written(tmp_path, **sections)
    config = load_config(path)
    found = memory(config, find(config, str(path), on_cpu=True, train_reward=True).setup, None)
    real = measured(path, monkeypatch)
    told = {phase.name: phase.bytes for phase in found.phases}
    pairs = {REWARD_TRAINING: real.training, "optimizer": real.optimizer, "validation": real.validation}
    for name, got in pairs.items():
        print(f"{name} {told[name]} {got} {told[name] / got - 1:+.4f}")
        assert told[name] >= 0.995 * got, name
    assert max(told[name] for name in pairs) <= 1.01 * max(pairs.values())
    assert found.host.bytes >= real.host


def test_the_official_reward_training_of_14b():
    """Weights, gradients and states by hand; the model FLOPs are three forwards of eight blocks."""
    found = predict(str(CONFIG), (), Options(train_reward=True))
    categories = {e.category: e.bytes for e in found.memory.peak.entries}
    block = 351_394_304
    assert categories["weights"] == pytest.approx(4 * 8 * block, rel=0.09)  # and embeddings
    assert categories["optimizer states"] == pytest.approx(8 * 8 * block, rel=0.05)  # and the head
    assert found.memory.peak.name == REWARD_TRAINING and found.fits and found.times.trained == 5
    seconds = {row.phase: row for row in found.times.rows}
    assert seconds[REWARD_TRAINING].flops == pytest.approx(5 * 3 * 8 * 4.2e13, rel=0.03)
    text = found.text()
    assert "5 samples a step" in text and all(len(line) <= 100 for line in text.splitlines())
    sharded = predict(str(CONFIG), ("train.accumulate=4", "parallel.sequence=2"), Options("h100-80", 8,
                      train_reward=True))  # fmt: skip
    assert sharded.exchanged.graded > 0 and sharded.memory.peak.bytes < found.memory.peak.bytes / 2


def test_a_validation_of_single_samples_asks_once(tmp_path):
    """With eval.pairs=false, also where pairs are trained on."""
    path = str(written(tmp_path, reward={"loss": "bt", "blocks": 1}))

    def made(*given: str) -> tuple[int, float]:
        found = predict(path, given, Options(train_reward=True))
        return (
            next(p.bytes for p in found.memory.phases if p.name == "validation"),
            next(row.seconds for row in found.times.rows if row.phase == "validation"),
        )

    (pair, long), (single, short) = made(), made("eval.pairs=false")
    assert long == pytest.approx(2 * short) and pair > single


def test_a_first_frame_is_counted():
    path = str(CONFIG.with_name("reward_ti2v_5b_720p.yaml"))
    sizes = [
        predict(path, (f"data.first_frame={on}",), Options(train_reward=True)).memory.peak.bytes
        for on in ("true", "false")
    ]
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "reward.path: got null, want the folder of a reward model, or --train-reward"),
        (["--train-reward", "model.recompute=auto:20"], "model.recompute: got 'auto:20', want a mode"),
        (["--train-reward", "data.paired=true"], "data.paired: got True, want false unless reward.loss is"),
        (["--train-reward", "reward.ce_weight=1"], "reward.ce_weight: got 1.0, want 0 unless reward.loss is"),
        (["--train-reward", "reward.path=weights/none"], "reward.path: got 'weights/none', want a folder"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert cli.main(["plan", str(CONFIG), *arguments]) == 2
    assert message in one_line(capsys)


def test_a_folder_without_a_configuration_is_refused(tmp_path, capsys):
    """A name is a guess for what is not here alone."""
    (tmp_path / "Wan2.1-T2V-14B").mkdir()
    given = f"model.path={tmp_path / 'Wan2.1-T2V-14B'}"
    assert cli.main(["plan", str(CONFIG), "--train-reward", given]) == 2
    assert "config.json" in one_line(capsys)
