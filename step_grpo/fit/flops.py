"""FLOPs by counting products; the compiler's own count takes the body of a loop once."""

from collections.abc import Iterable

from step_grpo.model.qwen import QwenConfig


def forward_flops(cfg: QwenConfig, lengths: Iterable[int], logits: int) -> float:
    """Of whole sequences through all layers: two for every number of a weight that a token meets.

    Args:
        cfg: architecture.
        lengths: tokens of each sequence; of its attention the pairs count that a query sees.
        logits: tokens whose logits are computed.
    """
    lengths = list(lengths)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    a_pair = 4 * cfg.layers * cfg.heads * cfg.head_dim  # its score and its share of the output
    return float(sum(lengths) * token_flops(cfg) + pairs * a_pair + logits * logit_flops(cfg))


def token_flops(cfg: QwenConfig) -> int:
    """Of one token in the products with the weights of the layers."""
    heads = cfg.width * cfg.head_dim * (2 * cfg.heads + 2 * cfg.kv_heads)
    return 2 * cfg.layers * (heads + 3 * cfg.width * cfg.ffn)


def logit_flops(cfg: QwenConfig) -> int:
    """Of one token's logits."""
    return 2 * cfg.width * cfg.vocab_size
