import pytest

from dsv4.data.tasks.steps import add_steps, operation_steps, subtract_steps


def test_column_sums_carry_and_borrow() -> None:
    assert add_steps(47, 38) == ["47+38", "7+8=15", "4+3+1=8", "47+38=85"]
    assert add_steps(5, 99) == ["5+99", "5+9=14", "0+9+1=10", "5+99=104"]
    assert subtract_steps(52, 38) == ["52-38", "12-8=4", "5-3-1=1", "52-38=14"]
    assert subtract_steps(100, 1) == ["100-1", "10-1=9", "10-0-1=9", "1-0-1=0", "100-1=99"]
    assert add_steps(4, 5) == ["4+5=9"]


@pytest.mark.parametrize("a", range(0, 120, 7))
def test_every_column_is_right(a: int) -> None:
    for b in range(0, 120, 11):
        for lines in [add_steps(a, b)] if a < b else [add_steps(a, b), subtract_steps(a, b)]:
            for line in lines:
                if "=" in line:
                    left, right = line.split("=")
                    assert eval(left) == int(right), line


def test_operations_that_do_not_stay_small_are_refused() -> None:
    assert operation_steps(12, "*", 3) is None
    assert operation_steps(12, "-", 30) is None
    assert operation_steps(-12, "+", 30) is None
    assert operation_steps(3, "-", 9) == ["3-9=-6"]
    assert operation_steps(7, "*", 8) == ["7*8=56"]
    with pytest.raises(ValueError, match="'/'"):
        operation_steps(8, "/", 2)
    with pytest.raises(ValueError, match="must not be negative"):
        subtract_steps(12, 30)
