"""What flash-attn's functions take and give, read in the sources of the packages named below.

Read on 24 November 2026 from the package index: sdists of flash-attn 2.7.0.post2 (the oldest that
setup.cfg allows), 2.8.3 and 2.8.3.post2, whose signatures are the same, and the wheel of
flash-attn-4 4.0.0b36, without its annotations. 2.8.3 also holds an older flash_attn.cute, whose
flash_attn_varlen_func has no max_seqlen_q; it cannot be imported where flash_attn_interface fails,
since flash_attn/__init__.py imports that first, so it never serves.
"""

import inspect

READ = {
    "flash_attn.flash_attn_interface": {
        "package": "flash-attn",
        "versions": ("2.7.0.post2", "2.8.3", "2.8.3.post2"),
        "returns": "out",  # alone unless return_attn_probs
        "flash_attn_func": """
            q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
            softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False
        """,
        "flash_attn_varlen_func": """
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
            softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
            deterministic=False, return_attn_probs=False, block_table=None
        """,
    },
    "flash_attn.cute": {
        "package": "flash-attn-4",
        "versions": ("4.0.0b36",),
        "returns": "out, lse",  # a pair always; return_lse only says whether lse has a gradient
        "flash_attn_func": """
            q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
            window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
            pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
            aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
            block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False,
            gather_bwd_token_chunk=None
        """,
        "flash_attn_varlen_func": """
            q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
            max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None,
            gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
            window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
            pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
            block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
            scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
            gather_bwd_recompute_p=False, gather_bwd_token_chunk=None
        """,
    },
}
FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")


def signature(module: str, function: str) -> inspect.Signature:
    """Of a function as it was read: names, order and defaults."""
    parameters = " ".join(READ[module][function].split())
    return inspect.signature(eval(f"lambda {parameters}: None"))  # plain literals, from above


def without_annotations(function) -> inspect.Signature:
    """Of a function as it is."""
    found = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return inspect.Signature(bare)
