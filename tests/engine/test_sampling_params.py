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
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(field: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(**{field: value})
    assert f"SamplingParams.{field} is {value}" in str(error.value)
    assert allowed in str(error.value)


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
