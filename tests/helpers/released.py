"""The 2B model's sizes, as released."""

from xcomp_jax.config import LLMConfig, LPCompConfig, VisionConfig, VLMConfig

TWO_B = VLMConfig(
  vision=VisionConfig(
    image_size=448, patch_size=16, width=1024, layers=23, heads=16, mlp_width=4096, table="umt-hd"
  ),
  llm=LLMConfig(
    vocab_size=151936,
    width=1536,
    layers=28,
    heads=12,
    kv_heads=2,
    head_dim=128,
    mlp_width=8960,
    rope_theta=1e6,
    rope_scaling=None,
    norm_eps=1e-6,
    tied=True,
    context=None,
  ),
  lp_comp=LPCompConfig("cosine", "suffix", 16),
  clip_frames=8,
  tokens_per_frame=16,
  dtype="bfloat16",
  clips_per_chunk=4,
  attention="auto",
  remat=True,
)
