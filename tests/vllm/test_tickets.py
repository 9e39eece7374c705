"""Cache salts that say which prefix a request stands behind, and that nobody else can write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprompt.errors import ArgumentError
from fastprompt.integrations.vllm.tickets import ForgedSaltError, Seal, Ticket, code_ids, placeholders

DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
TICKETS = st.builds(Ticket, DIGESTS, st.integers(1, 5000))
SEAL = Seal("s" * 32)


@given(TICKETS, st.none() | st.text(max_size=200))
def test_a_salt_opens_to_its_ticket(ticket, client):
    salt = SEAL.salt(ticket, client)
    assert SEAL.open(salt) == ticket
    assert len(salt) <= 128 and salt.isascii()  # what vLLM takes


@given(TICKETS, TICKETS)
def test_tickets_and_clients_have_salts_of_their_own(one, other):
    assert (SEAL.salt(one) == SEAL.salt(other)) == (one == other)
    assert len({SEAL.salt(one), SEAL.salt(one, ""), SEAL.salt(one, "a"), SEAL.salt(one, "b")}) == 4


@given(TICKETS, st.data())
def test_any_change_is_seen(ticket, data):
    salt = SEAL.salt(ticket)
    at = data.draw(st.integers(4, len(salt) - 1))
    forged = (
        salt[:at] + data.draw(st.sampled_from("0123456789abcdef-").filter(lambda c: c != salt[at])) + salt[at + 1 :]
    )
    with pytest.raises(ForgedSaltError):
        SEAL.open(forged)
    with pytest.raises(ForgedSaltError):
        Seal("t" * 32).open(salt)


@given(st.none() | st.text())
def test_other_salts_are_no_tickets(salt):
    if salt is None or not salt.startswith("fp1-"):
        assert SEAL.open(salt) is None
    if salt is not None:
        assert SEAL.open(SEAL.client_salt(salt)) is None


def test_a_short_secret_is_refused():
    with pytest.raises(ArgumentError, match="FASTPROMPT_VLLM_SECRET"):
        Seal("short")


@given(TICKETS, TICKETS)
def test_placeholders_tell_prompts_apart_and_fit_the_vocabulary(one, other):
    ids = code_ids(512, {511, 500})
    assert len(ids) == 16 and max(ids) == 510 and 500 not in ids
    assert len(placeholders(one, ids)) == one.length
    if one.length == other.length >= 64:
        assert (placeholders(one, ids) == placeholders(other, ids)) == (one.digest == other.digest)


def test_a_vocabulary_must_hold_the_code():
    with pytest.raises(ArgumentError, match="17 tokens, expected 16 at least besides"):
        code_ids(17, {0, 1})
