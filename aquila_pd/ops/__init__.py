"""Tensor operations beside fusion_ops: attention masks, rotary embedding, fused linears, CPU forms."""
