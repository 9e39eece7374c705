"""The oracle itself, against torch's attention on concatenated keys and against a loop over numbers."""

import math
import random

import torch
import torch.nn.functional as F
from op_cases import INF, attention, results

from fastprompt import reference


def test_equals_torch_attention_on_concatenated_keys():
    call = attention([(3, 6), (3, 6), (10, 6)], queries=5, keys=5)
    t = call.tensors
    prefix_k, prefix_v = (
        torch.stack([a[:, s : s + 6] for s in t["prefix_start"].tolist()]) for a in (t["prefix_k"], t["prefix_v"])
    )
    mask = torch.cat([torch.ones(5, 6), torch.ones(5, 5).tril()], 1).bool()
    want = F.scaled_dot_product_attention(
        t["q"], torch.cat([prefix_k, t["k"]], 2), torch.cat([prefix_v, t["v"]], 2), attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(call(reference.prefix_attention), want.transpose(1, 2), rtol=0, atol=1e-12)


def _loop(call, b: int, h: int, i: int) -> tuple[list[float], float]:
    """One query's output and lse, one number at a time."""
    t, s = call.tensors, call.settings
    at = {n: int(t[n][b]) for n in ("prefix_start", "prefix_len", "kv_start", "kv_len", "q_start")}
    kv_head = h // (t["q"].shape[1] // t["k"].shape[1])
    own_index = at["q_start"] + i
    position = at["prefix_len"] + own_index - at["kv_start"]
    seen = []  # key, value, bias
    for p in range(at["prefix_len"]):
        distance = position - p if s["causal"] else abs(position - p)
        if distance < s["window"]:
            token = at["prefix_start"] + p
            seen.append((t["prefix_k"][kv_head, token], t["prefix_v"][kv_head, token], t["prefix_bias"][0, h, 0, p]))
    for j in range(max(at["kv_start"], 0), at["kv_len"]):
        distance = own_index - j if s["causal"] else abs(own_index - j)
        if distance < s["window"] and not (s["causal"] and j > own_index):
            seen.append((t["k"][b, kv_head, j], t["v"][b, kv_head, j], t["bias"][0, h, 0, j]))
    cap, logits = s["softcap"], []
    for key, _, bias in seen:
        dot = sum(float(x) * float(y) for x, y in zip(t["q"][b, h, i], key, strict=True))
        logits.append(cap * math.tanh(s["scale"] * dot / cap) + float(bias))
    total = sum(math.exp(x) for x in logits) + math.exp(float(t["sinks"][h]))
    out = [
        sum(math.exp(x) / total * float(v[e]) for x, (_, v, _) in zip(logits, seen, strict=True))
        for e in range(t["v"].shape[3])
    ]
    return out, math.log(total)


def test_equals_a_loop_over_numbers():
    for causal in (True, False):
        call = attention(
            [(3, 5), (9, 2), (0, 0), (30, 9)], queries=3, keys=6, dims=(4, 3), sinks=True, bias=(1, 4, 1),
            causal=causal, window=6, softcap=2.5, scale=0.7,
            kv_start=[1, -3, 0, 4], kv_len=[6, 5, 0, 6], q_start=[3, 2, 0, 1],
        )  # fmt: skip
        out, lse = call(reference.prefix_attention, return_lse=True)
        for _ in range(40):
            b, h, i = random.randrange(4), random.randrange(4), random.randrange(3)
            want, want_lse = _loop(call, b, h, i)
            torch.testing.assert_close(out[b, i, h], torch.tensor(want, dtype=out.dtype), rtol=0, atol=1e-12)
            assert abs(float(lse[b, h, i]) - want_lse) < 1e-12


def test_gradients_are_those_of_finite_differences():
    call, names = attention(
        [(3, 3), (4, 3), (0, 0)], queries=3, keys=3, heads=(2, 1), dims=(4, 3), tokens=8, sinks=True, bias=(1, 2, 3),
        softcap=3.0, window=5, kv_start=[0, 2, 3],
    ).leaves()  # fmt: skip

    def function(*leaves):
        out, lse = call.with_tensors(**dict(zip(names, leaves, strict=True)))(
            reference.prefix_attention, return_lse=True
        )
        return out, lse.masked_fill(lse == -INF, 0.0)

    assert torch.autograd.gradcheck(function, [call.tensors[n] for n in names])


def test_sees_nothing():
    call = attention([(0, 0), (2, 4)], queries=2, keys=3, kv_start=[3, 3])
    found = results(call, reference.prefix_attention)
    assert (found["out"][0] == 0).all() and (found["lse"][0] == -INF).all()
    assert found["lse"][1].isfinite().all()
    assert (found["dq"][0] == 0).all() and (found["dk"] == 0).all()
    assert not any(x.isnan().any() for x in found.values())
