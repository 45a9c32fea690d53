"""Read what `write_artifacts.py` wrote with plain diffusers, and compare the images."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel

TOLERANCE = 1e-4
PROMPT = "a cat face on a red background"
TOKEN_PROMPT = "a <my-cat> on a red background"
BAD_WARNINGS = ("newly initialized", "not used when", "unexpected keys", "missing keys")
LORA_FILE = "pytorch_lora_weights.safetensors"


class Warnings(logging.Handler):
    """Keeps what libraries log, as it may say that weights were not read."""

    def __init__(self) -> None:
        """Listen to the libraries that read files."""
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        for name in ("transformers", "diffusers", "peft"):
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.messages.append(record.getMessage())


def main(folder: Path) -> int:
    """Read every kind of artifact in `folder`; return 1 when one gives another image."""
    if any(name.startswith("unweave") for name in sys.modules):
        raise SystemExit("this must run without any unweave package")
    print(
        f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}, torch {torch.__version__}"
    )
    diffusers.utils.logging.disable_progress_bar()
    failures = 0
    for base in sorted(path for path in folder.iterdir() if path.is_dir()):
        expected = load_file(base / "expected.safetensors")
        for kind, wanted in expected.items():
            problem = compare(base, kind, wanted)
            print(f"{base.name}/{kind}: {problem or 'ok'}")
            failures += bool(problem)
    return 1 if failures else 0


def compare(base: Path, kind: str, wanted: torch.Tensor) -> str:
    """Return what is wrong with the artifact `kind`, "" when its image is as `wanted`."""
    heard = Warnings()
    image = READERS.get(kind, read_erasure)(base, kind)
    bad = [text for text in heard.messages if any(part in text.lower() for part in BAD_WARNINGS)]
    if bad:
        return f"warning: {bad[0]}"
    error = ((image - wanted).abs().max() / wanted.abs().max()).item()
    return (
        "" if error <= TOLERANCE else f"relative error {error:.2g}, at most {TOLERANCE} is wanted"
    )


def read_pipeline(base: Path, kind: str) -> torch.Tensor:
    return draw(load(base))


def read_lora(base: Path, kind: str) -> torch.Tensor:
    pipe = load(base)
    pipe.load_lora_weights(base / kind, weight_name=LORA_FILE, use_safetensors=True)
    return draw(pipe)


def read_token(base: Path, kind: str) -> torch.Tensor:
    pipe = load(base)
    (file,) = (base / kind).glob("*.safetensors")
    pipe.load_textual_inversion(base / kind, weight_name=file.name, use_safetensors=True)
    return draw(pipe, TOKEN_PROMPT)


def read_erasure(base: Path, kind: str) -> torch.Tensor:
    """Read the part of an erasure that diffusers knows: a text encoder, a LoRA, or the delta."""
    if (base / kind / "text_encoder").is_dir():
        encoder = CLIPTextModel.from_pretrained(
            base / kind / "text_encoder", use_safetensors=True, local_files_only=True
        )
        return draw(load(base, text_encoder=encoder))
    if (base / kind / LORA_FILE).exists():
        return read_lora(base, kind)
    return draw(with_delta(load(base), base / kind))


def with_delta(pipe: StableDiffusionPipeline, folder: Path) -> StableDiffusionPipeline:
    """Add `delta.safetensors`, whose keys are `<component>/<parameter>`."""
    for key, change in load_file(folder / "delta.safetensors").items():
        component, name = key.split("/", 1)
        getattr(pipe, component).get_parameter(name).data += change
    return pipe


def load(base: Path, **components: Any) -> StableDiffusionPipeline:
    index = json.loads((base / "pipeline" / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    return StableDiffusionPipeline.from_pretrained(
        base / "pipeline",
        use_safetensors=True,
        local_files_only=True,
        safety_checker=None,
        torch_dtype=torch.float32,
        **components,
    )


def draw(pipe: StableDiffusionPipeline, prompt: str = PROMPT) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = pipe(prompt, num_inference_steps=4, generator=generator, output_type="np")
    return torch.from_numpy(output.images[0])


READERS: dict[str, Callable[[Path, str], torch.Tensor]] = {
    "pipeline": read_pipeline,
    "lora": read_lora,
    "kohya": read_lora,
    "token": read_token,
}

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
