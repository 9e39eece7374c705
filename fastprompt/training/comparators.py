"""Other ways to learn what prompts learn, in the same harness: full fine-tuning, linear probes, LoRA."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fastprompt.errors import ArgumentError
from fastprompt.heads import head_modules
from fastprompt.integrations.transformers import inputs as call_inputs
from fastprompt.prompts.init import seeded
from fastprompt.prompts.noise import Noise
from fastprompt.training.job import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL, LORA, PROBE, PROBE_MEAN = "full", "lora", "probe", "probe_mean"
KINDS = (FULL, LORA, PROBE, PROBE_MEAN)
LEARNING_RATES = {FULL: 5e-5, LORA: 2e-4, PROBE: 1e-2, PROBE_MEAN: 1e-2}
POOLED = ("sequence_classification",)
OF_TOKENS = ("token_classification",)


@dataclass(frozen=True)
class Comparator:
    """One way to learn a task; None stands for the job's own value.

    Semantics of `kind`:
        "full"         every weight of the backbone and its head
        "lora"         low-rank changes (PEFT), and the head
        "probe"        frozen backbone, a linear head on the first token ([CLS]), on a causal backbone's last one, or
                       on every token to be labelled
        "probe_mean"   frozen backbone, a linear head on the mean of all tokens
    """

    kind: str
    learning_rate: float | None = None
    weight_decay: float = 0.0
    batch_size: int | None = None
    epochs: float | None = None
    steps: int | None = None
    seed: int | None = None
    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] | None = None

    def job(self, job: Job) -> Job:
        """The job that this way does in place of a prompt's, under a name of its own."""
        changes: dict[str, Any] = self.lesson(job)
        return replace(job, name=f"{job.name} ({self.kind})", config=None, shares=None, init_from=None, **changes)

    def lesson(self, job: Job) -> dict[str, Any]:
        """How it learns the task of this job: fields of the new one."""
        own = self.epochs is not None or self.steps is not None
        return {
            "template": None,
            "learning_rate": LEARNING_RATES[self.kind] if self.learning_rate is None else self.learning_rate,
            "head_learning_rate": None,
            "weight_decay": self.weight_decay,
            "batch_size": job.batch_size if self.batch_size is None else self.batch_size,
            "seed": job.seed if self.seed is None else self.seed,
            "epochs": self.epochs if own else job.epochs,
            "steps": self.steps if own else job.steps,
        }

    def refusal(self, job: Job) -> str | None:
        """Why this way cannot do the job's task, if it cannot."""
        name = job.task.name
        if job.template is not None:
            return f"task {name} with a template is about virtual tokens"
        if self.kind == PROBE and name not in POOLED + OF_TOKENS:
            return f"a linear probe classifies texts or tokens, and the task is {name}"
        if self.kind == PROBE_MEAN and name not in POOLED:
            return f"a linear probe on the mean classifies texts, and the task is {name}"
        return None


class ComparedModel(nn.Module):
    """A backbone that learns in another way, called as a `PromptedModel` is; `library` has what it trains."""

    def __init__(self, backbone: Any, tokenizer: Any, name: str) -> None:
        super().__init__()
        self.backbone, self.tokenizer, self.name = backbone, tokenizer, name

    @property
    def library(self) -> dict[str, nn.Module]:
        return {self.name: Trained([p for p in self.parameters() if p.requires_grad])}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, prompts: Any = None, **inputs: Any) -> Any:
        return self.backbone(**inputs)

    def generate(self, prompts: Any = None, **inputs: Any) -> Any:
        if not self.backbone.config.is_encoder_decoder:
            inputs = call_inputs.pad_left(call_inputs.infer_mask(inputs, self.backbone.generation_config))
        return self.backbone.generate(**inputs)


class Probe(ComparedModel):
    """A frozen backbone and a linear head on its last states: of "each" token, the "first", "last" or "mean" one."""

    def __init__(self, backbone: Any, tokenizer: Any, name: str, outputs: int, pooling: str) -> None:
        super().__init__(backbone.requires_grad_(False), tokenizer, name)
        self.pooling = pooling
        self.linear = nn.Linear(backbone.config.hidden_size, outputs)

    def forward(self, prompts: Any = None, **inputs: Any) -> Any:
        with torch.no_grad():
            states = self.backbone.base_model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"]
        if self.pooling == "mean":
            states = (states * mask[..., None].to(states)).sum(1) / mask.sum(1, keepdim=True)
        elif self.pooling != "each":
            place = mask.sum(1) - 1 if self.pooling == "last" else torch.zeros_like(mask[:, 0])
            states = states[torch.arange(len(states), device=states.device), place]
        return SequenceClassifierOutput(logits=self.linear(states))  # in which data parallelism finds the tensors


class Trained(nn.Module):
    """Parameters of a model, held as the trainer expects those of a prompt."""

    head = None

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.encoder = nn.ParameterList(parameters)
        self.noise = Noise()  # it has no dropout of its own to draw


def build(
    comparator: Comparator, job: Job, backbone: PreTrainedModel, tokenizer: Any, *, causal: bool
) -> ComparedModel:
    """The model that learns a job, made by `comparator.job`, in this way; it takes the backbone over."""
    with seeded(job.seed):
        if comparator.kind == FULL:
            return ComparedModel(backbone.requires_grad_(True), tokenizer, job.name)
        if comparator.kind == LORA:
            return ComparedModel(_with_lora(comparator, backbone), tokenizer, job.name)
        outputs = job.task.num_labels()
        assert outputs is not None, "tasks without classes are refused"
        pooling = "last" if causal else "first"
        if job.task.name in OF_TOKENS or comparator.kind == PROBE_MEAN:
            pooling = "each" if job.task.name in OF_TOKENS else "mean"
        return Probe(backbone, tokenizer, job.name, outputs, pooling)


def _with_lora(comparator: Comparator, backbone: PreTrainedModel) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN
    except ImportError:
        raise ArgumentError("LoRA needs PEFT, which is not installed: pip install 'fastprompt[peft]'") from None
    targets: Any = list(comparator.target_modules) if comparator.target_modules else None
    if targets is None and backbone.config.model_type not in KNOWN:
        targets = "all-linear"
    config = LoraConfig(
        r=comparator.rank,
        lora_alpha=comparator.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        modules_to_save=head_modules(backbone) or None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, at PEFT
        return get_peft_model(backbone, config)
