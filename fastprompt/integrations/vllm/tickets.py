"""What a request carries to say which prefix it stands behind: a sealed cache salt, and placeholders for its tokens."""

from __future__ import annotations

import hmac
import re
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice

from fastprompt.errors import ArgumentError

MIN_SECRET = 32  # characters
CODE_IDS = 16  # token ids that placeholders are made of: one for each hexadecimal digit of a digest
_MARK = "fp1"
_BODY = re.compile(r"([0-9a-f]{64})-([1-9][0-9]{0,6})")
_SALT = re.compile(rf"{_MARK}-{_BODY.pattern}-([0-9a-f]{{8}})-([0-9a-f]{{32}})")


class ForgedSaltError(ArgumentError):
    """A cache salt that names a prefix without this server's seal."""


@dataclass(frozen=True)
class Ticket:
    """One version of a prompt as the engine knows it: the digest of its file, and how many virtual tokens it has."""

    digest: str
    length: int


def check_ticket(ticket: Ticket) -> None:
    """Raise ArgumentError for a ticket that no salt can spell."""
    if not isinstance(ticket.length, int) or _BODY.fullmatch(f"{ticket.digest}-{ticket.length}") is None:
        raise ArgumentError(
            f"digest is {ticket.digest!r} and length {ticket.length!r}, expected 64 hexadecimal digits and a number"
        )


class Seal:
    """Turns tickets into cache salts and back, with a secret that all processes of a server share.

    Semantics:
        salt = seal.salt(ticket, client="theirs")     # "fp1-<digest>-<length>-<client's own salt, hashed>-<HMAC>"
        seal.open(salt) == ticket                      # None for a salt that is no ticket; ForgedSaltError
        seal.client_salt("theirs")                     # what a client's salt becomes where there is no prompt

    The salt alone says which prefix a request reads: pages are found by it, and without it there is no prefix. So no
    request can have the one and not the other, and nobody without the secret can make one.
    """

    def __init__(self, secret: str) -> None:
        if len(secret) < MIN_SECRET:
            raise ArgumentError(
                f"the secret has {len(secret)} characters, expected {MIN_SECRET} at least: set FASTPROMPT_VLLM_SECRET "
                "to the same random text in every process of the server"
            )
        self._secret = secret.encode()

    def salt(self, ticket: Ticket, client: str | None = None) -> str:
        """The cache salt of a request under a prompt; requests with other `client` salts share no pages with it."""
        theirs = "0" * 8 if client is None else self._mac("client", client)[:8]
        body = f"{_MARK}-{ticket.digest}-{ticket.length}-{theirs}"
        return f"{body}-{self._mac('ticket', body)}"

    def open(self, salt: str | None) -> Ticket | None:
        """The ticket in a salt, None for a request without one. Errors: ForgedSaltError."""
        if salt is None or not salt.startswith(f"{_MARK}-"):
            return None
        match = _SALT.fullmatch(salt)
        if match is None or not hmac.compare_digest(match[4], self._mac("ticket", salt.rpartition("-")[0])):
            raise ForgedSaltError("the request's cache_salt names a prompt without this server's seal")
        return Ticket(match[1], int(match[2]))

    def client_salt(self, salt: str) -> str:
        """A client's own salt, where no prompt is asked for: it separates as before and can never be a ticket."""
        return f"client-{self._mac('client', salt)}"

    def _mac(self, purpose: str, text: str) -> str:
        return hmac.new(self._secret, f"{purpose}:{text}".encode(), sha256).hexdigest()[:32]


def code_ids(vocab_size: int, avoid: Collection[int]) -> tuple[int, ...]:
    """The token ids that placeholders are made of: the highest ones of the vocabulary without those to `avoid`.

    Many vocabularies have rows there that no text uses.
    """
    others = (token for token in range(vocab_size - 1, -1, -1) if token not in avoid)
    found = tuple(islice(others, CODE_IDS))
    if len(found) < CODE_IDS:
        raise ArgumentError(
            f"the vocabulary has {vocab_size} tokens, expected {CODE_IDS} at least besides special ones"
        )
    return found


def placeholders(ticket: Ticket, ids: tuple[int, ...]) -> list[int]:
    """Token ids that stand for a prompt's virtual tokens: its digest, digit by digit, as often as it takes."""
    code = [ids[int(digit, 16)] for digit in ticket.digest]
    return (code * (ticket.length // len(code) + 1))[: ticket.length]
