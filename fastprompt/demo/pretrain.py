"""Train the embedded backbone and its tokenizer from nothing: `python -m fastprompt.demo.pretrain`.

Everything follows from `--seed`: the corpus is generated (`corpus.py`), the weights are initialised and the rows are
drawn from it, so a second run on the same machine and versions gives the same files.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import tokenizers
import torch
import transformers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast as Tokenizer

from fastprompt.demo import ASSETS, corpus
from fastprompt.demo.tasks import ASK, exact_match, tasks

TOKENIZER_DOCUMENTS = 4000


@dataclass(frozen=True)
class Recipe:
    """Every number that decides what comes out."""

    seed: int = 0
    steps: int = 2400
    batch: int = 32
    length: int = 96
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.04
    vocabulary: int = 1024
    hidden: int = 128
    intermediate: int = 448
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    scored: int = 64


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    """A byte-level BPE trained on the corpus; the end of a line is its end-of-sequence token."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=["<pad>", "<bos>", "\n"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator((corpus.document(recipe.seed, -i) for i in range(1, TOKENIZER_DOCUMENTS)), trainer)
    return Tokenizer(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="\n",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, tokenizer: Tokenizer) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return transformers.LlamaForCausalLM(config)


class Rows(Dataset):
    """Row `i` is the beginning of document `i`; every second row opens with the begin token."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        opening = "<bos>" if index % 2 else ""
        text = opening + corpus.document(self.recipe.seed, index, 6 * self.recipe.length)
        ids = torch.tensor(self.tokenizer(text).input_ids[: self.recipe.length])
        return {"input_ids": ids, "labels": ids}


def skill_scores(model: transformers.PreTrainedModel, tokenizer: Tokenizer, count: int) -> dict[str, float]:
    """Exact match of each skill over `count` subjects, each asked for after a list of three other lines."""
    scores = {}
    for skill in corpus.SKILLS.values():
        rng, pairs = Random(f"score/{skill.name}"), []
        for _ in range(count):
            *shown, asked = rng.sample(list(skill.answers), 4)
            context = "".join(f"{x}{ASK} {skill.answers[x]}\n" for x in shown)
            pairs.append((f"{context}{asked}{ASK}", f" {skill.answers[asked]}"))
        scores[skill.name] = exact_match(model, tokenizer, pairs)
    return scores


def task_scores(model: transformers.PreTrainedModel, tokenizer: Tokenizer, count: int) -> dict[str, dict]:
    """Tasks without training: bare and after three examples on `test`, each phrasing on `train` and on `test`."""
    scores = {}
    for task in tasks():
        train, test = task.train[:count], task.test[:count]
        shown = "".join(f"{x}{y}\n" for x, y in train[:3])
        scores[task.name] = {
            "bare": exact_match(model, tokenizer, test),
            "three_examples": exact_match(model, tokenizer, [(shown + x, y) for x, y in test]),
            "phrasings": {
                text: [
                    exact_match(model, tokenizer, [(task.written(x, text), y) for x, y in pairs])
                    for pairs in (train, test)
                ]
                for text in task.phrasings
            },
        }
    return scores


def pretrain(recipe: Recipe, out: Path) -> dict:
    """Train by `recipe`, write tokenizer, weights and record to `out` (replaced in one rename); returns the record."""
    started = time.time()
    transformers.set_seed(recipe.seed)
    tokenizer = train_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch,
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            adam_beta2=0.98,
            warmup_steps=int(recipe.warmup * recipe.steps),
            lr_scheduler_type="cosine",
            logging_steps=max(1, recipe.steps // 45),
            save_strategy="no",
            report_to="none",
            seed=recipe.seed,
            use_cpu=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows(recipe, tokenizer))
        trainer.train()
        model.eval()
        record = {
            "command": f"python -m fastprompt.demo.pretrain --seed {recipe.seed} --steps {recipe.steps}",
            "recipe": asdict(recipe),
            "parameters": model.num_parameters(),
            "tokens": recipe.steps * recipe.batch * recipe.length,
            "loss": [[e["step"], round(e["loss"], 4)] for e in trainer.state.log_history if "loss" in e],
            "skills": skill_scores(model, tokenizer, recipe.scored),
            "tasks": task_scores(model, tokenizer, recipe.scored),
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)},
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "wall_seconds": round(time.time() - started),
        }
        folder = Path(scratch) / "assets"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    return record


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args(argv)
    record = pretrain(Recipe(seed=args.seed, steps=args.steps), args.out)
    print(json.dumps(record["skills"], indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
