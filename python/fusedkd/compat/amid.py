"""The losses of AMiD (aailab-kaist/AMiD, `distillm/losses.py`) that are its own, one import line away.

Arguments, reduction, `fusedkd.Head` sides and further options as in `fusedkd.compat.distillm`. The rest of that file is
ABKD's: take it from `fusedkd.compat.abkd`.
"""

from typing import Any

import torch

from .. import checks
from ..divergence import divergence
from ..head import Side
from . import _shared
from .distillm import Batch

_BASES = {"fkl": divergence("fkl"), "ab": divergence("ab", alpha=0.2, beta=0.7)}
_ZERO = 1e-8  # exponents below are limits


def amid(logits: Side, teacher_logits: Side, no_model_batch: Batch, args: Any, **kwargs: Any) -> torch.Tensor:
    """A divergence between the α-mixture r of teacher p and student q, and one of them.

    args: an object with amid_alpha, amid_lam (the teacher's weight in r), amid_div_name ("fkl", or "ab", which is
    α-β with (0.2, 0.7) fixed) and amid_div_order: xy for D(x‖y), one of "pr", "qr", "rp", "rq". As there every
    amid_alpha ≥ 1 is the geometric mixture, and amid_lam ≤ 0 and ≥ 1 are the student and the teacher.

    Differences: float32 inside and a float32 result whatever the logits' dtype (there softmax, powers and result are in
    that dtype); a row that is not finite stays so in "ab" (there it counts as 0); a batch without a counted token is 0
    in "fkl" too; a wrong name or order raises ValueError (there the program exits). kwargs: options of kd_loss.
    """
    checks.one_of("args.amid_div_name", args.amid_div_name, tuple(_BASES))
    lam = min(max(float(args.amid_lam), 0.0), 1.0)
    base = _BASES[args.amid_div_name]
    chosen = divergence("amid", alpha=args.amid_alpha, lam=lam, order=args.amid_div_order, base=base)
    return _shared.batch_loss("amid", logits, teacher_logits, no_model_batch, chosen, kwargs)


def ab_div(
    logits: Side, teacher_logits: Side, no_model_batch: Batch, alpha: float, beta: float, **options: Any
) -> torch.Tensor:
    """The α-β divergence with its true limits, unlike `fusedkd.compat.abkd.ab_div`.

    An exponent below 1e-8 is 0. A row that is not finite stays so (there it counts as 0).
    """
    alpha, beta = (0.0 if abs(value) < _ZERO else value for value in (alpha, beta))
    chosen = divergence("ab", alpha=alpha, beta=beta)
    return _shared.batch_loss("ab_div", logits, teacher_logits, no_model_batch, chosen, options)
