"""A diffusers pipeline from class labels to images, in one step or a few."""

import os
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..config import ObjectiveConfig
from ..errors import UserError, require
from ..method.guidance import TOLD, sampling_guidance
from .card import write_card
from .scheduler import MeanFlowScheduler
from .transformer import Transformer

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
GUIDANCE = ("guidance_scale", "guidance_start", "guidance_end")
"""What a network may be told of its guidance."""


class MeanFlowPipeline(DiffusionPipeline):
    """Draws images of classes by MeanFlow.

    Args:
        transformer: the network. scheduler: the steps. vae: the autoencoder of its latents, whose configuration tells
            their scale; None where the network makes pixels in [-1, 1] itself.
        id2label: names of the classes; a class may have several, separated by commas.
        pixels: range of the autoencoder's images, "symmetric" for [-1, 1] or "unit" for [0, 1].
        recipe: what it was trained by, and scores: what was measured of it; written into the model card.

    A step is one evaluation of the network, for its guidance is trained in. A network of improved MeanFlow is told the
    scale and the interval of its guidance; others have theirs from training.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: Transformer,
        scheduler: MeanFlowScheduler,
        vae: AutoencoderKL | None = None,
        id2label: dict | None = None,
        pixels: str = "symmetric",
        recipe: dict | None = None,
        scores: list | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        # JSON's keys are strings
        id2label = None if id2label is None else {str(i): name for i, name in id2label.items()}
        self.register_to_config(id2label=id2label, pixels=pixels, recipe=recipe, scores=scores)
        self.image_processor = VaeImageProcessor()
        classes: dict[str, set[int]] = {}
        for i, names in (id2label or {}).items():
            for name in names.split(","):
                classes.setdefault(name.strip(), set()).add(int(i))
        # a name of two classes (crane: bird and machine) stands for neither
        self.labels = {name: ids.pop() for name, ids in sorted(classes.items()) if len(ids) == 1}

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Save as diffusers does, with a model card (README.md) unless the folder has one."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_card(save_directory, self.config, self.transformer)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Look up classes by name.

        Raises:
            ValueError: for a name that ``labels`` does not have.
        """
        names = [label] if isinstance(label, str) else list(label)
        for name in names:
            wanted = "one of pipeline.labels, which lacks names of two classes"
            require(name in self.labels, "class_labels", name, wanted, "or pass the class's number")
        return [self.labels[name] for name in names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_scale: float | None = None,
        guidance_interval: Sequence[float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            class_labels: classes by number or name, one image each, also in lists of lists; None is one image of no
                class (the null class).
            num_inference_steps: equal steps from noise to image; None takes the scheduler's own schedule, one step
                unless it says otherwise. timesteps: falling times instead, such as [1, 0.5, 0].
            num_images_per_label: images of each label, in a row.
            generator: of the noise; a list has one an image, which then does not depend on its batch.
            latents: the noise itself (images, channels, size, size), in place of a generator.
            output_type: "pil", "np" (images, height, width, channels) or "pt" (images, channels, height, width) in
                [0, 1], or "latent".
            callback_on_step_end: called as (pipeline, i, t, tensors) after step i from time t; what it returns
                replaces the tensors of the names in callback_on_step_end_tensor_inputs.
            guidance_scale, guidance_interval: omega, 1 or more, and the times (start, end) in [0, 1] where guidance
                acts, for a network that is told them. None: the official best of its size in one step.

        Raises:
            ValueError: for arguments that do not fit, naming the first.
        """
        require(output_type in OUTPUT_TYPES, "output_type", output_type, f"one of {OUTPUT_TYPES}", "change it")
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        name, wanted = "callback_on_step_end_tensor_inputs", f"names among {self._callback_tensor_inputs}"
        require(not unknown, name, sorted(unknown), wanted, "leave the others out")
        labels = self._labels(class_labels, num_images_per_label).to(self._execution_device)
        told = dict(zip(GUIDANCE, self.guidance(guidance_scale, guidance_interval), strict=False))
        latents = self._noise(len(labels), generator, latents)

        self.scheduler.set_timesteps(num_inference_steps, timesteps=timesteps)
        self._num_timesteps = len(self.scheduler.timesteps)
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            z = self.scheduler.scale_model_input(latents, t).to(self.transformer.dtype)
            # times and guidance stay in fp32: bf16 has three digits
            times = {"timestep": t, "r_timestep": self.scheduler.previous_timestep(t)}
            inputs = {name: torch.full((len(z),), float(x), device=z.device) for name, x in (times | told).items()}
            (u,) = self.transformer(z, class_labels=labels, return_dict=False, **inputs)
            (latents,) = self.scheduler.step(u, t, latents, return_dict=False)
            if callback_on_step_end is not None:
                tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                latents = callback_on_step_end(self, i, t, tensors).pop("latents", latents)

        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def guidance(self, scale: float | None = None, interval: Sequence[float] | None = None) -> tuple[float, ...]:
        """What the network is told of its guidance: what is given, and for the rest its run's
        evaluation.guidance, or the official best of its size.

        Returns:
            omega, start and end; omega alone, or nothing, for a network that is told no more.

        Raises:
            ValueError: for what it cannot be told.
        """
        told = self.transformer.guidance_input
        count, wanted = TOLD[told]
        require(scale is None or count > 0, "guidance_scale", scale, wanted, "leave it out")
        require(interval is None or count > 1, "guidance_interval", interval, wanted, "leave it out")
        model, objective = self.transformer.model_config, ObjectiveConfig(guidance_input=told)
        own = (self.config.recipe or {}).get("config", {}).get("evaluation", {}).get("guidance", ())
        best = sampling_guidance(model, objective, own)
        given = (*(best[:1] if scale is None else (scale,)), *(best[1:] if interval is None else interval))
        return sampling_guidance(model, objective, given, "guidance_scale and guidance_interval")

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the last call."""
        return self._num_timesteps

    def _labels(self, class_labels, repeats: int) -> Tensor:
        """Return one class per image, int64; the null class stands for none."""
        require(repeats >= 1, "num_images_per_label", repeats, "a positive whole number", "change it")
        classes = self.transformer.config.num_classes
        if class_labels is None:
            return torch.full((repeats,), classes)
        ids = [self.get_label_ids(label)[0] if isinstance(label, str) else label for label in _flat(class_labels)]
        require(len(ids) > 0, "class_labels", ids, "at least one class", "None draws one image of no class")
        for label in ids:
            wanted = f"classes from 0 to {classes - 1}, or {classes} for none"
            require(isinstance(label, int) and 0 <= label <= classes, "class_labels", label, wanted, "correct it")
        return torch.tensor(ids).repeat_interleave(repeats)

    def _noise(self, count: int, generator, latents: Tensor | None) -> Tensor:
        """Draw noise in fp32 whatever the model's dtype, so that a seed means the same image in each."""
        config, device = self.transformer.config, self._execution_device
        shape = (count, config.in_channels, config.input_size, config.input_size)
        if isinstance(generator, list):
            wanted = f"{count}, one an image"
            require(len(generator) == count, "generator", len(generator), wanted, "or pass a single one")
        if latents is None:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        else:
            require(latents.shape == shape, "latents", tuple(latents.shape), f"the shape {shape}", "one an image")
            noise = latents.to(device, torch.float32)
        return noise * self.scheduler.init_noise_sigma

    def _decode(self, latents: Tensor, output_type: str):
        if self.vae is None:
            images = latents
        else:
            config = self.vae.config
            z = latents / config.scaling_factor
            if getattr(config, "latents_std", None) is not None:
                known = (config.latents_mean, config.latents_std)
                mean, std = (torch.tensor(x, device=z.device).reshape(1, -1, 1, 1) for x in known)
                z = z * std + mean
            if getattr(config, "shift_factor", None) is not None:
                z = z + config.shift_factor
            images = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float()
        if images.shape[1] not in (1, 3) and output_type == "pil":
            raise UserError(
                f"output_type: got 'pil' for images of {images.shape[1]} channels, wanted 1 or 3; these are latents, "
                "whose vae is missing: load one, pipeline.register_modules(vae=...), or ask for 'latent'"
            )
        if self.vae is not None and self.config.pixels == "unit":
            images = 2 * images - 1
        return self.image_processor.postprocess(images, output_type)


def _flat(labels) -> list:
    """Flatten labels in lists, tensors and arrays."""
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    if isinstance(labels, Sequence) and not isinstance(labels, str):
        return [each for label in labels for each in _flat(label)]
    return [labels]


# diffusers looks components up in imported modules: pipelines saved by older versions name these
for _name in ("meanflow.scheduler", "meanflow.transformer"):
    import_module(_name)
