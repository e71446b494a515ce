"""The YAML files of HY-Video-PRFL: read as they are, refused by their own keys, one line for the rest."""

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from helpers import one_line, tiny_config, write_data, write_run
from training_runs import run

from prfl_engine import cli
from prfl_engine.config import Config, load_config
from prfl_engine.errors import UserError
from prfl_engine.official_keys import KEYS, Copy, Into
from prfl_engine.official_yaml import OFFICIAL, recognised, settings
from prfl_engine.planner import pareto
from prfl_engine.planner.command import Options, predict

MODEL = """
model:
  base_path: {base}
  init_transformer_path: null
  {paths}
  patch_size: [1, 2, 2]
  lora:
    use_lora: false
    lora_rank: 128
    target_modules: ["q", "k", "v", "o"]
    resume_lora_path: null
  ema: {{use_ema: false, ema_decay: 0.99}}
  fsdp:
    fsdp_sharding_startegy: full
    use_cpu_offload: false
  gradient_checkpointing: true
  selective_checkpointing: 1.0
extra_model:
  vae: {{name: vae.pth, vae_stride: [4, 8, 8]}}
  text_encoder: {{t5_text_len: 512, t5_checkpoint: t5.pth, t5_tokenizer: t5}}
  image_encoder: {{clip_checkpoint: clip.pth, clip_tokenizer: clip}}
  scheduler:
    flow_shift: 5.0
    num_train_timesteps: 1000
    weighting_scheme: uniform
    logit_mean: 0
    logit_std: 1
    mode_scale: 1.29
"""
REST = """
optimizer:
  learning_rate: {lr}
  adam_beta1: 0.9
  adam_beta2: 0.999
  weight_decay: 0.01
  lr_scheduler: constant
  lr_warmup_steps: 0
  lr_num_cycles: 1
  lr_power: 1.0
  max_train_steps: 10
train:
  seed: 110221
  precision: fp32
  extra_precision: bf16
  allow_tf32: false
  save_interval: 5
  sanity_check_interval: 100
  teacher_student_parallel: true
  dpo_beta: 500
  gradient_accumulation_steps: {cycle}
"""
DATA = """
dataset:
  {lists}
  crop_ratio: [1, 1, 1]
  crop_type: "random"
  uncond_prob: [0.1, 0.0]
  sp_size: 4
  batch_size: 1
  sp_batch_size: 1
  num_workers: 0
  group_frame: null
  group_resolution: null
"""
LRM = """
lrm:
  query_attention: {{num_queries: 1, num_heads: 8, dropout: 0., return_type: query}}
  feature_layer: [1]
  pool: q_attn
  mlp_dim: 32
  {loss}
  task: "motion_quality"
  trainable_blocks: [0]
"""
KINDS = {
    "prfl": ("lrm_transformer_path", "lrm_mlp_path", "lrm_query_attention_path", "resume_transformer_path"),
    "ce": ("resume_transformer_path", "resume_mlp_path", "resume_query_attention_path"),
    "bt": ("resume_transformer_path", "resume_mlp_path"),  # one published file lacks the third key
}


def official(tmp_path, kind, lists=None, **replaced):
    """A file with the keys of a published one; replaced: values by key, dots as double underscores."""
    names = {"prfl": ("meta_file_list",), "ce": ("meta_file_list", "val_meta_file_list")}
    names["bt"] = (*names["ce"], "meta_file_lose_list")
    found = lists or {}
    listed = [f"{n}: [{found.get(n, tmp_path / 'all.list')}]" for n in names[kind]]
    cycle, lr = ("5.", "5e-6") if kind == "prfl" else ("1", "1e-6")
    text = f'train_id: "{kind}_480"\ntask: "t2v-14b"\n'
    text += MODEL.format(base=tmp_path / "policy", paths="\n  ".join(f"{p}: null" for p in KINDS[kind]))
    text += DATA.format(lists="\n  ".join(listed)) + REST.format(lr=lr, cycle=cycle)
    text += "" if kind == "prfl" else "eval:\n  seed: 0\n  timestep: [201, 400, 600, 800, 1000]\n"
    text += f"save:\n  output_dir: {tmp_path / 'outputs'}\n  sanity_check_dir: null\n"
    text += LRM.format(loss="" if kind == "prfl" else f'loss: "{kind}"')
    values = yaml.safe_load(text)
    for key, value in replaced.items():
        *parents, last = key.split("__")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    path = tmp_path / f"{kind}.yaml"
    path.write_text(text if not replaced else yaml.safe_dump(values))
    return path


@pytest.fixture
def trained(tmp_path):
    """A generator, and a reward model with its transformer in one folder and its heads in another; data."""
    write_run(tmp_path)
    heads = tmp_path / "heads"
    heads.mkdir()
    for name in ("mlp", "query_attention"):
        (tmp_path / f"reward/{name}_step_0.ckpt").rename(heads / f"{name}_step_7.ckpt")
    (tmp_path / "reward/reward.json").unlink()
    paths = {
        "model__lrm_transformer_path": str(tmp_path / "reward"),
        "model__lrm_mlp_path": str(heads / "mlp_step_7.ckpt"),
        "model__lrm_query_attention_path": str(heads / "query_attention_step_7.ckpt"),
    }
    return tmp_path, {"meta_file_list": tmp_path / "data/all.list"}, paths


def test_prfl_by_a_file_as_it_is(trained, capsys, monkeypatch):
    """The generator, the reward model's three paths and the data are read; steps, folder and seeds are the
    file's; the configuration that is written is ours."""
    tmp_path, lists, paths = trained
    null = tmp_path / "temp_data/null/wanx/null.npy"
    null.parent.mkdir(parents=True)
    (tmp_path / "data/null.npy").rename(null)
    monkeypatch.chdir(tmp_path)
    path = official(tmp_path, "prfl", lists, **paths)
    short = ("rollout.steps=3", "train.device=cpu", "train.tensorboard=false")
    run("train", path, *short)
    line = one_line(capsys)
    for key in ("extra_model.vae.name", "dataset.group_frame", "train.dpo_beta", "dataset.sp_size"):
        assert key in line
    assert "model.fsdp.fsdp_sharding_startegy" not in line and "train.seed" not in line
    out = tmp_path / "outputs/prfl_480"
    assert (out / "checkpoint-2").is_dir() and (out / "checkpoint-1").is_dir()
    made = load_config(out / "config.yaml")
    assert made.train.steps == 2 and made.train.accumulate == 5 and made.train.save_every == 1
    assert made.train.seed == 110221 and made.optim.lr == 5e-6 and made.model.recompute == "full"
    assert made.reward.mlp == paths["model__lrm_mlp_path"] and made.rollout.steps == 3
    run("train", path, *short, f"train.out={tmp_path / 'again'}", "train.compat=official")
    assert "train.compat" not in one_line(capsys)


def test_a_file_is_planned_for_as_many_gpus_as_are_asked_for(trained, capsys, monkeypatch):
    """As torchrun runs it, beside the paper's settings, and with one line about its keys."""
    tmp_path, lists, paths = trained
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = str(official(tmp_path, "prfl", lists, **paths))
    page = tmp_path / "plan.html"
    assert cli.main(["plan", path, "--gpus", "8", "--html", str(page), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("without meaning here") == 1 and "dataset.sp_size" not in printed.err
    planned = predict(path, (), Options(gpus=8))
    assert (planned.shards.size, planned.shards.sequence) == (8, 4)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert planned.subject.config == load_config(path) and load_config(path).train.accumulate == 10
    search = pareto.Search(path, (), Options(gpus=8))
    assert search.choices(8).settings.base == planned.subject.config
    assert list(search.candidates(2)) == []  # dataset.sp_size = 4 does not divide them
    assert search.choices(1).settings.base.train.accumulate == 5


@pytest.mark.parametrize("kind", ["ce", "bt"])
def test_reward_training_by_a_file_as_it_is(kind, tmp_path, capsys):
    write_run(tmp_path)
    names = ("meta_file_list", "val_meta_file_list", "meta_file_lose_list")
    lists = {
        name: write_data(
            tmp_path / name, tiny_config(), 4, seed=n,
            labels=lambda i: {"physics_quality": 1, "human_quality": i % 2},
        )
        for n, name in enumerate(names)
    }  # fmt: skip
    path = official(tmp_path, kind, lists, optimizer__max_train_steps=2, train__save_interval=2)
    given = ("train.device=cpu", "train.tensorboard=false", "train.compat=official")
    run("train-reward", path, *given)
    line = one_line(capsys)
    assert "dataset.uncond_prob" in line
    out = tmp_path / f"outputs/{kind}_480"
    made = load_config(out / "config.yaml")
    assert made.reward.blocks == 1 and made.reward.loss == kind and made.optim.lr_head == 1e-6
    assert made.eval.every == 2 and made.eval.seed == 0 and made.data.text_dropout == 0
    records = [json.loads(s)["values"] for s in (out / "metrics.jsonl").read_text().splitlines()]
    found = next(r for r in records if "eval/score" in r)
    for name in ("accuracy", "precision", "recall", "f1", "loss"):
        assert f"eval/{name}_t201" in found  # by labels, with pairs too
    # What it wrote goes on, by the same file.
    resumed = {
        "model__resume_transformer_path": str(out / "checkpoint-2"),
        "model__resume_mlp_path": str(out / "checkpoint-2/mlp_step_2.ckpt"),
        "model__resume_query_attention_path": str(out / "checkpoint-2/query_attention_step_2.ckpt"),
    }
    more = official(tmp_path, kind, lists, optimizer__max_train_steps=3, **resumed)
    config = load_config(more, given, "train-reward")
    assert config.train.steps == 1 and config.reward.heads["mlp"] == resumed["model__resume_mlp_path"]
    capsys.readouterr()
    run("eval-reward", more, *given)
    assert "accuracy" in capsys.readouterr().out


def value_of(path, name):
    section, _, field = name.partition(".")
    return getattr(getattr(load_config(path), section), field)


@pytest.mark.parametrize("kind, key, value, field, want", [
    ("prfl", "model__init_transformer_path", "w/other", "model.path", "w/other"),
    ("prfl", "model__resume_transformer_path", "o/checkpoint-5", "model.path", "o/checkpoint-5"),
    ("prfl", "model__resume_transformer_path", "o/checkpoint-5", "train.steps", 1),
    ("ce", "model__init_transformer_path", "w/other", "model.path", "w/other"),
    ("prfl", "model__ema", {"use_ema": True, "ema_decay": "9e-1"}, "train.ema", 0.9),
    ("prfl", "model__gradient_checkpointing", False, "model.recompute", "none"),
    ("prfl", "extra_model__scheduler__flow_shift", "3.", "rollout.shift", 3.0),
    ("prfl", "dataset__uncond_prob", [0.0, 0.3], "data.text_dropout", 0.0),
    ("prfl", "dataset__uncond_prob", [0.0, 0.3], "data.null_text", None),
    ("prfl", "train__precision", "bf16", "model.compute_dtype", "bfloat16"),
    ("prfl", "train__save_interval", 0, "train.save_every", 2),
    ("prfl", "train__save_interval", 12, "train.save_every", 3),
    ("ce", "train__gradient_accumulation_steps", "5.", "train.accumulate", 1),  # its script ignores it
    ("ce", "optimizer__learning_rate_mlp", "1e-5", "optim.lr_head", 1e-5),
    ("ce", "lrm__timestep", [600, 201], "reward.timesteps", (600, 201)),
    ("ce", "lrm__timestep", [600, 201], "eval.timesteps", (600, 201)),
    ("ce", "lrm__pool", "mean", "reward.pool", "mean"),
    ("ce", "lrm__task", "blur_quality", "data.label", "blur_quality"),
    ("ce", "lrm__trainable_blocks", [0, 1, 2], "reward.blocks", 3),
])  # fmt: skip
def test_what_a_key_means(kind, key, value, field, want, tmp_path):
    assert value_of(official(tmp_path, kind, **{key: value}), field) == want


def test_several_feature_layers(tmp_path):
    path = official(tmp_path, "ce", lrm__trainable_blocks=[0, 1], lrm__feature_layer=[1, 2])
    assert value_of(path, "reward.feature_layer") == (1, 2)


def test_lora(tmp_path):
    lora = {"use_lora": True, "lora_rank": 4, "target_modules": ["q"], "resume_lora_path": "x/checkpoint-5"}
    path = official(tmp_path, "prfl", model__lora=lora)
    config = load_config(path)
    assert (config.lora.rank, config.lora.targets, config.lora.path) == (4, ("q",), "x/checkpoint-5")
    assert config.train.steps == 1


def test_learning_rates_refer_to_updates(tmp_path):
    rates = {"optimizer__lr_scheduler": "cosine", "optimizer__lr_warmup_steps": 2}
    path = official(tmp_path, "prfl", **rates)
    plain, theirs = load_config(path).optim, load_config(path, ["train.compat=official"]).optim
    assert (plain.schedule, plain.warmup, plain.cycles, plain.horizon) == ("cosine", 2, 1, None)
    assert theirs.horizon == 10


def test_groups_of_processes_each_have_the_micro_batches_of_a_cycle(tmp_path):
    values = yaml.safe_load(official(tmp_path, "prfl").read_text())
    made = settings(values, world=8)
    assert made.values["parallel"] == {"replicate": 1, "sequence": 4}
    assert made.values["train"]["accumulate"] == 10 and made.values["train"]["steps"] == 2
    with pytest.raises(UserError, match="dataset.sp_size: got 4, want a divisor of the 6 processes"):
        settings(values, world=6)


@pytest.mark.parametrize("kind, key, value, needle", [
    ("prfl", "task", "i2v-1.3b", "task: got 'i2v-1.3b', want t2v-1.3b"),
    ("prfl", "model__patch_size", [1, 1, 1], "model.patch_size: got [1, 1, 1], want [1, 2, 2]"),
    ("prfl", "extra_model__scheduler__weighting_scheme", "logit_normal", "scheme: got 'logit_normal'"),
    ("prfl", "extra_model__scheduler__num_train_timesteps", 500, "timesteps: got 500, want 1000"),
    ("prfl", "dataset__crop_ratio", [1, 0.5, 1], "dataset.crop_ratio"),
    ("prfl", "dataset__crop_ratio", "half", "dataset.crop_ratio"),
    ("prfl", "optimizer__lr_scheduler", "polynomial", "optimizer.lr_scheduler: got 'polynomial'"),
    ("prfl", "optimizer__learning_rate", "fast", "optimizer.learning_rate: optim.lr: got 'fast'"),
    ("prfl", "train__precision", "fp16", "train.precision: got 'fp16', want bf16 or fp32"),
    ("prfl", "train__gradient_accumulation_steps", 2.5, "gradient_accumulation_steps: got 2.5"),
    ("prfl", "train__gradient_accumulation_steps", 11, "optimizer.max_train_steps"),
    ("ce", "lrm__trainable_blocks", [0, 2], "lrm.trainable_blocks: got [0, 2], want the first blocks"),
    ("ce", "lrm__pool", "cls", "lrm.pool: got 'cls', want q_attn, mean, max"),
    ("ce", "lrm__query_attention__product_text", True, "product_text: got True, want false"),
    ("ce", "lrm__loss", "mse", "lrm.loss: reward.loss: got 'mse', want ce or bt"),
    ("ce", "lrm__feature_layer", [9], "lrm.feature_layer: reward.feature_layer: got 9"),
])  # fmt: skip
def test_what_we_cannot_do_is_refused_by_its_key(kind, key, value, needle, tmp_path):
    with pytest.raises(UserError) as caught:
        load_config(official(tmp_path, kind, **{key: value}))
    assert needle in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change, needle", [
    ({}, "model.lrm_transformer_path: got null, want the folder of a reward model's transformer"),
    ({"model__lrm_mlp_path": None}, "model.lrm_mlp_path: got null"),
    ({"model__lrm_mlp_path": "gone.ckpt"}, "model.lrm_mlp_path: gone.ckpt: nothing is there"),
    ({"model__base_path": "gone"}, "model.base_path: gone: nothing is there"),
    ({"dataset__meta_file_list": ["gone.list"]}, "dataset.meta_file_list: gone.list: nothing is there"),
    ({"whole": True}, "dataset.uncond_prob: temp_data/null/wanx/null.npy: nothing is there"),
])  # fmt: skip
def test_a_path_that_is_missing_is_named_by_its_key(change, needle, trained, capsys):
    tmp_path, lists, paths = trained
    given = paths | change if change else {}
    given.pop("whole", None)
    path = official(tmp_path, "prfl", lists, **given)
    run("train", path, "train.device=cpu", code=2)
    assert needle in one_line(capsys)
    assert not (tmp_path / "outputs").exists()


def test_a_path_of_ours_takes_the_place_of_a_missing_one(trained):
    tmp_path, lists, _ = trained
    reward = [f"reward.{name}=x" for name in ("path", "mlp", "query_attention")]
    path = official(tmp_path, "prfl", lists)
    plain = "data.text_dropout=0", "data.null_text=null"
    for given in (reward, reward[:1]):  # three files, or a folder with all of them
        load_config(path, [*given, *plain], "train")


@pytest.mark.parametrize("kind, job, other", [
    ("prfl", "train-reward", "train"), ("ce", "train", "train-reward"),
])  # fmt: skip
def test_a_file_for_the_other_training_is_refused(kind, job, other, tmp_path, capsys):
    run(job, official(tmp_path, kind), code=2)
    assert f"want prfl {other} for this file" in one_line(capsys)


def test_an_unknown_key_is_named(tmp_path, capsys):
    load_config(official(tmp_path, "prfl", dataset__negative_prompt="x"))
    assert "dataset.negative_prompt" in one_line(capsys)


def test_a_file_of_ours_is_none_of_theirs(tmp_path):
    assert not recognised(yaml.safe_load(write_run(tmp_path).read_text()))
    assert not recognised({"model": {}, "optimizer": {}})
    with pytest.raises(UserError, match="optimizer: unknown field"):
        (tmp_path / "typo.yaml").write_text("optimizer: {lr: 1}\n")
        load_config(tmp_path / "typo.yaml")


def test_the_page_has_every_key_and_every_setting_of_compat():
    page = (Path(__file__).parents[1] / "docs/official.md").read_text()
    for key, rule in KEYS.items():
        if rule is not None:
            assert f"`{key}`" in page, key
    for name, value in OFFICIAL.items():
        text = json.dumps(value) if not isinstance(value, str) else value
        assert f"`{name}: {text.replace(chr(34), '')}`" in page, name


def test_every_key_leads_to_fields_that_exist():
    known = {f"{s.name}.{f.name}" for s in fields(Config) for f in fields(getattr(Config(), s.name))}
    for key, rule in KEYS.items():
        if isinstance(rule, Copy | Into):
            assert set(rule[0].split()) <= known, key


@pytest.mark.skipif("HY_VIDEO_PRFL" not in os.environ, reason="HY_VIDEO_PRFL names no checkout")
def test_the_files_of_a_checkout():
    """Every training file of a checkout that you have; what is missing there is a path."""
    folder = Path(os.environ["HY_VIDEO_PRFL"], "configs")
    found = [path for path in folder.glob("*.yaml") if recognised(yaml.safe_load(path.read_text()))]
    assert found
    for path in found:
        reward = "loss" in yaml.safe_load(path.read_text())["lrm"]
        config = load_config(path, ["train.compat=official"])
        assert config.train.compat == "official" and config.model.path
        with pytest.raises(UserError, match=r"^(model|dataset|lrm)\."):
            load_config(path, (), "train-reward" if reward else "train")
