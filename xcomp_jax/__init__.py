"""XComp in JAX: a video language model whose layers compress every frame to one token.

Read `model/lp_comp.py` (the idea), then `model/vlm.py` (the whole model in four functions), then
`training/loop.py`.

Axis letters, used by every docstring and einsum:
  B batch, T frames, C clips, F frames of a clip, P patches of a frame,
  N visual tokens, L sequence (queries), S keys, D width, H heads,
  K kv heads, h head size, V vocabulary.
"""
