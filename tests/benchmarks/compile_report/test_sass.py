"""Tensor-core work per turn of a loop, from invented SASS whose count is known."""

import re

import pytest

from benchmarks.compile_report.sass import count_loop, loop_mma_flops, parse

# Instruction descriptors of bf16 with fp32 sums: N >> 3 from bit 17, M >> 4 from bit 24.
M128_N64, M128_N8, M64_N128 = "0x8100490", "0x8020490", "0x4200490"
TURN = 2 * 128 * 64 * 16  # FLOP of one UTCHMMA of 128x64x16
UTCHMMA = "UTCHMMA gdesc[UR22], gdesc[UR24], tmem[UR40], tmem[UR46], idesc[UR47], UPT"
AGAIN = "@!P0 BRA ->"


def assemble(*lines):
    """As cuobjdump prints it. ``->3`` is the address of line 3."""
    text = [re.sub(r"->(\d+)", lambda to: hex(16 * int(to[1])), line) for line in lines]
    return parse(
        "\n".join(
            f"        /*{16 * number:04x}*/ {line:>60} ;  /* 0x00ff2e18160075ea */\n"
            "                                                 /* 0x001fe2000b800000 */"
            for number, line in enumerate(text)
        )
    )


def test_lines_are_read():
    instruction = assemble("@!UP0 " + UTCHMMA)[0]
    assert str(instruction) == f"@!UP0 {UTCHMMA} at 0x0"
    assert instruction.name == "UTCHMMA"
    assert instruction.is_mma
    assert [x.is_mma for x in assemble("HFMA2 R3, R3, R4, R5", "UTCBAR [UR4], URZ")] == [False] * 2


def test_how_an_instruction_is_scheduled_is_no_operand():
    again, load = assemble(
        "@P0 BRA.U !UP0, ->0          &req={1}      ?trans10", "LDG.E R4, [R2]    &wr=0x0 ?trans1"
    )
    assert (again.guard, again.opcode, again.operands) == ("@P0", "BRA.U", ("!UP0", "0x0"))
    assert load.operands == ("R4", "[R2]")


def test_named_shapes_are_counted_in_the_inner_loop():
    """128 queries, 64 keys, head_dim 72 as 80 and 72; the loop around it and the rest count not."""
    inner = ["HGMMA.64x64x16.F32.BF16 R8, R8, R9, R10"] * 9 + [
        "HMMA.16816.F32.BF16 R4, R4, R5, R6"
    ] * 4
    around = ["HMMA.16816.F32 R4, R5, R6, R7", *inner, AGAIN + "1", "BRA.U UP0, ->0", "EXIT"]
    assert loop_mma_flops(assemble(*around), 8) == 2 * 128 * 64 * (80 + 72)
    assert loop_mma_flops(assemble(*around[:11], "EXIT"), 8) == 0
    assert loop_mma_flops(assemble("BRX R4 -0x10", AGAIN + "0"), 8) == 0


def test_barriers_and_waits_are_counted_in_the_inner_loop():
    loop = ["DEPBAR.LE SB0, 0x4", "BAR.SYNC.DEFER_BLOCKING 0x0", "LDGDEPBAR", "MUFU.EX2 R4, R4"]
    loop += ["HGMMA.64x64x16.F32.BF16 R8, R8, R9, R10, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"]
    loop += ["MUFU.RCP R4, R4", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5"]
    code = assemble("BAR.SYNC 0x0", "MUFU.EX2 R4, R4", *loop, AGAIN + "2", "EXIT")
    assert count_loop(code) == {"instructions": 9, "barriers": 1, "waits": 3, "exp2": 1}
    assert count_loop(code[:2]) == {"instructions": 0, "barriers": 0, "waits": 0, "exp2": 0}


def test_unknown_shapes_and_targets_are_refused():
    with pytest.raises(
        ValueError, match=r"no shape known of IMMA\.16832\.S8 R0, R1, R2, R3 at 0x0"
    ):
        loop_mma_flops(assemble("IMMA.16832.S8 R0, R1, R2, R3", AGAIN + "0"), 4)
    with pytest.raises(ValueError, match="no target known of BRX R4 -0x10 at 0x10"):
        loop_mma_flops(assemble("HMMA.16816.F32 R0, R1, R2, R3", "BRX R4 -0x10"), 4)


@pytest.mark.parametrize("guard", ["", "@!UP0 "], ids=["always", "guarded"])
@pytest.mark.parametrize("start", [0, 1], ids=["set-in-the-loop", "set-before-it"])
def test_a_descriptor_is_counted_once_per_program(start, guard):
    code = assemble(f"UMOV UR47, {M128_N64}", guard + UTCHMMA, f"{AGAIN}{start}", "EXIT")
    assert loop_mma_flops(code, 8) == loop_mma_flops(code, 4) == TURN
    hmma = "HMMA.16816.F32.BF16 R4, R4, R5, R6"
    code = assemble(f"UMOV UR47, {M128_N64}", UTCHMMA, hmma, f"{AGAIN}{start}", "EXIT")
    assert loop_mma_flops(code, 8) == TURN + 8 * 2 * 16 * 8 * 16


def test_the_last_descriptor_before_an_instruction_counts():
    lines = [f"UMOV UR47, {M128_N64}", UTCHMMA, UTCHMMA, f"UMOV UR47, {M128_N8}", UTCHMMA]
    assert loop_mma_flops(assemble(*lines, AGAIN + "0", "EXIT"), 8) == 2 * TURN + TURN // 8
    # Neither what is set later in the turn, nor neighbours and readers of the register.
    lines = [f"UMOV UR47, {M64_N128}", "UMOV UR46, 0x0", "UIADD3.64 UR48, UR46, UR50, URZ"]
    lines += ["ISETP.LE.AND P4, PT, R50, UR47, PT", UTCHMMA, "ULOP3.LUT UR47, UR5, 0x1, URZ"]
    assert loop_mma_flops(assemble(*lines, AGAIN + "0", "EXIT"), 4) == 2 * 64 * 128 * 16


def test_two_descriptors_of_one_shape_may_meet():
    transposed = "0x8110490"
    code = assemble(
        f"UMOV UR47, {M128_N64}", "BRA.U UP0, ->3", f"UMOV UR47, {transposed}", UTCHMMA,
        AGAIN + "3", "EXIT",
    )  # fmt: skip
    assert loop_mma_flops(code, 8) == TURN


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (["R2UR UR47, R5"], "UR47 is no constant in UTCHMMA .* at 0x20: R2UR UR47, R5 at 0x10"),
        (["UMOV UR47, UR12"], "no constant .*: UMOV UR47, UR12 at 0x10"),
        (["ULOP3.LUT UP1, UR47, UR5, 0x1, URZ"], "no constant .*: ULOP3"),
        (["LDCU.64 UR46, c[0x0][0x358]"], r"no constant .*: LDCU\.64 UR46"),
        (["LDCU.128 UR44, c[0x0][0x358]"], r"no constant .*: LDCU\.128 UR44"),
        (["UIMAD.WIDE.U32 UR46, UR4, UR5, URZ"], r"no constant .*: UIMAD\.WIDE"),
        (["@UP0 R2UR UR47, R5"], "no constant .*: @UP0 R2UR"),
        (["CALL.REL.NOINC ->3"], "no constant .*: CALL"),
        ([f"@UP0 UMOV UR47, {M128_N8}"], r"one of \[\(128, 8, 16\), \(128, 64, 16\)\] in UTCHMMA"),
        (["BRA.U UP0, ->3", f"UMOV UR47, {M128_N8}"], r"one of \[\(128, 8, 16\)"),
        (["UMOV UR47, 0x8100494"], "UR47 holds 0x8100494, no known shape, in UTCHMMA"),
        (["UMOV UR47, 0x8100910"], "holds 0x8100910"),
        (["UMOV UR47, 0x10100490"], "holds 0x10100490"),
        (["UMOV UR47, 0x8000490"], "holds 0x8000490"),
    ],
    ids=[
        "read", "copied", "computed", "pair", "quad", "wide", "guarded", "call", "other-if-guarded",
        "other-if-branched", "sparse", "tf32", "256-rows", "no-columns",
    ],
)  # fmt: skip
def test_a_descriptor_that_is_not_known_is_refused(before, message):
    code = assemble(f"UMOV UR47, {M128_N64}", *before, UTCHMMA, AGAIN + "1", "EXIT")
    with pytest.raises(ValueError, match=message):
        loop_mma_flops(code, 8)


@pytest.mark.parametrize(
    "before", ["NOP", f"@UP0 UMOV UR47, {M128_N64}", f"UMOV UR7, {M128_N64}"], ids=str
)
def test_a_descriptor_that_may_not_be_set_is_refused(before):
    with pytest.raises(ValueError, match=r"UR47 may not be set in UTCHMMA .* at 0x10"):
        loop_mma_flops(assemble(before, UTCHMMA, AGAIN + "1", "EXIT"), 8)


@pytest.mark.parametrize("opcode", ["UTCHMMA.2CTA", "UTCQMMA"])
def test_other_instructions_of_that_kind_are_refused(opcode):
    code = assemble(f"UMOV UR47, {M128_N64}", UTCHMMA.replace("UTCHMMA", opcode), AGAIN + "0")
    with pytest.raises(ValueError, match=f"no shape known of {re.escape(opcode)} gdesc"):
        loop_mma_flops(code, 8)


def test_waiting_turns_are_no_loops_of_their_own():
    """As ptxas lays it out: the turns that wait for a barrier lie behind the end.

    Products before the loop and after it lie between those turns and where they lead back to.
    """
    wait = "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8+0xc000], R80"
    code = assemble(
        f"UMOV UR47, {M128_N64}", UTCHMMA, wait, "@!P1 BRA ->16",
        "BRA.U UP1, ->7",  # 4: the loop
        UTCHMMA, UTCHMMA, wait, "@!P1 BRA ->19", UTCHMMA, AGAIN + "4",
        UTCHMMA, wait, "@!P1 BRA ->22", UTCHMMA, "EXIT",
        wait, "@!P1 BRA ->16", "BRA ->4",  # 16
        wait, "@!P1 BRA ->19", "BRA ->9",
        wait, "@!P1 BRA ->22", "BRA ->14", "BRA ->25",
    )  # fmt: skip
    assert loop_mma_flops(code, 8) == 3 * TURN


def test_a_loop_is_what_leads_back_wherever_it_lies():
    code = assemble(
        f"UMOV UR47, {M128_N64}", "BRA.U UP0, ->8", "BRA.U UP1, ->5", UTCHMMA, "EXIT",  # 3: leaves
        UTCHMMA, AGAIN + "1", "EXIT", UTCHMMA, UTCHMMA, "BRA ->5",
    )  # fmt: skip
    assert loop_mma_flops(code, 8) == 3 * TURN
