"""The quantiser against a slow plain reference; it and the VQ-VAE are the same text in every stage."""
import subprocess, sys

import pytest
import torch

from conftest import CODED, ROOT, load

m = load(CODED[0])
WIDTHS = dict(width=128, residual_width=32, residual_blocks=2, downs=2)

def quantiser(K=8, D=3, seed=0, count=1.0):
    """One whose codes are all alive."""
    q = m.Quantiser(K, D)
    q.codes.copy_(torch.randn(K, D, generator=torch.Generator().manual_seed(seed)))
    q.counts.fill_(count)
    return q

def vectors(B=2, D=3, H=4, W=5, seed=1):
    return torch.randn(B, D, H, W, generator=torch.Generator().manual_seed(seed))

def nearest(z, codes):
    """(B, D, H, W) -> (B, H, W), every distance written out."""
    return (z.double()[:, None] - codes.double()[:, :, None, None]).square().sum(2).argmin(1)

@pytest.mark.parametrize("training", (True, False))
def test_nearest_code(training):
    q, z = quantiser(count=5.0).train(training), vectors()
    codes = q.codes.clone()
    out, commitment, ids = q(z)
    assert torch.equal(ids, nearest(z, codes)) and ids.dtype == torch.long
    torch.testing.assert_close(out, codes[ids].movedim(-1, 1))
    assert commitment.item() == pytest.approx((z - out).square().mean().item(), rel=1e-5)

def test_gradients_go_straight_through():
    """d out / d z is the identity; the commitment pulls z to its code with 2 (z - q) / N."""
    q, z = quantiser().eval(), vectors().requires_grad_()
    weight = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    (q(z)[0] * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)
    z.grad = None
    out, commitment, _ = q(z)
    commitment.backward()
    torch.testing.assert_close(z.grad, (2 * (z - out) / z.numel()).detach())
    assert not list(q.parameters())

def test_eval_changes_no_buffer():
    q = m.Quantiser(8, 3).eval()                # never trained: all codes 0
    other = quantiser().eval()
    for module in (q, other):
        before = {name: tensor.clone() for name, tensor in module.named_buffers()}
        state = torch.get_rng_state()
        module(vectors())
        with torch.no_grad():
            module(vectors(seed=3), torch.ones(2, 4, 5, dtype=torch.bool))
        assert all(torch.equal(before[name], tensor) for name, tensor in module.named_buffers())
        assert torch.equal(state, torch.get_rng_state())

def test_training_changes_buffers_even_without_gradients():
    q = quantiser()
    before = q.codes.clone()
    with torch.no_grad():
        q(vectors())
    assert not torch.equal(before, q.codes)

@pytest.mark.parametrize("masked", (False, True))
def test_moving_averages(masked):
    """Four steps against loops that keep a sum and a count for each code."""
    q = quantiser(count=5.0)
    codes, counts = q.codes.double().clone(), q.counts.double().clone()
    sums = codes * counts[:, None]
    for step in range(4):
        z = vectors(seed=10 + step)
        keep = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(step)) < 0.7 if masked else None
        ids = nearest(z, codes)
        new, total = torch.zeros_like(counts), torch.zeros_like(sums)
        for b in range(2):
            for h in range(4):
                for w in range(5):
                    if keep is None or keep[b, h, w]:
                        new[ids[b, h, w]] += 1
                        total[ids[b, h, w]] += z[b, :, h, w]
        counts, sums = m.DECAY * counts + (1 - m.DECAY) * new, m.DECAY * sums + (1 - m.DECAY) * total
        codes = sums / counts[:, None]
        assert counts.min() > 0.5               # nobody was near death in this test
        q(z, keep)
        torch.testing.assert_close(q.counts.double(), counts, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(q.codes.double(), codes, rtol=1e-4, atol=1e-5)

def test_codes_start_from_data():
    """In the first step every code is a vector of the batch, before it follows the averages."""
    torch.manual_seed(0)
    q, z, seen = m.Quantiser(16, 3), vectors(), {}
    follow, q.follow = q.follow, lambda *args: (seen.update(codes=q.codes.clone()), follow(*args))
    q(z)
    flat = z.movedim(1, -1).reshape(-1, 3)
    assert (seen["codes"][:, None] == flat).all(2).any(1).all()
    assert len(seen["codes"].unique(dim=0)) > 5
    assert (q.counts > 0).all() and q.codes.isfinite().all()

def test_dead_codes_are_revived_and_live_ones_are_left():
    q, z = quantiser(count=5.0), vectors()
    q.codes[3] = 1000.0                # far from all data, and out of use
    q.counts[3] = 0.0
    twin = quantiser(count=5.0)
    twin.codes.copy_(q.codes)
    torch.manual_seed(0)
    q.revive(z.movedim(1, -1).reshape(-1, 3), torch.ones(40))
    flat = z.movedim(1, -1).reshape(-1, 3)
    assert (flat == q.codes[3]).all(1).any()
    assert q.counts[3] == 40 / 8                # the usual count, with code and sum
    live = [k for k in range(8) if k != 3]
    assert torch.equal(q.codes[live], twin.codes[live]) and (q.counts[live] == 5).all()

def test_a_code_dies_only_after_disuse():
    """A code that no vector chooses goes on for a while, then moves onto data."""
    q, z = quantiser(count=5.0), vectors()
    q.codes[3] = 1000.0
    torch.manual_seed(0)
    steps = 0
    while q.codes[3].abs().max() > 500:
        q(z)
        steps += 1
        assert steps < 100
    assert steps > 5

def test_masked_positions_are_never_seen():
    """Marked by a huge value: neither counts, nor sums, nor new codes may know it."""
    keep = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(5)) < 0.5
    z = torch.where(keep[:, None], vectors(), torch.tensor(1e6))
    for seed in range(5):
        torch.manual_seed(seed)
        q = m.Quantiser(16, 3)
        q(z, keep)
        q(z, keep)
        assert q.codes.abs().max() < 10
        assert q.counts.sum().item() == pytest.approx(keep.sum().item(), rel=1e-5)

def test_everything_masked_breaks_nothing():
    q = quantiser(count=5.0)
    q(vectors(), torch.zeros(2, 4, 5, dtype=torch.bool))
    assert q.codes.isfinite().all()
    q(vectors())
    assert q.codes.isfinite().all() and q.counts.isfinite().all()

def test_float32_under_autocast():
    q, z = quantiser().eval(), vectors(16)
    with torch.autocast("cpu", torch.bfloat16):
        out, commitment, ids = q(z)
    assert torch.equal(ids, nearest(z, q.codes)) and commitment.dtype == torch.float32

RANK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from conftest import load
from test_quantiser import CODED, steps
rank, ranks, path, out = int(sys.argv[2]), 2, sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=ranks)
q = steps(load(CODED[0]), rank, ranks)
torch.save(q.state_dict(), f"{out}/{rank}.pt")
dist.destroy_process_group()
"""

def steps(module, rank, ranks):
    """Five steps with this rank's share of the same ten photos; the later ones keep codes dying."""
    torch.manual_seed(7)
    q = module.Quantiser(32, 4)
    for step in range(5):
        z = vectors(10, 4, 6, 6, seed=step) * (1 + step)
        keep = torch.rand(10, 6, 6, generator=torch.Generator().manual_seed(step)) < 0.6
        share = slice(rank * 10 // ranks, (rank + 1) * 10 // ranks)
        q(z[share], keep[share])
    return q

def test_two_ranks_are_as_good_as_one(tmp_path):
    children = [subprocess.Popen([sys.executable, "-c", RANK, str(ROOT / "tests"), str(rank),
                                  str(tmp_path / "meet"), str(tmp_path)]) for rank in range(2)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    one = steps(m, 0, 1).state_dict()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in one:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], one[name], rtol=1e-4, atol=1e-5)

# --- the network around it ------------------------------------------------------------------------

def test_sizes_of_the_paper():
    net = m.VQVAE(3, **WIDTHS)
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(net) == 662_723
    assert tuple(net.quantiser.codes.shape) == (512, 64)
    assert count(net.encoder) == 372_416

@pytest.mark.parametrize("downs", (1, 2, 3, 4))
@pytest.mark.parametrize("size", ((32, 32), (48, 32)))
def test_shapes(downs, size):
    net = m.VQVAE(5, 32, 8, 1, downs, K=16, D=4)
    output, commitment, ids = net(torch.rand(2, 3, *size))
    assert tuple(output.shape) == (2, 5, *size) and commitment.shape == ()
    assert tuple(ids.shape) == (2, size[0] >> downs, size[1] >> downs) and 0 <= ids.min() <= ids.max() < 16

def test_a_code_is_masked_when_its_whole_cell_is():
    net = m.VQVAE(3, 32, 8, 1, 2, K=16, D=4)
    keep = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    keep[..., :4, :4] = False          # the whole first cell
    keep[..., 4:8, 4:7] = False        # not the whole of the next
    seen = []
    net.quantiser.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    net(torch.rand(1, 3, 16, 16), keep)
    want = torch.ones(1, 4, 4, dtype=torch.bool)
    want[0, 0, 0] = False
    assert torch.equal(seen[0], want)

def test_names_are_the_same_in_every_stage():
    """The parameters' names and shapes are the contract between the stages."""
    shapes = [{name: tuple(t.shape) for name, t in load(name_).VQVAE(3, **WIDTHS).state_dict().items()}
              for name_ in CODED]
    assert all(other == shapes[0] for other in shapes)
    assert {name.split(".")[0] for name in shapes[0]} == {"encoder", "quantiser", "decoder", "head"}
