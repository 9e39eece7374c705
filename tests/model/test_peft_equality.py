"""Logits, loss, gradients and greedy tokens equal PEFT's on every architecture where PEFT works."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import zoo

import fastprompt as fp

P, ROWS, TOKENS = 6, 2, 13
METHODS = {
    "prefix": peft.PrefixTuningConfig,
    "prompt": peft.PromptTuningConfig,
    "p_tuning": peft.PromptEncoderConfig,
    "multitask": peft.MultitaskPromptTuningConfig,
    "cartridge": peft.CartridgeConfig,
}
EXTRA: dict[str, dict[str, Any]] = {
    "p_tuning": dict(encoder_hidden_size=16),
    "multitask": dict(num_tasks=3, num_ranks=2),
    "cartridge": dict(num_frozen_tokens=0),
}
PREFIX_KIND = ("prefix", "cartridge")
PEFT_RAISES = {"deepseek_v3", "falcon_mqa"}  # prefixes: their key and value shapes are not what PEFT expects
TASK = 1


def peft_model(backbone: Any, method: str, task_type: str, **more: Any) -> Any:
    options = dict(task_type=task_type, num_virtual_tokens=P) | EXTRA.get(method, {}) | more
    model = peft.get_peft_model(copy.deepcopy(backbone), METHODS[method](**options)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0.0, 0.4)
    return model


def ours(backbone: Any, adapter: Any, folder: Path) -> tuple[fp.PromptedModel, Any]:
    adapter.save_pretrained(folder)
    model = fp.PromptedModel(backbone)
    multitask = "MULTITASK" in str(adapter.peft_config["default"].peft_type)
    prompt = model.load_prompt("it", folder, trainable=True, task_id=TASK if multitask else None)
    return model.eval(), prompt


def peft_gradient(model: Any, run: Any) -> torch.Tensor:
    """Gradient `[P, width]` of PEFT's loss with respect to what its prompt encoder puts out."""
    seen: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handle = model.prompt_encoder["default"].register_forward_hook(keep)
    run().loss.backward()
    handle.remove()
    grad = seen[0].grad
    return grad.sum(0) if grad.dim() == 3 else grad


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error <= 1e-4, f"{what}: relative error {error:.2e}"


def task_ids(method: str) -> dict[str, torch.Tensor]:
    return {"task_ids": torch.full((ROWS,), TASK)} if method == "multitask" else {}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", zoo.CAUSAL)
def test_causal(name: str, method: str, tmp_path: Path) -> None:
    backbone = zoo.causal(name)
    theirs = peft_model(backbone, method, "CAUSAL_LM")
    ids = torch.randint(3, zoo.VOCAB, (ROWS, TOKENS))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    extra = task_ids(method)
    if name in PEFT_RAISES and method in PREFIX_KIND:
        with pytest.raises(RuntimeError):
            theirs(**inputs)
        return
    model, prompt = ours(backbone, theirs, tmp_path)
    expected_grad = peft_gradient(theirs, lambda: theirs(**inputs, **extra, labels=ids))
    with torch.no_grad():
        expected = theirs(**inputs, **extra, labels=ids)
    got = model(**inputs, labels=ids, prompts="it")
    got.loss.backward()
    assert_equal(got.logits, expected.logits[:, -TOKENS:], "logits")
    if method in PREFIX_KIND:  # the others' loss counts the same tokens, and one more: the first, after the prompt
        assert_equal(got.loss, expected.loss, "loss")
        assert_equal(prompt.encoder.weight.grad, expected_grad, "gradient")
    else:
        labels = torch.cat([torch.full((ROWS, P), -100), torch.full_like(ids[:, :1], -100), ids[:, 1:]], dim=1)
        assert_equal(got.loss, _shifted_loss(expected.logits, labels), "loss")
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert (
        model.generate(**inputs, prompts="it", **options).tolist()
        == theirs.generate(**inputs, **extra, **options).tolist()
    )


def _shifted_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "multitask"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom", "deepseek_v3"])
def test_embedding_prompt_gradient(name: str, method: str, tmp_path: Path) -> None:
    """With the first token's loss left out on both sides, gradients of the embeddings are equal."""
    backbone = zoo.causal(name)
    theirs = peft_model(backbone, method, "CAUSAL_LM")
    ids = torch.randint(3, zoo.VOCAB, (ROWS, TOKENS))
    labels = torch.cat([torch.full_like(ids[:, :1], -100), ids[:, 1:]], dim=1)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    model, prompt = ours(backbone, theirs, tmp_path)
    expected = peft_gradient(theirs, lambda: theirs(**inputs, **task_ids(method)))
    model(**inputs, prompts="it").loss.backward()
    assert_equal(prompt.encoder.weight.grad, expected[:P], "gradient")


@pytest.mark.parametrize("method", ["prefix", "cartridge"])
@pytest.mark.parametrize("name", sorted(zoo.CAUSAL.keys() - PEFT_RAISES - {"llama4_text"}))
def test_left_padding_with_a_prefix(name: str, method: str, tmp_path: Path) -> None:
    """Generation from a left-padded batch, where PEFT is right itself."""
    backbone = zoo.causal(name)
    theirs = peft_model(backbone, method, "CAUSAL_LM")
    model, _ = ours(backbone, theirs, tmp_path)
    ids = torch.randint(3, zoo.VOCAB, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    inputs = dict(input_ids=ids * mask, attention_mask=mask)
    assert model.generate(**inputs, prompts="it", **options).tolist() == theirs.generate(**inputs, **options).tolist()


def right_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids with their mask; the last row has three tokens of padding."""
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[-1, -3:] = 0
    return torch.randint(3, zoo.VOCAB, (ROWS, TOKENS)), mask


@pytest.mark.parametrize("method", ["prefix", "prompt", "p_tuning"])
@pytest.mark.parametrize("name", zoo.SEQ2SEQ)
def test_encoder_decoder(name: str, method: str, tmp_path: Path) -> None:
    backbone = zoo.seq2seq(name)
    theirs = peft_model(backbone, method, "SEQ_2_SEQ_LM")
    model, prompt = ours(backbone, theirs, tmp_path)
    ids, mask = right_padded()
    labels = torch.randint(3, zoo.VOCAB, (ROWS, 7))
    inputs = dict(input_ids=ids, attention_mask=mask, labels=labels)
    expected_grad = peft_gradient(theirs, lambda: theirs(**inputs))
    with torch.no_grad():
        expected = theirs(**inputs)
    got = model(**inputs, prompts="it")
    got.loss.backward()
    assert_equal(got.logits, expected.logits, "logits")
    assert_equal(got.loss, expected.loss, "loss")
    grad = prompt.encoder.weight.grad
    if method == "prefix":
        grad = _to_peft_slots(grad, model._info.spec.num_layers)
    assert_equal(grad, expected_grad[:P], "gradient")
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, num_beams=1)
    del inputs["labels"]
    assert model.generate(**inputs, prompts="it", **options).tolist() == theirs.generate(**inputs, **options).tolist()


def _to_peft_slots(grad: torch.Tensor, layers: int) -> torch.Tensor:
    """PEFT's decoder layer l reads slots 4l and 4l + 1 modulo 2L, so layers share slots and others stay unused."""
    ours_by_slot = grad.view(P, 2 * layers, -1)
    slots = torch.zeros_like(ours_by_slot)
    for layer in range(layers):
        for side in (0, 1):
            slots[:, (4 * layer + side) % (2 * layers)] += ours_by_slot[:, 2 * layer + side]
    return slots.flatten(1)


ENCODER_CASES = [
    (name, head, method)
    for name in ("bert", "roberta", "xlm_roberta", "electra")
    for head, methods in {
        "seq_cls": ("prefix", "prompt", "p_tuning", "multitask", "cartridge"),
        "token_cls": ("prefix",),
        "qa": ("prefix", "prompt", "p_tuning"),
    }.items()
    for method in methods
]
ENCODER_CASES += [
    (name, "seq_cls", method)
    for name in ("albert", "distilbert", "deberta", "deberta_v2", "mpnet")
    for method in ("prompt", "p_tuning")
]
NOT_IN_CONFIG = dict(token_dim=32, num_layers=3, num_attention_heads=4)  # DistilBERT names them otherwise
TASKS = {"seq_cls": "SEQ_CLS", "token_cls": "TOKEN_CLS", "qa": "QUESTION_ANS"}


@pytest.mark.parametrize(("name", "head", "method"), ENCODER_CASES)
def test_encoder(name: str, head: str, method: str, tmp_path: Path) -> None:
    backbone = zoo.encoder(name, head, **({"embedding_size": 32} if name == "albert" else {}))
    theirs = peft_model(backbone, method, TASKS[head], **(NOT_IN_CONFIG if name == "distilbert" else {}))
    model, prompt = ours(backbone, theirs, tmp_path)
    ids, mask = right_padded()
    if head == "qa":  # its loss is a softmax over padding too, whose logits mean nothing
        mask = torch.ones_like(mask)
    ids = torch.where(mask.bool(), ids, backbone.config.pad_token_id)
    inputs: dict[str, Any] = dict(input_ids=ids, attention_mask=mask)
    if head == "qa":
        inputs |= dict(start_positions=torch.tensor([1, 4]), end_positions=torch.tensor([2, 9]))
    else:
        inputs["labels"] = torch.randint(0, 2, (ROWS,) if head == "seq_cls" else (ROWS, TOKENS))
        if head == "token_cls":
            inputs["labels"] = inputs["labels"].masked_fill(mask == 0, -100)
    reference = dict(inputs) | task_ids(method)
    if head == "qa" and method not in PREFIX_KIND:  # PEFT leaves the spans where they were without the prompt
        reference |= {key: reference[key] + P for key in ("start_positions", "end_positions")}
    expected_grad = peft_gradient(theirs, lambda: theirs(**reference))
    with torch.no_grad():
        expected = theirs(**reference)
    got = model(**inputs, prompts="it")
    got.loss.backward()
    for field in ("logits", "start_logits", "end_logits"):
        if (want := expected.get(field)) is not None:
            real = slice(None) if head == "seq_cls" else mask.bool()
            assert_equal(got[field][real], (want[:, -TOKENS:] if head == "qa" else want)[real], field)
    assert_equal(got.loss, expected.loss, "loss")
    assert_equal(prompt.encoder.weight.grad, expected_grad[:P], "gradient")


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_from_peft(name: str) -> None:
    causal = name == "llama"
    backbone = zoo.causal(name) if causal else zoo.encoder(name)
    theirs = peft_model(backbone, "prefix", "CAUSAL_LM" if causal else "SEQ_CLS")
    ids = torch.randint(3, zoo.VOCAB, (ROWS, TOKENS))
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        model = fp.PromptedModel.from_peft(theirs)
        assert model.prompt_names == ["default"]
        assert_equal(model(input_ids=ids, prompts="default").logits, expected, "logits")
