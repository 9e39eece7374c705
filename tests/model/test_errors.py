"""Bad input gets a FastPromptError that names what came, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo

import fastprompt as fp

IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


@pytest.fixture
def model() -> fp.PromptedModel:
    model = fp.PromptedModel(zoo.causal("llama"))
    model.add_prompt("one", fp.PrefixTuning(num_virtual_tokens=4))
    return model.eval()


def test_unknown_name_suggests_a_near_one(model: fp.PromptedModel) -> None:
    with pytest.raises(fp.FastPromptError, match=r"'on'.*did you mean 'one'"):
        model(input_ids=IDS, prompts="on")
    with pytest.raises(KeyError):
        model.remove_prompt("two")


@pytest.mark.parametrize("prompts", [["one"], ["one"] * 3, []])
def test_prompts_of_the_wrong_length(model: fp.PromptedModel, prompts: list[str]) -> None:
    with pytest.raises(fp.FastPromptError, match="2 rows"):
        model(input_ids=IDS, prompts=prompts)
    with pytest.raises(fp.FastPromptError, match="2 rows"):
        model.generate(input_ids=IDS, prompts=prompts, max_new_tokens=1)


@pytest.mark.parametrize("prompts", [[1, 2], [["one"], None], torch.tensor([0, 1])])
def test_prompts_that_are_not_names(model: fp.PromptedModel, prompts: object) -> None:
    with pytest.raises(fp.FastPromptError, match="expected"):
        model(input_ids=IDS, prompts=prompts)  # type: ignore[arg-type]


def test_duplicate_name(model: fp.PromptedModel, tmp_path: Path) -> None:
    before = model.library["one"]
    model.save_prompt("one", tmp_path / "one")
    for act in (
        lambda: model.add_prompt("one", fp.PromptTuning(num_virtual_tokens=2)),
        lambda: model.load_prompt("one", tmp_path / "one"),
    ):
        with pytest.raises(fp.FastPromptError, match="exists"):
            act()
    assert model.library["one"] is before
    assert model.prompt_names == ["one"]


@pytest.mark.parametrize("name", ["", None, 3])
def test_bad_names(model: fp.PromptedModel, name: object) -> None:
    with pytest.raises(fp.FastPromptError, match="name"):
        model.add_prompt(name, fp.PromptTuning(num_virtual_tokens=2))  # type: ignore[arg-type]
    assert model.prompt_names == ["one"]


def test_names_may_hold_anything_else(model: fp.PromptedModel) -> None:
    for name in ("a.b", "a/b", "tenant 7: ü", "..", "weight"):
        model.add_prompt(name, fp.PromptTuning(num_virtual_tokens=2), seed=0)
        assert model(input_ids=IDS, prompts=name).logits.shape == (2, 3, zoo.VOCAB)
    assert len(model.state_dict()) > 0


def test_prompt_of_another_backbone(model: fp.PromptedModel, tmp_path: Path) -> None:
    model.save_prompt("one", tmp_path / "one")
    other = fp.PromptedModel(zoo.causal("gpt2"))
    with pytest.raises(fp.FastPromptError, match=r"llama.*gpt2|gpt2.*llama"):
        other.load_prompt("one", tmp_path / "one")
    assert other.prompt_names == []
    with pytest.raises(fp.FastPromptError, match="llama"):
        other.add_prompt("one", model.library["one"])


def test_prefix_on_an_architecture_that_takes_none() -> None:
    model = fp.PromptedModel(zoo.encoder("deberta"))
    with pytest.raises(fp.FastPromptError, match="PromptTuning"):
        model.add_prompt("p", fp.PrefixTuning(num_virtual_tokens=2))
    assert model.prompt_names == []


def test_more_positions_than_the_backbone_has() -> None:
    model = fp.PromptedModel(zoo.causal("gpt2", n_positions=16))
    model.add_prompt("p", fp.PrefixTuning(num_virtual_tokens=10))
    assert model(input_ids=torch.full((1, 6), 5), prompts="p").logits.shape[1] == 6
    with pytest.raises(fp.FastPromptError, match=r"17 positions, the backbone has 16"):
        model(input_ids=torch.full((1, 7), 5), prompts="p")


def test_prompts_must_be_a_config_and_backbones_a_model(model: fp.PromptedModel) -> None:
    with pytest.raises(fp.FastPromptError, match="PrefixTuning"):
        model.add_prompt("x", {"num_virtual_tokens": 3})  # type: ignore[arg-type]
    with pytest.raises(fp.FastPromptError, match="PreTrainedModel"):
        fp.PromptedModel(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_full_bank_says_so_and_recovers() -> None:
    model = fp.PromptedModel(zoo.causal("llama"), bank_bytes=20_000)
    for i in range(3):
        model.add_prompt(f"p{i}", fp.PrefixTuning(num_virtual_tokens=20), seed=i)
    model.eval()
    with torch.no_grad():
        with pytest.raises(fp.FastPromptError, match="bytes"):
            model(input_ids=torch.full((3, 4), 5), prompts=["p0", "p1", "p2"])
        for name in model.prompt_names:  # one at a time they fit, evicting one another
            assert torch.isfinite(model(input_ids=IDS, prompts=name).logits).all()


def test_text_init_without_a_tokenizer(model: fp.PromptedModel) -> None:
    with pytest.raises(fp.FastPromptError, match="tokenizer"):
        model.add_prompt("t", fp.PromptTuning(num_virtual_tokens=3, init="text", init_text="say"))


def test_a_head_where_there_is_none(model: fp.PromptedModel) -> None:
    with pytest.raises(fp.FastPromptError, match="no task head"):
        model.add_prompt("h", fp.PrefixTuning(num_virtual_tokens=3), num_labels=4)


def test_unknown_format(model: fp.PromptedModel, tmp_path: Path) -> None:
    with pytest.raises(fp.FastPromptError, match="peft"):
        model.save_prompt("one", tmp_path / "x", format="pickle")
    assert not (tmp_path / "x").exists()
    with pytest.raises(fp.FastPromptError):
        model.load_prompt("y", tmp_path / "nowhere")


def test_empty_batch_and_nothing_at_all(model: fp.PromptedModel) -> None:
    with pytest.raises(fp.FastPromptError, match="input_ids"):
        model(prompts="one")


def test_four_dimensional_masks_are_refused_with_prompts(model: fp.PromptedModel) -> None:
    with pytest.raises(fp.FastPromptError, match="attention_mask"):
        model(input_ids=IDS, attention_mask=torch.ones(2, 1, 3, 3), prompts="one")
