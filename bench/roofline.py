"""On paper: the operations and bytes of one step of FLUX.1-dev, and the least time that an H100 can take for them."""

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from bench._common import announce, benchmark_parser, table
from flux.fp8 import fp8_layers

SIDE, TEXT_TOKENS, STEPS = 1024, 512, 28
# NVIDIA H100 SXM, from its data sheet, without sparsity
BF16_FLOPS, FP8_FLOPS, BYTES_PER_SECOND = 989e12, 1979e12, 3.35e12


def main() -> None:
    benchmark_parser(__doc__).parse_args()
    announce(10)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    picture = (SIDE // 16) ** 2
    linear = {False: 0.0, True: 0.0}  # operations of the layers that go_fast has in fp8 (True) and of the others
    quantized = set(fp8_layers(transformer))
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear):
            operations = 2 * layer.weight.numel() * tokens_of(name, picture)
            linear[name in quantized and tokens_of(name, picture) > 1] += operations
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    attention = blocks * 4 * (picture + TEXT_TOKENS) ** 2 * transformer.inner_dim  # q k^T and its product with v
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    in_fp8 = sum(transformer.get_submodule(name).weight.numel() for name in quantized)
    rows = []
    for precision, flops, weight_bytes in (
        ("bf16", BF16_FLOPS, 2 * parameters),
        ("fp8", FP8_FLOPS, 2 * (parameters - in_fp8) + in_fp8),
    ):
        computing = (linear[False] + attention) / BF16_FLOPS + linear[True] / flops
        reading = weight_bytes / BYTES_PER_SECOND
        rows.append(
            [
                precision,
                f"{(linear[False] + linear[True]) / 1e12:.1f}",
                f"{attention / 1e12:.1f}",
                f"{weight_bytes / 1e9:.1f}",
                f"{1e3 * reading:.1f}",
                f"{1e3 * computing:.1f}",
                f"{STEPS * max(computing, reading):.2f}",
            ]
        )
    print(f"{SIDE} x {SIDE}: {picture} tokens of picture and {TEXT_TOKENS} of text; attention in bf16 in both.")
    times = ["reading the weights (ms)", "computing (ms)", f"{STEPS} steps at the least (s)"]
    table(["precision", "linear layers (TFLOP)", "attention (TFLOP)", "weights (GB)", *times], rows)


def tokens_of(name: str, picture: int) -> int:
    """How many rows a linear layer sees in one step."""
    if name.startswith("single_transformer_blocks") and "norm" not in name:
        return picture + TEXT_TOKENS
    if "norm" in name or name.startswith("time_text_embed"):
        return 1  # modulations and embedders see the picture as a whole
    text = name == "context_embedder" or "context" in name or ".add_" in name or "to_add_out" in name
    return TEXT_TOKENS if text else picture


if __name__ == "__main__":
    main()
