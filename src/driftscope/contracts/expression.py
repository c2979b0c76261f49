"""Plain arithmetic on printed figures, with the rounding of what was printed carried along.

A figure printed as ``5.70`` stands for anything from 5.695 to 5.705. Each value here is a point with the
two ends that its inputs' rounding allows (interval arithmetic, Moore 1966), so that a product of printed
factors can be told from a product that merely looks alike.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from driftscope.errors import InputError

MAXIMUM_LENGTH = 500


@dataclass(frozen=True)
class Interval:
    """A value and the ends that the rounding of its inputs allows."""

    value: float
    low: float
    high: float

    @classmethod
    def exact(cls, value: float) -> Interval:
        """Return a value without rounding."""
        return cls(value, value, value)

    @classmethod
    def printed(cls, text: str) -> Interval:
        """Return what a printed decimal stands for: half a unit of its last digit to either side.

        A figure without a decimal point is exact: a count.

        Raises:
            InputError: it is not a finite decimal number.
        """
        value, half = decimal_of(text)
        if "." not in text:
            half = 0.0
        return cls(value, value - half, value + half)


def decimal_of(text: str) -> tuple[float, float]:
    """Return the value of a printed decimal and half a unit of its last digit.

    Raises:
        InputError: it is not a finite decimal number.
    """
    try:
        number = Decimal(text)
    except InvalidOperation as error:
        raise InputError(f"{text!r} is not a decimal number") from error
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int):
        raise InputError(f"{text!r} is not a finite decimal number")
    return float(number), float(Decimal(5).scaleb(exponent - 1))


Value = Interval | list[Interval]


def evaluate(expression: str, inputs: Mapping[str, Value]) -> Interval:
    """Evaluate an expression of + - * / **, brackets and the functions below over named inputs.

    Functions of a list: `mean`, `smallest`, `largest`, `count`, `drops` (how often a value is below the one
    before), `close` (how often it is within a tenth of the one before). `quotients(a, b)`: one list over
    another. `inside(a, low, high)`: how many are in a band. `ulps_below(x, y)`: how many float32 steps y
    lies below x.

    Raises:
        InputError: the expression has anything else in it, a name is not among the inputs, or it divides
            by zero.
    """
    if len(expression) > MAXIMUM_LENGTH:
        raise InputError(f"expression of {len(expression)} characters; at most {MAXIMUM_LENGTH} are allowed")
    try:
        tree = ast.parse(expression, mode="eval")
        result = _value(tree.body, inputs)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise InputError(f"expression {expression!r} cannot be read: {error}") from error
    except (ZeroDivisionError, OverflowError) as error:
        raise InputError(f"expression {expression!r} cannot be evaluated: {error}") from error
    if isinstance(result, list):
        raise InputError(f"expression {expression!r} gives a list, expected a number")
    if not all(math.isfinite(end) for end in (result.value, result.low, result.high)):
        raise InputError(f"expression {expression!r} is not finite")
    return result


def _value(node: ast.expr, inputs: Mapping[str, Value]) -> Value:
    if isinstance(node, ast.Constant) and _is_number(node.value):
        return Interval.exact(float(ast.literal_eval(node)))
    if isinstance(node, ast.Name):
        if node.id not in inputs:
            raise InputError(f"expression names `{node.id}`, which is not among its inputs")
        return inputs[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _number(node.operand, inputs)
        return Interval(-inner.value, -inner.high, -inner.low)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _combine(
            _OPERATORS[type(node.op)], _number(node.left, inputs), _number(node.right, inputs), node.op
        )
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _call(node.func.id, [_value(argument, inputs) for argument in node.args])
    raise InputError(f"expression holds `{ast.unparse(node)}`, which is not allowed")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(node: ast.expr, inputs: Mapping[str, Value]) -> Interval:
    value = _value(node, inputs)
    if isinstance(value, list):
        raise InputError(f"expression uses the list `{ast.unparse(node)}` as a number")
    return value


def _power(base: float, exponent: float) -> float:
    if abs(exponent) > 64 or exponent != int(exponent):
        raise InputError(f"expression raises to the power {exponent}; expected an integer of at most 64")
    return float(base ** int(exponent))


_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: _power,
}


def _combine(
    operation: Callable[[float, float], float], left: Interval, right: Interval, operator: ast.operator
) -> Interval:
    if isinstance(operator, ast.Div) and right.low <= 0.0 <= right.high:
        raise InputError("expression divides by what may be zero")
    if isinstance(operator, ast.Pow) and (right.low != right.high or left.low < 0.0):
        raise InputError("expression raises a negative or to a rounded power")
    corners = [operation(a, b) for a in (left.low, left.high) for b in (right.low, right.high)]
    return Interval(operation(left.value, right.value), min(corners), max(corners))


def _call(name: str, arguments: Sequence[Value]) -> Value:
    if name == "ulps_below" and len(arguments) == 2:
        return _ulps_below(*arguments)
    if name == "quotients" and len(arguments) == 2:
        return _quotients(*arguments)
    if name == "inside" and len(arguments) == 3:
        return _inside(*arguments)
    if name in _FUNCTIONS and len(arguments) == 1 and isinstance(arguments[0], list) and arguments[0]:
        return _FUNCTIONS[name](arguments[0])
    known = ", ".join([*sorted(_FUNCTIONS), "inside", "quotients", "ulps_below"])
    raise InputError(f"expression calls `{name}` with {len(arguments)} arguments; known functions: {known}")


def _quotients(above: Value, below: Value) -> list[Interval]:
    if not isinstance(above, list) or not isinstance(below, list) or len(above) != len(below):
        raise InputError("quotients needs two lists of one length")
    divide = _OPERATORS[ast.Div]
    return [_combine(divide, a, b, ast.Div()) for a, b in zip(above, below, strict=True)]


def _inside(items: Value, low: Value, high: Value) -> Interval:
    """Count the members that are in a band with all that their rounding allows, and with any of it."""
    if not isinstance(items, list) or isinstance(low, list) or isinstance(high, list):
        raise InputError("inside needs a list and the two ends of a band")
    surely = sum(item.low >= low.value and item.high <= high.value for item in items)
    perhaps = sum(item.high >= low.value and item.low <= high.value for item in items)
    seen = sum(low.value <= item.value <= high.value for item in items)
    return Interval(float(seen), float(surely), float(perhaps))


def _each_end(function: Callable[[list[float]], float]) -> Callable[[list[Interval]], Interval]:
    """A function that rises with every member: its ends are those of the members."""
    return lambda items: Interval(
        function([item.value for item in items]),
        function([item.low for item in items]),
        function([item.high for item in items]),
    )


def _counted(test: Callable[[float, float], bool]) -> Callable[[list[Interval]], Interval]:
    """Count neighbours that pass a test, as printed; rounding is taken to hide no change."""
    return lambda items: Interval.exact(
        float(sum(test(a.value, b.value) for a, b in itertools.pairwise(items)))
    )


_FUNCTIONS: dict[str, Callable[[list[Interval]], Interval]] = {
    "mean": _each_end(lambda values: math.fsum(values) / len(values)),
    "smallest": _each_end(min),
    "largest": _each_end(max),
    "count": lambda items: Interval.exact(float(len(items))),
    "drops": _counted(lambda before, after: after < before),
    "close": _counted(lambda before, after: abs(after - before) <= 0.1 * abs(before)),
}


def _ulps_below(*arguments: Value) -> Interval:
    """Count the float32 steps from the second number up to the first, both in [0.5, 2]."""
    above, below = arguments
    if isinstance(above, list) or isinstance(below, list) or not 0.5 <= below.value <= above.value <= 2.0:
        raise InputError("ulps_below needs two numbers from 0.5 to 2, the larger first")
    below_one, above_one = 2.0**-24, 2.0**-23
    steps = (max(above.value, 1.0) - max(below.value, 1.0)) / above_one
    steps += (min(above.value, 1.0) - min(below.value, 1.0)) / below_one
    return Interval.exact(steps)
