"""The sampler's ways: compiled and captured ones draw what the plain one does, for every number of steps."""

import functools

import pytest
import runs
import torch

from meanflow.errors import UserError
from meanflow.method.sampling import Sampler, even_times, sample
from meanflow.model.build import build_net

SCHEDULES = ((1.0, 0.0), (1.0, 0.5, 0.0), (1.0, 0.7, 0.4, 0.1))


@pytest.fixture(scope="module")
def net():
    net = build_net(runs.tiny().model)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    return net.eval()


def inputs(count: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 1, 8, 8, generator=generator).to(device), (torch.arange(count) % 10).to(device)


def test_a_step_is_the_papers(net):
    noise, y = inputs(3)
    r, t = torch.full((3,), 0.25), torch.full((3,), 0.75)
    wanted = noise - 0.5 * net(noise, r, t, y)
    torch.testing.assert_close(Sampler(net)(noise, y, (0.75, 0.25)), wanted, rtol=0, atol=0)
    assert not Sampler(net)(noise, y).requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_sampler_draws_the_same(net, monkeypatch, backend):
    # the whole step in one graph is what either backend is asked for; inductor takes 20 s a shape
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    compiled = Sampler(net, compile=True)
    for count, times in ((3, SCHEDULES[0]), (3, SCHEDULES[1]), (4, SCHEDULES[2])):
        noise, y = inputs(count)
        torch.testing.assert_close(compiled(noise, y, times), sample(net, noise, y, times), rtol=1e-5, atol=1e-5)


def test_a_network_in_bf16_keeps_latents_in_fp32(net):
    noise, y = inputs(4)
    low = build_net(runs.tiny().model)
    low.load_state_dict(net.state_dict())
    latents = Sampler(low.to(torch.bfloat16))(noise, y, even_times(4))
    wanted = sample(net, noise, y, even_times(4))
    assert latents.dtype == torch.float32 and 0 < (latents - wanted).norm() / wanted.norm() < 0.02


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_graph_needs_a_gpu(net):
    with pytest.raises(UserError, match="^cuda_graph: got True, wanted a GPU to capture on, not cpu; "):
        Sampler(net, cuda_graph=True)(*inputs(2))


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_a_captured_sampler_draws_the_same(net, compile):
    on_gpu = build_net(runs.tiny().model).cuda()
    on_gpu.load_state_dict(net.state_dict())
    captured, plain = Sampler(on_gpu, compile=compile, cuda_graph=True), Sampler(on_gpu, compile=compile)
    kept = [
        (captured(*inputs(n, "cuda"), times), plain(*inputs(n, "cuda"), times)) for n in (4, 2) for times in SCHEDULES
    ]
    # all calls first: a result must outlive the calls after it
    for got, wanted in kept:
        assert torch.equal(got, wanted)
    # two shapes, whatever the steps
    assert len(captured._graphs) == 2
