"""What vLLM must be set to for prompts to be right; anything else is refused when the engine starts."""

from __future__ import annotations

from typing import Any

from fastprompt.errors import ArgumentError, IncompatiblePromptError, UnsupportedError
from fastprompt.integrations.vllm.store import StoreBackbone

_PLAIN = ("auto", "bfloat16", "float16", "float32")


def check_engine(config: Any, groups: Any) -> None:
    """Raise for settings under which prefixes would be wrong, or failures would reach other requests.

    `config` is vLLM's VllmConfig, `groups` the `kv_cache_groups` of its KVCacheConfig. Errors: ArgumentError for a
    setting, UnsupportedError for a kind of model.
    """
    if config.model_config.runner_type != "generate":
        raise ArgumentError(
            f"runner is {config.model_config.runner_type!r}, expected 'generate': prompts continue texts"
        )
    parallel, transfer = config.parallel_config, config.kv_transfer_config
    policy = getattr(transfer, "kv_load_failure_policy", None)
    if policy != "fail":
        raise ArgumentError(
            f"kv_load_failure_policy is {policy!r}, expected 'fail': vLLM would go on without the prompt otherwise"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) != 1:
            raise ArgumentError(
                f"{name} is {getattr(parallel, name)}, expected 1: pages are split among ranks otherwise"
            )
    if config.cache_config.cache_dtype not in _PLAIN:
        raise ArgumentError(
            f"kv_cache_dtype is {config.cache_config.cache_dtype!r}, expected one of {', '.join(_PLAIN)}: prefixes in "
            "quantised pages are not tested"
        )
    if config.lora_config is not None:
        raise ArgumentError("enable_lora is set, and prompts under LoRA adapters are not tested: leave it out")
    speculative = config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise ArgumentError(
            f"speculative_config has method {speculative.method!r}, expected 'ngram' or none: a draft model would not "
            "see the prompt"
        )
    _check_groups(groups)


def _check_groups(groups: Any) -> None:
    if len(groups) != 1:
        raise UnsupportedError(
            f"this model has {len(groups)} groups of pages (sliding windows or recurrent layers beside full "
            "attention), expected one: vLLM could not fail a request alone there; use fastprompt serve"
        )
    spec = groups[0].kv_cache_spec
    kind = type(spec).__name__
    window = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
    if kind != "FullAttentionSpec" or window or getattr(spec, "non_causal", False):
        said = f"{kind} with a window of {window}" if window else kind
        raise UnsupportedError(
            f"this model's attention is {said}, expected full causal attention in every layer: a prefix would leave "
            "the window, or is not kept as keys and values; use fastprompt serve"
        )


def check_model(config: Any, layers: dict[str, int], backbone: StoreBackbone) -> None:
    """Raise IncompatiblePromptError unless a store's prefixes are for this model; `layers` maps names to numbers."""
    model, spec = config.model_config, backbone.spec
    text, shape = model.hf_text_config, spec.layers[0]
    pipeline = getattr(config.parallel_config, "pipeline_parallel_size", 1)
    here = {
        "model type": text.model_type,
        "hidden size": model.get_hidden_size(),
        "kv heads": model.get_total_num_kv_heads(),
        "head size": model.get_head_size(),
    }
    made_for = {
        "model type": spec.model_type,
        "hidden size": spec.hidden_size,
        "kv heads": shape.kv_heads,
        "head size": shape.key_dim,
    }
    if pipeline == 1:
        here["layers"], made_for["layers"] = sorted(layers.values()), list(range(spec.num_layers))
    wrong = [f"{name} {here[name]} here, {made_for[name]} there" for name in here if here[name] != made_for[name]]
    if wrong:
        raise IncompatiblePromptError(
            f"the store's prefixes were made for {spec.describe()}, not for this model: {'; '.join(wrong)}; export the "
            "prompts for this model"
        )
