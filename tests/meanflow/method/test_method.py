"""The method's own checks: derivatives with a closed form, a known velocity field, guidance, weight, memory."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from meanflow.config import ObjectiveConfig
from meanflow.method.passes import Pass, Passes, func_jvp, pair_jvp
from meanflow.method.sampling import sample
from meanflow.model.dit import DiT
from meanflow.objectives.meanflow import meanflow_terms
from meanflow.objectives.meanflow_plan import Predictions, whole_batch

F64 = torch.float64


class Gaussian(nn.Module):
    """u of data N(mean, std^2) in closed form: the flow keeps (z_t - (1 - t) mean) / sigma_t, with
    sigma_t^2 = (1 - t)^2 std^2 + t^2."""

    num_classes = 1

    def __init__(self, mean=0.7, std=0.4):
        super().__init__()
        self.mean, self.std = mean, std

    def sigma(self, t):
        return ((1 - t) ** 2 * self.std**2 + t**2).sqrt()

    def velocity(self, z, t):
        # E[e - x | z_t = z]
        offset = z - (1 - t) * self.mean
        return -self.mean + (t - (1 - t) * self.std**2) / self.sigma(t) ** 2 * offset

    def flow(self, z, t, r):
        return (1 - r) * self.mean + self.sigma(r) / self.sigma(t) * (z - (1 - t) * self.mean)

    def forward(self, z, r, t, y):
        r, t = r.reshape(-1, 1, 1, 1), t.reshape(-1, 1, 1, 1)
        gap = t - r
        average = (z - self.flow(z, t, r)) / torch.where(gap == 0, 1, gap)
        return torch.where(gap == 0, self.velocity(z, t), average)


def column(a):
    return a[:, None, None, None]


def small_dit(**options):
    torch.manual_seed(0)
    net = DiT(
        input_size=4, patch_size=2, in_channels=2, hidden_size=32, depth=2, num_heads=2, num_classes=3, **options
    ).double()
    for p in net.parameters():  # adaLN-Zero starts as the identity: nothing would depend on anything
        nn.init.normal_(p, std=0.2)
    return net


def small_batch(n=6):
    g = torch.Generator().manual_seed(1)
    x, e = (torch.randn(n, 2, 4, 4, generator=g, dtype=F64) for _ in range(2))
    t, r = torch.rand(2, n, generator=g, dtype=F64).sort(0, descending=True).values
    return x, e, r, t, torch.arange(n) % 3


def test_jvp_of_a_function_with_a_closed_form():
    z, v = torch.randn(2, 5, 1, 2, 2, dtype=F64)
    r, t = torch.rand(2, 5, dtype=F64)
    one, zero = torch.ones_like(t), torch.zeros_like(t)

    def net(z, r, t, y):
        return z**2 * column(t).sin() + column(r).exp() * z

    for rates, wanted in {
        (0, 1): 2 * z * v * column(t).sin() + column(r).exp() * v + z**2 * column(t).cos(),
        (1, 0): 2 * z * v * column(t).sin() + column(r).exp() * v + column(r).exp() * z,
        (0, 0): 2 * z * v * column(t).sin() + column(r).exp() * v,
    }.items():
        direction = (v, one if rates[0] else zero, one if rates[1] else None)
        _, du_dt = func_jvp(net, (z, r, t), direction, (None,))
        torch.testing.assert_close(du_dt, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("embedding", [("t", "h"), ("t", "r"), ("t", "r", "h"), ("h",)], ids="-".join)
def test_pairs_are_the_networks_derivative(embedding):
    net, (x, v, r, t, y) = small_dit(time_embedding=embedding), small_batch()
    direction = (v, torch.full_like(r, 0.3), torch.ones_like(t))
    u, du_dt = pair_jvp(net, (x, r, t), direction, (y,))
    u_func, du_dt_func = func_jvp(net, (x, r, t), direction, (y,))
    torch.testing.assert_close(u, u_func, rtol=0, atol=1e-12)
    torch.testing.assert_close(du_dt, du_dt_func, rtol=1e-10, atol=1e-10)
    step = 1e-5
    ahead, behind = (net(x + s * v, r + s * 0.3, t + s, y) for s in (step, -step))
    torch.testing.assert_close(du_dt, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("start, count", [(0, 2), (4, 2), (1, 3)], ids=["leading", "trailing", "inner"])
def test_tangent_on_a_slice_of_the_batch(start, count):
    net, (x, v, r, t, y) = small_dit(), small_batch()
    u, du_dt = net(x, r, t, y, tangents=(v, None, torch.ones_like(t)))
    rows = slice(start, start + count)
    u_slice, du_dt_slice = net(x, r, t, y, tangents=(v[rows], None, torch.ones_like(t[rows])), tangent_start=start)
    torch.testing.assert_close(u_slice, u, rtol=0, atol=1e-13)
    torch.testing.assert_close(du_dt_slice, du_dt[rows], rtol=1e-12, atol=1e-12)


def test_average_velocity_is_the_integral_of_the_velocity():
    net, y = Gaussian(), torch.zeros(4, dtype=torch.long)
    z = torch.randn(4, 1, 2, 2, dtype=F64)
    r, t = torch.tensor([0.0, 0.1, 0.5, 0.0], dtype=F64), torch.tensor([1.0, 0.6, 0.9, 0.3], dtype=F64)
    # Gauss-Legendre along the path that ends in z at time t
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(60))
    integral = torch.zeros_like(z)
    for node, weight in zip(nodes, weights, strict=True):
        s = column((t + r) / 2 + node * (t - r) / 2)
        integral += weight * column((t - r) / 2) * net.velocity(net.flow(z, column(t), s), s)
    torch.testing.assert_close(column(t - r) * net(z, r, t, y), integral, rtol=1e-9, atol=1e-10)


def test_the_identity_holds_for_the_known_field():
    net, y = Gaussian(), torch.zeros(5, dtype=torch.long)
    z = torch.randn(5, 1, 2, 2, dtype=F64)
    t, r = torch.rand(2, 5, dtype=F64).sort(0, descending=True).values
    v = net.velocity(z, column(t))
    u, du_dt = func_jvp(net, (z, r, t), (v, None, torch.ones_like(t)), (y,))
    torch.testing.assert_close(u, v - column(t - r) * du_dt, rtol=1e-9, atol=1e-9)


def test_the_target_is_right_on_average():
    # the target is linear in v: given z, the conditional velocities average to the marginal one, whose target is u
    net, n = Gaussian(), 400_000
    g = torch.Generator().manual_seed(3)
    x = net.mean + net.std * torch.randn(n, 1, 1, 1, generator=g, dtype=F64)
    e = torch.randn(n, 1, 1, 1, generator=g, dtype=F64)
    t, r = torch.full((n,), 0.8, dtype=F64), torch.full((n,), 0.2, dtype=F64)
    nobody = torch.zeros(n, dtype=torch.bool)
    terms = meanflow_terms(ObjectiveConfig(), net, x, e, r, t, nobody.long(), nobody, jvp=func_jvp)
    z = (0.2 * x + 0.8 * e).flatten()
    residual = (terms.u - terms.u_tgt).flatten()
    for feature in (torch.ones_like(z), z, z**2):
        mean, error = (feature * residual).mean(), (feature * residual).std() / n**0.5
        assert abs(mean) < 4 * error


def test_one_step_samples_the_gaussian():
    net = Gaussian()
    noise = torch.randn(50_000, 1, 1, 1, generator=torch.Generator().manual_seed(5), dtype=F64)
    y = torch.zeros(len(noise), dtype=torch.long)
    one = sample(net, noise, y)
    torch.testing.assert_close(one, net.mean + net.std * noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sample(net, noise, y, (1.0, 0.7, 0.2, 0.0)), one, rtol=1e-10, atol=1e-10)


def mix(config, v, u_null, u_cond):
    """v_g of one sample, of scalars."""
    t = torch.tensor([0.5])
    plan = whole_batch(config, t, t, torch.zeros(1, dtype=torch.bool))
    rows = torch.tensor([u_null, u_cond][: len(plan.rows)])
    return Predictions(config, plan, config.kappa, rows).guided(torch.tensor([v]), slice(None)).item()


def test_guidance_mixes_scalars():
    assert mix(ObjectiveConfig(omega=0.2, kappa=0.5), 1.0, 10.0, 100.0) == pytest.approx(0.2 + 3 + 50)
    assert mix(ObjectiveConfig(omega=2.0), 1.0, 10.0, None) == pytest.approx(2 - 10)


def test_guidance_interval_includes_both_ends():
    class Constant(nn.Module):
        num_classes = 7

        def forward(self, z, r, t, y):
            assert torch.equal(r, t)
            return column(torch.where(y == 7, 10.0, 100.0)).expand_as(z)

    config = ObjectiveConfig(omega=0.2, kappa=0.5, guidance_start=0.25, guidance_end=0.75)
    t = torch.tensor([0.25, 0.75, 0.5, 0.2499, 0.7501])
    v = torch.ones(5, 1, 1, 1)
    plan = whole_batch(config, t, t, torch.zeros(5, dtype=torch.bool))
    passes = Passes({"guidance": Pass(len(plan.rows))}, Constant())
    predictions = Predictions.make(config, passes, v, t, torch.arange(5), None, plan)
    v_g = predictions.guided(v, slice(None)).flatten()
    torch.testing.assert_close(v_g, torch.tensor([53.2, 53.2, 53.2, 1.0, 1.0]))


def test_effective_scale():
    # where the network predicts its own target, kappa only rescales omega: v_g = u_null + omega' (v - u_null)
    wanted = mix(ObjectiveConfig(omega=2.0), 3.0, 1.0, None)
    assert mix(ObjectiveConfig(omega=0.4, kappa=0.8), 3.0, 1.0, wanted) == pytest.approx(wanted)


@pytest.mark.parametrize("c, p", [(0.01, 1.0), (1e-3, 0.5), (1.0, 2.0), (0.01, 0.0)])
def test_adaptive_weight(c, p):
    x, e, r, t, y = small_batch()
    net, drop = small_dit(), torch.zeros(6, dtype=torch.bool)
    terms = meanflow_terms(ObjectiveConfig(norm_c=c, norm_p=p), net, x, e, r, t, y, drop)
    raw = (terms.u - terms.u_tgt).square().sum((1, 2, 3))
    torch.testing.assert_close(terms.raw, raw)
    torch.testing.assert_close(terms.loss, (raw / (raw + c) ** p).mean())
    z = (1 - column(t)) * x + column(t) * e
    # the weight is not differentiated: the gradient is that of the weighted squared error
    (got,) = torch.autograd.grad(terms.loss, net.final_layer.linear.weight, retain_graph=True)
    weighted = ((net(z, r, t, y) - terms.u_tgt).square().sum((1, 2, 3)) / terms.weight).mean()
    (wanted,) = torch.autograd.grad(weighted, net.final_layer.linear.weight)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
    assert not terms.weight.requires_grad and not terms.u_tgt.requires_grad


@pytest.mark.parametrize("jvp", [pair_jvp, func_jvp], ids=["pairs", "torch.func"])
def test_equal_times_have_the_velocity_as_target(jvp):
    x, e, _, t, y = small_batch()
    terms = meanflow_terms(ObjectiveConfig(), small_dit(), x, e, t, t, y, torch.zeros(6, dtype=torch.bool), jvp=jvp)
    assert torch.equal(terms.u_tgt, e - x)


def live_bytes(compute) -> int:
    """Bytes that autograd keeps for the backward pass of what compute() returns, without its inputs."""
    alive = weakref.WeakValueDictionary()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        saved = Saved(tensor)
        alive[id(saved)] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = compute()
    assert result.requires_grad
    return sum({storage_of(saved.tensor): saved.tensor.nbytes for saved in alive.values()}.values())


def storage_of(tensor):
    """What tells views of the same memory from others; the tensors inside torch.func have none of their own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return id(tensor)


def test_the_derivative_costs_no_memory_until_the_backward():
    net, (x, e, r, t, y) = small_dit(), small_batch()
    nobody = torch.zeros(6, dtype=torch.bool)

    def flow_matching():
        u = net(x, t, t, y)
        return (u - (e - x)).square().mean()

    def with_pairs():
        return meanflow_terms(ObjectiveConfig(), net, x, e, r, t, y, nobody).loss

    def target_not_stopped():
        u, du_dt = func_jvp(net, (x, r, t), (e - x, None, torch.ones_like(t)), (y,))
        return (u - ((e - x) - column(t - r) * du_dt)).square().mean()

    plain, stopped, running = (live_bytes(f) for f in (flow_matching, with_pairs, target_not_stopped))
    assert stopped < 1.02 * plain + 4 * x.nbytes
    # what this test would see if the target were not stopped: the tangents, though no operator differentiates them
    assert running > 1.5 * plain


def test_a_gradient_through_the_derivative_is_refused():
    net, (x, e, r, t, y) = small_dit(), small_batch()
    _, du_dt = net(x, r, t, y, tangents=(e - x, None, torch.ones_like(t)))
    with pytest.raises(RuntimeError, match="tangent"):
        du_dt.sum().backward()
