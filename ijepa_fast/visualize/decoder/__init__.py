"""What the predictor believes is behind a block: a small diffusion decoder, and its proof."""

__all__: list[str] = []
