"""Generation: what a model says after a text, greedily or by beam search, in batches of many prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from fastprompt.prompts.base import check_int
from fastprompt.training import metrics
from fastprompt.training.padding import pad_token_id
from fastprompt.training.tasks.base import (
    IGNORED,
    Examples,
    Features,
    GenerationTask,
    Item,
    TaskBatch,
    TaskContext,
)
from fastprompt.training.tasks.causal import CausalLM, likelihood_scores
from fastprompt.training.tasks.reading import text_of
from fastprompt.training.tasks.sequence import tokenized


@dataclass(frozen=True)
class Generation(CausalLM, GenerationTask):
    """Says `target` after `text`, scored by what it generates; examples, rows and loss are those of `CausalLM`.

    Scores: `exact_match`, the share of generated texts that are the target but for space around it; `bleu` of
    sacrebleu where bleu=True; and those of `CausalLM`.

    Args:
        max_new_tokens: tokens after which an answer ends that has not ended itself.
        beams: of beam search; 1 is greedy.
    """

    max_new_tokens: int = 64
    beams: int = 1
    bleu: bool = False

    name: ClassVar[str] = "generation"
    metric: ClassVar[str] = "exact_match"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("max_new_tokens", self.max_new_tokens, 1)
        check_int("beams", self.beams, 1)

    def packages(self) -> tuple[str, ...]:
        return ("sacrebleu",) if self.bleu else ()

    def positions(self, row: Features) -> int:
        given = row.labels.count(IGNORED)
        return given + self._room_behind(row.input_ids[given:])

    def predict(self, model: Any, output: Any, batch: TaskBatch) -> list[Any]:
        return self.generate(model, batch)

    @torch.no_grad()
    def generate(self, model: Any, batch: TaskBatch) -> list[Any]:
        """Of each row the text that is generated, and what `CausalLM` predicts."""
        known = CausalLM.predict(self, model, self._forward(model, batch), batch)
        tokens = model.generate(
            **self._given(model, batch),
            prompts=list(batch.prompts),
            max_new_tokens=self.max_new_tokens,
            num_beams=self.beams,
            do_sample=False,
            eos_token_id=model.tokenizer.eos_token_id,
            pad_token_id=pad_token_id(model),
        )
        texts = model.tokenizer.batch_decode(self._said(tokens, batch), skip_special_tokens=True)
        return [(text, *row) for text, row in zip(texts, known, strict=True)]

    def score(
        self, predictions: Sequence[Sequence[Any]], examples: Examples, items: Sequence[Item]
    ) -> dict[str, float]:
        wanted = [text_of(examples[item.example], "target") for item in items]
        texts = metrics.generation([rows[0][0] for rows in predictions], wanted, bleu=self.bleu)
        return texts | likelihood_scores([rows[0][1:] for rows in predictions])

    def _room_behind(self, target: Sequence[int]) -> int:
        return max(len(target), self.max_new_tokens)

    def _forward(self, model: Any, batch: TaskBatch) -> Any:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, prompts=list(batch.prompts))

    def _given(self, model: Any, batch: TaskBatch) -> dict[str, torch.Tensor]:
        """The texts alone, `[R, N']`, padded on the right."""
        rows = [ids[: labels.count(IGNORED)] for ids, labels in zip(batch.input_ids, batch.labels, strict=True)]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id(model)),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        }

    def _said(self, tokens: torch.Tensor, batch: TaskBatch) -> torch.Tensor:
        """The generated tokens among all that `generate` returns."""
        return tokens[:, max(labels.count(IGNORED) for labels in batch.labels) :]


@dataclass(frozen=True)
class Seq2SeqLM(Generation):
    """Says `target` to `text` with an encoder-decoder; scores are those of `Generation`.

    Semantics:
        encoder row = text with special tokens; decoder row = start token + target without its last
        loss = -log p(token | text, target so far), summed over the target with its special tokens
    """

    name: ClassVar[str] = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"

    def check_setup(self, context: TaskContext) -> list[str]:
        problems = super().check_setup(context)
        if context.template is not None:
            problems.append("seq2seq takes no template: use a prompt that stands before the text")
        if context.decoder_start_token_id is None:
            problems.append("the backbone's config has no decoder_start_token_id, where every target begins: set it")
        return problems

    def positions(self, row: Features) -> int:
        return len(row.input_ids)

    def encode(self, example: Mapping[str, Any], context: TaskContext) -> tuple[Features, ...]:
        wanted = list(context.tokenizer(text_target=text_of(example, "target"))["input_ids"])
        row = tokenized(context, [text_of(example, "text")], wanted, self.truncate)
        start = context.decoder_start_token_id
        assert start is not None  # check_setup
        return (replace(row, token_type_ids=None, decoder_input_ids=[start, *wanted[:-1]]),)

    def _predicted(self, output: Any, batch: TaskBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return output.logits, batch.padded_labels(output.logits.shape[1])

    def _forward(self, model: Any, batch: TaskBatch) -> Any:
        start = model.config.decoder_start_token_id
        rows = [torch.tensor([start, *labels[:-1]]) for labels in batch.labels]
        decoder = pad_sequence(rows, batch_first=True).to(batch.input_ids.device)  # what follows a target is not read
        return model(**self._given(model, batch), decoder_input_ids=decoder, prompts=list(batch.prompts))

    def _given(self, model: Any, batch: TaskBatch) -> dict[str, torch.Tensor]:
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

    def _said(self, tokens: torch.Tensor, batch: TaskBatch) -> torch.Tensor:
        return tokens
