"""What is wrong with the user's input is one line that names it, exit code 2, never a traceback."""

import json

import numpy as np
import pytest
import torch
import yaml
from helpers import one_line, tiny_config, tiny_model, tiny_reward, write_run
from training_runs import unchecked

from prfl_engine.cli import main
from prfl_engine.config import Config, load_config
from prfl_engine.errors import UserError
from prfl_engine.model.checkpoint import save_reward, save_transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One generator, reward model and data set for all tests; none of them starts to train."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


def refused(
    folder, capsys, *needles, command="train", overrides=(), config="config.yaml", out="run"
):
    """The command fails on one line that holds the needles, and leaves no checkpoint."""
    capsys.readouterr()
    assert main([command, str(folder / config), *overrides]) == 2
    line = one_line(capsys)
    for needle in needles:
        assert needle in line, line
    assert "Traceback" not in line
    assert not list(folder.glob(f"{out}/checkpoint-*"))
    return line


@pytest.mark.parametrize("override, field", [
    ("train.stepz=3", "train.stepz"),
    ("trane.steps=3", "trane"),
    ("train.steps=many", "train.steps"),
    ("train.steps=2.5", "train.steps"),
    ("train.steps=.inf", "train.steps"),
    ("train.steps=null", "train.steps"),
    ("train.steps=true", "train.steps"),
    ("train.steps=[1]", "train.steps"),
    ("train.steps=0", "train.steps"),
    ("train.accumulate=0", "train.accumulate"),
    ("train.resume=1", "train.resume"),
    ("train.ema=1", "train.ema"),
    ("train.device=tpu0", "train.device"),
    ("optim.lr=fast", "optim.lr"),
    ("optim.lr=-1", "optim.lr"),
    ("optim.lr=.nan", "optim.lr"),
    ("optim.betas=[0.9]", "optim.betas"),
    ("optim.clip=0", "optim.clip"),
    ("optim.schedule=linear", "optim.schedule"),
    ("model.compute_dtype=float16", "model.compute_dtype"),
    ("model.recompute=maybe", "model.recompute"),
    ("reward.feature_layer=9", "reward.feature_layer"),
    ("reward.dropout=1", "reward.dropout"),
    ("data.text_dropout=1.5", "data.text_dropout"),
    ("data.batch_size=0", "data.batch_size"),
    ("data.num_workers=-1", "data.num_workers"),
    ("data.train=[]", "data.train"),
    ("rollout.solver=heun", "rollout.solver"),
    ("rollout.steps=1", "rollout.steps"),
    ("rollout.range=[2,1]", "rollout.range"),
    ("rollout.range=[0,2]", "rollout.range"),
    ("rollout.range=late-ish", "rollout.range"),
    ("loss.form=square", "loss.form"),
    ("loss.weight=-0.1", "loss.weight"),
    ("eval.timesteps=[1001]", "eval.timesteps"),
    ("eval.timesteps=[1000]", "eval.timesteps"),
    ("eval.timesteps=[]", "eval.timesteps"),
    ("reward.num_heads=0", "reward.num_heads"),
    ("reward.return_type=mean", "reward.return_type"),
    ("train.steps", "override"),
    ("steps=3", "override"),
    ("a.b.c=1", "override"),
    ("train.steps=[", "train.steps"),
])  # fmt: skip
def test_an_impossible_field_is_named(override, field, folder, capsys):
    value = override.partition("=")[2]
    line = refused(folder, capsys, f"prfl: {field}: ", overrides=[override])
    if value and field != "data.train" and "unknown field" not in line:
        assert "want" in line


@pytest.mark.parametrize("overrides, needle", [
    (["loss.weight=0", "loss.sft_weight=0"], "loss.weight"),
    (["data.null_text=null"], "data.null_text"),
    (["reward.path=null"], "reward.path"),
    (["model.path=null", "model.preset=t2v-2b"], "model.preset"),
    (["eval.every=1", "data.val=[]"], "data.val"),
])  # fmt: skip
def test_fields_that_need_one_another(overrides, needle, folder, capsys):
    refused(folder, capsys, f"prfl: {needle}: ", overrides=overrides)


@pytest.mark.parametrize("field", ["data.train", "data.null_text", "reward.path", "model.path"])
def test_a_missing_file_is_named(field, folder, capsys, tmp_path):
    value = tmp_path / "nowhere"
    overrides = [f"{field}={value}", "data.text_dropout=1", f"train.out={tmp_path / 'run'}"]
    refused(folder, capsys, str(value), overrides=overrides)


@pytest.mark.parametrize(
    "content", ["train: {steps: [}", "- 1\n- 2", "train: 3", "trane: {}", "text", "\t"]
)
def test_a_broken_configuration_file(content, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(content)
    refused(tmp_path, capsys, "prfl: ", config="bad.yaml")


def test_a_missing_or_binary_configuration_file(tmp_path, capsys):
    (tmp_path / "binary.yaml").write_bytes(bytes(range(128, 256)))
    for name in ("binary.yaml", "no.yaml", ""):
        refused(tmp_path, capsys, str(tmp_path / name), config=name)


def write_latent(tmp_path, *shape):
    path = tmp_path / "data/latent-0.npy"
    np.save(path, np.zeros(shape, np.float32))
    return path


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("shape", [(1, 12, 1, 4, 4), (16, 1, 4, 4), (1, 16, 1, 4)])
def test_a_latent_of_the_wrong_shape_is_named(shape, workers, tmp_path, capsys):
    write_run(tmp_path, samples=1)
    path = write_latent(tmp_path, *shape)
    overrides = [f"data.num_workers={workers}"]
    refused(tmp_path, capsys, str(path), str(list(shape)), "latent", overrides=overrides)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_latent_that_cannot_be_patched_is_named(batch_size, tmp_path, capsys):
    write_run(tmp_path, samples=1)
    write_latent(tmp_path, 1, 16, 1, 4, 5)
    meta = str(tmp_path / "data/0.json")
    refused(tmp_path, capsys, meta, overrides=[f"data.batch_size={batch_size}"])


def test_a_checkpoint_with_other_weights_is_named(tmp_path, capsys):
    write_run(tmp_path)
    other = tmp_path / "other"
    save_transformer(tiny_model(tiny_config(ffn_dim=40)), other)
    config = json.loads((other / "config.json").read_text()) | {"ffn_dim": 48}
    (other / "config.json").write_text(json.dumps(config))
    refused(tmp_path, capsys, str(other), "blocks.0.ffn.0", overrides=[f"model.path={other}"])


@pytest.mark.parametrize("fields", [
    {"text_dim": 20}, {"text_len": 8}, {"model_type": "i2v"},
], ids=str)  # fmt: skip
def test_a_reward_model_for_other_inputs_is_refused(fields, tmp_path, capsys):
    write_run(tmp_path)
    save_reward(tiny_reward(tiny_config(**fields)), tmp_path / "other", 0)
    overrides = [f"reward.path={tmp_path / 'other'}"]
    refused(tmp_path, capsys, "prfl: reward.path: ", *fields, overrides=overrides)


def test_a_reward_model_with_fewer_blocks_than_asked_is_refused(folder, capsys, tmp_path):
    overrides = ["reward.blocks=2", "reward.feature_layer=2", f"train.out={tmp_path}"]
    refused(folder, capsys, "reward.feature_layer", overrides=overrides)


def test_a_generator_without_a_reward_files_is_no_reward_model(folder, capsys, tmp_path):
    overrides = [f"reward.path={folder / 'policy'}", f"train.out={tmp_path}"]
    refused(folder, capsys, str(folder / "policy"), "query_attention", overrides=overrides)


def test_a_label_that_is_none_is_named(tmp_path, capsys):
    write_run(tmp_path, samples=1)
    path = tmp_path / "data/0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"physics_quality": "fine"}))
    overrides = ["reward.path=null"]
    needles = (str(path), "physics_quality", "fine")
    refused(tmp_path, capsys, *needles, command="train-reward", overrides=overrides)


@pytest.mark.parametrize("overrides, needle", [
    (["reward.path=null", "model.path=null"], "model.path"),
    (["reward.path=null", "reward.blocks=3"], "policy"),
    (["reward.path=null", "reward.num_heads=5"], "reward.num_heads"),
    (["reward.path=null", "reward.loss=bt"], "data.lose"),
    (["reward.path=null", "data.paired=true"], "data.paired"),
    (["reward.path=null", "reward.ce_weight=0.5"], "reward.ce_weight"),
    (["reward.path=null", "reward.pairs_at_once=true"], "reward.pairs_at_once"),
])  # fmt: skip
def test_reward_training(overrides, needle, folder, capsys, tmp_path):
    overrides = [*overrides, f"train.out={tmp_path}"]
    refused(folder, capsys, needle, command="train-reward", overrides=overrides)


def test_evaluating_and_sampling_need_their_models(folder, capsys):
    refused(folder, capsys, "reward.path", command="eval-reward", overrides=["reward.path=null"])
    refused(folder, capsys, "data.val", command="eval-reward", overrides=["data.val=[]"])
    for overrides, needle in (
        (["model.path=null"], "model.path"),
        (["sample.guidance=5"], "data.negative_text"),
        (["data.val=[]"], "data.val"),
    ):
        out = ["--out", str(folder / "samples")]
        refused(folder, capsys, needle, command="sample", overrides=[*overrides, *out])
        assert not (folder / "samples").exists()


@pytest.mark.parametrize("broken", [
    b"", b"no state", {"step": 1},
    {"step": 1, "best": 0.0, "optimizer": {}, "rng": torch.get_rng_state()},
], ids=["empty", "text", "no optimizer", "other optimizer"])  # fmt: skip
def test_a_broken_training_state_is_named(broken, tmp_path, capsys):
    config = write_run(tmp_path)
    assert main(["train", str(config), "train.steps=1", "loss.weight=0"]) == 0
    path = unchecked(tmp_path / "run") / "checkpoint-1/training_state.pt"
    path.write_bytes(broken) if isinstance(broken, bytes) else torch.save(broken, path)
    refused(tmp_path, capsys, str(path), overrides=["train.resume=true"], out="no")


def test_the_output_is_a_file(folder, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    refused(folder, capsys, "train.out", overrides=[f"train.out={tmp_path / 'file'}"])


# What is accepted.


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("""
optim: {lr: 5e-6, lr_head: "1e-5", betas: [0.9, 0.999]}
train: {steps: 5., accumulate: "3", seed: 1e3}
loss: {weight: 1}
""")
    c = load_config(path, ["optim.eps=1e-7", "data.batch_size=2.0"])
    assert (c.optim.lr, c.optim.lr_head, c.optim.eps) == (5e-6, 1e-5, 1e-7)
    assert (c.train.steps, c.train.accumulate, c.train.seed, c.data.batch_size) == (5, 3, 1000, 2)
    assert all(type(v) is int for v in (c.train.steps, c.train.accumulate, c.train.seed))
    assert type(c.loss.weight) is float


def test_large_whole_numbers_stay_exact_or_are_refused():
    assert load_config(None, [f"train.seed={2**53 + 1}"]).train.seed == 2**53 + 1
    with pytest.raises(UserError, match="^train.seed: got 10+, want a whole number in "):
        load_config(None, [f"train.seed={10**309}"])  # more than a float holds


def test_lists_and_single_values(tmp_path):
    assert load_config(None, ["data.train=a.list"]).data.train == ("a.list",)
    assert load_config(None, ["data.train=[a.list, b.list]"]).data.train == ("a.list", "b.list")
    assert load_config(None, ["rollout.range=[0, 5]"]).rollout.range == (0, 5)
    assert load_config(None, ["rollout.range=early"]).rollout.range == "early"
    assert load_config(None, ["reward.return_type=null"]).reward.return_type is None


def test_empty_files_and_sections_are_the_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    for content in ("", "train:\n", "{}"):
        path.write_text(content)
        assert load_config(path) == Config()
    assert load_config(path, ["train.steps=3"]).train.steps == 3


def test_a_configuration_survives_being_written(tmp_path):
    c = load_config(None, ["optim.lr=5e-6", "rollout.range=[1, 4]", "data.train=[a, b]"])
    (tmp_path / "c.yaml").write_text(c.to_yaml())
    assert load_config(tmp_path / "c.yaml") == c


def test_the_published_values_are_the_defaults():
    c = Config()
    assert (c.rollout.steps, c.rollout.shift, c.rollout.solver) == (40, 5.0, "unipc")
    assert (c.loss.form, c.loss.weight, c.loss.target, c.loss.sft_weight) == (
        "hinge",
        0.1,
        2.0,
        1.0,
    )
    assert (c.optim.lr, c.optim.betas, c.optim.weight_decay) == (5e-6, (0.9, 0.999), 0.01)
    assert (c.reward.blocks, c.reward.pooling) == (8, {})  # 8, 8 and query, unless stored otherwise
    assert c.eval.timesteps == (201, 400, 600, 800, 1000)


def test_a_run_writes_down_its_configuration(tmp_path):
    config = write_run(tmp_path)
    assert main(["train", str(config), "train.steps=1", "loss.weight=0"]) == 0
    assert load_config(tmp_path / "run/config.yaml") == load_config(
        config, ["train.steps=1", "loss.weight=0"]
    )
    assert yaml.safe_load(config.read_text())["train"]["steps"] == 2


def test_bad_usage_and_help():
    for argv, code in (
        (["train"], 2),
        (["nothing"], 2),
        ([], 2),
        (["--version"], 0),
        (["--help"], 0),
    ):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == code


def test_a_user_error_is_a_value_error():
    assert issubclass(UserError, ValueError)
