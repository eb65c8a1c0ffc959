"""Every divergence, in reading order. Adding one: a new file here and its name in ALL."""

from ..maths.definition import Definition, Derived
from .ab import AB
from .akl import AKL
from .alpha import ALPHA
from .amid import AMID
from .decoupled import DECOUPLED
from .dkd import DKD
from .drkl import DRKL
from .eopd import EOPD
from .fkl import FKL
from .frkl import FRKL
from .hellinger import HELLINGER
from .jeffreys import JEFFREYS
from .jsd import JSD
from .renyi import RENYI
from .rkl import RKL
from .skl import SKL
from .srkl import SRKL
from .taid import TAID
from .todi import TODI
from .triangular import TRIANGULAR
from .tsallis import TSALLIS
from .tvd import TVD

ALL: tuple[Definition | Derived, ...] = (
    FKL,
    RKL,
    DRKL,
    AB,
    DECOUPLED,
    ALPHA,
    TSALLIS,
    RENYI,
    FRKL,
    JEFFREYS,
    JSD,
    SKL,
    SRKL,
    TVD,
    HELLINGER,
    TRIANGULAR,
    TODI,
    DKD,
    TAID,
    AMID,
    AKL,
    EOPD,
)

REGISTRY: dict[str, Definition | Derived] = {member.name: member for member in ALL}


def definitions() -> dict[str, Definition]:
    """Everything that has a kernel of its own, by name: the registered ones, and those that a derived name brings."""
    members = REGISTRY.values()
    return {
        definition.name: definition
        for member in members
        for definition in ((member,) if isinstance(member, Definition) else member.definitions)
    }
