"""The model as one object: heads of a batch, threads, copies, saved prompts, the Trainer, several processes."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_cases import in_two_processes
from transformers import Trainer, TrainingArguments

import fastprompt as fp


def prompted(backbone: Any, **prompts: fp.PromptConfig) -> fp.PromptedModel:
    model = fp.PromptedModel(backbone)
    for i, (name, config) in enumerate(prompts.items()):
        prompt = model.add_prompt(name, config, seed=i)
        with torch.no_grad():
            for p in prompt.encoder.parameters():
                p.normal_(0.0, 0.5)
    return model.eval()


PREFIX, EMBED = fp.PrefixTuning(num_virtual_tokens=6), fp.PromptTuning(num_virtual_tokens=3)


@pytest.mark.parametrize("per_token", [False, True])
def test_heads_of_different_sizes_train_in_one_batch(per_token: bool) -> None:
    """Loss and gradients of rows with 2, 5 and 3 labels are those of the rows' own runs."""
    model = fp.PromptedModel(zoo.encoder("bert", "token_cls" if per_token else "seq_cls")).eval()
    sizes = {"a": 2, "b": 5, "c": 3}
    for name, labels in sizes.items():
        model.add_prompt(name, EMBED if name == "b" else PREFIX, num_labels=labels, seed=1)
    ids = torch.randint(3, zoo.VOCAB, (3, 7))
    shape = (7,) if per_token else ()
    labels = torch.stack([torch.randint(0, n, shape) for n in sizes.values()])
    out = model(input_ids=ids, labels=labels, prompts=list(sizes))
    out.loss.backward()
    mixed = {n: p.grad.clone() for n, p in model.library.named_parameters()}
    model.zero_grad()
    losses = [model(input_ids=ids[b : b + 1], labels=labels[b : b + 1], prompts=[n]).loss for b, n in enumerate(sizes)]
    (sum(losses) / 3).backward()
    torch.testing.assert_close(out.loss, sum(losses) / 3)
    for n, p in model.library.named_parameters():
        torch.testing.assert_close(mixed[n], p.grad, rtol=1e-4, atol=1e-6)


def test_threads_do_not_mix_their_rows() -> None:
    names = [f"p{i}" for i in range(6)]
    model = prompted(zoo.causal("llama"), **{n: fp.PrefixTuning(num_virtual_tokens=3 + i) for i, n in enumerate(names)})
    ids = torch.randint(3, zoo.VOCAB, (2, 8))

    def run(i: int) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, prompts=[names[i % 6], names[(i + 1) % 6]]).logits

    expected = [run(i) for i in range(6)]
    with ThreadPoolExecutor(4) as pool:
        for i, got in enumerate(pool.map(run, range(48))):
            torch.testing.assert_close(got, expected[i % 6], rtol=1e-5, atol=1e-5)


def test_threads_share_a_bank_too_small_for_all() -> None:
    names = [f"p{i}" for i in range(6)]
    backbone = zoo.causal("llama")
    model = fp.PromptedModel(backbone, bank_bytes=384 * 40)  # four of the prompts at a time
    for i, name in enumerate(names):
        model.add_prompt(name, fp.PrefixTuning(num_virtual_tokens=9), seed=i)
    model.eval()
    ids = torch.randint(3, zoo.VOCAB, (1, 8))

    def run(i: int) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, prompts=[names[i % 6]]).logits

    expected = [run(i) for i in range(6)]
    with ThreadPoolExecutor(2) as pool:
        for i, got in enumerate(pool.map(run, range(36))):
            torch.testing.assert_close(got, expected[i % 6], rtol=1e-5, atol=1e-5)
    assert model.library.bank.stats().evictions > 0


@pytest.mark.parametrize(
    "make", [lambda: zoo.causal("llama"), lambda: zoo.encoder("roberta")], ids=["llama", "roberta"]
)
def test_a_deep_copy_is_a_model_of_its_own(make: Any) -> None:
    model = prompted(make(), a=PREFIX, b=EMBED)
    ids = torch.randint(3, zoo.VOCAB, (2, 8))
    with torch.no_grad():
        expected = model(input_ids=ids, prompts=["a", "b"]).logits
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(input_ids=ids, prompts=["a", "b"]).logits, expected)
        twin.library["a"].encoder.weight.zero_()
        torch.testing.assert_close(model(input_ids=ids, prompts=["a", "b"]).logits, expected)


@pytest.mark.parametrize("format", ["fastprompt", "peft"])
def test_saved_and_loaded_prompts_give_the_same_logits(format: str, tmp_path: Path) -> None:
    configs = dict(
        prefix=PREFIX,
        embed=EMBED,
        lstm=fp.PTuning(num_virtual_tokens=4, encoder="lstm", encoder_hidden_size=16),
        mlp=fp.PTuningV2(num_virtual_tokens=5, reparameterization="mlp"),
        cartridge=fp.Cartridge(num_virtual_tokens=8),
    )
    model = prompted(zoo.causal("llama"), **configs)
    other = fp.PromptedModel(zoo.causal("llama"))
    ids = torch.randint(3, zoo.VOCAB, (5, 8))
    for name in configs:
        model.save_prompt(name, tmp_path / name, format=format)
        other.load_prompt(name, tmp_path / name)
    with torch.no_grad():
        expected = model(input_ids=ids, prompts=list(configs)).logits
        got = other.eval()(input_ids=ids, prompts=list(configs)).logits
    torch.testing.assert_close(got, expected)


class Rows(torch.utils.data.Dataset):
    """Rows of several prompts with their texts."""

    def __init__(self, names: list[str]) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, zoo.VOCAB, (24, 10), generator=generator)
        self.rows = [{"input_ids": x, "prompts": names[i % len(names)]} for i, x in enumerate(ids)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    ids = torch.stack([r["input_ids"] for r in rows])
    return {"input_ids": ids, "labels": ids, "prompts": [r["prompts"] for r in rows]}


def test_the_trainer_trains_every_prompt_and_nothing_else(tmp_path: Path) -> None:
    model = prompted(zoo.causal("llama"), a=PREFIX, b=EMBED, v2=fp.PTuningV2(num_virtual_tokens=4, layers=(-1,)))
    frozen = {n: p.clone() for n, p in model.backbone.named_parameters()}
    before = {n: p.clone() for n, p in model.library.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=6,
        learning_rate=0.05,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(["a", "b", "v2"]), data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(torch.equal(frozen[n], p) for n, p in model.backbone.named_parameters())
    assert not any(torch.equal(before[n], p) for n, p in model.library.named_parameters())


def _save_gradients(out: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(
        prompted(zoo.causal("llama"), a=PREFIX, b=EMBED), find_unused_parameters=True
    )
    ids = torch.arange(3, 3 + 4 * 8).view(4, 8)
    rows = ["a", "b", "b", None]
    mine = slice(2 * rank, 2 * rank + 2)
    model(input_ids=ids[mine], labels=ids[mine], prompts=rows[mine]).loss.backward()
    grads = {n: p.grad for n, p in model.module.library.named_parameters()}
    sharded = prompted(zoo.causal("llama"), a=PREFIX, b=fp.PTuningV2(num_virtual_tokens=3))
    for module in (*sharded.backbone.model.layers, sharded.backbone):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    sharded(input_ids=ids[mine], labels=ids[mine], prompts=rows[mine]).loss.backward()
    for n, p in sharded.library.named_parameters():
        grads[f"sharded {n}"] = p.grad if p.grad is not None else torch.zeros_like(p)
        torch.distributed.all_reduce(grads[f"sharded {n}"])
    if rank == 0:
        torch.save(grads, out)


def test_data_parallel_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    in_two_processes(_save_gradients, tmp_path / "grads")
    grads = torch.load(tmp_path / "grads", weights_only=True)
    ids = torch.arange(3, 3 + 4 * 8).view(4, 8)
    torch.manual_seed(0)
    for start, scale, b in (("", 1, EMBED), ("sharded ", 2, fp.PTuningV2(num_virtual_tokens=3))):
        model = prompted(zoo.causal("llama"), a=PREFIX, b=b)
        model(input_ids=ids, labels=ids, prompts=["a", "b", "b", None]).loss.backward()
        for n, p in model.library.named_parameters():
            torch.testing.assert_close(grads[start + n] / scale, p.grad, rtol=1e-4, atol=1e-6)


def test_the_bank_holds_a_prompt_once_however_many_rows_read_it() -> None:
    model = prompted(zoo.causal("llama"), a=fp.PrefixTuning(num_virtual_tokens=64))
    with torch.no_grad():
        for rows in (1, 16):
            model(input_ids=torch.full((rows, 4), 5), prompts="a")
    assert model.library.bank.stats().tokens == 64
