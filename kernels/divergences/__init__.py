"""Every divergence, in reading order. Adding one: a new file here and its name in ALL."""

from ..divergence import Decoupled, Definition
from .ab import AB
from .decoupled import DECOUPLED
from .drkl import DRKL
from .fkl import FKL
from .rkl import RKL

ALL: tuple[Definition | Decoupled, ...] = (
    FKL,
    RKL,
    DRKL,
    AB,
    DECOUPLED,
)

REGISTRY: dict[str, Definition | Decoupled] = {member.name: member for member in ALL}
