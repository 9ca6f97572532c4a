import pytest

from dsv4.data.tasks.steps import add_steps, divide_steps, operation_steps, subtract_steps


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


@pytest.mark.parametrize("b", range(1, 10))
def test_a_division_has_a_line_per_digit_of_its_quotient(b: int) -> None:
    assert divide_steps(232, 8) == ["232/8", "23/8=2 7", "72/8=9 0"]
    assert divide_steps(816, 8) == ["816/8", "8/8=1 0", "1/8=0 1", "16/8=2 0"]
    for a in range(10 * b, 1000, 37):
        first, *lines = divide_steps(a, b)
        assert first == f"{a}/{b}" and int("".join(line.split("=")[1][0] for line in lines)) == a // b
        for line in lines:
            part, quotient, rest = int(line.split("/")[0]), *map(int, line.split("=")[1].split())
            assert part == b * quotient + rest and rest < b
    for wrong in ((10 * b - 1, b), (100, 0), (100, 10)):
        with pytest.raises(ValueError, match="b is from 1 to 9"):
            divide_steps(*wrong)


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
