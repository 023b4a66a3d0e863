"""From annotations and videos to rows of samples: decoding, stores, prompts, packing."""
