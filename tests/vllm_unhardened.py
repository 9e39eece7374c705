"""The connector without what protects it: what the traps of tests/vllm/test_traps.py are shown with."""

from __future__ import annotations

from typing import Any

from fastprompt.integrations.vllm.connector import FastPromptConnector
from fastprompt.integrations.vllm.tickets import Ticket


class Unhardened(FastPromptConnector):
    """Takes the prompt from the request's transfer parameters, whatever its salt and its placeholders say."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        ticket, _ = self._ticket(request)
        return (0 if ticket is None else max(0, ticket.length - num_computed_tokens)), False

    def _ticket(self, request: Any) -> tuple[Ticket | None, str]:
        said = (request.kv_transfer_params or {}).get("fastprompt")
        return (None if said is None else Ticket(*said)), ""


class Raising(FastPromptConnector):
    """Lets what goes wrong with a prompt's file out of the workers' half."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for load in self._get_connector_metadata().loads:
            self.writer.prefixes.get(load.ticket.digest)
        super().start_load_kv(forward_context, **kwargs)
