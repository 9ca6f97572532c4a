import pytest

from dsv4.engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_tokens", 0, "1 or more"),
        ("max_tokens", True, "integer"),
        ("max_tokens", 1.5, "integer"),
        ("max_tokens", None, "integer"),
        ("temperature", None, "number"),
        ("stop", 3, "None"),
        ("temperature", -0.1, "[0, inf)"),
        ("temperature", float("nan"), "[0, inf)"),
        ("top_p", 0.0, "(0, 1]"),
        ("top_p", 1.01, "(0, 1]"),
        ("top_k", -1, "0 or more"),
        ("min_p", 1.5, "[0, 1]"),
        ("seed", -1, "[0, 9223372036854775807]"),
        ("seed", 2**63, "[0, 9223372036854775807]"),
        ("logprobs", -2, "0 or more"),
        ("n", 0, "1 or more"),
        ("presence_penalty", 2.1, "[-2, 2]"),
        ("frequency_penalty", -2.1, "[-2, 2]"),
        ("logit_bias", 5, "a dict"),
        ("stop_token_ids", 5, "a list of token ids"),
        ("temperature", 10**400, "[0, inf)"),
        ("prompt_logprobs", 3, "True or False"),
        ("json_object", None, "True or False"),
        ("json_schema", [1], "a JSON object"),
        ("json_schema", False, "a JSON object"),
        ("hidden_token_ids", 5, "a list of token ids"),
        ("choice", [], "at least 1 string"),
        ("choice", "ab", "at least 1 string"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(field: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(**{field: value})
    shown = repr(value) if isinstance(value, str) else value
    assert f"SamplingParams.{field} is {shown}" in str(error.value)
    assert allowed in str(error.value)


def test_a_schema_is_a_constraint_whatever_it_says() -> None:
    assert SamplingParams(json_schema={}).is_constrained and SamplingParams(json_schema={}).constraint_field
    with pytest.raises(ValueError, match="json_schema is False; allowed: a JSON object"):
        SamplingParams(json_schema=False, grammar_after=(5,))  # pyright: ignore[reportArgumentType]


def test_ids_and_salts_are_checked() -> None:
    with pytest.raises(ValueError, match=r"stop_token_ids\[1\] is 'x'; it must be an integer"):
        SamplingParams(stop_token_ids=(3, "x"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"stop_token_ids\[0\] is -1"):
        SamplingParams(stop_token_ids=(-1,))
    with pytest.raises(ValueError, match="cache_salt"):
        SamplingParams(cache_salt="\ud800")


def test_an_empty_stop_string_is_refused_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"stop\[1\]"):
        SamplingParams(stop=["a", ""])
    with pytest.raises(ValueError, match=r"stop\[0\]"):
        SamplingParams(stop="")


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams().stop_strings == SamplingParams(stop=None).stop_strings == ()


def test_logprobs_true_wants_no_alternatives_and_a_number_wants_that_many() -> None:
    assert not SamplingParams().wants_logprobs
    assert SamplingParams(logprobs=True).wants_logprobs and SamplingParams(logprobs=True).num_alternatives == 0
    assert SamplingParams(logprobs=0).wants_logprobs
    assert SamplingParams(logprobs=3).num_alternatives == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {"5": 1.0}}, r"logit_bias's token id is '5'; it must be an integer"),
        ({"logit_bias": {5: 101.0}}, r"logit_bias\[5\] is 101.0; allowed: \[-100, 100\]"),
        ({"regex": ""}, r"regex is ''; allowed: a string of at least 1 character"),
        ({"grammar": 3}, "grammar is 3; allowed: a string"),
        ({"choice": ["a", ""]}, r"choice\[1\] is ''; allowed"),
        ({"choice": ["a", "b\ud800"]}, r"choice\[1\]: character 1 is U\+D800"),
        ({"json_schema": "{"}, "json_schema is no JSON"),
        ({"json_schema": {"const": float("nan")}}, "json_schema is no JSON"),
        ({"json_schema": {}, "regex": "a"}, "has json_schema and regex; allowed: one of"),
        ({"json_object": True, "choice": ["a"]}, "has json_object and choice; allowed: one of"),
        ({"grammar_after": (5,)}, "grammar_after is set without a constraint"),
        ({"grammar_after": ("x",), "regex": "a"}, r"grammar_after\[0\] is 'x'; it must be an integer"),
    ],
)
def test_a_bad_bias_or_constraint_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_a_schema_may_be_text_or_a_dict() -> None:
    assert SamplingParams(json_schema='{"type": "null"}').schema == SamplingParams(json_schema={"type": "null"}).schema
    assert SamplingParams(json_schema={}).is_constrained and not SamplingParams().is_constrained
