from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driftscope.errors import InputError
from driftscope.forward.policy import KV_TYPES, PATHS, SITES, WHOLE_MODEL, Choice, Policy

CHOICES = st.builds(
    Choice,
    st.sampled_from(["teacher", "candidate"]),
    st.sampled_from(PATHS),
    st.sampled_from([None, "q8_0", "q8_K"]),
)
LAYERS = st.none() | st.lists(st.integers(WHOLE_MODEL, 5))
SITE_SETS = st.none() | st.lists(st.sampled_from(SITES))


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    policy = Policy(draw(CHOICES), kv_type=draw(st.sampled_from(KV_TYPES)))
    for _ in range(draw(st.integers(0, 3))):
        policy = policy.override(draw(CHOICES), layers=draw(LAYERS), sites=draw(SITE_SETS))
    return policy


@given(policies())
def test_a_policy_survives_json_and_can_be_hashed(policy: Policy) -> None:
    again = Policy.from_dict(json.loads(json.dumps(policy.to_dict())))
    assert again == policy
    assert hash(again) == hash(policy)
    assert {policy: 1}[again] == 1


def test_a_uniform_policy_is_the_same_everywhere() -> None:
    policy = Policy.uniform("candidate", "int8-dot")
    chosen = {policy.choice(layer, site) for layer in (WHOLE_MODEL, 0, 7) for site in SITES}
    assert chosen == {Choice("candidate", "int8-dot")}
    assert policy.artifacts == ("candidate",)


def test_the_last_override_that_covers_a_site_holds() -> None:
    int8, teacher = Choice("candidate", "int8-dot"), Choice("teacher")
    policy = Policy.uniform("candidate").override(int8, sites=["down", "o"]).override(teacher, layers=[2])
    assert policy.choice(1, "down") == int8
    assert policy.choice(1, "up") == Choice("candidate")
    assert policy.choice(2, "down") == teacher
    assert policy.choice(WHOLE_MODEL, "lm_head") == Choice("candidate")
    assert policy.artifacts == ("candidate", "teacher")


def test_the_order_in_which_layers_and_sites_are_named_does_not_matter() -> None:
    choice = Choice("teacher")
    a = Policy.uniform("candidate").override(choice, layers=[3, 1, 1], sites=["down", "q"])
    b = Policy.uniform("candidate").override(choice, layers={1, 3}, sites=("q", "down", "down"))
    assert a == b
    assert a.to_dict() == b.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "f16"}, "path 'f16' is unknown"),
        ({"kv_type": "q8_0"}, "kv_type 'q8_0' is unknown"),
        ({"overrides": [{"artifact": "teacher", "sites": ["qkv"]}]}, "site 'qkv' is unknown"),
        ({"overrides": [{"sites": ["q"]}]}, "malformed .*artifact"),
        ({"overrides": [{"artifact": "teacher", "layers": ["x"]}]}, "malformed"),
        ({"overrides": 3}, "malformed"),
        ({"sites": ["q"]}, "unknown key 'sites'"),
    ],
)
def test_a_malformed_policy_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Policy.from_dict({"artifact": "candidate", **change})


def test_a_choice_at_an_unknown_site_is_refused() -> None:
    with pytest.raises(InputError, match="site 'attn' is unknown"):
        Policy.uniform("teacher").choice(0, "attn")
