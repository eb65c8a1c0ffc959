"""Counting instructions: listings written by hand, in the form that cuobjdump prints."""

from __future__ import annotations

import re

import pytest

from fusedkd.kernels.aot import sass

PAIR = ["LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R2.64+0x1000]"]  # one tile of two sides
STORE = "STG.E.128 desc[UR4][R2.64], R4"
ELEMENTS = 8  # bfloat16 numbers in 16 bytes


def listing(*lines: str) -> str:
    """Code at 0x0, 0x10, ...; `name:` labels the line after it, `<name>` is the label's address.

    `LDG ... !2` releases scoreboard 2, `FADD ... ?0 ?2` waits for 0 and 2.
    """
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = 16 * len(code)
        else:
            code.append(line)
    text = '\tcode for sm_90a\n\t\tFunction : _value\n\t.headerflags\t@"EF_CUDA_SM90"\n'
    for i, line in enumerate(code):
        sets = int((re.findall(r" !(\d)", line) or [7])[0])
        control = sum(1 << int(x) for x in re.findall(r" \?(\d)", line)) << 11 | 7 << 8 | sets << 5 | 18
        line = re.sub(r" [!?]\d", "", line)
        predicate, _, rest = line.rpartition("@ ") if "@ " in line else ("", "", line)
        for name, address in labels.items():
            rest = rest.replace(f"<{name}>", f"{address:#x}")
        text += f"        /*{16 * i:04x}*/  {predicate:>16} {rest} ;    /* 0x000000ff00007202 */\n"
        text += f"{'':54}/* {control << 41 | 0x78E00FF:#018x} */\n"
    return text


def counts(*lines: str, sides: int = 2) -> list[float]:
    """Instructions per loop, as they are counted for one bfloat16 tile of ELEMENTS a thread."""
    return [round(x.instructions * ELEMENTS) for x in sass.per_element(listing(*lines), ELEMENTS, 2 * sides, 2)]


def test_one_loop() -> None:
    """From the target of the branch to the branch; what lies around it, its padding and the final trap do not count."""
    code = ["MOV R1, c[0x0][0x28]", "top:", *PAIR, "@!P0@ FADD R4, R4, R8", "NOP", "@P1@ BRA <top>", "EXIT"]
    assert counts(*code, "trap:", "BRA <trap>", "NOP") == [4]


def test_innermost_loops_in_program_order() -> None:
    """A loop around others is not counted where one of them touches memory, and is where none does."""
    outer = ["rows:", "MOV R1, RZ", "first:", *PAIR, "@P0@ BRA <first>"]
    second = ["second:", *PAIR, "FADD R4, R4, R8", "@P0@ BRA <second>", "@P1@ BRA <rows>", "EXIT"]
    assert counts(*outer, *second) == [3, 4]
    search = ["tile:", *PAIR, "halve:", "IADD3 R1, R1, 0x1, RZ", "@P0@ BRA <halve>", "@P1@ BRA <tile>", "EXIT"]
    assert counts(*search) == [5]


def test_a_loop_without_memory() -> None:
    """Neither registers nor shared memory are logits."""
    assert counts("top:", "LDS R4, [R2]", "STS [R2], R4", "SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "@P0@ BRA <top>") == []


def test_branches_inside() -> None:
    """Both arms count, also one out of line; of a called slow path the call counts."""
    loop = ["top:", *PAIR, "@P2@ BRA <slow>", "FADD R4, R4, R8", "back:", "CALL.REL.NOINC <divide>", "@P0@ BRA <top>"]
    rest = ["@P3@ EXIT", "RET.REL.NODEC R6 0x0"]
    assert counts(*loop, *rest, "slow:", "FMUL R4, R4, R8", "BRA <back>", "divide:", "MUFU.RCP R1, R1", *rest) == [8]


def test_a_loop_entered_in_its_middle() -> None:
    """The rotated form: the test stands first and is jumped to."""
    assert counts(
        "BRA <test>", "top:", *PAIR, "test:", "ISETP.LT.AND P0, PT, R1, R2, PT", "@P0@ BRA <top>", "EXIT"
    ) == [4]


def test_a_condition_among_the_operands() -> None:
    """A uniform branch goes on below, too; an unconditional one does not."""
    assert counts("top:", *PAIR, "BRA.U UP0, <out>", "BRA <top>", "out:", "EXIT") == [4]
    assert counts("top:", *PAIR, "BRA.U !UP0, <top>", "STG.E desc[UR4][R2.64], R4", "EXIT") == [3]


def test_unrolled_copies_are_divided_out() -> None:
    """Two tiles a turn, found by the bytes that are loaded; scalars of a row beside them are no tile."""
    scalar = "LDG.E R20, desc[UR4][R6.64]"
    loop = ["top:", *PAIR, "FADD R4, R4, R8", *PAIR, "FADD R5, R4, R8", scalar, "@P0@ BRA <top>", "EXIT"]
    assert counts(*loop) == [4]
    zeros = ["top:", *["STG.E.128 desc[UR4][R2.64], RZ"] * 4, "IADD3 R2, R2, 0x1, RZ", "@P0@ BRA <top>", "EXIT"]
    (found,) = sass.per_element(listing(*zeros), ELEMENTS, 4, 2)
    assert (found.instructions, found.bytes) == (round(6 / (4 * ELEMENTS), 1), 2)
    wide = [line.replace("STG.E.128", "STG.E.256") for line in zeros]
    assert sass.per_element(listing(*wide), ELEMENTS, 4, 4) == [found._replace(bytes=4)]


def test_units() -> None:
    """Special functions and float32 operations, of which a packed one is two; the bytes of a tile, read and written."""
    work = ["MUFU.EX2 R4, R4", "MUFU.RCP R5, R4", "FFMA R4, R4, R8, R5", "FADD.FTZ R4, R4, R8", "FFMA2 R4, R4, R8, R6"]
    rest = ["FMNMX R4, R4, R8, !PT", "IMAD R4, R4, R8, R5", "NOP", "LDG.E R20, desc[UR4][R6.64]"]
    (found,) = sass.per_element(listing("top:", *PAIR, *work, *rest, STORE, "@P0@ BRA <top>", "EXIT"), ELEMENTS, 4, 2)
    assert found == sass.LoopCount(round(12 / ELEMENTS, 1), 2 / ELEMENTS, 4 / ELEMENTS, 4 + 2)


def test_one_side() -> None:
    """A kernel of one side has one number per element; a loop over one of two sides is one tile all the same."""
    loop = ["top:", PAIR[0], "@P0@ BRA <top>", "EXIT"]
    assert counts(*loop, sides=1) == counts(*loop) == [2]


def test_part_of_a_tile_is_refused() -> None:
    """A count that cannot be right is an error."""
    with pytest.raises(ValueError, match=r"0x0 moves 1\.5 tiles"):
        counts("top:", *PAIR, PAIR[0], "@P0@ BRA <top>", "EXIT")


SCALAR, HALF = "LDG.E R20, desc[UR4][R6.64] !1", "LDG.E.U16 R21, desc[UR4][R6.64] !1"
WIDE = [line + " !0" for line in PAIR]
USED = "FADD R4, R4, R8"


@pytest.mark.parametrize(
    ("ahead", "code"),
    [
        (0, [USED, "EXIT"]),
        (32, [*WIDE, USED + " ?0", "EXIT"]),
        (36, [*WIDE, SCALAR, USED + " ?0", "EXIT"]),
        (34, [*WIDE, USED, HALF, USED + " ?0 ?1", "EXIT"]),
        (32, [*WIDE, USED + " ?0", SCALAR, USED + " ?1", "EXIT"]),  # waited for in between
        (64, [*WIDE, USED + " ?3", *WIDE, USED + " ?0", "EXIT"]),  # another scoreboard, of shared memory perhaps
        (36, [SCALAR, "@P0@ BRA <on>", "on:", *WIDE, USED + " ?0", "EXIT"]),
        (32, [SCALAR, "BRA <on>", "on:", *WIDE, USED + " ?0", "EXIT"]),  # whoever comes here may come from elsewhere
        (48, [*WIDE, "@P0@ LDG.E.128 R4, desc[UR4][R2.64] !2", "STG.E.128 desc[UR4][R2.64], R4 ?0", "EXIT"]),
    ],
)
def test_loaded_ahead(ahead: int, code: list[str]) -> None:
    """The bytes of the loads up to the first instruction that waits for one of them, of the longest such run."""
    assert sass.loaded_ahead(listing(*code)) == ahead
