"""The process that parses and compares LaTeX with SymPy; it is started as a script and killed when it overruns.

One JSON object a line in, one out. Each request gets a CPU budget from the kernel (``RLIMIT_CPU``): a request that
exhausts it ends the process with SIGXCPU, which the parent reports as the answer's own doing; a machine that is merely
busy never does that. Nothing here evaluates text as Python.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from typing import Any

from latex2sympy2_extended.latex2sympy2 import latex2sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import Expr, Float, N, Symbol, simplify  # type: ignore[import-untyped]

MEMORY_BYTES = 2 << 30
DIGITS = 50
_NORMALISE = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)


def parse(latex: str) -> Any:
    """SymPy object of one LaTeX expression; raises whatever the parser raises."""
    text = normalize_latex(latex, config=_NORMALISE)
    return latex2sympy(
        text, is_real=not should_treat_as_complex(text), convert_degrees=False, normalization_config=None
    )


def compare(gold: Any, answer: Any, mode: str, significant: int) -> bool:
    """Whether two parsed expressions are equal; constants are compared by value, with relative error."""
    if mode == "antiderivative":
        return not simplify(gold - answer).free_symbols
    numeric = same_constant(gold, answer, significant)
    if numeric is not None:
        return numeric
    if verify(gold, answer, float_rounding=significant, timeout_seconds=None):
        return True
    # Math-Verify compares a lone symbol by spelling only: x is not 2x/2 to it.
    lone = isinstance(gold, Symbol) or isinstance(answer, Symbol)
    return lone and isinstance(gold, Expr) and isinstance(answer, Expr) and bool(simplify(gold - answer) == 0)


def same_constant(gold: Any, answer: Any, significant: int) -> bool | None:
    """Relative comparison at 50 digits; None unless both are finite constants.

    Absolute error, which Math-Verify uses, takes any two tiny numbers for equal.
    """
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)) or gold.free_symbols or answer.free_symbols:
        return None
    a, b = N(gold.doit(), DIGITS), N(answer.doit(), DIGITS)
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return None
    scale = max(abs(a), abs(b))
    decimal = gold.has(Float) or answer.has(Float)
    tolerance = Float(10, DIGITS) ** -(significant if decimal else DIGITS - 15)
    return bool(scale == 0 or abs(a - b) <= tolerance * scale)


def handle(request: dict[str, Any]) -> dict[str, Any]:
    """One comparison; the reply holds ``equal``, or ``error`` naming what could not be done."""
    sides: dict[str, Any] = {}
    for side in ("gold", "answer"):
        try:
            sides[side] = parse(request[side])
        except (MemoryError, RecursionError):
            return {"error": "memory"}
        except Exception as exc:
            return {"error": side, "detail": f"{type(exc).__name__}: {exc}"[:200]}
    try:
        return {"equal": compare(sides["gold"], sides["answer"], request["mode"], request["significant"])}
    except (MemoryError, RecursionError):
        return {"error": "memory"}
    except Exception as exc:
        return {"error": "compare", "detail": f"{type(exc).__name__}: {exc}"[:200]}


def main() -> None:
    """Serve requests until standard input ends."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    handle({"gold": "\\frac{x}{2}", "answer": "0.5x", "mode": "equal", "significant": 6})
    for line in sys.stdin:
        request = json.loads(line)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + request["cpu_s"], hard))
        print(json.dumps(handle(request)), flush=True)


if __name__ == "__main__":
    main()
