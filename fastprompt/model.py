"""PromptedModel: one frozen transformers model, any mixture of prompts in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fastprompt import heads, in_place, peft_format, store
from fastprompt.call import Rows, check_generation, check_rows, prepared
from fastprompt.ensemble import Votes, Words, ensemble
from fastprompt.errors import ArgumentError, IncompatiblePromptError, UnsupportedError
from fastprompt.integrations.hub import local_folder
from fastprompt.integrations.transformers import checkpointing
from fastprompt.integrations.transformers import inputs as call_inputs
from fastprompt.integrations.transformers.probe import inspect_backbone
from fastprompt.integrations.transformers.source import BackboneSource
from fastprompt.library import PromptLibrary
from fastprompt.prompts import PromptConfig, SoftPrompt
from fastprompt.prompts.base import check_int
from fastprompt.prompts.init import seeded
from fastprompt.prompts.transfer import start_from


class PromptedModel(nn.Module):
    """A frozen transformers model that takes a prompt a row.

    Semantics:
        model = PromptedModel(AutoModelForCausalLM.from_pretrained("gpt2"))
        model.load_prompt("sentiment", "path")                     # a PEFT adapter or a fastprompt folder
        model.add_prompt("mine", PrefixTuning(num_virtual_tokens=30))
        model(**batch, prompts=["sentiment", None, "mine"]).logits  # a name a row, or one for all rows

    Everything else (`config`, `generate`'s options, `device`, ...) is the backbone's. Text positions start behind the
    prompt, padding on either side never changes a row, the KV cache holds own tokens only, and a row's result does not
    depend on its neighbours.

    Args:
        backbone: a transformers model; it is frozen and its attention implementation switched to fastprompt's.
        tokenizer: needed by inits from text and class labels only.
        bank_bytes: byte budget of the device arena that holds prefixes in use; None is unbounded.
    """

    def __init__(self, backbone: PreTrainedModel, tokenizer: Any = None, *, bank_bytes: int | None = None) -> None:
        super().__init__()
        if bank_bytes is not None:
            check_int("bank_bytes", bank_bytes, 1)
        self.backbone: Any = backbone
        self.tokenizer = tokenizer
        self._info = inspect_backbone(backbone)
        self.library = PromptLibrary(self._info, bank_bytes)
        self._head_hooks: set[str] = set()
        self._places = False  # whether it ever had a prompt with virtual tokens in place

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone":
                raise
            return getattr(self.backbone, name)

    def add_prompt(
        self,
        name: str,
        config: PromptConfig | SoftPrompt,
        *,
        num_labels: int | None = None,
        labels: Sequence[str] | None = None,
        seed: int | None = None,
        init_from: str | SoftPrompt | None = None,
    ) -> SoftPrompt:
        """Add a fresh, trainable prompt (or one built before) and return it.

        A backbone with a task head (sequence or token classification, question answering) gives each prompt its own
        trainable copy, with `num_labels` outputs when given. `init_from` is a prompt, or the name of one here, whose
        virtual tokens the new one starts with, cut or repeated to its length.
        """
        self.library.check_new(name)
        heads.check_labels(num_labels, labels)
        if isinstance(config, SoftPrompt):
            if (num_labels, labels, seed, init_from) != (None,) * 4:
                raise ArgumentError(
                    "num_labels, labels, seed and init_from are for a fresh prompt, and config is a built one"
                )
            prompt = config
        elif isinstance(config, PromptConfig):
            if init_from is not None:
                start = self.library[init_from] if isinstance(init_from, str) else init_from
                prompt = start_from(start, config, self._info.spec, seed=seed)
            else:
                prompt = config.build(self._info.spec, BackboneSource(self._info, self.tokenizer), seed=seed)
            self._give_head(prompt, num_labels, labels, seed)
        else:
            what = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
            raise ArgumentError(f"config is {what}, expected a prompt config: PrefixTuning(num_virtual_tokens=30), say")
        return self._take(name, prompt)

    def share_prompt(
        self,
        name: str,
        source: str,
        *,
        num_labels: int | None = None,
        labels: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> SoftPrompt:
        """Add a prompt that is the virtual tokens of `source` under a fresh head of its own, and return it.

        Both names train and read the same tokens, which a batch computes once; saved, each is whole.
        """
        first = self.library[source]
        prompt = type(first)(first.config, first.spec, first.encoder)
        self._give_head(prompt, num_labels, labels, seed)
        self._take(name, prompt)
        self.library.share(name, source)
        return prompt

    def load_prompt(
        self, name: str, path: str | Path, *, trainable: bool = False, task_id: int | None = None
    ) -> SoftPrompt:
        """Load a prompt under a name: a fastprompt folder, a PEFT adapter folder, or an adapter's id on the hub.

        Args:
            trainable: whether its parameters take gradients.
            task_id: which task of a PEFT multitask prompt to take.
        Raises:
            PromptFileError, IncompatiblePromptError, DuplicatePromptError: nothing is loaded then.
        """
        self.library.check_new(name)
        folder = local_folder(path)
        if peft_format.is_peft_folder(folder):
            prompt = peft_format.read_peft(folder, self._info.spec, task_id=task_id)
        elif task_id is not None:
            raise ArgumentError(f"task_id is {task_id!r}, but {path} is no PEFT adapter, whose tasks it tells apart")
        else:
            prompt = store.load_prompt(folder, self._info.spec)
        return self._take(name, prompt.requires_grad_(trainable))

    def save_prompt(self, name: str, path: str | Path, *, format: str = "fastprompt", overwrite: bool = False) -> None:
        """Write a prompt to a folder, in fastprompt's own format or as a PEFT adapter."""
        prompt = self.library[name]
        if format == "fastprompt":
            store.save_prompt(path, prompt, record=prompt.record, overwrite=overwrite)
        elif format == "peft":
            peft_format.write_peft(
                path,
                prompt,
                task_type=prompt.task_type or self._info.task_type,
                base_model_name_or_path=getattr(self.backbone, "name_or_path", "") or None,
                overwrite=overwrite,
            )
        else:
            raise ArgumentError(f'format is {format!r}, expected "fastprompt" or "peft"')

    def remove_prompt(self, name: str) -> SoftPrompt:
        """Forget a prompt; returns it."""
        return self.library.remove(name)

    @property
    def prompt_names(self) -> list[str]:
        """Names of all prompts, in the order they came."""
        return list(self.library)

    @classmethod
    def from_peft(cls, peft_model: Any, tokenizer: Any = None, **options: Any) -> PromptedModel:
        """The same backbone with every prompt adapter of a `PeftModel`, under the adapters' names.

        The backbone is taken over, not copied: use the `PeftModel` no more.
        """
        from fastprompt.integrations import peft

        with peft.saved_prompts(peft_model) as folders:
            model = cls(peft.unwrap(peft_model), tokenizer, **options)
            for name, folder in folders.items():
                model.load_prompt(name, folder, trainable=True)
        return model

    def why(self) -> str:
        """Which path prompts take through this backbone, and why."""
        info = self._info
        embeds = "compiled to prefixes" if info.compiles else "embedded before the text"
        lines = [f"{info.spec.describe()}: prefix path {info.path!r}", *info.reasons, f"embedding prompts are {embeds}"]
        return "\n  ".join(lines)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        prompts: str | Rows | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's forward with a prompt a row.

        Args:
            prompts: a name for all rows, or one name or None a row; None is the bare backbone.
            labels: as the backbone takes them.
            kwargs: the backbone's own arguments.
        Returns:
            the backbone's output; per-token fields cover the caller's tokens, never the virtual ones.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask} | kwargs
        if labels is not None:
            inputs["labels"] = labels
        rows = self._rows(prompts, inputs)
        if rows is None:
            return self.backbone(**inputs)
        with prepared(self._info, self.library, rows, inputs) as call:
            output = self.backbone(**call.inputs)
        return call.finish(output)

    def generate(self, inputs: torch.Tensor | None = None, *, prompts: str | Rows | None = None, **kwargs: Any) -> Any:
        """`backbone.generate` with a prompt a row; `prompts` as in `forward`."""
        if inputs is not None:
            kwargs["input_ids"] = inputs
        rows = self._rows(prompts, kwargs)
        if rows is None:
            return self.backbone.generate(**kwargs)
        if not self._info.encoder_decoder:
            check_generation(self._info, self.library, rows, kwargs)
            kwargs = call_inputs.pad_left(call_inputs.infer_mask(kwargs, self.backbone.generation_config))
        with torch.no_grad(), prepared(self._info, self.library, rows, kwargs, generating=True) as call:
            return call.finish_generation(self.backbone.generate(**call.inputs))

    def ensemble(
        self, prompts: Sequence[str], *, classes: Words | None = None, at: torch.Tensor | None = None, **inputs: Any
    ) -> Votes:
        """What several prompts of one task say about the same rows, from one forward without gradients.

        Args:
            prompts: their names.
            classes: for a language model, the token ids (one or several) of each class's words; None: the head's.
            at: int64 `[B]`, the column where a language model answers; None: the last token of each row.
            inputs: as in `forward`, each row once.
        """
        return ensemble(self, prompts, inputs, classes, at)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """As the backbone's own, always non-reentrant: reentrant checkpointing loses the prompts' gradients."""
        checkpointing.enable(self._info, activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again."""
        checkpointing.disable(self._info)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The same under its former name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused, because it would save the backbone without its prompts."""
        raise UnsupportedError("save prompts with save_prompt, the backbone with model.backbone.save_pretrained")

    push_to_hub = save_pretrained

    def _rows(self, prompts: str | Rows | None, inputs: dict[str, Any]) -> list[str | None] | None:
        """A checked name or None for each row; None for a call without prompts."""
        rows = check_rows(prompts, inputs, self.library)
        if self._places and not any(name and self.library[name].in_place for name in rows or ()):
            in_place.refuse(inputs.get("input_ids"))
        return rows

    def _give_head(
        self, prompt: SoftPrompt, num_labels: int | None, labels: Sequence[str] | None, seed: int | None
    ) -> None:
        prompt.labels = tuple(labels) if labels else None
        prompt.task_type = self._info.task_type
        with seeded(seed):
            prompt.head = heads.fresh_head(self.backbone, num_labels or (len(labels) if labels else None))

    def _take(self, name: str, prompt: SoftPrompt) -> SoftPrompt:
        """Add a prompt and let its head stand in for the backbone's; nothing is added if it cannot."""
        modules = heads.RowHeads((prompt.head,), (0,)).modules()
        known = {module_name for module_name, _ in self.backbone.named_modules()}
        if missing := modules - known:
            raise IncompatiblePromptError(
                f"prompt {name!r} has a head for {', '.join(sorted(missing))}, which {type(self.backbone).__name__} "
                "does not have: load the backbone with the task's class"
            )
        self.library.add(name, prompt)
        for module in modules - self._head_hooks:
            heads.hook(module, self.backbone.get_submodule(module), self._info.owner)
            self._head_hooks.add(module)
        if prompt.in_place and not self._places:
            in_place.hook(call_inputs.body_of(self.backbone), self._info.owner)
            self._places = True
        return prompt
