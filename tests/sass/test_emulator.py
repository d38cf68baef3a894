"""Tests of the emulator of machine code itself, with small kernels."""

import functools
import struct
from collections import Counter

import numpy as np
import pytest
import torch

from tests.sass import compiler
from tests.sass.launch import BlockCounts, Index, launch
from tests.sass.memory import AccessError, Memory, Region
from tests.sass.program import Instruction, Kind, Operand, parse_listing
from tests.sass.warp import from_bfloat16, to_bfloat16

needs_nvcc = pytest.mark.skipif(not compiler.AVAILABLE, reason="needs nvcc and cuobjdump")
FIRST_ADDRESS = 0x7F0000000000  # beyond 32 bits


@functools.cache
def kernels():
    source = (compiler.ROOT / "tests/sass/selftest.cu").read_text()
    return compiler.programs(source)


def run(
    kernel: str, *arguments: np.ndarray | int, grid: int = 1, block: int = 32, shared_bytes: int = 0
) -> dict[Index, BlockCounts]:
    """Run a kernel of selftest.cu, which writes to the arrays."""
    address, regions, parameters = FIRST_ADDRESS, [], b""
    for argument in arguments:
        if isinstance(argument, int):
            parameters += struct.pack("<i", argument)
            continue
        content = argument.reshape(-1).view(np.uint8)
        regions.append(Region(address, content))
        parameters += struct.pack("<Q", address)
        address += (len(content) + 4096) // 256 * 256
    size = (grid, 1, 1), (block, 1, 1)
    return launch(kernels()[kernel], *size, parameters, Memory(regions), shared_bytes)


def random_integers(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-(2**31), 2**31, count).astype(np.int32)


@needs_nvcc
def test_integers():
    a, b = random_integers(96).reshape(2, 48)
    a[4:7] = 0, -(2**30), 3 << 20
    a[:4], b[:4] = (7, -7, 2**31 - 1, -5), (2, 2, -1, -(2**31))
    products, out = np.zeros(48, np.int64), np.zeros((48, 5), np.int32)
    run("integers", a, b, products, out, grid=3, block=16)
    x, y = a.astype(np.int64), b.astype(np.int64)
    assert (products == x * y - y).all()
    assert (out[:, 0] == np.trunc(x / y)).all()
    shifted = (b.view(np.uint32) >> 5).astype(np.int64)
    assert (out[:, 1] == (np.minimum(x, y) ^ x >> 3 ^ shifted).astype(np.int32)).all()
    high = (a.view(np.uint32).astype(object) * b.view(np.uint32).astype(object)) >> 32
    assert (out[:, 2] == (np.abs(x) % 7 + high.astype(np.int64)).astype(np.int32)).all()
    assert (out[:, 3] == np.clip(np.minimum(x, y), 0, None)).all()
    assert (out[:, 4] == [(v & -v).bit_length() for v in x.tolist()]).all()


@needs_nvcc
def test_floats():
    x = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    x[:6] = np.inf, -np.inf, np.nan, 1e20, -0.5, 3
    out, whole = np.zeros((32, 4), np.float32), np.zeros((32, 2), np.int32)
    run("floats", x, out, whole)
    exact = x.astype(np.float64)
    bounded = np.clip(np.nan_to_num(exact, nan=0), -(2**31), 2**31 - 1)
    with np.errstate(over="ignore"):
        assert np.array_equal(out[:, 0], (exact**2 - 1).astype(np.float32), equal_nan=True)
    assert np.array_equal(out[:, 1], np.where(x > 0.5, x, -x), equal_nan=True)
    assert np.array_equal(out[:, 2], np.fmin(x, 0.25) + np.fmax(x, -0.25).astype(np.float32))
    assert np.array_equal(out[:, 3], np.floor(x), equal_nan=True)
    assert (whole == np.stack([np.floor(bounded), np.trunc(bounded)], 1)).all()


@needs_nvcc
def test_halves():
    x, y = np.random.default_rng(0).standard_normal((2, 32, 2)).astype(np.float16)
    out, wide = np.zeros((32, 2, 2), np.float16), np.zeros((32, 2), np.float32)
    run("halves", x, y, out, wide)
    product = x * y[:, :1]
    fused = x.astype(np.float64) * y[:, 1:] + product
    assert (out[:, 0] == fused.astype(np.float16)).all()
    assert (out[:, 1] == x + y).all()
    assert (wide == product).all()


@needs_nvcc
def test_bfloats():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 32, 2, generator=generator).bfloat16()
    out = torch.zeros(32, 2, 2, dtype=torch.bfloat16)
    run("bfloats", *(tensor.view(torch.int16).numpy() for tensor in (x, y, out)))
    product = x * y[:, :1]
    fused = x.double() * y[:, 1:] + product.double()
    assert out[:, 0].equal(fused.bfloat16())
    assert out[:, 1].equal(x + y)


def test_rounding_to_bfloat16_rounds_once():
    nearly_half = 1 + 2.0**-8 + 2.0**-40  # a float32 would be halfway to the next bfloat16
    values = np.array([nearly_half, -nearly_half, 1 + 2.0**-8, 1e39, 1e-40, np.inf, np.nan])
    rounded = from_bfloat16(to_bfloat16(values))
    expected = [1 + 2.0**-7, -1 - 2.0**-7, 1, np.inf, 2.0**-133, np.inf, np.nan]
    assert np.array_equal(rounded, np.array(expected, np.float32), equal_nan=True)


@needs_nvcc
def test_lanes_exchange_values():
    x, lane = random_integers(32) % 900, np.arange(32)
    out = np.zeros((32, 5), np.int32)
    run("lanes", x, out)
    assert (out[:, 0] == x[lane // 8 * 8 + 3]).all()
    assert (out[:, 1] == x[lane ^ 5]).all()
    assert (out[:, 2] == x[np.where(lane % 16 < 12, lane + 4, lane) % 32]).all()
    assert (out[:, 3] == 1).all()
    assert (out[:, 4].view(np.uint32) == sum(int(v & 1) << i for i, v in enumerate(x))).all()


@needs_nvcc
def test_lanes_that_diverge():
    turns, out = np.arange(64, dtype=np.int32) % 11, np.full(64, -1, np.int32)
    run("diverging", turns, out, block=64)
    expected = [sum(t if t % 2 else 10 for t in range(n)) for n in turns]
    assert out.tolist() == expected[:40] + [-1] * 24


@needs_nvcc
def test_warps_wait_at_barriers():
    x, sums = random_integers(384).astype(np.float32) // 2**20, np.zeros(3, np.float32)
    counts = run("block_sums", x, sums, grid=3, block=128, shared_bytes=512)
    assert (sums == x.reshape(3, 128).sum(1)).all()
    assert [block.warps for block in counts.values()] == [4, 4, 4]


@needs_nvcc
def test_reductions_and_their_sectors():
    sums, x = np.zeros(8, np.float32), np.arange(128, dtype=np.float32).reshape(32, 4)
    counts = run("add", sums, x)
    assert sums.tolist() == [*(x[i::3, 3].sum() for i in range(3)), 0, *x.sum(0)]
    assert counts[0, 0, 0].sectors == 2


@needs_nvcc
def test_instructions_are_counted():
    words = np.zeros(32 * 4, np.uint32)
    counts = run("copy", words, words.copy(), 0)[0, 0, 0]
    executed = {i.name for i in kernels()["copy"].instructions if i.name not in ("NOP", "BRA")}
    assert set(counts.instructions) == executed
    assert (counts.instructions["STG"], counts.instructions["EXIT"]) == (2, 1)


@needs_nvcc
@pytest.mark.parametrize(
    ("shift", "message"), [(-16, "out of bounds"), (16, "out of bounds"), (4, "not aligned")]
)
def test_wrong_accesses_are_errors(shift, message):
    words = np.zeros(32 * 4, np.uint32)
    with pytest.raises(AccessError, match=message):
        run("copy", words, words.copy(), shift)


@needs_nvcc
def test_too_little_shared_memory_is_an_error():
    x, sums = np.zeros(128, np.float32), np.zeros(1, np.float32)
    with pytest.raises(AccessError, match="out of bounds"):
        run("block_sums", x, sums, block=128, shared_bytes=508)


def test_instructions_are_parsed():
    (program,) = parse_listing(
        """
        Function : _Z4copyPKfPf
        /*0000*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64+-0x10] ;  /* 0x0 */
        /*0010*/                   HFMA2 R2, -R5.H1_H1, |R16|, c[0x0][R3+0x218] ;
        """
    ).values()
    load, multiply = program.instructions
    assert (load.name, load.modifiers, load.address) == ("LDG", ("E", "128"), 0)
    assert load.guard == Operand("!P0", Kind.PREDICATE, 0, inverted=True)
    assert [o.kind for o in load.operands] == [Kind.REGISTER, Kind.OTHER]
    assert multiply.operands[1].negative
    assert multiply.operands[1].suffixes == ("H1_H1",)
    assert multiply.operands[2].absolute
    assert (multiply.operands[3].index, multiply.operands[3].base.index) == (0x218, 3)


def test_an_unknown_instruction_is_an_error():
    program = parse_listing("Function : f\n /*0000*/ BFREV R1, R2 ;\n /*0010*/ EXIT ;")["f"]
    with pytest.raises(NotImplementedError, match="BFREV R1, R2"):
        launch(program, (1, 1, 1), (32, 1, 1), b"", Memory([]))


def test_counts_are_by_name():
    program = parse_listing("Function : f\n /*0000*/ MOV R1, 0x2 ;\n /*0010*/ EXIT ;")["f"]
    (counts,) = launch(program, (1, 1, 1), (64, 1, 1), b"", Memory([])).values()
    assert counts.instructions == Counter(MOV=2, EXIT=2)
    assert isinstance(program.instructions[0], Instruction)
