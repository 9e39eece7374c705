"""vLLM's KV connector for prompts: a request's cache salt says which prefix its first pages hold."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.model_executor.models.utils import extract_layer_index

from fastprompt import env
from fastprompt.integrations.vllm.checks import check_engine, check_model
from fastprompt.integrations.vllm.forgetting import CacheMemory
from fastprompt.integrations.vllm.loads import Load, plan_load
from fastprompt.integrations.vllm.offline import special_ids
from fastprompt.integrations.vllm.pages import PageWriter, Prefixes, check_layers, heads_of_rank
from fastprompt.integrations.vllm.store import PrefixStore
from fastprompt.integrations.vllm.tickets import ForgedSaltError, Seal, Ticket, code_ids, placeholders
from fastprompt.integrations.vllm.versions import check_installed

log = logging.getLogger("fastprompt.vllm")

PROMPT_LOGPROBS = ("prompt_logprobs", "prompt_logprob_token_ids")


@dataclass
class Loads(KVConnectorMetadata):
    """What a step's workers have to write before the model runs."""

    loads: list[Load] = field(default_factory=list)


class FastPromptConnector(KVConnectorBase_V1, SupportsHMA):
    """Writes prompts into pages.

    Semantics:
        a request whose cache_salt is a sealed ticket for P virtual tokens has P tokens "in the external cache"
        what of them is in no page yet is written before the step in which the request first runs
        a prefix that cannot be read fails its request, through vLLM's own report of pages that failed to load
    Set up by `fastprompt.integrations.vllm.transfer_config`. Errors when the engine starts: FastPromptError for a vLLM,
    a model or a setting that prompts would be wrong under. Later it raises nothing.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        check_installed()
        super().__init__(vllm_config, role, kv_cache_config)
        groups = kv_cache_config.kv_cache_groups
        check_engine(vllm_config, groups)
        store = PrefixStore(self._kv_transfer_config.get_from_extra_config("store", ""))
        backbone = store.backbone()
        layers = {name: extract_layer_index(name) for name in groups[0].layer_names}
        check_model(vllm_config, layers, backbone)
        if role == KVConnectorRole.SCHEDULER:
            model = vllm_config.model_config
            self.seal = Seal(env.vllm_secret() or "")
            self._ids = code_ids(model.get_vocab_size(), special_ids(model.hf_text_config))
            self._planned: list[Load] = []
            self._memory = CacheMemory()
        else:
            self.writer = self._writer(vllm_config, groups[0].kv_cache_spec, Prefixes(store, backbone.spec), layers)
            self._failed: set[int] = set()

    def _writer(self, config: Any, spec: Any, prefixes: Prefixes, layers: dict[str, int]) -> PageWriter:
        check_layers(config.compilation_config.static_forward_context, list(layers))
        parallel = config.parallel_config
        ranks = parallel.tensor_parallel_size
        heads = heads_of_rank(config.model_config.get_total_num_kv_heads(), ranks, parallel.rank % ranks)
        return PageWriter(prefixes, layers, heads, spec.block_size, spec.dtype)

    # the scheduler's half --------------------------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """The pages that vLLM finds by what they hold."""
        self._memory.pool = gpu_block_pool

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens of a request behind `num_computed_tokens` its prefix covers; they are there at once."""
        ticket, problem = self._ticket(request)
        if ticket is None and not problem:
            return 0, False
        # of a request that skips caches vLLM would compute the placeholders as text, and keep that under its salt
        request.skip_reading_prefix_cache = False
        # one that must fail has tokens "from here" too, whose pages are then reported as failed
        last = request.num_tokens - 1 if ticket is None else ticket.length
        return max(0, last - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note what to write, now that the request has its pages."""
        held = blocks.get_block_ids()[0]
        self._memory.begins(request, held)
        if num_external_tokens > 0:
            ticket, problem = self._ticket(request)
            self._planned.append(plan_load(ticket, problem, num_external_tokens, request.all_token_ids, held))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What the workers of this step are told."""
        planned, self._planned = self._planned, []
        self._memory.step()
        return Loads(planned)

    def update_connector_output(self, connector_output: Any) -> None:
        """Forget what stands behind pages that could not be loaded: vLLM itself forgets only what it can still see."""
        self._memory.forget(connector_output.invalid_block_ids)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Nothing is kept of a request."""
        return False, None

    def _ticket(self, request: Any) -> tuple[Ticket | None, str]:
        """The ticket a request carries, or why one that claims a prompt has none that is valid."""
        try:
            ticket = self.seal.open(request.cache_salt)
        except ForgedSaltError as error:
            return None, str(error)
        if ticket is None:
            return None, ""
        tokens = request.prompt_token_ids or []
        if ticket.length >= len(tokens):
            return None, f"the request has {len(tokens)} tokens, expected more than its {ticket.length} virtual ones"
        if tokens[: ticket.length] != placeholders(ticket, self._ids):
            return None, "the request does not begin with its prompt's placeholders"
        if any(getattr(request.sampling_params, name, None) is not None for name in PROMPT_LOGPROBS):
            return None, "the request asks for its prompt's log-probabilities, which virtual tokens do not have"
        return ticket, ""

    # the workers' half -----------------------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write this step's prefixes, before the model runs."""
        loads = self._get_connector_metadata().loads
        if loads:
            self._failed |= self.writer.write(loads, forward_context.no_compile_layers)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages whose requests must fail."""
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything is written when the model starts."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is kept."""

    def wait_for_save(self) -> None:
        """Nothing is kept."""
