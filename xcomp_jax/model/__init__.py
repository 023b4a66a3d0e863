"""The model: tower, token merging, LLM, LP-Comp and QC-Comp. Read `lp_comp`, then `vlm`."""
