"""A folder for the Hugging Face Hub, that transformers and timm open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sgformer.core.errors import UserError, how_to_install
from sgformer.core.names import markdown
from sgformer.data.image import height_and_width
from sgformer.exporting.formats import ExportFormat, Runner, register_export
from sgformer.exporting.graphs import Graph
from sgformer.models.backbone import SGFormer
from sgformer.models.config import VARIANTS
from sgformer.models.load import network_name

WEIGHTS, CONFIG, CARD, CODE = "model.safetensors", "config.json", "README.md", "modeling_sgformer.py"

# Named as what it extends: of any other name transformers' pipeline says, wrongly, that it is not supported.
CLASS = "TimmWrapperForImageClassification"

#: What `trust_remote_code=True` runs instead of `import sgformer` in the reader's own program.
MODULE = f'''"""The classifier of this folder for transformers; needs sgformer: {how_to_install()}."""

import sgformer  # noqa: F401 - adds its networks to timm
import transformers


class {CLASS}(transformers.{CLASS}):
    """SG-Former with a classifier."""
'''


@register_export("hub")
class HubFormat(ExportFormat):
    """A folder: weights, config with the preprocessing, model card, and the code that `trust_remote_code` runs.

    The config is timm's, which transformers reads as its own (`TimmWrapper`).
    """

    suffix = ""
    any_size = True
    folder = True

    def write(self, graph: Graph, example: Tensor, size: Any, about: dict[str, Any], path: Path) -> list[Path]:
        import timm
        from timm.models._hub import save_config_for_hf

        if graph.axes(open_size=True) != {"logits": {0: "batch"}}:
            raise UserError("--format hub is for classifiers, without --features and --significance")
        path.mkdir()
        name, options = _timm_arguments(graph.model)
        model = timm.create_model(name, num_classes=len(about["classes"]), **options)
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in graph.model.state_dict().items()}
        save_file(tensors, path / WEIGHTS, {"format": "pt"})
        reading = {key: about[key] for key in ("mean", "std", "crop_pct", "interpolation")}
        shape = [model.in_chans, *map(int, height_and_width(about["image_size"]))]
        settings = {
            "pretrained_cfg": {**reading, "input_size": shape, "test_input_size": None, "test_crop_pct": None},
            "label_names": about["classes"],
            "model_type": "timm_wrapper",  # known to transformers, which then asks for no code of the folder's
        }
        if isinstance(graph.model, SGFormer):
            settings["auto_map"] = {"AutoModelForImageClassification": f"{Path(CODE).stem}.{CLASS}"}
            (path / CODE).write_text(MODULE, encoding="utf-8")
        save_config_for_hf(model, str(path / CONFIG), model_config=settings)
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        config["model_args"] = options  # timm's own have the number of classes, which transformers passes by itself
        (path / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (path / CARD).write_text(_card(about, graph.model.metadata), encoding="utf-8")
        return [path]

    def open(self, path: Path) -> Runner:
        import timm

        model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()

        def run(image: Tensor) -> tuple[list[Tensor], None]:
            with torch.no_grad():
                return [model(image)], None

        return run


def _timm_arguments(model: Any) -> tuple[str, dict[str, Any]]:
    """The name and the arguments by which `timm.create_model` builds the network without its classifier's size."""
    name = network_name(model)
    if not isinstance(model, SGFormer):
        return name, {}
    # All of the config, so that a name whose stages change in a later version, or a plugin's, means the same network.
    left_out = ("num_classes", "drop_rate", "drop_path_rate")
    options = {key: value for key, value in model.config.to_dict().items() if key not in left_out}
    return name if name in VARIANTS else "sgformer_n", options


def _card(about: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """The model card: Markdown below the metadata that the Hub reads."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="timm", pipeline_tag="image-classification", tags=["image-classification", "timm", "transformers"]
    )
    size = " x ".join(str(int(side)) for side in height_and_width(about["image_size"]))
    known = ", ".join(markdown(name) for name in about["classes"][:20])
    more = f" and {len(about['classes']) - 20} more" if len(about["classes"]) > 20 else ""
    metrics = metadata.get("metrics", {}).items()
    # A value that is not finite is stored as null.
    scores = [f"| {markdown(name)} | {value:.4g} |" for name, value in metrics if isinstance(value, (int, float))]
    table = ["", "On the validation images of its training:", "", "| Metric | Value |", "|---|---|", *scores]
    import_first = f"import sgformer  # {how_to_install()}\n" if about["config"] else ""
    return f"""---
{data.to_yaml()}
---

# {markdown(about["model"])}

An image classifier of {len(about["classes"])} classes: {known}{more}. Images are read at {size} pixels.
{chr(10).join(table if scores else [])}

```python
{import_first}from transformers import pipeline

classify = pipeline("image-classification", "FOLDER OR REPOSITORY")
print(classify("photo.jpg"))
```

{"Without the first line, pass `trust_remote_code=True`. " if about["config"] else ""}With timm:
`timm.create_model("local-dir:FOLDER", pretrained=True)`, or `hf-hub:REPOSITORY`.

Training data, intended use and limits: to be described by its author.
"""
