"""Every key of HY-Video-PRFL's YAML files, and what it is here."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Copy(NamedTuple):
    """A key whose value a field of ours takes."""

    field: str


class Into(NamedTuple):
    """A key that these fields follow from, together with others; the functions below say how."""

    fields: str


class Only(NamedTuple):
    """A key with a value that we cannot choose."""

    holds: Callable[[Any], bool]
    want: str


IGNORED = None
"""A key without meaning here."""

KEYS: dict[str, Copy | Into | Only | None] = {
    "train_id": Into("train.out"),
    "task": Only(
        lambda v: v in ("t2v-1.3b", "t2v-14b", "i2v-14b-480p", "i2v-14b-720p"),
        "t2v-1.3b, t2v-14b, i2v-14b-480p or i2v-14b-720p",
    ),
    "model.base_path": Into("model.path"),
    "model.init_transformer_path": Into("model.path"),
    "model.resume_transformer_path": Into("model.path reward.path train.steps"),
    "model.lrm_transformer_path": Into("reward.path"),
    "model.lrm_query_attention_path": Into("reward.query_attention"),
    "model.lrm_mlp_path": Into("reward.mlp"),
    "model.resume_query_attention_path": Into("reward.query_attention"),
    "model.resume_mlp_path": Into("reward.mlp"),
    "model.patch_size": Only(lambda v: list(v) == [1, 2, 2], "[1, 2, 2]"),
    "model.lora.use_lora": Into("lora.rank"),
    "model.lora.lora_rank": Into("lora.rank"),
    "model.lora.target_modules": Copy("lora.targets"),
    "model.lora.resume_lora_path": Into("lora.path train.steps"),
    "model.ema.use_ema": Into("train.ema"),
    "model.ema.ema_decay": Into("train.ema"),
    "model.fsdp.fsdp_sharding_startegy": Into("parallel.replicate"),
    "model.fsdp.use_cpu_offload": IGNORED,
    "model.gradient_checkpointing": Into("model.recompute"),
    "model.selective_checkpointing": Into("model.recompute"),
    "extra_model.vae.name": IGNORED,
    "extra_model.vae.vae_stride": IGNORED,
    "extra_model.text_encoder.t5_text_len": IGNORED,
    "extra_model.text_encoder.t5_checkpoint": IGNORED,
    "extra_model.text_encoder.t5_tokenizer": IGNORED,
    "extra_model.image_encoder.clip_checkpoint": IGNORED,
    "extra_model.image_encoder.clip_tokenizer": IGNORED,
    "extra_model.scheduler.flow_shift": Copy("rollout.shift"),
    "extra_model.scheduler.num_train_timesteps": Only(lambda v: v == 1000, "1000"),
    "extra_model.scheduler.weighting_scheme": Only(lambda v: v == "uniform", "uniform"),
    "extra_model.scheduler.logit_mean": IGNORED,
    "extra_model.scheduler.logit_std": IGNORED,
    "extra_model.scheduler.mode_scale": IGNORED,
    "dataset.meta_file_list": Copy("data.train"),
    "dataset.meta_file_lose_list": Copy("data.lose"),
    "dataset.val_meta_file_list": Into("data.val eval.every"),
    "dataset.crop_ratio": Only(lambda v: all(float(n) == 1 for n in v), "[1, 1, 1]"),
    "dataset.crop_type": IGNORED,
    "dataset.uncond_prob": Into("data.text_dropout data.null_text"),
    "dataset.sp_size": Into("parallel.sequence"),
    "dataset.batch_size": Copy("data.batch_size"),
    "dataset.sp_batch_size": IGNORED,
    "dataset.num_workers": Copy("data.num_workers"),
    "dataset.group_frame": IGNORED,
    "dataset.group_resolution": IGNORED,
    "optimizer.learning_rate": Into("optim.lr optim.lr_head"),
    "optimizer.learning_rate_mlp": Into("optim.lr_head"),
    "optimizer.adam_beta1": Into("optim.betas"),
    "optimizer.adam_beta2": Into("optim.betas"),
    "optimizer.weight_decay": Copy("optim.weight_decay"),
    "optimizer.lr_scheduler": Into("optim.schedule optim.warmup optim.horizon optim.cycles"),
    "optimizer.lr_warmup_steps": Into("optim.warmup"),
    "optimizer.lr_num_cycles": Into("optim.cycles"),
    "optimizer.lr_power": IGNORED,
    "optimizer.max_train_steps": Into("train.steps optim.horizon"),
    "train.seed": Copy("train.seed"),
    "train.precision": Into("model.compute_dtype model.latent_dtype"),
    "train.extra_precision": IGNORED,
    "train.allow_tf32": IGNORED,
    "train.save_interval": Into("train.save_every eval.every"),
    "train.sanity_check_interval": IGNORED,
    "train.teacher_student_parallel": IGNORED,
    "train.dpo_beta": IGNORED,
    "train.gradient_accumulation_steps": Into("train.accumulate train.steps train.save_every"),
    "eval.seed": Copy("eval.seed"),
    "eval.timestep": Into("eval.timesteps"),
    "save.output_dir": Into("train.out"),
    "save.log_dir": IGNORED,
    "save.sanity_check_dir": IGNORED,
    "lrm.query_attention.num_queries": Into("reward.num_queries"),
    "lrm.query_attention.num_heads": Into("reward.num_heads"),
    "lrm.query_attention.dropout": Into("reward.dropout"),
    "lrm.query_attention.return_type": Into("reward.return_type"),
    "lrm.query_attention.layer_norm": IGNORED,
    "lrm.query_attention.text_dim": IGNORED,
    "lrm.query_attention.product_text": Only(lambda v: v is False, "false"),
    "lrm.feature_layer": Into("reward.feature_layer"),
    "lrm.pool": Into("reward.pool"),
    "lrm.mlp_dim": IGNORED,
    "lrm.loss": Copy("reward.loss"),
    "lrm.task": Copy("data.label"),
    "lrm.timestep": Into("reward.timesteps eval.timesteps"),
    "lrm.trainable_blocks": Into("reward.blocks"),
}
"""Every official key."""
