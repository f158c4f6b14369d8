"""The demonstration's network, a residual MLP of about half a million weights, and its checkpoint folder.

    h = embed(2 x - 1);  h = h + fc2(gelu(fc1(norm(h)))) for each layer;  logits = head(norm(h))

The checkpoint is laid out as Hugging Face does: config.json and model.safetensors, tensors named
`layers.0.fc1.weight`, so that recipes with gradients over the layers mean something.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class DigitsConfig:
    """Sizes of the network, by the names that transformers uses in config.json."""

    hidden_size: int = 128
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    image_size: int = 8
    num_labels: int = 10


class Layer(nn.Module):
    """h [N, hidden] -> h + fc2(gelu(fc1(norm(h))))."""

    def __init__(self, config: DigitsConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.fc2(functional.gelu(self.fc1(self.norm(hidden))))


class DigitsMLP(nn.Module):
    """pixels [N, 8, 8] in [0, 1] -> logits [N, 10]."""

    def __init__(self, config: DigitsConfig | None = None):
        super().__init__()
        self.config = config or DigitsConfig()
        hidden = self.config.hidden_size
        self.embed = nn.Linear(self.config.image_size**2, hidden)
        self.layers = nn.ModuleList(Layer(self.config) for _ in range(self.config.num_hidden_layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, self.config.num_labels)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.embed(2 * pixels.flatten(1) - 1)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))


def save_checkpoint(model: DigitsMLP, folder: Path) -> None:
    """Writes config.json and model.safetensors (fp32)."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = {"architectures": ["DigitsMLP"], "model_type": "digits_mlp", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(kind | asdict(model.config), indent=2) + "\n", encoding="utf-8")
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def load_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder, by name."""
    return load_file(folder / "model.safetensors")


def load_checkpoint(folder: Path) -> DigitsMLP:
    """The network that save_checkpoint, or a merge of such folders, has written."""
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = DigitsMLP(DigitsConfig(**{name: stored[name] for name in asdict(DigitsConfig())}))
    model.load_state_dict(load_state(folder))
    return model
