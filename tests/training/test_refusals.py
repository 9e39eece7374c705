"""Everything that is wrong with a run is told at once, before any training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import training_cases as cases
import zoo

import fastprompt as fp
from fastprompt.errors import TrainingError
from fastprompt.training import arguments, check
from fastprompt.training.template import Template


def problems(model: fp.PromptedModel, given: list[fp.Job], **options: Any) -> list[str]:
    """What a run is refused for; the model is then as before."""
    names, mode = model.prompt_names, model.training
    with pytest.raises(TrainingError) as caught:
        fp.train(model, given, **({"options": cases.CPU} | options))
    assert model.prompt_names == names and model.training == mode
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(epochs=2.0), "epochs is 2.0 and steps is 4, expected exactly one"),
        (dict(steps=None), "expected exactly one"),
        (dict(steps=0), "steps is 0"),
        (dict(steps=None, epochs=-1), "epochs is -1"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(learning_rate=-1.0), "learning_rate is -1.0"),
        (dict(head_learning_rate="much"), "head_learning_rate is 'much'"),
        (dict(schedule="square"), "schedule is 'square'"),
        (dict(warmup=1.5), "warmup is 1.5"),
        (dict(warmup=-1), "warmup is -1"),
        (dict(patience=2), "patience needs validation"),
        (dict(patience=0), "patience is 0"),
        (dict(seed=-1), "seed is -1"),
        (dict(max_grad_norm=-0.5), "max_grad_norm is -0.5"),
        (dict(name="a/b"), "'a/b' cannot name"),
        (dict(config=None), "no prompt of this name"),
        (dict(config="mine"), "config is str"),
        (dict(shares="cartridge"), "shares is 'cartridge'"),
        (dict(train=cases.Rows()), "train: the data set is empty"),
        (dict(train=cases.Rows([{"text": "a"}])), "train: column 'ids' is missing"),
        (dict(validation=cases.Rows()), "validation: the data set is empty"),
        (dict(train=cases.Rows([{"ids": [5] * 600}])), "train: example 0: 600 tokens"),
        (dict(config=fp.PTuning(num_virtual_tokens=512)), "512 virtual tokens, and the backbone has 512 positions"),
        (dict(config=fp.PTuningV2(num_virtual_tokens=2, layers=(7,))), "layers has [7]"),
        (dict(task="classify"), "task is str"),
        (dict(train=[{"ids": [5]}]), "train is list, expected a data set"),
        (dict(config=fp.PTuning(num_virtual_tokens=2, in_place=True)), "nothing says where: give a template"),
        (dict(template=Template("{2} {text} [MASK]")), "says where virtual tokens stand"),
        (dict(task=cases.Classify()), "classify needs a backbone of AutoModelForSequenceClassification"),
    ],
)
def test_one_fault(changes: dict[str, Any], told: str) -> None:
    given = cases.job("p_tuning", **changes)
    found = problems(cases.causal(), [given])
    assert any(told in problem and problem.startswith(f"job {given.name!r}: ") for problem in found), found


def test_all_faults_of_all_jobs_at_once() -> None:
    given = [
        cases.job("p_tuning", batch_size=0, schedule="square"),
        cases.job("cartridge", epochs=1),
        cases.job("cartridge", config=None, shares="nobody"),
    ]
    found = problems(cases.causal(), given, save_every=0, eval_batch_size=0, options=cases.CPU | {"max_grad_norm": 1.0})
    assert len(found) >= 7
    for word in (
        "batch_size",
        "schedule",
        "epochs",
        "nobody",
        "save_every",
        "eval_batch_size",
        "max_grad_norm",
        "another job",
    ):
        assert any(word in problem for problem in found), word


def test_faulty_data_of_all_jobs_at_once() -> None:
    given = [
        cases.job("p_tuning", train=cases.Rows([{"ids": []}])),
        cases.job("cartridge", train=cases.Rows()),
        cases.job("prefix_tuning", config=fp.PTuningV2(num_virtual_tokens=2, layers=(9,))),
    ]
    found = problems(cases.causal(), given)
    assert sorted(problem.split(":")[0] for problem in found) == [f"job {job.name!r}" for job in sorted_jobs(given)]


def sorted_jobs(given: list[fp.Job]) -> list[fp.Job]:
    return sorted(given, key=lambda job: job.name)


def test_checks_without_training() -> None:
    model = cases.causal()
    check(model, cases.jobs(), cases.CPU)
    assert model.prompt_names == []
    with pytest.raises(TrainingError, match="batch_size"):
        check(model, cases.jobs(batch_size=0))


def test_a_decoder_that_classifies_needs_to_know_padding() -> None:
    model = fp.PromptedModel(zoo.causal_classifier(pad_token_id=None), SimpleNamespace(pad_token_id=0))
    (found,) = problems(model, [cases.job("prefix_tuning", task=cases.Classify())])
    assert "no pad_token_id" in found


def test_names_that_clash() -> None:
    model = cases.causal()
    model.add_prompt("p_tuning", fp.PromptTuning(num_virtual_tokens=2))
    assert "in the model already" in problems(model, [cases.job("p_tuning")])[0]
    assert "shares" in problems(model, [cases.job("p_tuning", config=None, shares="p_tuning")])[0]


def test_a_prompt_of_the_model_needs_the_task_s_head() -> None:
    model = cases.classifier()
    model.add_prompt("p_tuning", fp.PromptTuning(num_virtual_tokens=2), num_labels=2)
    given = cases.job("p_tuning", config=None, task=cases.Classify(3), train=cases.texts(4, 0))
    assert "head has 2 outputs, and classify needs 3" in problems(model, [given])[0]


def test_a_model_without_a_tokenizer() -> None:
    assert "tokenizer" in problems(fp.PromptedModel(zoo.causal("llama")), [cases.job("p_tuning")])[0]


def test_a_backbone_that_reads_no_tokens() -> None:
    import transformers

    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    sizes |= dict(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=zoo.VOCAB, num_mel_bins=4)
    config = transformers.WhisperConfig(
        max_source_positions=10, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **sizes
    )
    with pytest.raises(fp.FastPromptError, match="WhisperForConditionalGeneration, which reads input_features"):
        fp.PromptedModel(transformers.WhisperForConditionalGeneration(config))


def test_what_is_no_model_and_no_jobs() -> None:
    job = cases.job("prefix_tuning")
    for model, jobs, told in (
        (zoo.causal("llama"), [job], "model is LlamaForCausalLM, expected PromptedModel"),
        (cases.causal(), job, "jobs is Job, expected a list"),
        (cases.causal(), [{"name": "a"}], "jobs has dict, expected Job"),
    ):
        for act in (fp.train, check):
            with pytest.raises(TrainingError, match=told):
                act(model, jobs)


def test_no_jobs() -> None:
    assert "jobs is empty" in problems(cases.causal(), [])[0]


def test_an_unknown_metric_is_told_before_any_step() -> None:
    given = cases.job("p_tuning", validation=cases.texts(3, 0), metric="beauty")
    assert "metric is 'beauty'" in problems(cases.causal(), [given])[0]


@pytest.mark.parametrize("name", [*arguments.INSTEAD, "nonsense", "gradient_acumulation_steps"])
def test_options_that_would_couple_prompts(name: str) -> None:
    (problem,) = arguments.check_options({name: 1})
    assert name in problem and "cannot be set" in problem
    if name.startswith("gradient_ac"):
        assert "did you mean 'gradient_accumulation_steps'" in problem


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_accumulation_has_to_be_a_count(value: Any) -> None:
    assert "gradient_accumulation_steps is" in arguments.check_options({"gradient_accumulation_steps": value})[0]


def test_folders(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    given = [cases.job("p_tuning")]
    assert "a file" in problems(cases.causal(), given, output_dir=file)[0]
    assert "output_dir" in problems(cases.causal(), given, resume=True)[0]
    assert "contradict" in problems(cases.causal(), given, output_dir=tmp_path, resume=True, overwrite=True)[0]
