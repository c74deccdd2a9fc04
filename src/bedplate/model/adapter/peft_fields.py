"""Every field of `adapter_config.json` that bedplate knows, and what it means for what the adapter computes."""

from __future__ import annotations

# What the reader goes by: see `PeftConfig`.
USED = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "use_bdlora",
        "bias",
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
        "layer_replication",
        "ensure_weight_tying",
        "alora_invocation_tokens",
        "task_type",  # of an activated LoRA
    }
)

# Fields that say where an adapter comes from or how it was trained, but not what it computes.
NO_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",  # about a linear that stores its weight transposed: PEFT ignores it for all others
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "monteclora_config",  # noise in training
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "velora_config",  # another backward pass
        # How A and B start, where `init_lora_weights` names it; PEFT leaves them in a converted adapter's config.
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        # Settings of training that some programs write beside PEFT's own.
        "learning_rate",
        "lora_dtype",
        "loraplus_lr_embedding",
        "loraplus_lr_ratio",
        "lorap_emb_lr",
        "lorap_lr_ratio",
        "merge_weights",
    }
)

# What is not taken, in the words that a user knows it by.
REFUSED = {
    "use_qalora": "QALoRA, trained on a base that was quantized in groups",
    "kasa_config": "KaSA, which changes the base model's weights",
    "arrow_config": "Arrow, which routes between several adapters",
    "megatron_config": "layers of Megatron",
    "enable_lora": "a LoRA on parts of a joined linear, from before PEFT 0.3",
}

# For these PEFT reads an empty object as: set, with the defaults.
SET_BY_EMPTY = frozenset({"kasa_config", "arrow_config"})

# Starts of A and B that leave the base model's weights alone, and whose product B·A is zero.
KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")

# Starts that change the base model's weights: A and B alone do not describe the fine-tune.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
