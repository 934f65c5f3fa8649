"""MeanFlow's sampling as a diffusers scheduler: z_r = z_t - (t - r) u(z_t, r, t)."""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..errors import require
from ..method.sampling import check_times, even_times


class MeanFlowScheduler(SchedulerMixin, ConfigMixin):
    """Few steps from noise at t = 1 to data at t = 0, by average velocities.

    Args:
        times: the default schedule, such as [1, 0.5, 0]; None: one step, [1, 0].

    Timesteps are times in [0, 1] themselves. A step depends on its time alone, so steps may be taken in any order.
    """

    order = 1
    init_noise_sigma = 1.0
    _compatibles = []

    @register_to_config
    def __init__(self, times: list | None = None):
        self.set_timesteps()

    def __len__(self) -> int:
        return len(self.timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Set the schedule.

        Args:
            num_inference_steps: so many equal steps from 1 to 0. timesteps: falling times of one's own instead, such
                as [1, 0.5, 0]; the last one, where the sample ends, is no step. Neither: the configured times.
            device: of the attribute ``timesteps``.

        Raises:
            ValueError: for both, or times that do not fall within [0, 1].
        """
        wanted = f"none beside num_inference_steps = {num_inference_steps}"
        require(num_inference_steps is None or timesteps is None, "timesteps", timesteps, wanted, "pass one of them")
        if num_inference_steps is not None:
            self._times = even_times(num_inference_steps)
        else:
            times = (self.config.times or [1, 0]) if timesteps is None else timesteps
            self._times = check_times(torch.as_tensor(times, dtype=torch.float64).tolist())
        self.num_inference_steps = len(self._times) - 1
        self.timesteps = torch.tensor(self._times[:-1], dtype=torch.float32, device=device)

    def previous_timestep(self, timestep: float | Tensor) -> float:
        """The time at which the step from ``timestep`` ends.

        Raises:
            ValueError: where the schedule has no step from there.
        """
        return self._times[self._index(timestep) + 1]

    def _index(self, timestep: float | Tensor) -> int:
        """Index of the step that starts at a time, up to the rounding of fp32 or a model's dtype."""
        t = float(timestep)
        index = min(range(len(self)), key=lambda i: abs(self._times[i] - t))
        near = abs(self._times[index] - t) <= 0.01 * self._times[index]
        require(near, "timestep", t, f"one of {list(self._times[:-1])}", "take it from scheduler.timesteps")
        return index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return the sample unchanged; other schedulers scale it."""
        return sample

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Compute z_r = z_t - (t - r) u, in fp32 or the sample's own dtype if that is wider.

        Args:
            model_output: u (B, channels, height, width), the average velocity from t back to r. timestep: t, one of
                ``timesteps``. sample: z_t, shaped like u.

        Returns:
            An output whose prev_sample is z_r in the dtype of the sample; or a tuple of it.
        """
        index = self._index(timestep)
        gap = self._times[index] - self._times[index + 1]
        dtype = torch.promote_types(sample.dtype, torch.float32)
        z = (sample.to(dtype) - gap * model_output.to(dtype)).to(sample.dtype)
        return SchedulerOutput(prev_sample=z) if return_dict else (z,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Compute z_t = (1 - t) x + t e from x and e (B, ...) and any times t (B,) in [0, 1], for training."""
        t = timesteps.to(original_samples).reshape(-1, *[1] * (original_samples.ndim - 1))
        return (1 - t) * original_samples + t * noise
