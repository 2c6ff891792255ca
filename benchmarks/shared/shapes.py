"""Layers of real models, by name, each with where its sizes are from, and the batch sizes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """`activation(input @ weight.T + bias)`, weight (out_features, in_features).

    activation: what follows the layer in its model, by fastlinear's name, or None.
    bias: whether it has one in its model.
    source: where the sizes are from.
    """

    name: str
    in_features: int
    out_features: int
    activation: str | None
    bias: bool
    source: str


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("mnist-1", 784, 128, "relu", True, "28 x 28 pixels, 128 hidden"),
        Layer("mnist-2", 128, 10, None, True, "10 digits"),
        Layer("dlrm-1", 13, 512, "relu", True, "MLPerf DLRM, bottom MLP 13-512-256-128"),
        Layer("dlrm-2", 512, 256, "relu", True, "MLPerf DLRM, bottom MLP 13-512-256-128"),
        Layer("vit-b-qkv", 768, 2304, None, True, "ViT-B/16 (Dosovitskiy et al. 2021), 3 x 768"),
        Layer("bert-base-up", 768, 3072, "gelu", True, "BERT-base (Devlin et al. 2019)"),
        Layer("bert-base-down", 3072, 768, None, True, "BERT-base (Devlin et al. 2019)"),
        Layer("gpt2-xl-up", 1600, 6400, "gelu_tanh", True, "gpt2-xl's configuration, n_embd 1600"),
        Layer("gpt2-xl-down", 6400, 1600, None, True, "gpt2-xl's configuration, n_embd 1600"),
        Layer("llama-3-8b-kv", 4096, 1024, None, False, "Llama 3 8B: 8 heads of 128 for keys"),
        Layer("square", 4096, 4096, None, True, "a square; without bias, Llama 3 8B's queries"),
        Layer("llama-3-8b-gate", 4096, 14336, "silu", False, "Llama 3 8B, MLP"),
        Layer("llama-3-8b-down", 14336, 4096, None, False, "Llama 3 8B, MLP"),
        Layer("llama-3-70b-gate", 8192, 28672, "silu", False, "Llama 3 70B, MLP"),
        Layer("llama-3-70b-down", 28672, 8192, None, False, "Llama 3 70B, MLP"),
        Layer("skinny", 8192, 1024, None, True, "few outputs of long sums; Llama 3 70B's keys"),
    )
}

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


def operations(layer: Layer, rows: int, mode: str) -> int:
    """Multiplications and additions of the matrix products of `mode`."""
    product = 2 * rows * layer.in_features * layer.out_features
    return product * {"forward": 1, "backward": 2, "forward+backward": 3}[mode]


def least_bytes(layer: Layer, rows: int, mode: str, itemsize: int, bias: bool) -> int:
    """What has to move if every operand is read once and every result written once.

    What an activation keeps for its derivative is not counted.
    """
    input, output = rows * layer.in_features, rows * layer.out_features
    weight, biases = layer.in_features * layer.out_features, layer.out_features * bias
    forward = input + weight + biases + output
    # Reads grad_output, input and weight; writes the gradients of input, weight and bias.
    backward = output + 2 * (input + weight) + biases
    parts = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
    return itemsize * parts[mode]


def memory(layer: Layer, rows: int, itemsize: int) -> int:
    """Bytes that a step with every operand and gradient takes, the float64 truth not among them."""
    input, output = rows * layer.in_features, rows * layer.out_features
    weight = layer.in_features * layer.out_features
    return itemsize * (2 * input + 4 * output + 2 * weight)
