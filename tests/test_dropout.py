"""The dropout mask: Philox's published vectors, the definition by hand, and its statistics."""

import math

import pytest
import torch

from fastlora import dropout
from fastlora.functional import lora_linear

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)

# Random123, kat_vectors: rounds, counter and key, output
KNOWN = [
    (7, (0,) * 6, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ONES,) * 6, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def philox_by_hand(counter, key, rounds):
    """Philox4x32 on Python's integers, as in the paper."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return c0, c1, c2, c3


def mask_by_hand(seed, M, K, t, first_row=0):
    """The packed mask as lists of bytes, straight from its definition."""
    width = 4 * ((K + 31) // 32)
    key = (seed % (1 << 32), (seed >> 32) % (1 << 32))
    rows = []
    for i in range(first_row, first_row + M):
        row = []
        for j in range(width):
            index = i * width + j
            words = philox_by_hand((index % (1 << 32), index >> 32, 0, 0), key, 7)
            lanes = [half for word in words for half in (word & 0xFFFF, word >> 16)]
            row.append(sum((lanes[b] >= t and 8 * j + b < K) << b for b in range(8)))
        rows.append(row)
    return rows


def draw(seed, M, K, t, first_row=0):
    return dropout.draw_mask(torch.tensor([seed]), M, K, t, first_row)


def keep(seed, M, K, t):
    return dropout.unpack_mask(draw(seed, M, K, t), K)


@pytest.mark.parametrize(("rounds", "given", "expected"), KNOWN)
def test_known_answers(rounds, given, expected):
    *counter, k0, k1 = (torch.tensor([word]) for word in given)
    words = dropout.philox4x32(tuple(counter), (k0, k1), rounds)
    assert tuple(word.item() for word in words) == expected
    assert philox_by_hand(given[:4], given[4:], rounds) == expected


@pytest.mark.parametrize("t", [0, 1, 6554, 32768, 65535, 65536])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**32 + 5, -(2**63), 2**63 - 1])
def test_mask_is_its_definition_for_every_seed(seed, t):
    mask = draw(seed, 3, 41, t)
    assert mask.dtype == torch.uint8
    assert mask.tolist() == mask_by_hand(seed, 3, 41, t)


@pytest.mark.parametrize(
    ("M", "K"), [(1, 1), (5, 7), (3, 8), (2, 31), (2, 32), (2, 33), (4, 63), (3, 100), (1, 252)]
)
def test_mask_is_its_definition_at_every_shape(M, K):
    assert draw(77, M, K, 30000).tolist() == mask_by_hand(77, M, K, 30000)


def test_a_lane_equal_to_the_threshold_is_kept():
    words = philox_by_hand((0, 0, 0, 0), (5, 0), 7)
    for b, lane in enumerate(half for word in words for half in (word & 0xFFFF, word >> 16)):
        assert keep(5, 1, 8, lane)[0, b]
        assert not keep(5, 1, 8, lane + 1)[0, b]


@pytest.mark.parametrize(("M", "K"), [(0, 5), (3, 0), (0, 0)])
def test_empty_mask(M, K):
    mask = draw(1, M, K, 6554)
    assert mask.shape == (M, dropout.mask_bytes(K))
    assert dropout.unpack_mask(mask, K).shape == (M, K)


@pytest.mark.parametrize("boundary", [2**31, 2**32, 2**33, 3 * 2**40])
@pytest.mark.parametrize("K", [20, 40, 80])
def test_bytes_past_32_bits(K, boundary):
    """Rows of 4, 8 and 12 bytes whose index crosses the boundary; no two of them are alike."""
    first = boundary // dropout.mask_bytes(K) - 1
    assert draw(3, 4, K, 20000, first).tolist() == mask_by_hand(3, 4, K, 20000, first)
    assert not torch.equal(draw(3, 4, K, 20000, first), draw(3, 4, K, 20000, first % 2**20))


def test_rows_can_be_drawn_in_parts():
    whole = draw(9, 23, 45, 10000)
    parts = [draw(9, n, 45, 10000, first) for first, n in ((0, 1), (1, 15), (16, 7))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("K", [1, 8, 31, 32, 45, 96])
def test_bits_past_the_row_are_zero(K):
    mask = draw(4, 6, K, 0)
    bits = dropout.unpack_mask(mask, 8 * mask.shape[1])
    assert bits[:, :K].all()
    assert not bits[:, K:].any()


def test_everything_is_kept_or_dropped_at_the_ends():
    assert keep(5, 64, 96, 0).all()
    assert not keep(5, 64, 96, 65536).any()


def test_unpack_is_little_endian():
    mask = torch.tensor([[0b0000_0001, 0b1000_0010, 0, 0]], dtype=torch.uint8)
    kept = dropout.unpack_mask(mask, 20)
    assert kept.dtype == torch.bool
    assert kept.nonzero()[:, 1].tolist() == [0, 9, 15]


def test_keep_takes_a_lazily_negated_input():
    x = torch.complex(torch.zeros(3, 40), torch.randn(3, 40)).conj().imag
    mask = draw(4, 3, 40, 32768)
    assert x.is_neg()
    assert torch.equal(dropout.keep(x, mask), x.where(dropout.unpack_mask(mask, 40), 0))


def test_rate_is_rounded_to_a_16_bit_threshold():
    assert [dropout.threshold(p) for p in (0.0, 0.1, 0.5, 1.0)] == [0, 6554, 32768, 65536]
    for t in (0, 1, 6554, 32768, 65535):
        assert dropout.inverse_keep(t) == 1 / (1 - t / 65536)
    assert dropout.inverse_keep(65536) == 0.0


# ---- statistics

# chance that a right generator fails one of the tests below
ALPHA = 1e-3


def is_plausible(successes, trials, q, tests):
    """Whether Chernoff's bound on a binomial tail leaves this count a chance of ALPHA / tests."""
    found = successes / trials
    terms = ((found, q), (1 - found, 1 - q))
    divergence = sum(a * math.log(a / b) for a, b in terms if a)
    return 2 * math.exp(-trials * divergence) > ALPHA / tests


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_each_lane_keeps_its_share(p):
    t = dropout.threshold(p)
    bits = keep(2024, 256, 1024, t).view(-1, 8)
    q = 1 - t / 65536
    for lane in bits.unbind(1):
        assert is_plausible(lane.sum().item(), len(lane), q, tests=8)


def test_elements_are_independent():
    """At p = 1/2 any two different elements agree half of the time."""
    a = keep(11, 256, 1024, 32768)
    pairs = {
        "next element": (a[:, 1:], a[:, :-1]),
        "next byte": (a[:, 8:], a[:, :-8]),
        "next 32 elements": (a[:, 32:], a[:, :-32]),
        "next row": (a[1:], a[:-1]),
        "next seed": (a, keep(12, 256, 1024, 32768)),
        "seed of another high word": (a, keep(11 + 2**32, 256, 1024, 32768)),
        "negative seed": (a, keep(-11, 256, 1024, 32768)),
    }
    for name, (one, other) in pairs.items():
        agree = (one == other).sum().item()
        assert is_plausible(agree, one.numel(), 0.5, tests=len(pairs)), name


@pytest.mark.parametrize("dim", [0, 1])
def test_no_row_or_column_is_special(dim):
    a = keep(13, 512, 512, 32768)
    counts = a.sum(dim).tolist()
    assert all(is_plausible(n, 512, 0.5, tests=len(counts)) for n in counts)


# ---- the seed


def test_seed_comes_from_torchs_generator():
    torch.manual_seed(3)
    first, second = (dropout.draw_seed(torch.device("cpu")) for _ in range(2))
    torch.manual_seed(3)
    again = dropout.draw_seed(torch.device("cpu"))
    assert first.dtype == torch.int64 and first.shape == (1,)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_seeds_use_all_their_bits():
    torch.manual_seed(0)
    seeds = torch.cat([dropout.draw_seed(torch.device("cpu")) for _ in range(64)])
    assert (seeds >= 0).all()
    for bit in range(63):
        assert len((seeds >> bit & 1).unique()) == 2, bit


def test_a_call_draws_one_seed_and_only_if_it_drops():
    x, W, A, B = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)

    def state_after(**options):
        torch.manual_seed(1)
        lora_linear(x, W, A, B, scaling=1.0, **options)
        return torch.get_rng_state()

    torch.manual_seed(1)
    untouched = torch.get_rng_state()
    dropout.draw_seed(x.device)
    drawn = torch.get_rng_state()
    assert torch.equal(state_after(p=0.1), drawn)
    for options in ({"p": 0.0}, {"p": 0.1, "training": False}, {"p": 0.1, "seed": torch.tensor(1)}):
        assert torch.equal(state_after(**options), untouched)


def test_restoring_the_generator_restores_the_mask():
    x, W, A, B = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    state = torch.get_rng_state()
    first, other = (lora_linear(x, W, A, B, scaling=1.0, p=0.5) for _ in range(2))
    torch.set_rng_state(state)
    assert torch.equal(lora_linear(x, W, A, B, scaling=1.0, p=0.5), first)
    assert not torch.equal(other, first)
