"""The model card of a saved pipeline."""

import json
from collections.abc import Mapping
from pathlib import Path

from .transformer import Transformer

CARD = "README.md"
TEXT = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
license: {licence}
tags: [meanflow, one-step]
---

# {title}

{method}: images in one evaluation of the network, or a few.

```python
from meanflow.interop.pipeline import MeanFlowPipeline

pipeline = MeanFlowPipeline.from_pretrained("{folder}")
images = pipeline(class_labels=[{labels}], num_inference_steps=1).images
```

`timesteps=[1, 0.5, 0]` sets times of one's own. {guidance}

## Network

{network}

## Recipe

{recipe}

## Scores

{scores}

## Licence

{licence_note}
"""


KINDS = {"dit": "DiT", "imf": "Transformer"}
MEANFLOW = "[MeanFlow](https://arxiv.org/abs/2505.13447)"
IMPROVED = "[Improved MeanFlow](https://arxiv.org/abs/2512.02012)"
GUIDANCE = {
    "none": "Guidance is trained in: there is no guidance scale.",
    "omega": "`guidance_scale` sets the scale of the guidance, in the same single evaluation.",
    "interval": "`guidance_scale=4, guidance_interval=(0.3, 0.7)` sets the scale of the guidance, and the times where "
    "it acts, in the same single evaluation.",
}
"""What to say of guidance, by what the network is told of it."""


def write_card(folder: str | Path, config: Mapping, transformer: Transformer) -> None:
    """Write the card of a pipeline beside it, unless the folder has one already: people edit cards.

    Args:
        config: of the pipeline. transformer: its network.
    """
    path = Path(folder, CARD)
    if path.exists():
        return
    net, model = transformer.config, transformer.model_config
    millions = sum(p.numel() for p in transformer.parameters()) / 1e6
    recipe = config.get("recipe") or {}
    shape = f"depth {net.depth}, width {net.hidden_size}, {net.num_heads} heads, patch {net.patch_size}"
    text = TEXT.format(
        title=f"MeanFlow, {net.num_classes} classes",
        folder=path.parent.name,
        licence="other",
        labels=", ".join(str(i) for i in range(min(net.num_classes, 3))),
        method=IMPROVED if model.beyond_dit else MEANFLOW,
        guidance=GUIDANCE[transformer.guidance_input],
        network=f"{KINDS[model.network]}, {shape}: {millions:.1f} M parameters. "
        f"Samples of {net.in_channels} x {net.input_size} x {net.input_size}.",
        recipe=_recipe(recipe),
        scores=_scores(config.get("scores")),
        licence_note="Not stated yet: whoever publishes these weights names their licence here and in the header.",
    )
    path.write_text(text)


def _recipe(recipe: Mapping) -> str:
    if not recipe:
        return "Not known."
    origin = f"From {recipe['origin']}, step {recipe['step']}, weights: {recipe['weights']}."
    return f"{origin}\n\n```json\n{json.dumps(recipe['config'], indent=1)}\n```"


def _scores(scores) -> str:
    if not scores:
        return "None measured. `scripts/evaluate.py` measures them, each with its protocol."
    names = list(dict.fromkeys(name for row in scores for name in row))
    lines = [names, ["---"] * len(names), *([_cell(row.get(name, "")) for name in names] for row in scores)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
