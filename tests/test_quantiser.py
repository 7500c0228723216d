"""The quantiser against a slow plain reference, and the VQ-VAE around it, which is the same in
every stage."""

import pytest
import torch
from conftest import CODED, load

m = load("vqvae")


def quantiser(K=8, D=3):
    """One whose codes are all alive."""
    q = m.Quantiser(K, D)
    q.codes.copy_(torch.randn(K, D, generator=torch.Generator().manual_seed(0)))
    q.shares.fill_(1 / K)
    return q


def draw(B=2, D=3, H=4, W=5, seed=1):
    return torch.randn(B, D, H, W, generator=torch.Generator().manual_seed(seed))


def nearest(z, codes):
    """(B, D, H, W) -> (B, H, W), every distance written out."""
    distances = (z.double()[:, None] - codes.double()[:, :, None, None]).square().sum(2)
    return distances.argmin(1)


def flat(z):
    """(B, D, H, W) -> (B H W, D)."""
    return z.movedim(1, -1).reshape(-1, z.shape[1])


# --- looking up ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_nearest_code(training):
    q, z = quantiser().train(training), draw()
    codes = q.codes.clone()
    out, commitment, ids = q(z)
    assert torch.equal(ids, nearest(z, codes)) and ids.dtype == torch.long
    torch.testing.assert_close(out, codes[ids].movedim(-1, 1))
    assert commitment.item() == pytest.approx((z - out).square().mean().item(), rel=1e-5)


def test_gradients_go_straight_through():
    """d out / d z is the identity; the commitment pulls z to its code with 2 (z - q) / N."""
    q, z = quantiser().eval(), draw().requires_grad_()
    weight = draw(seed=2)
    (q(z)[0] * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)
    z.grad = None
    out, commitment, _ = q(z)
    commitment.backward()
    torch.testing.assert_close(z.grad, (2 * (z - out) / z.numel()).detach())
    assert not list(q.parameters())


def test_float32_under_autocast():
    q, z = quantiser().eval(), draw(16)
    with torch.autocast("cpu", torch.bfloat16):
        out, commitment, ids = q(z)
    assert torch.equal(ids, nearest(z, q.codes))
    assert out.dtype == commitment.dtype == torch.float32


# --- learning ------------------------------------------------------------------------------------


def learn_slowly(codes, shares, vectors, ids):
    """learn() in loops over codes and vectors -> codes, shares, and which codes are dead."""
    K, N = len(codes), len(vectors)
    new_codes, new_shares, dead = codes.clone(), shares.clone(), []
    for k in range(K):
        own = [vectors[n] for n in range(N) if ids[n] == k]
        new_shares[k] = m.DECAY * shares[k] + (1 - m.DECAY) * len(own) / N
        average = m.DECAY * codes[k] * shares[k]
        for vector in own:
            average = average + (1 - m.DECAY) * vector / N
        new_codes[k] = average / new_shares[k]
        if new_shares[k] < 0.1 / K:
            dead.append(k)
    return new_codes, new_shares, dead


@pytest.mark.parametrize("q", [m.Quantiser(8, 3), quantiser()], ids=["new", "alive"])
def test_eval_changes_no_buffer(q):
    q.eval()
    before = {name: tensor.clone() for name, tensor in q.named_buffers()}
    state = torch.get_rng_state()
    q(draw())
    for name, tensor in q.named_buffers():
        assert torch.equal(before[name], tensor)
    assert torch.equal(state, torch.get_rng_state())


def test_training_moves_codes_even_without_gradients():
    q = quantiser()
    before = q.codes.clone()
    with torch.no_grad():
        q(draw())
    assert not torch.equal(before, q.codes)


def test_moving_averages():
    """Four steps of training, in none of which a code dies."""
    q = quantiser()
    codes, shares = q.codes.double(), q.shares.double()
    for step in range(4):
        z = draw(seed=10 + step)
        ids = nearest(z, codes).flatten()
        codes, shares, dead = learn_slowly(codes, shares, flat(z).double(), ids)
        q(z)
        assert dead == []
        torch.testing.assert_close(q.shares.double(), shares, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(q.codes.double(), codes, rtol=1e-4, atol=1e-5)


def test_dead_codes_are_revived_and_live_ones_go_on():
    torch.manual_seed(0)
    q, z = quantiser(), draw()
    q.codes[3] = 1000.0  # far from all data
    q.shares[3] = 0.01
    vectors, ids = flat(z), nearest(z, q.codes).flatten()
    want, shares, dead = learn_slowly(q.codes, q.shares, vectors, ids)
    assert dead == [3]
    q.learn(vectors, ids)
    live = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(q.codes[live], want[live])
    torch.testing.assert_close(q.shares[live], shares[live])
    assert (vectors == q.codes[3]).all(1).any() and q.shares[3] == 1 / 8


def test_codes_start_from_data():
    """The first step finds all codes at zero and takes the first for all vectors: it becomes their
    mean, all others become vectors."""
    torch.manual_seed(0)
    q, z = m.Quantiser(16, 3), draw()
    assert (q(z)[2] == 0).all()
    torch.testing.assert_close(q.codes[0], flat(z).mean(0))
    assert (q.codes[1:, None] == flat(z)).all(2).any(1).all()
    assert len(q.codes.unique(dim=0)) > 8 and (q.shares[1:] == 1 / 16).all()
    assert len(q(z)[2].unique()) > 8


def test_a_code_dies_after_22_steps_without_use():
    torch.manual_seed(0)
    q, steps = quantiser(), 0
    q.codes[3] = 1000.0
    while q.codes[3].abs().max() > 500:
        q(draw())
        steps += 1
        assert steps < 100
    assert steps == 22


def test_the_codebook_follows_a_jump():
    """All vectors move away at once. A few codes are nearest to all of them then, and the others
    would be lost: after 40 steps the codebook is in use again."""
    torch.manual_seed(0)
    q, used = m.Quantiser(32, 4), []
    for step in range(80):
        away = 10.0 * (step >= 40)
        ids = q(draw(16, 4, 8, 8, seed=step) + away)[2]
        used.append(len(ids.unique()))
    assert used[39] > 24 and used[40] < 8 and used[79] > 24


# --- the network around it -----------------------------------------------------------------------


def size_of(module):
    return sum(weight.numel() for weight in module.parameters())


def test_sizes_of_the_paper():
    net = m.VQVAE(3, 128, 32, 2, 2, 512)
    assert size_of(net) == 662_723 and size_of(net.encoder) == 372_416
    assert tuple(net.quantiser.codes.shape) == (512, 64)


def test_without_codes_the_vectors_go_on_as_they_are():
    q, z = m.Quantiser(0, 3), draw()
    out, commitment, ids = q(z)
    assert out is z and commitment == 0 and tuple(ids.shape) == (2, 4, 5)


@pytest.mark.parametrize("downs", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_shapes(downs, size):
    net = m.VQVAE(5, 32, 8, 1, downs, K=16, D=4)
    output, commitment, ids = net(torch.rand(2, 3, *size))
    assert tuple(output.shape) == (2, 5, *size) and commitment.shape == ()
    assert tuple(ids.shape) == (2, size[0] >> downs, size[1] >> downs)


def test_names_are_the_same_in_every_stage():
    """The names and shapes of the tensors are the contract between the stages."""
    shapes = []
    for name in CODED:
        state = load(name).VQVAE(3, 128, 32, 2, 2, 512).state_dict()
        shapes.append({key: tuple(tensor.shape) for key, tensor in state.items()})
    assert shapes[0] == shapes[1] == shapes[2]
    parts = {key.split(".")[0] for key in shapes[0]}
    assert parts == {"encoder", "quantiser", "decoder", "head"}
