"""The quantiser against a slow plain reference, alone and shared by two processes, and the VQ-VAE
around it, which is the same in every stage."""

import subprocess
import sys

import pytest
import torch
from conftest import CODED, ROOT, load

m = load("vqvae")
NET = [128, 32, 2, 2]


def quantiser(K=8, D=3):
    """One whose codes are all alive."""
    q = m.Quantiser(K, D)
    q.codes.copy_(torch.randn(K, D, generator=torch.Generator().manual_seed(0)))
    q.shares.fill_(1 / K)
    return q


def vectors(B=2, D=3, H=4, W=5, seed=1):
    return torch.randn(B, D, H, W, generator=torch.Generator().manual_seed(seed))


def some(B=2, H=4, W=5, seed=0, share=0.7):
    """Which positions are to be seen."""
    return torch.rand(B, H, W, generator=torch.Generator().manual_seed(seed)) < share


def nearest(z, codes):
    """(B, D, H, W) -> (B, H, W), every distance written out."""
    distances = (z.double()[:, None] - codes.double()[:, :, None, None]).square().sum(2)
    return distances.argmin(1)


def flat(z):
    return z.movedim(1, -1).reshape(-1, z.shape[1])


# --- looking up ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_nearest_code(training):
    q, z = quantiser().train(training), vectors()
    codes = q.codes.clone()
    out, commitment, ids = q(z)
    assert torch.equal(ids, nearest(z, codes)) and ids.dtype == torch.long
    torch.testing.assert_close(out, codes[ids].movedim(-1, 1))
    assert commitment.item() == pytest.approx((z - out).square().mean().item(), rel=1e-5)


def test_gradients_go_straight_through():
    """d out / d z is the identity; the commitment pulls z to its code with 2 (z - q) / N."""
    q, z = quantiser().eval(), vectors().requires_grad_()
    weight = vectors(seed=2)
    (q(z)[0] * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)
    z.grad = None
    out, commitment, _ = q(z)
    commitment.backward()
    torch.testing.assert_close(z.grad, (2 * (z - out) / z.numel()).detach())
    assert not list(q.parameters())


def test_float32_under_autocast():
    q, z = quantiser().eval(), vectors(16)
    with torch.autocast("cpu", torch.bfloat16):
        out, commitment, ids = q(z)
    assert torch.equal(ids, nearest(z, q.codes))
    assert out.dtype == commitment.dtype == torch.float32


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [m.Quantiser(8, 3), quantiser()])
def test_eval_changes_no_buffer(q):
    q.eval()
    before = {name: tensor.clone() for name, tensor in q.named_buffers()}
    state = torch.get_rng_state()
    q(vectors())
    q(vectors(seed=3), some())
    for name, tensor in q.named_buffers():
        assert torch.equal(before[name], tensor)
    assert torch.equal(state, torch.get_rng_state())


def test_training_moves_codes_even_without_gradients():
    q = quantiser()
    before = q.codes.clone()
    with torch.no_grad():
        q(vectors())
    assert not torch.equal(before, q.codes)


@pytest.mark.parametrize("masked", [False, True])
def test_moving_averages(masked):
    """Four steps against loops that keep a sum and a share for each code."""
    q = quantiser()
    codes, shares = q.codes.double(), q.shares.double()
    sums = codes * shares[:, None]
    for step in range(4):
        z, keep = vectors(seed=10 + step), torch.ones(2, 4, 5, dtype=torch.bool)
        if masked:
            keep = some(seed=step)
        ids, counts, total = nearest(z, codes), torch.zeros_like(shares), torch.zeros_like(sums)
        for b, h, w in keep.nonzero().tolist():
            counts[ids[b, h, w]] += 1
            total[ids[b, h, w]] += z[b, :, h, w]
        shares = m.DECAY * shares + (1 - m.DECAY) * counts / keep.sum()
        sums = m.DECAY * sums + (1 - m.DECAY) * total / keep.sum()
        codes = sums / shares[:, None]
        q(z, keep)
        torch.testing.assert_close(q.shares.double(), shares, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(q.codes.double(), codes, rtol=1e-4, atol=1e-5)


def test_codes_start_from_data():
    torch.manual_seed(0)
    q, data = m.Quantiser(16, 3), flat(vectors())
    q.revive(data, torch.ones(len(data)))
    assert (q.codes[:, None] == data).all(2).any(1).all()
    assert len(q.codes.unique(dim=0)) > 5 and (q.shares == 1 / 16).all()


def test_dead_codes_are_revived_and_live_ones_are_left():
    torch.manual_seed(0)
    q, data = quantiser(), flat(vectors())
    q.codes[3] = 1000.0  # far from all data
    q.shares[3] = 0.0
    before = q.codes.clone()
    q.revive(data, torch.ones(len(data)))
    assert (data == q.codes[3]).all(1).any() and (q.shares == 1 / 8).all()
    live = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(q.codes[live], before[live])


def test_a_code_dies_only_after_disuse():
    """A code that no vector chooses goes on for a while, then moves onto data."""
    torch.manual_seed(0)
    q, steps = quantiser(), 0
    q.codes[3] = 1000.0
    while q.codes[3].abs().max() > 500:
        q(vectors())
        steps += 1
        assert steps < 100
    assert steps > 5


def test_masked_positions_are_never_seen():
    """They hold a huge value: neither averages nor new codes may know it."""
    keep = some(share=0.5)
    z = torch.where(keep[:, None], vectors(), torch.tensor(1e6))
    for seed in range(5):
        torch.manual_seed(seed)
        q = m.Quantiser(16, 3)
        q(z, keep)
        q(z, keep)
        assert q.codes.abs().max() < 10 and q.shares.sum().item() == pytest.approx(1, rel=1e-5)


# --- two processes -------------------------------------------------------------------------------

RANK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_quantiser import steps
rank, out = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
torch.save([steps(rank, 2, fresh).state_dict() for fresh in (False, True)], f"{out}/{rank}.pt")
dist.destroy_process_group()
"""


def steps(rank, ranks, fresh):
    """Five steps with this process's share of the same ten photos."""
    torch.manual_seed(rank)
    q = quantiser(32, 4)
    if fresh:
        q = m.Quantiser(32, 4)
    for step in range(5):
        part = slice(rank * 10 // ranks, (rank + 1) * 10 // ranks)
        q(vectors(10, 4, 6, 6, seed=step)[part], some(10, 6, 6, seed=step)[part])
    return q


def test_two_processes_learn_the_codebook_of_one(tmp_path):
    words = [sys.executable, "-c", RANK, str(ROOT / "tests")]
    children = [subprocess.Popen([*words, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    first, second = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for a, b in zip(first, second):  # with living codes, and with codes that start from data
        for name in a:
            assert torch.equal(a[name], b[name])
    for name, tensor in steps(0, 1, False).state_dict().items():
        torch.testing.assert_close(first[0][name], tensor, rtol=1e-4, atol=1e-5)


# --- the network around it -----------------------------------------------------------------------


def size_of(module):
    return sum(weight.numel() for weight in module.parameters())


def test_sizes_of_the_paper():
    net = m.VQVAE(3, NET)
    assert size_of(net) == 662_723 and size_of(net.encoder) == 372_416
    assert tuple(net.quantiser.codes.shape) == (512, 64)


@pytest.mark.parametrize("downs", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_shapes(downs, size):
    net = m.VQVAE(5, [32, 8, 1, downs], K=16, D=4)
    output, commitment, ids = net(torch.rand(2, 3, *size))
    assert tuple(output.shape) == (2, 5, *size) and commitment.shape == ()
    assert tuple(ids.shape) == (2, size[0] >> downs, size[1] >> downs)


def test_a_cell_is_masked_when_all_its_pixels_are():
    net, seen = m.VQVAE(3, [32, 8, 1, 2], K=16, D=4), []
    keep = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    keep[..., :4, :4] = False  # the whole first cell
    keep[..., 4:8, 4:7] = False  # not the whole of the next
    net.quantiser.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    net(torch.rand(1, 3, 16, 16), keep)
    want = torch.ones(16)
    want[0] = 0
    assert torch.equal(seen[0].flatten().float(), want)


def test_names_are_the_same_in_every_stage():
    """The names and shapes of the tensors are the contract between the stages."""
    shapes = []
    for name in CODED:
        state = load(name).VQVAE(3, NET).state_dict()
        shapes.append({key: tuple(tensor.shape) for key, tensor in state.items()})
    assert shapes[0] == shapes[1] == shapes[2]
    parts = {key.split(".")[0] for key in shapes[0]}
    assert parts == {"encoder", "quantiser", "decoder", "head"}
