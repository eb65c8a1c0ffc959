"""Temporally adaptive interpolated distillation: any divergence from a teacher that is mixed with the student.

    D(m, q) with m = softmax((1 − t)·stop(z) + t·u), z and u the scaled logits of student and teacher

t moves from the student's own distribution (t = 0: loss and gradient are 0) to the teacher (t = 1: D(p, q), exactly);
`fusedkd.TAIDSchedule` moves it as the authors do. The mixture is formed as the logits are loaded: with d = u − z,
centred on the two row maxima, it only scales d by t, so t ∈ {0, 1} is exact and no 0·(−inf) arises.
Gradient: that of the base at p = m; nothing flows through the mixture. For the base fkl: q − m.
Edge cases: those of the base. A column that only the student forbids (z = −inf) is forbidden in m too, for t < 1.
Source: Shing et al., TAID, ICLR 2025, eq. 3-4. The authors' value is the cross-entropy −Σ m log q, which is
KL(m‖q) plus the entropy of m and has the same gradient.
"""

from typing import Any

from ..maths.definition import Derived, Form, Parameter


def form(t: Any, base: Form) -> Form:
    """The base with a mixed teacher."""
    if base.mix is not None or not base.definition.separable:
        raise ValueError(
            "base of 'taid' must be a divergence other than taid, amid, akl and eopd (such as fkl, rkl, drkl)"
        )
    return base._replace(mix=t)


TAID = Derived(
    "taid",
    form,
    (
        Parameter("t", 0.4, "0: the student itself, 1: the teacher", low=0.0, high=1.0),
        Parameter("base", "fkl", "any divergence but taid, amid, akl and eopd"),
    ),
)
