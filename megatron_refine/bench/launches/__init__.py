"""What the steps of a GPU launch, compute and move, counted on any machine: no GPU, and nothing is computed.

The program itself takes a GPU's way, at full size, on fake tensors: shapes without values. A dispatch mode sees every
operator of torch, forward and backward. What torch does not see into is counted as it is declared.

counter.py   the modes, and what one operator launches and moves;  opaque.py  torch.compile, FlexAttention, the kernels
             of flash-linear-attention (delta.py)
steps.py     NTP, fused and two-pass steps of two and of one layer, whose difference is a layer's; what follows them,
             once an optimizer step, of the whole model
roofline.py  the time at stated peaks, and the tables
"""
