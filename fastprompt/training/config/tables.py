"""The tables of a config file, as models: names, types, bounds and what each key means.

Keys of a method or a task (`num_virtual_tokens`, `classes`, ...) are the fields of its own dataclass, see `fields.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Rate = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]
Space = dict[str, Any]


class Table(BaseModel):
    """A table of the file: unknown keys are refused, types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RunTable(Table):
    """`[run]`: the backbone, and what all prompts of the run have in common."""

    backbone: Name = Field(description="a transformers model: a folder, an id on the hub, or `embedded`")
    tokenizer: Name | None = Field(None, description="a tokenizer; none: the backbone's")
    output: Name | None = Field(
        None,
        description="folder for prompts and results, beside the file; `--output` goes before it; none: `NAME-run` here",
    )
    seed: Seed = Field(0, description="of everything random in the run; each prompt has a seed of its own besides")
    cpu: bool = Field(False, description="train on the CPU even where there is an accelerator")
    threads: Count | None = Field(None, description="CPU threads; none: as many as torch finds")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the frozen backbone's weights; prompts are always float32"
    )
    attention: Name | None = Field(None, description="transformers' `attn_implementation`; none: the backbone's own")
    bf16: bool = Field(False, description="mixed precision: autocast to bfloat16")
    accumulation: Count = Field(1, description="passes that a step is divided into, with the same result; saves memory")
    gradient_checkpointing: bool = Field(False, description="compute activations again in the backward pass")
    evaluation_rows: Count = Field(32, description="rows in one forward of an evaluation")
    backbone_dropout: bool = Field(False, description="dropout inside the backbone while training")
    save_every: Count | None = Field(
        None, description="optimiser steps between checkpoints to resume from; none: only at the end"
    )


class DataTable(Table):
    """`[prompt.data]`: examples from files, or from a dataset on the hub."""

    train: str | tuple[str, ...] = Field(
        description="`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` files, a folder that `datasets` saved, or a hub name"
    )
    validation: str | tuple[str, ...] | None = Field(None, description="the same, for scores and the best prompt")
    subset: str | None = Field(None, description="configuration of a hub dataset")
    train_split: str = Field("train", description="split of a hub dataset")
    validation_split: str = Field("validation", description="split of a hub dataset")
    columns: dict[str, str] = Field({}, description="other names for columns: `{ old = 'new' }`")
    train_examples: Count | None = Field(None, description="use at most so many; none: all")
    validation_examples: Count | None = Field(None, description="use at most so many; none: all")


class PromptTable(Table):
    """`[[prompt]]`: one prompt; and, in `[defaults]`, what prompts have unless they say otherwise."""

    name: Name = Field(description="the prompt's name, and that of the folder it is saved in")
    method: str | None = Field(
        None,
        description="`prompt_tuning`, `p_tuning`, `prefix_tuning`, `p_tuning_v2` or `cartridge`; none with `shares`",
    )
    learning_rate: Rate = Field(1e-2, description="AdamW's, at its highest")
    weight_decay: Rate = Field(0.0, description="AdamW's")
    schedule: Literal["linear", "constant", "cosine"] = Field(
        "linear", description="`linear` and `cosine` fall to zero"
    )
    warmup: Seed | Annotated[float, Field(ge=0, lt=1)] = Field(
        0, description="rising learning rate: steps (an integer), or a share of all steps (below 1)"
    )
    head_learning_rate: Rate | None = Field(None, description="the head's own; none: `learning_rate`")
    batch_size: Count = Field(16, description="examples of this prompt in an optimiser step")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="how long; this or `steps`")
    steps: Count | None = Field(None, description="how long, in optimiser steps; this or `epochs`")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="bound on the norm of this prompt's gradient; none: no bound"
    )
    evaluate_every: Count | None = Field(None, description="optimiser steps between evaluations; none: once an epoch")
    patience: Count | None = Field(
        None, description="evaluations without a better score after which it stops; none: never"
    )
    metric: Name | None = Field(None, description="the score that chooses the best prompt; none: the task's own")
    seed: Seed = Field(0, description="of this prompt's init and order of examples")
    init_from: Name | None = Field(None, description="transfer: a saved prompt's folder to start from")
    shares: Name | None = Field(
        None, description="multi-task: name of the prompt whose virtual tokens this one trains too, with its own head"
    )
    template: Name | None = Field(
        None, description="P-Tuning: where virtual tokens stand, such as `{3} [MASK] {3} {subject} {3}`"
    )
    max_length: Count | None = Field(
        None,
        description="tokens of a text, special ones counted, its answer and virtual tokens not; a longer one is cut at "
        "its end, or as the task's `truncate` says; none: only the backbone's positions bound it",
    )
    task: Space = Field({}, description="what it learns; see Tasks")
    data: Space = Field({}, description="from which examples; see Data")


class ComparatorTable(Table):
    """`[[comparator]]`: another way to learn the same tasks, for a table of quality and cost."""

    kind: Literal["full", "lora", "probe", "probe_mean"] = Field(
        description="full fine-tuning, LoRA through PEFT, a linear probe on [CLS] (or on each token), or on the mean"
    )
    prompts: Annotated[tuple[Name, ...], Field(min_length=1)] | None = Field(
        None, description="names of the prompts whose tasks and data it learns; none: all"
    )
    learning_rate: Rate | None = Field(None, description="none: 5e-5 for full, 2e-4 for lora, 1e-2 for probes")
    weight_decay: Rate = Field(0.0, description="AdamW's")
    batch_size: Count | None = Field(None, description="none: as the prompt")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="none: as the prompt; this or `steps`")
    steps: Count | None = Field(None, description="none: as the prompt; this or `epochs`")
    seed: Seed | None = Field(None, description="none: as the prompt")
    rank: Count = Field(8, description="of LoRA's matrices")
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="of LoRA: changes are scaled by alpha / rank")
    target_modules: Annotated[tuple[Name, ...], Field(min_length=1)] | None = Field(
        None, description="modules that LoRA changes; none: PEFT's choice for the architecture, or all linear ones"
    )


class RangeTable(Table):
    """A range of values in `[sweep.space]`."""

    low: float = Field(description="the least value")
    high: float = Field(description="the greatest value")
    log: bool = Field(False, description="spread evenly in the logarithm")
    points: Annotated[int, Field(ge=2)] | None = Field(None, description="values that a grid takes, both ends included")
    integer: bool = Field(False, description="round to integers")


class SweepTable(Table):
    """`[sweep]`: which candidates to train in place of each prompt, and which of them to drop early."""

    search: Literal["grid", "random"] = Field("grid", description="every combination, or random ones")
    candidates: Count | None = Field(None, description="how many random combinations of each prompt; none: 16")
    seed: Seed = Field(0, description="of the random combinations")
    eta: Annotated[int, Field(ge=2)] = Field(3, description="successive halving: one in `eta` goes on")
    rungs: Annotated[int, Field(ge=0)] = Field(0, description="how often losers are dropped; 0: never")
    max_prompts_per_run: Count | None = Field(
        None, description="candidates trained together; none: as many as fit, measured"
    )
    memory: Annotated[float, Field(gt=0)] | None = Field(
        None, description="GiB that a run may take; none: 80% of what is free on the device"
    )
    space: Annotated[Space, Field(min_length=1)] = Field(description="key of a prompt -> list of values, or a range")
